"""Roll-outs of a trained model: scores with intervals, recorded episodes, video.

    python eval.py runs/pac-small-0 --episodes 20              a table, and eval.json beside the run
    python eval.py runs/pac-small-0 runs/bc-small-0            ... and a figure that compares the runs
    python eval.py runs/pac-small-0 --act mean                 the policy alone, without its critic
    python eval.py runs/pac-small-0 --video hopper.gif --tasks Hopper-v5
    python eval.py runs/pac-small-0 --record datasets/own      append the episodes to a data set

A score is a return, scaled so that the uniform random policy has 0 and the data's expert 1.

An environment that raises or hangs costs its own episode only. Exit codes: 0; 2, the message says what is
wrong; 3, some episodes failed and are left out of the scores.
"""

import argparse
import json
import os
import signal
import sys
import threading
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

import data
from learner import improvement_weights
from model import ModelConfig, Perceiver, mean_action, sample_actions, sharpen

ACTS = ("improved", "mean", "mode", "sample", "best")
SAMPLES, BEST_OF = 64, 16  # actions drawn at a state, for `improved` and for `best`
ENV_SECONDS = 60  # an environment that needs longer for one answer hangs; MuJoCo's need under 0.001
EPISODES_FAILED = 3  # exit code
CHECKPOINT_FORMAT = 2
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint may be read by one process


class RunError(Exception):
    """Something is wrong with a run's folder; the message says what, and what to do."""


# ---------------------------------------------------------------- acting

@torch.no_grad()
def act(model, obs, task, how, eta=2.0, generator=None):
    """obs (B, O), task (B,) -> actions (B, A) in [-1, 1]

    improved   the mean of pi_imp: the mean of 64 draws from the sharpened policy, weighted by exp(Q / eta),
               eta in units of Q's spread over the draws [ours]
    mean, mode of each dimension's bins; sample: a draw; best: of 16 draws from the sharpened policy, that of the highest Q
    """
    latents = model.encode(obs, task)
    policy = model.policy(latents, task)
    if how == "mean":
        return mean_action(policy)
    if how == "mode":
        components, bins = policy
        likeliest = bins[torch.arange(len(obs)), components.argmax(1)]  # (B, A, K)
        return (2 * likeliest.argmax(-1) + 1) / likeliest.shape[-1] - 1
    count = {"sample": 1, "best": BEST_OF}.get(how, SAMPLES)
    noise = torch.rand(len(obs), count, 1 + policy[1].shape[2], generator=generator, device=obs.device)
    if how == "sample":
        return sample_actions(policy, noise)[:, 0]
    actions = sample_actions(sharpen(policy), noise)  # (B, N, A)
    q = model.expectation(model.q(latents, actions, task))  # (B, N)
    if how == "best":
        return actions[torch.arange(len(q)), q.argmax(1)]
    return (improvement_weights(q, model.q_spread[task], eta)[..., None] * actions).sum(1)


def has_q(settings):
    return settings["beta"] > 0 and settings["critic"] == "q"


def default_act(settings):
    """`improved` for what improves on a policy by Q, `mean` for the rest: BC+Q has a Q too, but clones."""
    return "improved" if has_q(settings) and settings["alpha"] < 1 else "mean"


def make_env(meta, render=False):
    env = gymnasium.make(meta["env_id"], disable_env_checker=True,
                         **(dict(render_mode="rgb_array", width=256, height=256) if render else {}))
    if render:  # default quality renders 8 frames a second without a GPU; without these, over 145 (64 x 64, 2026-11-22)
        env.unwrapped.model.vis.quality.offsamples = 0
        env.unwrapped.model.vis.quality.shadowsize = 0
    return env


