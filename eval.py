"""Roll-outs of a trained model: scores with intervals, recorded episodes, video.

    python eval.py runs/pac-small-0 --episodes 20       a table, and eval.json in the run's folder
    python eval.py runs/pac-small-0 runs/bc-small-0     ... and a figure that compares the runs
    python eval.py runs/pac-small-0 --act mean          the policy alone, without its critic
    python eval.py runs/pac-small-0 --video hopper.gif --tasks Hopper-v5
    python eval.py runs/pac-small-0 --record datasets/own     append the episodes to a data set

A score is a return, scaled so that the uniform random policy has 0 and the data's expert 1. An
environment that raises or hangs costs its own episode only. Exit codes: 0; 2, the message says what
is wrong; 3, some episodes failed and are left out of the scores.
"""

import argparse
import sys

ACTS = ("improved", "mean", "mode", "sample", "best")  # see `act`
EPISODES = 20
EPISODES_FAILED = 3  # exit code


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders that train.py made")
    add("--episodes", type=int, default=EPISODES, help="a task (default: %(default)s)")
    add("--tasks", nargs="+", metavar="TASK", help="only these (default: all of the run's)")
    add("--act", choices=ACTS, help="how to act (default: the run's way)")
    add("--eta", type=float, help="of `improved`, in units of Q's spread (default: the run's)")
    add("--seed", type=int, default=1, help="of environments and actions (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--record", metavar="DIR", help="append the episodes to this data set")
    add("--video", metavar="FILE", help="film one episode of each task, to a .gif or .mp4")
    add("--plot", metavar="FILE", help="the comparison's figure (several runs: compare.png)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports below, which take seconds: errors are answered at once

import json
from pathlib import Path

import numpy as np
import torch

import data
import envs
import plots
from checkpoint import RunError, find_checkpoint, load_run
from learner import improvement_weights
from model import in_bf16

SAMPLES, BEST_OF = 64, 16  # actions drawn at a state, for `improved` and for `best`
ENV_SECONDS = 60  # an environment that needs longer for one answer hangs; MuJoCo's need under 0.001


# ---------------------------------------------------------------- acting

@torch.no_grad()
def act(model, obs, task, how, eta=2.0, generator=None):
    """obs (B, O), task (B,) -> actions (B, A) in [-1, 1]

    improved   the mean of pi_imp: the mean of 64 draws from the sharpened policy, weighted by
               exp(Q / eta), eta in units of Q's spread [ours]
    mean, mode of each dimension's bins
    sample     a draw
    best       of 16 draws from the sharpened policy, that of the highest Q
    """
    with in_bf16(model.config, obs.device):
        latents = model.encode(obs, task)
        policy = model.policy(latents, task)
    if how == "mean":
        return policy.mean()
    if how == "mode":
        return policy.mode()
    count = {"sample": 1, "best": BEST_OF, "improved": SAMPLES}[how]
    shape = len(obs), count, 1 + policy.mask.shape[1]
    noise = torch.rand(shape, generator=generator, device=obs.device)
    if how == "sample":
        return policy.sample(noise)[:, 0]
    actions = policy.sharpen().sample(noise)  # (B, N, A)
    with in_bf16(model.config, obs.device):
        logits = model.q(latents, actions, task)
    q = model.expectation(logits)  # (B, N)
    if how == "best":
        return actions[torch.arange(len(q)), q.argmax(1)]
    w = improvement_weights(q, model.q_spread[task], eta)  # (B, N)
    return (w[..., None] * actions).sum(1)


# ---------------------------------------------------------------- roll-outs

class Play:
    """One episode being played; if its environment raises or hangs, `failed` says so."""

    def __init__(self, index, number, meta, keep, render):
        self.index, self.number, self.meta = index, number, meta
        self.keep, self.render = keep, render
        self.low = np.array(meta["action_low"], np.float32)
        self.high = np.array(meta["action_high"], np.float32)
        self.obs, self.action, self.reward, self.frames = [], [], [], []
        self.terminated = self.live = False
        self.env = self.failed = None

    def ask(self, function, *args, **kwargs):
        """What the environment answers; None if it fails."""
        try:
            with envs.time_limit(ENV_SECONDS):
                return function(*args, **kwargs)
        except Exception as error:
            self.failed = (f"{self.meta['name']}, episode {self.number}, step {len(self.reward)}: "
                           f"{type(error).__name__}: {error}")
            self.live = False

    def start(self, seed):
        self.env = self.ask(envs.make, self.meta, self.render)
        answer = self.env and self.ask(self.env.reset, seed=seed)
        if answer:
            self.obs.append(answer[0])
            self.live = True

    def step(self, unit_action):
        """unit_action (A,) in [-1, 1], padded"""
        unit_action = unit_action[:len(self.low)]
        action = self.low + (unit_action + 1) / 2 * (self.high - self.low)
        answer = self.ask(self.env.step, action)
        if answer is None:
            return
        obs, reward, self.terminated, truncated, _ = answer
        self.reward.append(reward)
        if self.keep:
            self.obs.append(obs)
            self.action.append(action)
        else:
            self.obs = [obs]
        if self.render and len(self.reward) % 2:
            self.frames.append(self.env.render())
        if self.terminated or truncated:
            self.live = False
            self.env.close()

    def steps_left(self):
        """How many steps a live episode can still take; 0 for an unknown number."""
        limit = self.env.spec.max_episode_steps if self.env and self.env.spec else None
        return max(0, (limit or 0) - len(self.reward))

    def episode(self):
        """All of it if it was kept, otherwise the rewards alone."""
        obs, action = (np.array(x, np.float32) for x in (self.obs, self.action))
        return data.Episode(obs, action, np.array(self.reward, np.float32), self.terminated)


def rollout(model, metas, episodes, seed=0, how="improved", eta=2.0, keep=False, render=False):
    """Play `episodes` of each task, all in lock-step: one forward pass a step serves every
    environment.

    metas: of the model's tasks, in order; None leaves one out. keep: all of the episodes, not the
    rewards alone. render: film the first one of each task. -> a list of Play, those of a task
    together
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    plays = [Play(index, number, meta, keep, render and number == 0)
             for index, meta in enumerate(metas) if meta for number in range(episodes)]
    # A plain loop is faster here than gymnasium's AsyncVectorEnv: most steps take under 0.1 ms.
    for play in plays:
        play.start(seed * 10_000 + play.number)
    width = model.obs_mean.shape[1]
    live = [play for play in plays if play.live]
    total = sum(play.steps_left() for play in live)
    with data.progress(total=total, desc="evaluate", unit="step", unit_scale=True, leave=False,
                       delay=2) as bar:
        while live:
            obs = torch.zeros(len(live), width)
            for row, play in enumerate(live):
                obs[row, :len(play.obs[-1])] = torch.from_numpy(play.obs[-1])
            task = torch.tensor([play.index for play in live])
            actions = act(model, obs.to(device), task.to(device), how, eta, generator).cpu().numpy()
            for play, action in zip(live, actions):
                play.step(action)
                bar.update(1 if play.live else 1 + play.steps_left())
            live = [play for play in live if play.live]
    return plays


# ---------------------------------------------------------------- statistics

def iqm(scores):
    """The mean of the middle half of all scores (rliable's interquartile mean, Agarwal et al. 2021,
    arXiv 2108.13264). scores: (..., tasks); a quarter of them, rounded down, is cut off at either
    end."""
    flat = np.sort(np.ravel(scores))
    cut = int(0.25 * len(flat))
    return float(flat[cut:len(flat) - cut].mean())


def interval(samples, statistic, resamples=2000, seed=0):
    """95% percentile-bootstrap interval of statistic(list of arrays), each resampled by itself."""
    rng = np.random.default_rng(seed)
    values = [statistic([rng.choice(x, len(x)) for x in samples]) for _ in range(resamples)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def normalise(returns, meta):
    """Returns as scores: 0 the random policy's mean, 1 the expert's; unchanged without them."""
    returns, reference = np.array(returns), meta.get("reference")
    if not reference:
        return returns
    return (returns - reference["random"]) / (reference["expert"] - reference["random"])


def summarise(plays):
    """What eval.json holds: each task's returns and score, the IQM over tasks, and what failed."""
    tasks, all_scores = {}, []
    for meta, played in by_task(plays):
        returns = [float(np.array(play.reward, np.float32).sum()) for play in played]
        scores = normalise(returns, meta)
        all_scores.append(scores)
        tasks[meta["name"]] = {
            "return": float(np.mean(returns)), "return_std": float(np.std(returns)),
            "score": float(scores.mean()), "interval": interval([scores], lambda x: x[0].mean()),
            "length": float(np.mean([len(play.reward) for play in played])), "returns": returns}

    def iqm_of_tasks(samples):
        return iqm([x.mean() for x in samples])

    value, bounds = np.nan, [np.nan, np.nan]
    if all_scores:  # otherwise every episode failed
        value, bounds = iqm_of_tasks(all_scores), interval(all_scores, iqm_of_tasks)
    failed = [play.failed for play in plays if play.failed]
    return {"tasks": tasks, "failed": failed, "iqm": value, "interval": bounds}


def by_task(plays):
    """(meta, its plays that did not fail) for each task that has any"""
    groups = {}
    for play in plays:
        if not play.failed:
            groups.setdefault(play.index, (play.meta, []))[1].append(play)
    return list(groups.values())


def table(summary):
    """The readable form of a summary: one line a task, and the IQM."""
    lines = [f"{'task':<28}{'return':>18}{'length':>8}{'score':>8}   95% interval"]
    for name, row in summary["tasks"].items():
        low, high = row["interval"]
        lines.append(f"{name:<28}{row['return']:>9.1f} ± {row['return_std']:<6.1f}"
                     f"{row['length']:>8.0f}{row['score']:>8.3f}   [{low:.3f}, {high:.3f}]")
    low, high = summary["interval"]
    lines.append(f"{'IQM over tasks':<54}{summary['iqm']:>8.3f}   [{low:.3f}, {high:.3f}]")
    lines += [f"failed, and left out: {line}" for line in summary["failed"]]
    return "\n".join(lines)


def evaluate(model, metas, episodes, seed=0, how="improved", eta=2.0):
    """Roll out and summarise; `metas` as for `rollout`."""
    return summarise(rollout(model, metas, episodes, seed, how, eta))


# ---------------------------------------------------------------- the command

def compare(summaries, path):
    """The figure of several evaluations. summaries: by the runs' names"""
    names = list(next(iter(summaries.values()))["tasks"])
    methods = {}
    for run, summary in summaries.items():
        rows = [summary["tasks"].get(name) for name in names]
        points = [row and (row["score"], *row["interval"]) for row in rows]
        methods[run] = [*points, (summary["iqm"], *summary["interval"])]
    plots.compare(methods, [*names, "IQM over tasks"], path, "scores with 95% intervals")
    print(f"wrote {path}")


def evaluation_path(run, args, summary):
    """eval.json for a full evaluation; a look at less, or another way to act, has its own name."""
    looks = [args.act, args.eta and f"eta{args.eta:g}", args.video and "video", *(args.tasks or ())]
    looks = [look for look in looks if look]
    path = Path(run, "eval.json")
    if not looks and path.exists() and episodes_of(path) > summary["episodes"]:
        looks = [f"{summary['episodes']}-episodes"]
    return Path(run, "-".join(["eval", *looks]) + ".json")


def episodes_of(path):
    """How many episodes a task an evaluation has; 0 if the file is damaged."""
    try:
        return json.loads(path.read_text())["episodes"]
    except (ValueError, KeyError):
        return 0


def write_summary(path, summary):
    data.write_file(path, json.dumps(summary, indent=2) + "\n")


def evaluate_run(run, args):
    """Score one run as the flags say; print it, then write what was asked for -> the summary"""
    model, config = load_run(run, args.device)
    torch.set_num_threads(config["train"]["threads"] or torch.get_num_threads())
    settings, names = config["settings"], [meta["name"] for meta in config["tasks"]]
    for name in args.tasks or ():
        if name not in names:
            raise RunError(f"{run}: no task {name!r}; it was trained on: {', '.join(names)}")
    metas = [meta if meta["name"] in (args.tasks or names) else None for meta in config["tasks"]]
    how, eta = args.act or settings["act"], args.eta or settings["eta"]
    has_q = settings["beta"] > 0 and settings["critic"] != "v"
    if how in ("improved", "best") and not has_q:
        raise RunError(f"{run}: --act {how} needs a Q decoder, and {config['algo']} trains none")
    plays = rollout(model, metas, args.episodes, args.seed, how, eta, keep=bool(args.record),
                    render=bool(args.video))
    about = {"run": str(run), "act": how, "eta": eta, "seed": args.seed, "episodes": args.episodes,
             "checkpoint": find_checkpoint(run).name}
    summary = {**about, **summarise(plays)}
    print(f"{run}: {how}, {args.episodes} episodes a task\n{table(summary)}")
    path = evaluation_path(run, args, summary)
    write_summary(path, summary)
    print(f"wrote {path}")
    if args.video:
        envs.write_video(args.video, [frame for play in plays for frame in play.frames])
        print(f"wrote {args.video}")
    if args.record:
        record(plays, args.record)
    return summary


def record(plays, folder):
    """Append the episodes to a data set, task by task."""
    for meta, played in by_task(plays):
        path, start = Path(folder, meta["name"]), None
        if not (path / "meta.json").exists():
            start = envs.describe(meta["env_id"], meta["instruction"], meta["discount"],
                                  meta["reference"])
        data.append(path, [play.episode() for play in played], start)
        print(f"wrote {len(played)} episodes to {path}")


def main(args):
    summaries = {}
    try:
        for run in args.runs:
            summaries[Path(run).name] = evaluate_run(run, args)
        if len(summaries) > 1 or args.plot:
            compare(summaries, args.plot or "compare.png")
    except (RunError, data.DataError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    if any(summary["failed"] for summary in summaries.values()):
        sys.exit(EPISODES_FAILED)


if __name__ == "__main__":
    main(ARGS)
