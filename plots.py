"""Every figure: of one run, of several, and what a lecture needs of a trained model.

    python plots.py runs/pac-tiny-0 --task Hopper-v5              into runs/pac-tiny-0/figures/
    python plots.py runs/pac-tiny-0 --task Hopper-v5 --format pdf --step 100

    q            Q over one and over two dimensions of the action, the policy, the data's action
    weights      pi_imp's weights of the policy's draws, for eta from 0.1 to 10
    target       a Bellman target, projected on the atoms
    value        value along an episode, and the return that followed
    attention    the latents' attention over the observation's tokens and the words
    histograms   the episodes' returns, and Q's spread over a state's actions, task by task
    frames       an episode's beginning, played by the policy's mean

Readable in grey and at a column's width: methods differ in their markers, and the one that matters
is the darkest.
"""

import argparse
import json
import signal
import sys
from pathlib import Path


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="a folder that train.py made")
    add("--task", help="of the run's tasks (default: the first)")
    add("--episode", type=int, help="of the data (default: that of the median return)")
    add("--step", type=int, help="of the episode, for single states (default: its middle)")
    add("--data", metavar="DIR", help="a data set (default: the run's first with the task)")
    add("--out", type=Path, metavar="DIR", help="where to (default: RUN/figures/TASK)")
    add("--format", choices=("png", "pdf"), default="png", help="(default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports below, which take seconds: errors are answered at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback

import matplotlib
import numpy as np
import torch

import data
import envs
import prepare
from checkpoint import RunError, load_run
from kernels.categorical_projection import project
from learner import improvement_weights, value_range
from model import bin_centre

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKERS = "osD^vP>X"
PANELS = {  # of a run's curve: the axis' label, and the metrics shown
    "loss": ["policy/clone_loss", "policy/improve_loss", "critic/loss"],
    "value, scaled to [0, 1]": ["critic/value", "critic/observed", "critic/error"],
    "entropy (nats a dimension), ESS": ["policy/entropy", "policy/ess"],
}
SCORE = "normalised score (0: uniform random policy, 1: expert)"
NAMED = 20  # tasks in a legend; more would leave no room for the panels


def save(figure, path):
    figure.savefig(path, dpi=130)
    plt.close(figure)


def shade(number, count):
    """A grey-safe colour: the last of `count` is the darkest."""
    return plt.cm.viridis(0.85 * (1 - (number + 1) / count))


# ---------------------------------------------------------------- one run

def curve(run):
    """run/curve.png: the main metrics and the scores against updates, from metrics.jsonl.

    A dotted line marks the end of the warm-up; the scores of the evaluation at the end are marked
    too.
    """
    run = Path(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for (label, names), ax in zip(PANELS.items(), axes.flat):
        for name in names:
            draw_metric(ax, lines, name, name)
        ax.set_ylabel(label)
    draw_scores(axes[1, 1], lines, run / "eval.json", config["train"]["steps"])
    for ax in axes.flat:
        if config["settings"]["beta"]:
            warm_until = config["settings"]["warmup"] * config["train"]["steps"]
            ax.axvline(warm_until, color="grey", linestyle=":")
        ax.set_xlabel("update")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{run}; dotted: the warm-up ends", parse_math=False)
    save(figure, run / "curve.png")


def draw_metric(ax, lines, name, label, **style):
    points = [(line["update"], line[name]) for line in lines if name in line]
    if points:
        numbers = [value for _, value in points if value is not None]
        marker = "o" if len(numbers) == 1 else None  # a line of one point is not to be seen
        ax.plot(*zip(*points), label=label, **{"linewidth": 1, "marker": marker, **style})


def draw_scores(ax, lines, evaluation, steps):
    """The scores along the way, and at the end those of eval.json, if it is there; the returns if
    no task has a score."""
    logged, what = {name for line in lines for name in line}, "score"
    final = json.loads(evaluation.read_text()) if evaluation.exists() else {"tasks": {}}
    logged |= {f"eval/{task}/{kind}" for task, row in final["tasks"].items()
               for kind in ("score", "return") if row[kind] is not None}
    if not any(name.endswith("/score") for name in logged):
        what = "return"
    names = {name for name in logged if name.endswith(f"/{what}")}
    steps = int(final.get("checkpoint", steps))  # that it is of
    for number, name in enumerate(sorted(names)):
        task = name.removeprefix("eval/").removesuffix(f"/{what}")
        named = task if len(names) <= NAMED else None
        marker, color = MARKERS[number % len(MARKERS)], plt.cm.tab10(number % 10)
        style = dict(marker=marker, markersize=4, color=color)
        draw_metric(ax, lines, name, named, **style)
        if task in final["tasks"]:
            label = None if any(name in line for line in lines) else named
            ax.plot(steps, final["tasks"][task][what], label=label, **style | {"markersize": 7})
    draw_metric(ax, lines, "eval/iqm", "IQM", color="black", linewidth=2.5, marker=".")
    if final.get("iqm") is not None:
        ax.plot(steps, final["iqm"], color="black", marker="*", markersize=12)
    ax.set_ylabel("normalised score" if what == "score" else what)


# ---------------------------------------------------------------- several methods

def rows(ax, names, methods, label=SCORE):
    """Names downwards, a marker and an interval for each method; the last method's is the boldest.

    names: the rows, the last one (IQM) at the bottom; methods: name -> a list of (centre, low,
    high), one a row, None where there is no number.
    """
    for number, (method, points) in enumerate(methods.items()):
        offset = 0.8 * (0.5 - (number + 0.5) / len(methods))
        places = [len(names) - 1 - k + offset for k, point in enumerate(points) if point]
        centre, low, high = np.array([point for point in points if point]).T
        ax.errorbar(centre, places, xerr=arms(centre, low, high), label=method,
                    **style(number, len(methods)))
    for x in (0, 1) if label == SCORE else ():
        ax.axvline(x, color="grey", linewidth=0.8, linestyle=":")
    for place in range(len(names) - 1):
        ax.axhline(place + 0.5, color="black" if place == 0 else "0.85", linewidth=0.5)
    ax.set_yticks(range(len(names)), reversed(names))
    ax.set_ylim(-0.5, len(names) - 0.5)
    ax.set_xlabel(label)


def arms(centre, low, high):
    """An error bar's arms, downwards and upwards. A mean of equal numbers may lie beside them, by
    rounding, and no arm may be negative."""
    return np.maximum([centre - low, high - centre], 0)


def style(number, count):
    """How one of several methods is drawn."""
    return dict(fmt=MARKERS[number % len(MARKERS)], color=shade(number, count), capsize=2,
                markersize=5, linewidth=2.2 if number == count - 1 else 1.2)


def legend_below(figure, axes):
    """The legend of the panel that has the most lines."""
    ax = max(axes, key=lambda ax: len(ax.get_legend_handles_labels()[0]))
    handles, labels = ax.get_legend_handles_labels()
    columns = min(4, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def compare(methods, names, path, title="", label=SCORE):
    """One figure of several methods, a row a task, the IQM last."""
    size = (6, (0.2 + 0.07 * len(methods)) * len(names) + 1.8)
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    rows(ax, names, methods, label)
    figure.suptitle(title, fontsize=10)
    legend_below(figure, [ax])
    save(figure, path)


def ladder(panels, rungs, path, title):
    """What each rung adds: a panel a data set, a row a method, its IQM written beside it.

    panels: name -> {method: (centre, low, high)}; rungs: all methods, from the top downwards
    """
    size = (max(8, 1.7 * len(panels)), 0.3 * len(rungs) + 1.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False,
                                layout="constrained")
    for (name, found), ax in zip(panels.items(), axes[0]):
        for place, rung in enumerate(reversed(rungs)):
            if rung in found:
                centre, low, high = np.array([found[rung]]).T
                number = len(rungs) - 1 - place
                ax.errorbar(centre, place, xerr=arms(centre, low, high),
                            **style(number, len(rungs)))
                ax.annotate(f"{centre[0]:.2f}", (centre[0], place), (0, 5), fontsize=7, ha="center",
                            textcoords="offset points")
        ax.set_yticks(range(len(rungs)), reversed(rungs))
        ax.set_ylim(-0.6, len(rungs) - 0.3)
        ax.set_xlim(0, 1.1)
        ax.grid(axis="x", color="0.85", linewidth=0.5)
        ax.set_xlabel(name)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def against(panels, x_names, path, x_label, y_label):
    """Lines over a few named conditions, one panel beside the other.

    panels: title -> {method: {x: (centre, low, high)}}
    """
    width = 6 if len(panels) == 1 else 2.6 * len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4), sharey=True, squeeze=False,
                                layout="constrained")
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    for (title, methods), ax in zip(panels.items(), axes[0]):
        for method, points in methods.items():
            number = names.index(method)
            apart = 0.05 * (number - (len(names) - 1) / 2)
            places = np.array([x_names.index(x) for x in points]) + apart
            centre, low, high = np.array(list(points.values())).T
            ax.errorbar(places, centre, yerr=arms(centre, low, high), label=method,
                        linestyle="-", **style(number, len(names)))
        for y in (0, 1):
            ax.axhline(y, color="grey", linewidth=0.8, linestyle=":")
        ax.set_xticks(range(len(x_names)), x_names)
        ax.set_xlabel(x_label)
        ax.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel(y_label)
    legend_below(figure, axes[0])
    save(figure, path)


# ---------------------------------------------------------------- a lecture's figures

# What data has to share with that of the training, to be what the model can look at.
AS_TRAINED = ("obs_dim", "action_dim", "action_low", "action_high", "discount")


def first_of(names, folders):
    """Each task, of the first of the data sets that has it."""
    tasks = []
    for name in names:
        found = [folder for folder in folders if Path(folder, name, "meta.json").exists()]
        tasks += prepare.open_tasks((found or folders)[0], [name])
    return tasks


class Scene:
    """A trained model, and the data's episode and step at which it is looked at.

    T steps: obs (T+1, O) and action (T, A), padded and in [-1, 1], as the model takes them; reward
    (T,). Values are given in units of the return.
    """

    def __init__(self, run, task=None, folder=None, episode=None, step=None):
        self.model, self.config = load_run(run)
        if self.model.pixels is not None:
            raise RunError(f"{run} learnt from pictures, and these figures are of models that read "
                           "numbers alone; eval.py --video films it")
        names = [meta["name"] for meta in self.config["tasks"]]
        self.name = task or names[0]
        if self.name not in names:
            raise RunError(f"{run}: no task {self.name!r}; it was trained on: {', '.join(names)}")
        self.index = names.index(self.name)
        self.meta = self.config["tasks"][self.index]
        if folder:
            prepare.open_tasks(folder, [self.name])
        folders = [folder] if folder else []  # that may lack others of the run's tasks
        self.tasks = first_of(names, folders + self.config["train"]["data"])
        for opened, meta in zip(self.tasks, self.config["tasks"]):
            prepare.must_agree(opened, meta, f"in {run}", AS_TRAINED)
        self.low, self.range = value_range(self.config["tasks"])
        self.load_episode(self.tasks[self.index], episode)
        self.step = len(self.reward) // 2 if step is None else step
        if not 0 <= self.step < len(self.reward):
            raise RunError(f"--step {step}: the episode has {len(self.reward)} steps")

    def load_episode(self, task, number):
        by_return = np.argsort(task.episodes["return"])
        self.number = int(by_return[len(by_return) // 2]) if number is None else number
        if not 0 <= self.number < len(by_return):
            raise RunError(f"--episode {number}: the data has {len(by_return)} of {self.name}")
        sampler, (start, length, *_) = data.Sampler(self.tasks, 1), task.episodes[self.number]
        index = np.arange(start, start + length + 1)[None]
        rows = np.zeros((*index.shape, sampler.width), np.float32)
        sampler.gather(sampler.sources[self.index], index, rows)
        episode = data.Batch(torch.from_numpy(rows), sampler.obs_dim, self.of_task(1))
        self.obs = torch.cat([episode.obs[0], episode.next_obs[0, -1:]])
        self.action, self.reward = episode.action[0], episode.reward[0]
        self.returns, self.terminated = episode.return_to_go[0], episode.terminated[0, -1].item()

    def of_task(self, count):
        return torch.full((count,), self.index)

    def as_return(self, value):
        """Values on [0, 1] as returns."""
        return (self.low[self.index] + self.range[self.index] * value).numpy()

    def latents(self, steps):
        obs = self.obs[steps]
        return self.model.encode(obs, self.of_task(len(obs)))

    def at_state(self, step=None):
        """The latents (1, L, W) and the policy at a step."""
        step = self.step if step is None else step
        latents = self.latents(slice(step, step + 1))
        return latents, self.model.policy(latents, self.of_task(1))

    def value_probs(self, latents, action):
        """latents (B, L, W), action (B, N, A) -> probabilities (B, N, M) of the value atoms"""
        logits = self.model.q(latents, action, self.of_task(len(latents)))
        return torch.softmax(logits, dim=-1)

    def q(self, latents, action):
        return self.model.mean_value(self.value_probs(latents, action))

    def draws(self, policy, count):
        """Draws of a Policy of B states: (B, count, A)"""
        generator = torch.Generator().manual_seed(0)
        B, A = policy.mask.shape
        return policy.sample(torch.rand(B, count, 1 + A, generator=generator))

    @property
    def title(self):
        return f"{self.name}, episode {self.number} of the data, step {self.step}"


def q_figure(scene):
    """Q over one and over two dimensions of the action, the others being the data's."""
    latents, policy = scene.at_state()
    dims = min(2, scene.meta["action_dim"])
    panels = dims + (dims == 2)
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.6), layout="constrained",
                                squeeze=False)
    for dim in range(dims):
        draw_q_line(axes[0, dim], scene, latents, policy, dim)
    if dims == 2:
        draw_q_map(figure, axes[0, 2], scene, latents, policy)
    return figure


def draw_q_line(ax, scene, latents, policy, dim):
    K = policy.log_bins.shape[-1]
    centres = bin_centre(torch.arange(K), K)
    action = scene.action[scene.step].repeat(1, K, 1)  # (1, K, A)
    action[0, :, dim] = centres
    q = scene.as_return(scene.q(latents, action)[0])
    shares = (policy.log_components[0, :, None] + policy.log_bins[0, :, dim]).exp().sum(0)  # (K,)
    behind = ax.twinx()
    bars = behind.bar(centres.numpy(), shares.numpy(), width=2 / K, color="0.8")
    behind.set(ylim=(0, 3 * shares.max()), yticks=[])
    ax.set_zorder(1)  # the line before the bars
    ax.patch.set_visible(False)
    line, = ax.plot(centres, q, color="black")
    here = ax.axvline(scene.action[scene.step, dim].item(), color="black", linestyle="--")
    ax.margins(y=0.4)
    ax.set(xlabel=f"action {dim}", ylabel="Q, as a return")
    ax.legend([line, here, bars], ["Q", "data's action", "policy's bins"], fontsize=8,
              loc="upper left")


def draw_q_map(figure, ax, scene, latents, policy):
    ticks = torch.linspace(-1, 1, 41)
    action = scene.action[scene.step].repeat(1, len(ticks) ** 2, 1)
    action[0, :, :2] = torch.cartesian_prod(ticks, ticks)
    q = scene.as_return(scene.q(latents, action)[0]).reshape(len(ticks), -1)
    ticks = ticks.numpy()
    colours = ax.pcolormesh(ticks, ticks, q.T, cmap="Greys_r", shading="nearest")
    figure.colorbar(colours, ax=ax, label="Q, as a return")
    drawn = scene.draws(policy, 150)[0].numpy()
    ax.plot(drawn[:, 0], drawn[:, 1], "o", markersize=4, color="white", markeredgecolor="black",
            markeredgewidth=0.5, label="policy's draws")
    here = scene.action[scene.step].numpy()
    ax.plot(here[0], here[1], "*", markersize=16, color="black", markeredgecolor="white",
            label="data's action")
    ax.set(xlabel="action 0", ylabel="action 1")
    ax.legend(fontsize=8, loc="upper left")


def weights_figure(scene):
    """pi_imp's weights of 64 draws of the policy, the best by Q first."""
    latents, policy = scene.at_state()
    q = scene.q(latents, scene.draws(policy, 64))  # (1, N)
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    etas = (0.1, 0.3, 1, 3, 10)
    for number, eta in enumerate(etas):
        w = improvement_weights(q, scene.model.q_spread[scene.index][None], eta)[0]
        ess = 1 / w.square().sum().item()
        best_first = w.sort(descending=True).values
        ax.plot(range(1, 65), best_first.clamp(min=1e-6), color=shade(len(etas) - 1 - number, 5),
                marker=MARKERS[number], markevery=6, markersize=4,
                label=f"eta {eta:g}: as many as {ess:.1f} draws")
    ax.axhline(1 / 64, color="grey", linestyle=":", linewidth=0.8)
    ax.set(yscale="log", ylim=(1e-5, 1.5), xlabel="draw of the policy, the best by Q first",
           ylabel="weight in pi_imp")
    ax.legend(fontsize=8)
    return figure


def target_figure(scene):
    """One step's Bellman target beside what the critic says."""
    t, i = scene.step, scene.index
    over = scene.terminated and t == len(scene.reward) - 1
    discount = torch.tensor([0.0 if over else scene.meta["discount"]])
    _, policy = after = scene.at_state(t + 1)
    next_probs = scene.value_probs(after[0], scene.draws(policy, 64)).mean(1)  # (1, M)
    shift = (scene.reward[t] - (1 - discount) * scene.low[i]) / scene.range[i]
    target = project(next_probs, shift, discount)[0]
    now = scene.value_probs(scene.at_state()[0], scene.action[t].view(1, 1, -1))[0, 0]
    atoms = scene.as_return(scene.model.value_atoms)
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.bar(atoms, target.numpy(), width=atoms[1] - atoms[0], color="0.8",
           label=f"target: {scene.reward[t]:.2f} + {discount.item():g} x the next value, projected")
    ax.plot(atoms, next_probs[0], color="0.4", linestyle="--", label="the next value, 64 draws")
    ax.plot(atoms, now, color="black", label="what the critic says of the data's action")
    seen = atoms[(target + next_probs[0] + now).numpy() > 1e-3]
    ax.set(xlim=(seen.min(), seen.max()), xlabel="value, as a return", ylabel="probability")
    ax.set_ylim(0, 1.4 * ax.get_ylim()[1])  # the legend's place
    ax.legend(fontsize=8, loc="upper left")
    return figure


def value_figure(scene):
    """Along the episode: what the critic expects, and the return that followed."""
    T = len(scene.reward)
    latents = scene.latents(slice(T))
    figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    ax.plot(scene.returns, color="black", linewidth=2, label="return that followed")
    if scene.config["settings"]["critic"] == "v":
        value = scene.model.expectation(scene.model.v(latents))
        ax.plot(scene.as_return(value), color="0.3", linestyle="--", label="V of the state")
    else:
        own = scene.q(latents, scene.action[:, None])[:, 0]
        policy = scene.model.policy(latents, scene.of_task(T))
        drawn = scene.q(latents, scene.draws(policy, 16)).mean(1)
        ax.plot(scene.as_return(own), color="0.3", linestyle="--", label="Q of the data's action")
        ax.plot(scene.as_return(drawn), color="0.6", label="Q of the policy's draws, mean")
    ax.axvline(scene.step, color="grey", linestyle=":", linewidth=0.8)
    ax.set(xlabel="step", ylabel="discounted return")
    ax.legend(fontsize=8)
    return figure


def attention_figure(scene):
    """The mean over heads, a row a latent."""
    obs = scene.obs[scene.step][None]
    scores = scene.model.attention_scores(obs, scene.of_task(1))
    weights = torch.softmax(scores, dim=-1)[0].mean(0)  # (L, I)
    tokens = [f"obs {number}" for number in range(scene.model.config.obs_tokens)]
    words = scene.meta["instruction"].lower().split()
    weights = weights[:, :len(tokens) + len(words)]  # the rest is padding
    figure, ax = plt.subplots(figsize=(1.5 + 0.5 * weights.shape[1], 2 + 0.3 * len(weights)),
                              layout="constrained")
    shown = ax.imshow(weights.numpy(), cmap="Greys", vmin=0, aspect="auto")
    ax.axvline(len(tokens) - 0.5, color="black", linewidth=0.8)
    ax.set_xticks(range(weights.shape[1]), tokens + words, rotation=60, ha="right", fontsize=8,
                  parse_math=False)
    ax.set_yticks(range(len(weights)))
    ax.set_ylabel("latent")
    figure.colorbar(shown, ax=ax, label="attention")
    return figure


def histograms_figure(scene, has_q):
    """A row a task, the scene's the darkest."""
    count = len(scene.tasks)
    figure, axes = plt.subplots(count, 2 if has_q else 1, figsize=(9, 1.3 * count + 0.8),
                                layout="constrained", squeeze=False)
    spreads = q_spreads(scene) if has_q else None
    for index, task in enumerate(scene.tasks):
        colour = "0.2" if index == scene.index else "0.6"
        ax = axes[index, 0]
        ax.hist(task.episodes["return"], bins=40, color=colour)
        for level, line in (("random", ":"), ("expert", "--")):
            if task.meta["reference"]:
                ax.axvline(task.meta["reference"][level], color="black", linestyle=line)
        ax.set_ylabel(task.name.removesuffix("-v5"), fontsize=8, rotation=0, ha="right")
        ax.set_yticks([])
        if has_q:
            axes[index, 1].hist(spreads[index], bins=np.geomspace(1e-4, 0.3, 40), color=colour)
            axes[index, 1].axvline(scene.model.q_spread[index].item(), color="black")
            axes[index, 1].set(xscale="log", yticks=[])
    axes[-1, 0].set_xlabel("episode's return (dotted: random, dashed: expert)", fontsize=8)
    if has_q:
        axes[-1, 1].set_xlabel("Q's deviation over a state's actions; line: q_spread", fontsize=8)
    return figure


def q_spreads(scene, states=1024, draws=32):
    """Q's standard deviation over draws of the policy at the data's states: an array a task."""
    sampler = data.Sampler(scene.tasks, states)
    batch = sampler.sample(np.random.default_rng(0))
    latents = scene.model.encode(batch.obs[:, 0], batch.task)
    actions = scene.draws(scene.model.policy(latents, batch.task), draws)
    q = scene.model.expectation(scene.model.q(latents, actions, batch.task))  # (B, N)
    return [q.std(1)[batch.task == index].numpy() for index in range(len(scene.tasks))]


def film(scene, longest):
    """The frames of an episode's beginning, which the policy's mean plays."""
    frames, low = [], np.array(scene.meta["action_low"], np.float32)
    half = (np.array(scene.meta["action_high"], np.float32) - low) / 2
    env = envs.make(scene.meta, render=True)
    obs, over = env.reset(seed=0)[0], False
    while not over and len(frames) < longest:
        frames.append(envs.picture(env))
        row = torch.zeros(1, scene.obs.shape[1])
        row[0, :len(obs)] = torch.from_numpy(obs)
        latents = scene.model.encode(row, scene.of_task(1))
        unit = scene.model.policy(latents, scene.of_task(1)).mean()[0, :len(low)].numpy()
        obs, _, terminated, truncated, _ = env.step(low + (unit + 1) * half)
        over = terminated or truncated
    env.close()
    return frames


def frames_figure(scene, count=8, longest=64):
    """A strip of them."""
    try:
        frames = film(scene, longest)
    except Exception as error:  # whatever an environment or its renderer raises
        raise RunError(f"{scene.name} cannot be filmed here ({type(error).__name__}: {error}); "
                       "the other figures are there") from None
    shown = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    figure, axes = plt.subplots(1, len(shown), figsize=(1.6 * len(shown), 2), squeeze=False,
                                layout="constrained")
    for step, ax in zip(shown, axes[0]):
        ax.imshow(frames[step])
        ax.set_title(f"step {step}", fontsize=8)
        ax.axis("off")
    return figure


@torch.no_grad()
def lecture(scene):
    """Yield the names and figures of a scene; what the run has no critic for is left out."""
    settings = scene.config["settings"]
    has_value = settings["beta"] > 0
    has_q = has_value and settings["critic"] != "v"
    if has_q:
        yield "q", q_figure(scene)
        yield "weights", weights_figure(scene)
        yield "target", target_figure(scene)
    if has_value:
        yield "value", value_figure(scene)
    yield "attention", attention_figure(scene)
    yield "histograms", histograms_figure(scene, has_q)
    yield "frames", frames_figure(scene)


def main(args):
    try:
        scene = Scene(args.run, args.task, args.data, args.episode, args.step)
        folder = args.out or Path(args.run, "figures", scene.name)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in lecture(scene):
            path = folder / f"{name}.{args.format}"
            if name not in ("histograms", "frames"):
                figure.suptitle(scene.title, fontsize=10)
            save(figure, path)
            print(f"wrote {path}")
    except (RunError, data.DataError, OSError) as error:
        print(f"plots.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(ARGS)