@contextmanager
def time_limit(seconds):
    """TimeoutError if the block takes longer. Only Unix has such a timer, and only for the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_):
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rollout(model, tasks, episodes, seed=0, how="improved", eta=2.0, keep=False, render=False):
    """Play `episodes` of each task, all in lock-step: one forward pass a step serves every environment.

    tasks: metas, in the model's order; None leaves one out. Returns, for each task, a list of
    data.Episode (all of it with `keep`, otherwise the rewards alone), the frames of the first ones,
    and a line for each episode whose environment raised or hung, which is left out.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    places = [(index, number) for index, meta in enumerate(tasks) if meta for number in range(episodes)]
    envs, live, history, failed = {}, {}, {}, {}  # by place; live: the observation

    def ask(i, function, *args, **kwargs):
        """What an environment answers; None if it raises or hangs, and then its episode has failed."""
        try:
            with time_limit(ENV_SECONDS):
                return function(*args, **kwargs)
        except Exception as error:
            failed[i] = (f"{tasks[places[i][0]]['name']}, episode {places[i][1]}, step "
                         f"{len(history[i]['reward']) if i in history else 0}: {type(error).__name__}: {error}")

    # A plain loop over environments is faster here than gymnasium's AsyncVectorEnv: most steps take under 0.1 ms.
    for i, (index, number) in enumerate(places):
        envs[i] = ask(i, make_env, tasks[index], render and number == 0)
        start = envs[i] and ask(i, envs[i].reset, seed=seed * 10_000 + number)
        if start:
            live[i] = start[0]
            history[i] = dict(obs=[start[0]], action=[], reward=[], terminated=False, frames=[])
    width = max(spec.obs_dim for spec in model.config.tasks)
    while live:
        obs = torch.zeros(len(live), width)
        for row, (i, observation) in enumerate(live.items()):
            obs[row, :len(observation)] = torch.from_numpy(observation)
        task = torch.tensor([places[i][0] for i in live])
        actions = act(model, obs.to(device), task.to(device), how, eta, generator).cpu().numpy()
        for row, i in enumerate(list(live)):
            meta = tasks[places[i][0]]
            low, high = np.array(meta["action_low"], np.float32), np.array(meta["action_high"], np.float32)
            action = low + (actions[row, :len(low)] + 1) / 2 * (high - low)
            answer = ask(i, envs[i].step, action)
            if answer is None:
                del live[i]
                continue
            observation, reward, terminated, truncated, _ = answer
            live[i], past = observation, history[i]
            past["reward"].append(reward)
            if keep:
                past["obs"].append(observation), past["action"].append(action)
            if envs[i].render_mode and len(past["reward"]) % 2:
                past["frames"].append(envs[i].render())
            if terminated or truncated:
                past["terminated"] = terminated
                envs[i].close()
                del live[i]
    results = [[] for _ in tasks]
    for i, past in history.items():
        if i not in failed:
            results[places[i][0]].append(data.Episode(
                np.array(past["obs"], np.float32), np.array(past["action"], np.float32),
                np.array(past["reward"], np.float32), past["terminated"]))
    return results, [past["frames"] for past in history.values() if past["frames"]], list(failed.values())


# ---------------------------------------------------------------- statistics

def iqm(scores):
    """The mean of the middle half of all scores (rliable's interquartile mean, Agarwal et al. 2021, arXiv 2108.13264).

    scores: (..., tasks); a quarter of them, rounded down, is cut off at either end.
    """
    flat = np.sort(np.ravel(scores))
    cut = int(0.25 * len(flat))
    return float(flat[cut:len(flat) - cut].mean())


