"""Roll-outs of a trained model: scores with intervals, recorded episodes, video.

    python eval.py runs/pac-small-0 --episodes 20       a table, and eval.json in the run's folder
    python eval.py runs/pac-small-0 runs/bc-small-0     ... and a figure that compares the runs
    python eval.py runs/pac-small-0 --act mean          the policy alone, without its critic
    python eval.py runs/pac-small-0 --video hopper.gif --tasks Hopper-v5
    python eval.py runs/pac-small-0 --record datasets/own     append the episodes to a data set
    python eval.py RUN --tasks metaworld-push --instruction "shove the puck"    told in other words

A score is a return, scaled so that the uniform random policy has 0 and the data's expert 1; a task
without this reference has returns alone. An episode succeeds if its `info` says so at any step. An
environment that raises, hangs or answers with anything but numbers costs its own episode only. Exit
codes: 0; 2, the message says what is wrong; 3, some episodes failed and are left out of the scores.
"""

import argparse
import math
import signal
import sys
from pathlib import Path

# The ways to act, see `act`, and how many actions each draws at a state.
ACTS = {"improved": 64, "mean": 0, "sharpened": 0, "mode": 0, "sample": 1, "best": 16}
EPISODES = 20
EPISODES_FAILED = 3  # exit code
VIDEOS = (".gif", ".mp4")


def number(kind, words, allowed):
    """The type of an argument that takes some numbers alone; words: which."""

    def read(text):
        if not allowed(kind(text)):
            raise argparse.ArgumentTypeError(f"{text}: it has to be {words}")
        return kind(text)

    read.__name__ = kind.__name__  # argparse names it where a text is no number at all
    return read


COUNT = number(int, "1 or more", lambda x: x >= 1)
SEED = number(int, "0 or more", lambda x: x >= 0)
POSITIVE = number(float, "above 0", lambda x: 0 < x < math.inf)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders that train.py made")
    add("--episodes", type=COUNT, default=EPISODES, help="a task (default: %(default)s)")
    add("--tasks", nargs="+", metavar="TASK", help="only these (default: all of the run's)")
    add("--instruction", metavar="TEXT", help="what the model reads (default: the tasks' own)")
    add("--act", choices=ACTS, help="how to act (default: the run's way)")
    add("--eta", type=POSITIVE, help="of `improved`, in units of Q's spread (default: the run's)")
    add("--seed", type=SEED, default=1, help="of environments and actions (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--record", metavar="DIR", help="append the episodes to this data set")
    add("--video", metavar="FILE", help="film one episode of each task, to a .gif or .mp4")
    add("--plot", metavar="FILE", help="the comparison's figure (several runs: compare.png)")
    args = parser.parse_args(argv)
    if args.video and (len(args.runs) > 1 or not args.video.endswith(VIDEOS)):
        parser.error(f"--video {args.video}: a .gif or .mp4 of one run")
    if args.plot and not Path(args.plot).suffix:
        parser.error(f"--plot {args.plot}: a name that ends in .png, .pdf or .svg, say")
    if args.record and len(args.runs) > 1:
        parser.error("--record: of one run at a time; the next one would play other episodes")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports below, which take seconds: errors are answered at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback

import json
import re
from collections import deque
from errno import EACCES, EPERM, EROFS
from zlib import crc32

import numpy as np
import torch

import data
import envs
import parallel
import plots
import prepare
from checkpoint import RunError, load_run, read_config
from envs import Play
from learner import improvement_weights
from model import in_bf16

ALIVE = 100  # environments at once: one of Meta-World's takes 27 MB


# ---------------------------------------------------------------- acting

