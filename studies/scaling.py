"""Scaling on a laptop: how return and losses grow with model, data and compute.

    python -m studies.scaling plan                  what would run, and how long it takes here
    python -m studies.scaling run --workers 2       the runs that are missing, two at a time
    python -m studies.scaling run --index 7         one of them: a job of a cluster's array
    python -m studies.scaling fit                   results/scaling_fit.json, from the table alone
    python -m studies.scaling plot                  the figures, from the table alone
    python -m studies.scaling run --folder /tmp/try --updates 8 --episodes 2 --index 0     a trial

A run goes through all updates once, at a constant learning rate, and the averaged weights are
evaluated on the way: one run gives the whole profile. Its rows come into results/scaling.csv when
it ends. A killed one goes on from its checkpoint in runs/scaling.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import parallel
import prepare
from behaviors import TASKS
from checkpoint import RunError, checkpoints, find_checkpoint, restore, save
from eval import COUNT, act, draws, evaluate
from kernels.categorical_projection import bellman_cross_entropy
from kernels.graph import Graphs
from learner import RISE, Learner, cloning_loss, settings_for
from model import config_for, count_parameters
from studies import print_table, scaling_fit, scaling_show
from studies.runs import Table, at_a_time, call, need_data
from studies.scaling_fit import BATCH, HALF, WIDE, fitted
from train import random_streams

WIDTHS = (8, 16, 32, 64, 96, 128)
EVALUATED = (64, 128, 256, 512, 1024, 2048, 4096)  # updates after which a run is evaluated
WARMUP = 512  # updates on the observed returns alone; from then to HALF on half of them
EPISODES = 3  # a task and evaluation
SAVE_EVERY = 256  # updates between checkpoints
HELD_OUT = 20  # one episode in so many is not trained on
HELD_OUT_STATES = 4096
FOCUS = 5  # of the weighting of the data
LONGEST = 1000  # steps of an episode


# ---------------------------------------------------------------- the family of sizes

def shape(width):
    """All of a size's shape, from its width. 32 and 64 are `tiny` and `small` of model.py."""
    return dict(width=width, latents=max(1, width // 8), blocks=-(-width // 64),
                heads=-(-width // 16), widening=2)


def learning_rate(width):
    """The highest rate: that of `small`, and elsewhere in inverse proportion to the width, as was
    measured at two widths, see README.md."""
    return 3e-3 * 64 / width


def config_of(size, metas):
    """The ModelConfig of a size of the family, `w8` and so on."""
    return replace(config_for("tiny", metas), **shape(width_of(size)))


def width_of(size):
    return int(size[1:])


def parameters(model):
    """How many numbers of the model a transition passes: N.

    Each task has encoders of its own, of which a transition passes one; and of the table of words
    it meets a few rows. At width 8 these tables are 77% of all parameters.
    """
    tables = model.word_embedding.weight.numel()
    others = 1 - 1 / len(model.config.tasks)
    for encoder in (model.obs_encoder, model.action_encoder):
        tables += others * count_parameters(encoder)
    return round(count_parameters(model) - tables)


class Operations(NamedTuple):
    """Floating-point operations of an update in the warm-up, and of one after it."""
    warm: int
    after: int

    def until(self, updates):
        warm = min(updates, WARMUP)
        return warm * self.warm + (updates - warm) * self.after


def operations(learner):
    """The Operations of a learner on the meta device."""
    return Operations(parallel.flops_per_update(learner, BATCH, share=1),
                      parallel.flops_per_update(learner, BATCH))


# ---------------------------------------------------------------- the sweep

class Job(NamedTuple):
    """A run. The fields are columns of the table, and its key."""
    algo: str
    weighting: int  # the focus: 0, none
    data: str  # a part of the default data
    share: str  # of the episodes, as 1/4
    size: str
    seed: int
    variant: str = "constant"  # see VARIANTS

    @property
    def name(self):
        return "-".join(map(str, self)).replace("/", "of").replace(" ", "")


# What else is done to the learning rate: the factor of it, and the last update.
VARIANTS = {"constant": (1, EVALUATED[-1]), "rate x 1/3": (1 / 3, 1024), "rate x 3": (3, 1024),
            "decayed": (1, EVALUATED[-1])}
COMPARED = (("bc_q", 0, "switching"), ("pac", 0, "switching"), ("bc_q", FOCUS, "switching"),
            ("pac", FOCUS, "switching"), ("pac", 0, "beyond"))
MEASURED_AT = ("w16", "w64")  # the learning rate's rule, and the decay's worth
SHARES = ("1/4", "1/16", "1/64")
SHARES_AT = "w32"
KEY = Job._fields
COLUMNS = (*KEY, "params", "updates", "flops", "return", "return_std", "clone_loss",
           "weighted_clone_loss", "critic_loss", *TASKS)
NUMBERS = {"weighting": int, "seed": int, "params": int, "updates": int, "flops": float,
           **dict.fromkeys(COLUMNS[len(KEY) + 3:], float)}


def sweep():
    """All jobs, in an order in which every beginning of it is of use."""
    sizes = [f"w{width}" for width in WIDTHS]

    def profiles(ways, seed, sizes=sizes):
        return [Job(*way, "1", size, seed) for size in sizes for way in ways]

    def varied(variant, ways):
        return [Job(*way, "1", size, 0, variant) for size in MEASURED_AT for way in ways]

    jobs = profiles(COMPARED[:2], 0)
    jobs += varied("rate x 1/3", COMPARED[:1]) + varied("rate x 3", COMPARED[:1])
    jobs += profiles(COMPARED[2:4], 0) + profiles(COMPARED[4:], 0)
    jobs += [Job(*way, share, SHARES_AT, 0) for share in SHARES for way in COMPARED[:2]]
    jobs += varied("decayed", COMPARED[:2])
    jobs += profiles(COMPARED, 1)
    return jobs + profiles(COMPARED[:4], 0, WIDE) + profiles(COMPARED[:4], 1, WIDE)


def scaling_table(folder=None):
    return Table("scaling", COLUMNS, KEY, folder, NUMBERS)


# ---------------------------------------------------------------- the data

class Part(NamedTuple):
    """A part of the data: what is trained on, what is held out, and the metas of its tasks."""
    training: dict  # arguments of a Sampler
    held_out: dict
    metas: list


def open_part(folder, share="1"):
    """A Part: every HELD_OUT-th episode is held out; of the others a share is trained on, evenly
    spaced."""
    sources = prepare.open_sources([folder], check=False)
    training, held_out = [], []
    step = int(share.split("/")[-1])
    for task in sources["tasks"]:
        numbers = np.arange(len(task.episodes))
        away = numbers % HELD_OUT == 0
        if len(numbers) < 2:
            raise data.DataError(f"{task.folder}: one episode alone: none can be held out")
        training.append(only(task, task.episodes[~away][::step]))
        held_out.append(only(task, task.episodes[away]))
    metas = prepare.merged_metas(sources["tasks"])
    return Part({**sources, "tasks": training}, {**sources, "tasks": held_out}, metas)


def only(task, episodes):
    """The Task with some of its episodes."""
    task = copy.copy(task)
    task.episodes = episodes
    return task


# ---------------------------------------------------------------- a run

class Steady(Learner):
    """A Learner whose phases are counts of updates, and whose learning rate stays up.

    So update u is the same whatever follows, and one run is the runs of all its lengths.
    decay_from: the rate falls along a line from there to nothing at `last` (none: it stays).
    """

    def __init__(self, config, settings, metas, last, decay_from=None, **more):
        self.last, self.decay_from = last, decay_from
        # Half of the observed returns until halfway between the warm-up and this many.
        total = 2 * HALF - WARMUP
        settings = replace(settings, warmup=WARMUP / total)
        super().__init__(config, settings, metas, total, **more)

    def learning_rate(self):
        factor = min(1, (self.updates + 1) / RISE)
        if self.decay_from is not None and self.updates >= self.decay_from:
            factor = (self.last - self.updates) / (self.last - self.decay_from)
        return factor * self.settings.learning_rate


def new_learner(job, metas, device="cpu"):
    factor, last = VARIANTS[job.variant]
    rate = factor * learning_rate(width_of(job.size))
    settings = settings_for(job.algo, focus=float(job.weighting), learning_rate=rate)
    decay_from = last * 3 // 4 if job.variant == "decayed" else None
    return Steady(config_of(job.size, metas), settings, metas, last, decay_from, device=device,
                  seed=job.seed)


@torch.no_grad()
def held_out_losses(learner, batch):
    """The averaged model's losses on held-out data, the same measure for all algorithms.

    The critic's is the cross-entropy to the returns that were observed.
    """
    batch = batch.to(learner.device)
    model, task = learner.target_model, batch.task
    action, observed = batch.action[:, 0], learner.scale(batch.return_to_go[:, 0], task)
    latents = model.encode(batch.obs[:, 0], task)
    clone = cloning_loss(model.policy(latents, task), action)
    logits = model.q(latents, action[:, None], task)[:, 0]
    nothing = torch.zeros_like(observed)
    critic = bellman_cross_entropy(logits, torch.zeros_like(logits), nothing, nothing, observed, 1)
    return {"clone_loss": clone.mean().item(), "critic_loss": critic.mean().item(),
            "weighted_clone_loss": (batch.worth * clone).mean().item()}


def scores(learner, metas, seed, episodes):
    """The return, as an IQM of scores; its standard error over episodes; and each task's score, nan
    for what the data does not have."""
    settings = learner.settings
    summary = evaluate(learner.target_model, metas, episodes, seed + 1, settings.act, settings.eta)
    if summary["failed"]:
        raise RunError("an episode of the evaluation failed: " + summary["failed"][0])
    low, high = summary["interval"]
    tasks = dict.fromkeys(TASKS, np.nan)
    tasks |= {name: row["score"] for name, row in summary["tasks"].items()}
    return {"return": summary["iqm"], "return_std": (high - low) / (2 * 1.96), **tasks}


def restore_rows(run, learner, checksums):
    """Make the learner what it was when the run was stopped -> the run's rows until then. RunError
    if its data had other checksums"""
    if not checkpoints(run):
        return []
    restore(find_checkpoint(run), learner)
    kept = json.loads((run / "rows.json").read_text())
    if not isinstance(kept, dict) or kept["checksums"] != checksums:
        raise RunError(f"{run} was begun on other data, or by older code: move it away")
    return [row for row in kept["rows"] if row["updates"] <= learner.updates]


def train(job, run, folder, device="cpu", last=None, episodes=EPISODES):
    """A run to its end, from where it was stopped -> its rows"""
    part = open_part(folder, job.share)
    learner = new_learner(job, part.metas, device)
    updates_of = learner if device == "cpu" else Graphs(learner)
    last = last or learner.last
    rng, _ = random_streams(job.seed, 2**31, "cpu")  # a stream that no update has
    learner.start_at(data.Sampler(**part.training, batch_size=20_000).sample(rng))
    held_out = data.Sampler(**part.held_out, batch_size=HELD_OUT_STATES, focus=FOCUS)
    held_out = held_out.sample(np.random.default_rng(0))
    same = {**job._asdict(), "params": parameters(learner.model)}
    cost = operations(new_learner(job, part.metas, "meta"))
    checksums = [task.meta["checksum"] for task in part.training["tasks"]]
    sampler, rows = sampler_for(learner, part), restore_rows(run, learner, checksums)
    while learner.updates < last:
        rng, generator = random_streams(job.seed, learner.updates, device)
        candidates = sampler.sample(rng).to(learner.device)
        metrics = updates_of.update_from(candidates, generator)
        updates = learner.updates
        evaluates = updates in EVALUATED or updates == last
        saves = evaluates or updates % SAVE_EVERY == 0
        if saves:
            learner.check(metrics)
        if evaluates:
            learner.measure_spread(candidates)
            row = {**same, "updates": updates, "flops": cost.until(updates),
                   **held_out_losses(learner, held_out),
                   **scores(learner, part.metas, job.seed, episodes)}
            rows.append(row)
            print(time.strftime("%H:%M"), job.name, updates, f"return {row['return']:.3f}, clone "
                  f"{row['clone_loss']:.3f}, critic {row['critic_loss']:.3f}", flush=True)
        if saves:
            run.mkdir(parents=True, exist_ok=True)
            kept = {"checksums": checksums, "rows": rows}
            data.write_file(run / "rows.json", json.dumps(kept, indent=1) + "\n")
            save(run, learner, keep=1)  # after the rows: those of a checkpoint are there
    return rows


def sampler_for(learner, part):
    return data.Sampler(**part.training, batch_size=BATCH * learner.pool,
                        steps=learner.settings.n_step, focus=learner.settings.focus)


def rounded(row):
    """A row with numbers as short as they are meant."""
    return {name: f"{value:.5g}" if isinstance(value, float) else value
            for name, value in row.items()}


def make(job, table, args):
    """One run, in this process, and its rows in the table."""
    run = table.runs / job.name
    torch.set_num_threads(1)
    parallel.keep_memory()
    with data.only_writer(run):
        rows = train(job, run, args.datasets / job.data, args.device, args.updates, args.episodes)
    table.append(map(rounded, rows))


# ---------------------------------------------------------------- the plan

def cpu_seconds(function, times=3):
    """The median CPU time of a call: other work on the machine counts less."""
    taken = []
    for _ in range(times + 1):  # the first one warms up
        began = time.process_time()
        function()
        taken.append(time.process_time() - began)
    return float(np.median(taken[1:]))


class Price(NamedTuple):
    """What a run takes: parameters, operations, and CPU seconds of an update and an evaluation."""
    params: int
    cost: Operations
    warm: float
    after: float
    evaluation: float

    def run(self, last):
        evaluations = sum(updates <= last for updates in EVALUATED)
        updates = min(last, WARMUP) * self.warm + max(0, last - WARMUP) * self.after
        return updates + evaluations * self.evaluation


def price_of(job, part):
    """Measure an update in the warm-up, one after it, and a step of an evaluation."""
    learner = new_learner(job, part.metas)
    candidates = sampler_for(learner, part).sample(np.random.default_rng(0))
    generator = torch.Generator()
    learner.start_at(candidates)

    def update():
        learner.update_from(candidates, generator)

    warm = cpu_seconds(update)
    learner.updates = WARMUP + 1
    after = cpu_seconds(update)
    plays = candidates.take(slice(EPISODES * len(part.metas)))
    noise = torch.rand(len(plays.task), *draws(learner.model, learner.settings.act))

    def step():
        act(learner.target_model, plays.obs[:, 0], plays.task, learner.settings.act, noise=noise)

    cost = operations(new_learner(job, part.metas, "meta"))
    # A step of an environment takes about as long as a tenth of a millisecond.
    evaluation = LONGEST * (cpu_seconds(step) + 1e-4 * len(plays.task))
    return Price(parameters(learner.model), cost, warm, after, evaluation)


def plan(jobs, missing, args):
    """Print what would be run, and how long it takes here."""
    part = open_part(args.datasets / "switching")
    prices = {}
    for width in WIDTHS:
        for algo, weighting in sorted({job[:2] for job in jobs}):
            job = Job(algo, weighting, "switching", "1", f"w{width}", 0)
            prices[algo, weighting, job.size] = price_of(job, part)
    rows = []
    for (algo, weighting, size), price in prices.items():
        made = shape(width_of(size))
        rows.append([size, made["latents"], made["blocks"], made["heads"], f"{price.params:,}",
                     algo, weighting, f"{price.cost.after / 1e9:.2f}", f"{price.warm * 1e3:.0f}",
                     f"{price.after * 1e3:.0f}", f"{price.run(EVALUATED[-1]) / 60:.0f}"])
    print_table(["size", "latents", "blocks", "heads", "parameters", "algo", "focus",
                 "GFLOP an update", "ms in the warm-up", "ms after it", "minutes a run"], rows)
    print()
    seconds = 0
    for index, job in enumerate(jobs):
        if job.size in WIDE:
            state = "with --device cuda" if job in missing else "in the table"
            print(f"{index:>3}  {job.name:<44}    a GPU, {state}")
            continue
        price = prices[job.algo, job.weighting, job.size].run(VARIANTS[job.variant][1])
        if job in missing:
            seconds += price
        state = f"{seconds / 3600:.1f} core-hours so far" if job in missing else "in the table"
        print(f"{index:>3}  {job.name:<44} {price / 60:>4.0f} min, {state}")
    hours = seconds / 3600
    print(f"\n{len(missing)} of {len(jobs)} runs are missing: {hours:.1f} hours of a core, "
          f"{hours / args.workers:.1f} with --workers {args.workers}")


# ---------------------------------------------------------------- the command

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m studies.scaling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("plan", "run", "fit", "plot"))
    parser.add_argument("--workers", type=COUNT, default=2,
                        help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--index", type=int, help="run: this one of the plan's alone")
    parser.add_argument("--folder", type=Path, help="instead of runs/ and results/, for a trial")
    parser.add_argument("--datasets", type=Path, default=prepare.DATASETS, metavar="DIR",
                        help="the default data (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="that trains: cuda by CUDA graphs (default: %(default)s)")
    parser.add_argument("--updates", type=COUNT, help="a trial's: fewer than the sweep's")
    parser.add_argument("--episodes", type=COUNT, default=EPISODES,
                        help="a task and evaluation (default: %(default)s)")
    args = parser.parse_args(argv)
    trial = args.updates is not None or args.episodes != EPISODES
    if trial and not args.folder:
        parser.error("--updates and --episodes are a trial's: give it a --folder of its own")
    if args.episodes < 2:
        parser.error("--episodes: one alone tells of no spread; give 2 or more")
    jobs = len(sweep())
    if args.index is not None and not 0 <= args.index < jobs:
        parser.error(f"--index {args.index}: the plan has runs 0 to {jobs - 1}")
    return args


def run(jobs, missing, table, args):
    """The runs that are missing, each in a process of its own. One that fails stops no other.
    Those of WIDE take a GPU."""
    if args.device == "cpu":
        missing = [job for job in missing if job.size not in WIDE]
    given = [f"--{name}={value}" for name, value in
             (("folder", args.folder), ("updates", args.updates), ("episodes", args.episodes),
              ("device", args.device))
             if value is not None]

    def work(job):
        command = ["-m", "studies.scaling", "run", "--index", jobs.index(job),
                   "--datasets", args.datasets, *given]
        call(command, table.runs / f"{job.name}.log")

    at_a_time(args.workers, work, missing)


def main(argv=None):
    args = parse_args(argv)
    jobs, table = sweep(), scaling_table(args.folder)
    try:
        missing, rows = table.missing(jobs), table.rows()
        if args.command in ("plan", "run") and not args.folder:  # a trial may have any data
            for part in ("switching", "beyond"):
                need_data(args.datasets / part)
        if args.command in ("fit", "plot") and not rows:
            raise RunError(f"{table.path} has no rows yet: python -m studies.scaling run")
        if args.command == "plan":
            plan(jobs, missing, args)
        elif args.command == "run" and args.index is None:
            run(jobs, missing, table, args)
        elif args.command == "fit":
            laws = scaling_fit.laws_of_all(fitted(rows), COMPARED, VARIANTS, ("1", *SHARES))
            path = table.path.with_name("scaling_fit.json")
            data.write_file(path, json.dumps(laws, indent=1, allow_nan=False) + "\n")
            scaling_show.print_ends(rows, COMPARED)
            print()
            scaling_show.print_laws(laws)
            print(f"\nwrote {path}")
        elif args.command == "plot":
            scaling_show.draw(rows, COMPARED, table.path.parent)
        elif jobs[args.index] in missing:
            make(jobs[args.index], table, args)
        else:
            print(f"run {args.index} is in {table.path}")
    except (RunError, data.DataError, OSError) as error:
        print(f"studies.scaling: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