def interval(samples, statistic, resamples=2000, seed=0):
    """95% percentile-bootstrap interval of `statistic(list of arrays)`, each array resampled by itself (stratified)."""
    rng = np.random.default_rng(seed)
    values = [statistic([rng.choice(x, len(x)) for x in samples]) for _ in range(resamples)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def normalise(returns, meta):
    """0 the random policy's mean return, 1 the expert's; the returns themselves where the data names neither."""
    reference = meta.get("reference")
    return (np.array(returns) - reference["random"]) / (reference["expert"] - reference["random"]) if reference \
        else np.array(returns)


def summarise(results, tasks, failed=()):
    """Episodes of each task -> what eval.json holds: each task's returns and score, and the IQM over tasks."""
    summary, scores = {"tasks": {}, "failed": list(failed)}, []
    for episodes, meta in zip(results, tasks):
        if episodes:
            returns = [float(episode.reward.sum()) for episode in episodes]
            scores.append(normalise(returns, meta))
            summary["tasks"][meta["name"]] = {
                "return": float(np.mean(returns)), "return_std": float(np.std(returns)),
                "score": float(scores[-1].mean()), "interval": interval(scores[-1:], lambda x: x[0].mean()),
                "length": float(np.mean([len(episode.reward) for episode in episodes])), "returns": returns}
    of_tasks = lambda samples: iqm([x.mean() for x in samples])
    summary["iqm"], summary["interval"] = (of_tasks(scores), interval(scores, of_tasks)) if scores \
        else (np.nan, [np.nan, np.nan])  # every episode failed
    return summary


def table(summary):
    """The readable form of a summary: one line a task, and the IQM."""
    lines = [f"{'task':<28}{'return':>18}{'length':>8}{'score':>8}   95% interval"]
    for name, row in summary["tasks"].items():
        lines.append(f"{name:<28}{row['return']:>9.1f} ± {row['return_std']:<6.1f}{row['length']:>8.0f}"
                     f"{row['score']:>8.3f}   [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]")
    low, high = summary["interval"]
    lines.append(f"{'IQM over tasks':<54}{summary['iqm']:>8.3f}   [{low:.3f}, {high:.3f}]")
    lines += [f"failed, and left out: {line}" for line in summary["failed"]]
    return "\n".join(lines)


def evaluate(model, tasks, episodes, seed=0, how="improved", eta=2.0):
    """Roll out and summarise; `tasks` as for `rollout`."""
    results, _, failed = rollout(model, tasks, episodes, seed, how, eta)
    return summarise(results, tasks, failed)


def compare(summaries, path):
    """One figure of several evaluations: a row of points with intervals a task, one marker a run."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(next(iter(summaries.values()))["tasks"])
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(names) + 1.8), layout="constrained")
    for k, (run, summary) in enumerate(summaries.items()):
        rows = [*[summary["tasks"].get(name) for name in names], {"score": summary["iqm"], "interval": summary["interval"]}]
        offset = 0.5 * ((k + 0.5) / len(summaries) - 0.5)
        present = [(len(names) - y + offset, row) for y, row in enumerate(rows) if row]
        score = np.array([row["score"] for _, row in present])
        low, high = np.array([row["interval"] for _, row in present]).T
        axes.errorbar(score, [y for y, _ in present], xerr=[score - low, high - score], label=run,
                      fmt="osD^v<>P"[k % 8], color=plt.cm.viridis(0.85 * k / max(1, len(summaries) - 1)), capsize=3)
    axes.set_yticks(range(len(names) + 1), ["IQM over tasks", *reversed(names)])
    for x in (0, 1):
        axes.axvline(x, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("normalised score (0: uniform random policy, 1: expert), 95% interval")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curve(run):
    """run/curve.png: the main metrics and the scores against updates, from metrics.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    panels = {"loss": ["policy/clone_loss", "policy/improve_loss", "critic/loss"],
              "value, scaled to [0, 1]": ["critic/value", "critic/observed", "critic/error"],
              "entropy (nats a dimension), ESS": ["policy/entropy", "policy/ess"],
              "normalised score": ["eval/iqm", *sorted({k for line in lines for k in line if k.endswith("/score")})]}
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
    for (label, names), ax in zip(panels.items(), axes.flat):
        for name in names:
            points = [(line["update"], line[name]) for line in lines if name in line]
            if points:
                short = name.removeprefix("eval/").removesuffix("/score")
                ax.plot(*zip(*points), label=short, linewidth=2.5 if name == "eval/iqm" else 1,
                        color="black" if name == "eval/iqm" else None)
        ax.set_xlabel("update"), ax.set_ylabel(label)
        if ax.lines:
            ax.legend(fontsize=8, framealpha=0.5)
    figure.suptitle(str(run))
    figure.savefig(run / "curve.png", dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------- a run's folder

def write_whole(path, text):
    """Replace a file in one step: a killed writer leaves the old one, beside a .partial that nothing reads."""
    partial = Path(f"{path}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def checkpoints(run):
    """A run's checkpoints, oldest first: folders named after their update. Others are what killed writers left."""
    return sorted(path for path in Path(run, "checkpoints").glob("*") if path.name.isdecimal())


def find_checkpoint(run, update=None):
    """The path of a run's newest checkpoint, or of that made after `update` updates; RunError if there is none."""
    found = {int(path.name): path for path in checkpoints(run)}
    if not found:
        raise RunError(f"{run}: no checkpoint in {run}/checkpoints; train with `python train.py --out {run}`")
    if update is not None and update not in found:
        raise RunError(f"{run}: no checkpoint of update {update}; there are: {', '.join(map(str, found))}")
    return found[max(found) if update is None else update]


def crc32(path):
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def verify(path):
    """Read a checkpoint's every byte; RunError names the file that is not what was written."""
    older = [int(other.name) for other in checkpoints(path.parent.parent) if other.name < path.name]
    advice = f"the one before it is used if you ask for it: --resume {path.parent.parent} --at {older[-1]}" \
        if older else "there is none before it"
    try:
        stored = json.loads((path / "checkpoint.json").read_text())
        if stored["format"] != CHECKPOINT_FORMAT or stored["updates"] != int(path.name):
            raise RunError(f"{path}/checkpoint.json is of another format or update; {advice}")
        for name, checksum in stored["crc32"].items():
            with open(path / name, "rb") as file:
                if file.read(9)[8:] != b"{":  # what every safetensors file has there, and no pickle
                    raise RunError(f"{path / name} is not a safetensors file; if it is a pickle, reading it could run "
                                   f"anything: refused unread; {advice}")
            if crc32(path / name) != checksum:
                raise RunError(f"{path / name} is damaged: its checksum is wrong; {advice}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}/checkpoint.json, or a file it lists, is damaged ({error!r}); {advice}") from None


def read_config(run):
    try:
        return json.loads(Path(run, "config.json").read_text())
    except FileNotFoundError:
        raise RunError(f"{run}: not a run's folder (config.json is missing)") from None
    except json.JSONDecodeError as error:
        raise RunError(f"{run}/config.json is damaged: {error}") from None


def load_tensors(path, into):
    """Fill the dict of tensors `into`, whole or sharded, from a checkpoint of any number of ranks.

    torch's distributed checkpoints, stored as safetensors: no pickle is ever read. RunError on any mismatch.
    """
    try:
        stored = dcp.HuggingFaceStorageReader(path).read_metadata().state_dict_metadata
        for name, tensor in into.items():
            shape = tuple(stored[name].size) if name in stored else "no such tensor"
            if shape != tuple(tensor.shape):
                raise RunError(f"{path}: {name}: {shape} in the checkpoint, but {tuple(tensor.shape)} in the model of "
                               "config.json: the checkpoint is of another configuration")
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(path))
    except (SafetensorError, OSError, dcp.api.CheckpointException) as error:
        raise RunError(f"{path}: the checkpoint cannot be read ({error})") from None


def load_run(run, device="cpu"):
    """A run's folder -> (the averaged model theta', config). Nothing else is read: neither data nor pickles."""
    config = read_config(run)
    model = Perceiver(ModelConfig(**config["model"])).to(device)
    path = find_checkpoint(run)
    verify(path)
    load_tensors(path, {f"target.{name}": tensor for name, tensor in model.state_dict().items()})
    return model.eval(), config


def write_video(path, frames):
    try:
        import imageio.v3 as imageio
        if Path(path).suffix == ".gif":
            imageio.imwrite(path, frames, duration=40, loop=0)
        else:
            imageio.imwrite(path, frames, fps=25)
    except ImportError:
        raise RunError(f"{path}: writing this format needs `pip install imageio imageio-ffmpeg`; "
                       "a .gif needs no more than requirements.txt") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py made")
    parser.add_argument("--episodes", type=int, default=20, help="a task (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (default: all of the run's)")
    parser.add_argument("--act", choices=ACTS, help="how to act (default: improved for pac, else mean)")
    parser.add_argument("--eta", type=float, help="of `improved`, in units of Q's spread (default: the run's)")
    parser.add_argument("--seed", type=int, default=1, help="of environments and actions (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", metavar="DIR", help="append the episodes to this data set")
    parser.add_argument("--video", metavar="FILE", help="write one episode of each task to a .gif or .mp4")
    parser.add_argument("--plot", metavar="FILE", help="figure of the comparison (default with several runs: compare.png)")
    args = parser.parse_args()
    summaries = {}
    try:
        for run in args.runs:
            model, config = load_run(run, args.device)
            names = [meta["name"] for meta in config["tasks"]]
            for name in args.tasks or ():
                if name not in names:
                    raise RunError(f"{run}: no task {name!r}; it was trained on: {', '.join(names)}")
            tasks = [meta if meta["name"] in (args.tasks or names) else None for meta in config["tasks"]]
            how, eta = args.act or default_act(config["settings"]), args.eta or config["settings"]["eta"]
            if how in ("improved", "best") and not has_q(config["settings"]):
                raise RunError(f"{run}: --act {how} needs a Q decoder, and {config['algo']} trains none")
            if args.video:
                os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
            results, frames, failed = rollout(model, tasks, args.episodes, args.seed, how, eta, bool(args.record),
                                              bool(args.video))
            summary = {"run": str(run), "act": how, "eta": eta, "seed": args.seed, "episodes": args.episodes,
                       "checkpoint": find_checkpoint(run).name, **summarise(results, tasks, failed)}
            summaries[Path(run).name] = summary
            write_whole(Path(run, "eval.json"), json.dumps(summary, indent=2) + "\n")
            print(f"{run}: {how}, {args.episodes} episodes a task, written to {run}/eval.json\n{table(summary)}")
            if args.video:
                write_video(args.video, [frame for clip in frames for frame in clip])
            for meta, episodes in zip(tasks, results):
                if args.record and meta:
                    folder = Path(args.record, meta["name"])
                    start = None if (folder / "meta.json").exists() else \
                        data.new_meta(meta["env_id"], meta["instruction"], meta["discount"], meta["reference"])
                    data.append(folder, episodes, start)
        if len(summaries) > 1 or args.plot:
            compare(summaries, args.plot or "compare.png")
    except (RunError, data.DataError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    if any(summary["failed"] for summary in summaries.values()):
        sys.exit(EPISODES_FAILED)


if __name__ == "__main__":
    main()