@torch.no_grad()
def act(model, obs, task, how, eta=2.0, noise=None, frames=None):
    """obs (B, O), task (B,) -> actions (B, A) in [-1, 1]. frames: as of Perceiver.inputs

    noise: what they are drawn by, numbers uniform on [0, 1) of the shape (B, *draws(model, how))

    improved   the mean of pi_imp: the mean of 64 draws from the sharpened policy, weighted by
               exp(Q / eta), eta in units of Q's spread [ours]
    mean, mode of each dimension's bins
    sharpened  the mean of the sharpened policy: improved, without Q
    sample     a draw
    best       of 16 draws from the sharpened policy, that of the highest Q
    """
    with in_bf16(model.config, obs.device):
        latents = model.encode(obs, task, frames)
        policy = model.policy(latents, task)
    if how == "mean":
        return policy.mean()
    if how == "sharpened":
        return policy.sharpen().normalised().mean()
    if how == "mode":
        return policy.mode()
    if noise is None:
        noise = torch.rand(len(obs), *draws(model, how), device=obs.device)
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


def draws(model, how):
    """How many actions are drawn at a state, and the random numbers that each takes."""
    return ACTS[how], 1 + model.action_mask.shape[1]


# ---------------------------------------------------------------- roll-outs

def rollout(model, metas, episodes, seed=0, how="improved", eta=2.0, keep=False, render=False,
            first=None):
    """Play `episodes` of each task, at most ALIVE at once in lock-step: one forward pass a step
    serves every environment.

    metas: of the model's tasks, in order; None leaves one out. keep: all of the episodes, not the
    rewards alone. render: film the first one of each task. first: the number of each task's first
    episode (default: 0) -> a list of Play, those of a task together
    """
    device = next(model.parameters()).device
    plays = []
    for index, meta in enumerate(metas):
        start = first[index] if first else 0
        for number in range(episodes if meta else 0):
            plays.append(Play(index, start + number, meta, keep, render and number == 0))
    # A plain loop is faster here than gymnasium's AsyncVectorEnv: most steps take under 0.1 ms.
    waiting, live = deque(plays), []
    with data.progress(total=0, desc="evaluate", unit="step", unit_scale=True, leave=False,
                       delay=2) as bar:
        while waiting or live:
            while waiting and len(live) < ALIVE:
                play = waiting.popleft()
                play.start(seed_of(seed, play.number))
                bar.total += play.steps_left()
                if play.live:
                    live.append(play)
            if live:
                step(model, live, how, eta, device)
            for play in live:
                bar.update(1 if play.live else 1 + play.steps_left())
            live = [play for play in live if play.live]
    return plays


def seed_of(seed, number):
    """An episode's own seed, of 32 bits: dm_control takes no larger one."""
    return (seed * 10_000 + number) % 2**32


def step(model, plays, how, eta, device):
    """One step of each of `plays`."""
    obs = np.zeros((len(plays), model.obs_mean.shape[1]), np.float32)
    for row, play in zip(obs, plays):
        row[:len(play.obs[-1])] = play.obs[-1]
    shape = draws(model, how)
    noise = np.array([play.rng.random(shape, np.float32) for play in plays])
    task = torch.tensor([play.index for play in plays], device=device)
    obs, noise = torch.from_numpy(obs).to(device), torch.from_numpy(noise).to(device)
    frames = None
    if model.pixels is not None:
        none = np.zeros((data.HISTORY, *model.config.frame), np.uint8)
        frames = [play.history() if play.seen else none for play in plays]
        frames = torch.from_numpy(np.stack(frames)).to(device)
    actions = act(model, obs, task, how, eta, noise, frames).cpu().numpy()
    for play, action in zip(plays, actions):
        play.step(action)


# ---------------------------------------------------------------- statistics

def iqm(scores):
    """The mean of the middle half of all scores (rliable's interquartile mean, Agarwal et al. 2021,
    arXiv 2108.13264). scores: (..., tasks); a quarter of them, rounded down, is cut off at either
    end."""
    flat = np.sort(np.ravel(scores))
    cut = int(0.25 * len(flat))
    return float(flat[cut:len(flat) - cut].mean())


def interval(samples, statistic, resamples=2000, seed=0):
    """95% percentile-bootstrap interval of statistic(list of arrays), each resampled by itself ->
    [low, high], plain numbers"""
    rng = np.random.default_rng(seed)
    values = [statistic([rng.choice(x, len(x)) for x in samples]) for _ in range(resamples)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def normalise(returns, meta):
    """Returns as scores: 0 the random policy's mean, 1 the expert's; None without these."""
    reference = meta.get("reference")
    if not reference:
        return None
    return (np.array(returns) - reference["random"]) / (reference["expert"] - reference["random"])


def bounds(samples, statistic):
    """The interval of a statistic; None where a sample is a single number and tells of no spread"""
    return interval(samples, statistic) if min(map(len, samples)) > 1 else None


def summarise(plays):
    """What eval.json holds: each task's returns and score, the IQM over tasks, and what failed.

    A task without a reference has no score: its interval is that of the return, and the IQM is of
    the other tasks. What cannot be told is None.
    """
    tasks, all_scores = {}, []
    for meta, played in by_task(plays):
        returns = [play.total for play in played]
        scores = normalise(returns, meta)
        sample = np.array(returns) if scores is None else scores
        row = {
            "return": float(np.mean(returns)), "return_std": float(np.std(returns)),
            "score": None if scores is None else float(scores.mean()),
            "interval": bounds([sample], lambda x: x[0].mean()),
            "length": float(np.mean([len(play.reward) for play in played])), "returns": returns}
        # Some environments speak of success only when there is one.
        if any(play.success is not None for play in played):
            row["success"] = float(np.mean([bool(play.success) for play in played]))
        if scores is not None:
            all_scores.append(scores)
        tasks[meta["name"]] = row

    def iqm_of_tasks(samples):
        return iqm([x.mean() for x in samples])

    value, around = None, None
    if all_scores:
        value, around = iqm_of_tasks(all_scores), bounds(all_scores, iqm_of_tasks)
    failed = [play.failed for play in plays if play.failed]
    return {"tasks": tasks, "failed": failed, "iqm": value, "interval": around}


def by_task(plays):
    """(meta, its plays that did not fail) for each task that has any"""
    groups = {}
    for play in plays:
        if not play.failed:
            groups.setdefault(play.index, (play.meta, []))[1].append(play)
    return list(groups.values())


def shown(number):
    return "-" if number is None else f"{number:.3f}"


def table(summary):
    """The readable form of a summary: one line a task, and the IQM."""
    lines = [f"{'task':<28}{'return':>18}{'length':>8}{'score':>8}   95% interval"]
    for name, row in summary["tasks"].items():
        line = (f"{name:<28}{row['return']:>9.1f} ± {row['return_std']:<6.1f}"
                f"{row['length']:>8.0f}{shown(row['score']):>8}   {between(row)}")
        if row["score"] is None and row["interval"]:
            line += " of the return"
        if "success" in row:
            line += f"   success {row['success']:.0%}"
        lines.append(line)
    lines.append(f"{'IQM over tasks':<54}{shown(summary['iqm']):>8}   {between(summary)}")
    return "\n".join(lines + failures(summary))


def failures(summary):
    """A line for each task of which episodes failed: how many, and what the first one met."""
    of_tasks = {}
    for line in summary["failed"]:
        of_tasks.setdefault(line.split(", episode ")[0], []).append(line)
    return [f"failed, and left out: {lines[0]}" +
            (f" (and {len(lines) - 1} more of this task)" if len(lines) > 1 else "")
            for lines in of_tasks.values()]


def between(row):
    return "[{:.3f}, {:.3f}]".format(*row["interval"]) if row["interval"] else "-"


def evaluate(model, metas, episodes, seed=0, how="improved", eta=2.0):
    """Roll out and summarise; `metas` as for `rollout`. Tasks are told in their first wording."""
    model.use_wording(0)
    return summarise(rollout(model, metas, episodes, seed, how, eta))


# ---------------------------------------------------------------- the command

def refuse_unlike(runs, names=None):
    """RunError for tasks of one name that are scored by other returns, or played elsewhere: their
    scores would stand in one row. names: of the tasks that are played, or all"""
    first = {}
    for run in runs:
        for meta in tasks_of(run):
            if names and meta["name"] not in names:
                continue
            other, before = first.setdefault(meta["name"], (run, meta))
            for key in ("env_id", *envs.KEPT, "reference"):
                if meta.get(key) != before.get(key):
                    raise RunError(f"{meta['name']} has {key} {meta.get(key)} in {run}, and "
                                   f"{before.get(key)} in {other}: score them one by one")


def tasks_of(run):
    """The metas of a run's tasks; none of what is no run, which is said when its turn comes."""
    try:
        return read_config(run)["tasks"]
    except RunError:
        return []


def compare(summaries, path):
    """The figure of several evaluations: of the scores, or where there are none of the returns.

    summaries: by the runs' folders
    """
    found = [row for summary in summaries.values() for row in summary["tasks"].items()]
    names, what = list(dict.fromkeys(name for name, _ in found)), "score"
    if all(row["score"] is None for _, row in found):
        what = "return"
    methods = {}
    for run, summary in summaries.items():
        of_tasks = [summary["tasks"].get(name, {what: None}) for name in names]
        points = [point(row, what) for row in of_tasks]
        if what == "score":
            points.append(point({"score": summary["iqm"], "interval": summary["interval"]}, what))
        if any(points):
            shown_as = f"./{run}" if run[0] == "_" else run  # a legend hides what begins so
            shown_as = shown_as.replace("$", r"\$")  # and sets as a formula what stands between two
            methods[shown_as] = points
        else:
            print(f"{run} is left out of the figure: none of its tasks has a {what}")
    if what == "score":
        same = len({tuple(summary["tasks"]) for summary in summaries.values()}) == 1
        names.append("IQM over tasks" if same else "IQM over a run's own tasks")
    rows = [row for row in zip(names, *methods.values()) if any(row[1:])]  # with any number
    names, *columns = map(list, zip(*rows)) if rows else ([],)
    methods = dict(zip(methods, columns))
    if methods:
        label = plots.SCORE if what == "score" else "return"
        plots.compare(methods, names, path, f"{what}s with 95% intervals", label=label)
        print(f"wrote {path}")


def point(row, what):
    """(centre, low, high) of a row; None where it has no such number"""
    value = row[what]
    return None if value is None else (value, *(row["interval"] or (value, value)))


def file_of(act=None, eta=None, video=None, instruction=None, tasks=None):
    """eval.json for a full evaluation; a look at less, or another way to act, has its own name."""
    looks = [act, eta and f"eta{eta:g}", video and "video", instruction and told(instruction),
             tasks and f"of-{short('-'.join(tasks))}"]
    return "-".join(["eval", *filter(None, looks)]) + ".json"


def told(instruction):
    """A part of a file's name: another one for whatever a model reads as other words, see
    model.tokenize."""
    words = " ".join(instruction.lower().split())
    name = re.sub(r"\W+", "-", f"told {words}")
    if re.search(r"[^\w ]", words):  # a comma, say, which the name has lost
        name += f"-{crc32(words.encode()):08x}"
    return short(name)


def short(text):
    """A part of a file's name, which has limits; texts that differ have names that differ."""
    written = text.encode()
    if len(written) <= 80:
        return text
    return f"{written[:40].decode(errors='ignore')}-{crc32(written):08x}"


def kept_path(path, summary):
    """The path, or one beside it if that has an evaluation of the same checkpoint by more episodes
    or by others: what was measured stays."""
    try:
        before = json.loads(path.read_text())
        if before.get("checkpoint", summary["checkpoint"]) != summary["checkpoint"]:
            return path
        if scored(before) > scored(summary):
            beside = f"{path.stem}-{summary['episodes']}-episodes.json"
        elif before["seed"] != summary["seed"]:
            beside = f"{path.stem}-seed{summary['seed']}.json"
        elif before.get("first", 0) != summary.get("first", 0):
            beside = f"{path.stem}-from-episode-{summary.get('first', 0)}.json"
        else:
            return path
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return path  # there is none, or it is damaged
    return kept_path(path.with_name(beside), summary)  # that may be there as well


def scored(summary):
    """How many episodes an evaluation's scores are of."""
    return sum(len(row["returns"]) for row in summary["tasks"].values())


def write_summary(path, summary):
    """A run that may only be read has been scored all the same."""
    try:
        data.write_file(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
        print(f"wrote {path}")
    except OSError as error:
        if error.errno not in (EACCES, EPERM, EROFS):
            raise
        print(f"not written, for it may not be: {path} ({error.strerror})")


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
    has_q = settings["beta"] > 0 and settings.get("critic") != "v"
    if how in ("improved", "best") and not has_q:
        raise RunError(f"{run}: --act {how} needs a Q decoder, and {config['algo']} trains none")
    if args.eta and how != "improved":
        raise RunError(f"{run}: --eta is of --act improved, and this is to act by {how}")
    if args.instruction is not None:
        try:
            for index in range(len(metas)):
                model.set_instruction(index, args.instruction)
        except ValueError as error:
            raise RunError(f"--instruction: {error}") from None
    first = None
    if args.record:
        first = [recorded(args.record, meta) if meta else None for meta in metas]
    plays = rollout(model, metas, args.episodes, args.seed, how, eta, keep=bool(args.record),
                    render=bool(args.video), first=first)
    about = {"run": str(run), "act": how, "eta": eta, "seed": args.seed, "episodes": args.episodes,
             "first": max(filter(None, first or ()), default=0), "checkpoint": config["checkpoint"]}
    summary = {**about, **summarise(plays)}
    print(f"{run}: {how}, {args.episodes} episodes a task\n{table(summary)}")
    name = file_of(args.act, args.eta, args.video, args.instruction, args.tasks)
    write_summary(kept_path(Path(run, name), summary), summary)
    if args.record:
        record(plays, args.record, first, args.episodes)
    if args.video:
        envs.write_video(args.video, [frame for play in plays for frame in play.frames])
        print(f"wrote {args.video}")
    return summary


def recorded(folder, meta):
    """How many episodes of a task were played for a data set, those that failed included: the next
    ones are others."""
    path = Path(folder, meta["name"])
    prepare.refuse_other(path, meta)
    if not (path / "meta.json").exists():
        return 0
    there = data.Task(path).meta
    return there.get("played", there["episodes"])


def record(plays, folder, first, episodes):
    """Append the episodes to a data set, task by task.

    first: how many had been played for each task before; episodes: and how many now
    """
    for meta, played in by_task(plays):
        path, start = Path(folder, meta["name"]), None
        before = first[played[0].index]
        if recorded(folder, meta) != before:
            raise data.DataError(f"{path}: another process has recorded here meanwhile, and these "
                                 "may be the same episodes; record again")
        if not (path / "meta.json").exists():
            start = prepare.anew(meta)
        data.append(path, [play.episode() for play in played], start, played=before + episodes)
        print(f"wrote {len(played)} episodes to {path}")


def main(args):
    summaries, code = {}, 0
    if args.video and not Path(args.video).parent.is_dir():  # said before the episodes are played
        print(f"eval.py: --video {args.video}: there is no folder {Path(args.video).parent}",
              file=sys.stderr)
        sys.exit(2)
    runs = list(dict.fromkeys(str(Path(run)) for run in args.runs))
    try:
        refuse_unlike(runs, args.tasks)
    except RunError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    for run in runs:
        try:
            summaries[run] = evaluate_run(run, args)
        except (RunError, data.DataError, OSError) as error:
            print(f"eval.py: {error}", file=sys.stderr)
            code = 2
    try:
        if len(runs) > 1 or args.plot:
            compare(summaries, args.plot or "compare.png")
    except (ValueError, OSError) as error:  # an unknown suffix, or a folder that is not there
        print(f"eval.py: {error}", file=sys.stderr)
        code = 2
    if not code and any(summary["failed"] for summary in summaries.values()):
        code = EPISODES_FAILED
    if code:
        sys.exit(code)


if __name__ == "__main__":
    parallel.outlive_readers()
    main(ARGS)
