"""What the studies share: tables in results/, and the runs of train.py that they are made of.

A run that was killed goes on from its checkpoint. One that has its rows is not made again.
"""

import argparse
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from threading import RLock

import numpy as np

import prepare
from behaviors import TASKS, TRANSITIONS
from checkpoint import RunError, read_config
from data import DataError, only_writer, write_file
from eval import COUNT, EPISODES_FAILED, interval, iqm, shown
from learner import settings_for
from studies import RESULTS, print_table
from train import MAY_CHANGE, TrainConfig, idle, parse_args, steps_of

SEEDS = (0, 1, 2)
EPISODES = 20  # a task and run
NUMBERS = {"seed": int, "score": lambda text: float(text) if text else None}  # of most tables
WITHIN_RUN = ("task", "told", "words", "updates", "episode")  # they tell the rows of a run apart
FILE_LOCK = RLock()  # several runs end at once
GOES_ON = "stopped: the study goes on when it is started again"
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes after Ctrl-C and `kill`
SHOWN_ROWS = [*TASKS, "IQM"]
DECIDE = ("data", "steps", "episodes")  # may change on --resume, and not between a study's runs
DRAWN = "mean and range over seeds; IQM with its 95% interval"
BY_RETURN = ("rwr_return", "one_step_return", "pacv_return", "pac_return")  # --merit return
# Played too. pi_imp is made of draws from the sharpened policy: what of its lead is Q, what is
# the sharpening? A clone acts by that as well.
OTHER_ACTS = {"bc": "sharpened", "filtered_bc": "sharpened", "rwr": "sharpened",
              "pacv": "sharpened", "bc_q": "improved"}


# ---------------------------------------------------------------- tables

class Table:
    """results/NAME.csv, a row for each score; the figure beside it; and the runs, in runs/NAME.

    key: the columns that tell one run from another. folder: instead of results/ and runs/.
    numbers: the types of the columns that are no text.
    """

    def __init__(self, name, columns, key, folder=None, numbers=NUMBERS):
        self.columns, self.key, self.numbers = columns, key, numbers
        results = folder or RESULTS
        self.path = results / f"{name}.csv"
        self.figure = results / f"{name}.png"
        self.configs = results / f"{name}-configs.json"
        self.runs = (folder or Path()) / "runs" / name

    def as_written(self):
        """The rows, all of text. One that is not whole, or stands there twice, ends the command: it
        would be shown as if it were a result."""
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            lines = file.read().splitlines(keepends=True)
        rows, seen = [], set()
        for line, row in enumerate(csv.DictReader(lines), 2):
            whole = tuple(row) == self.columns and None not in row.values()
            heads = tuple(row.values()) == self.columns  # a table that was put behind another
            if not whole or heads or self.place(row) in seen:
                self.refuse(line)
            rows.append(row)
            seen.add(self.place(row))
        if lines and not lines[-1].endswith("\n"):
            self.refuse(len(lines))
        return rows

    def refuse(self, line):
        print(f"{self.path}, line {line}: it is cut off, or of another table, or its row stands "
              "there twice; delete all rows of its run: they are made again", file=sys.stderr)
        sys.exit(2)

    def place(self, row):
        """What tells a row from all others."""
        names = [name for name in self.columns if name in self.key or name in WITHIN_RUN]
        return tuple(str(row.get(name, "")) for name in names)

    def rows(self):
        rows = self.as_written()
        for line, row in enumerate(rows, 2):
            for column, kind in self.numbers.items():
                try:
                    row[column] = kind(row[column])
                except ValueError:
                    self.refuse(line)
        return rows

    def need_rows(self):
        """End the command where there is nothing to show."""
        if not self.rows():
            sys.exit(f"{self.path} has no row yet: run this without --table")

    def append(self, rows):
        """Add those of the rows that are not there, without what is not among the columns. The
        table is replaced in one step: a kill cuts no row off."""
        with self.alone():
            before = self.as_written()
            there, text = {self.place(row) for row in before}, io.StringIO(newline="")
            writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows([*before, *(row for row in rows if self.place(row) not in there)])
            write_file(self.path, text.getvalue())

    @contextmanager
    def alone(self):
        """Hold the table: against other threads of this study, and against other studies."""
        with FILE_LOCK, only_writer(self.path.parent, wait=True):
            yield

    def kept_configs(self):
        return json.loads(self.configs.read_text()) if self.configs.exists() else {}

    def keep_config(self, run):
        """Put a run's settings and flags into NAME-configs.json."""
        config = read_config(run)
        self.put_config(run.name, {key: config[key] for key in ("train", "settings")})

    def put_config(self, name, config):
        with self.alone():
            configs = self.kept_configs() | {name: config}
            write_file(self.configs, json.dumps(configs, indent=1, sort_keys=True) + "\n")

    def copy_config(self, source, of_its, of_mine):
        """The config that another table keeps of one of its jobs, for one of this table's."""
        if config := source.kept_configs().get(name_of(of_its)):
            self.put_config(name_of(of_mine), config)

    def missing(self, jobs):
        """Those of the jobs, tuples of the key's values, that have no row yet."""
        present = {tuple(row[column] for column in self.key) for row in self.rows()}
        return [job for job in jobs if job not in present]

    def scores(self, tasks=TASKS, **which):
        """(seeds, tasks) of the rows that have these values, without seeds that lack a task."""
        of_seeds = {}
        for row in self.rows():
            if which.items() <= row.items():
                of_seeds.setdefault(row["seed"], {})[row["task"]] = row["score"]
        whole = [scores for _, scores in sorted(of_seeds.items()) if len(scores) == len(tasks)]
        return np.array([[scores[task] for task in tasks] for scores in whole])

    def methods(self, column, names, tasks=TASKS, **which):
        """name -> its scores, for those of the names that have any."""
        found = {name: self.scores(tasks, **{column: name}, **which) for name in names}
        return {name: matrix for name, matrix in found.items() if len(matrix)}


def iqm_interval(matrix):
    """The IQM over seeds and tasks, and its 95% interval -> (value, low, high)

    Seeds are resampled task by task, as rliable does. matrix: (seeds, tasks)
    """
    return iqm(matrix), *interval(list(matrix.T), iqm)


def points(matrix):
    """What plots.compare draws of a method: each task's mean and range over seeds, and the IQM."""
    return [*zip(matrix.mean(0), matrix.min(0), matrix.max(0)), iqm_interval(matrix)]


def cells(matrix):
    """A method's column: each task's mean and spread over seeds, and the IQM."""
    value, low, high = iqm_interval(matrix)
    if len(matrix) == 1:
        return [f"{score:.2f}" for score in matrix[0]] + [f"**{value:.3f}**"]
    spread = zip(matrix.mean(0), matrix.std(0))
    shown = [f"{mean:.2f} ± {std:.2f}" for mean, std in spread]
    return [*shown, f"**{value:.3f}** [{low:.3f}, {high:.3f}]"]


def print_scores(methods, tasks=TASKS):
    """A table in markdown. methods: name -> (seeds, tasks)

    The mean over tasks sees what the IQM leaves out: a task that is the worst for all.
    """
    head = [f"{name}, seeds: {len(matrix)}" for name, matrix in methods.items()]
    rows = zip([*tasks, "**IQM**"], *map(cells, methods.values()))
    means = [f"{matrix.mean():.3f} ± {matrix.mean(1).std():.3f}" for matrix in methods.values()]
    print_table(["", *head], [*rows, ["mean over tasks", *means]])


# ---------------------------------------------------------------- data

def need_data(folder, tasks=TASKS, transitions=TRANSITIONS, discount=0.99, **how):
    """Make what is missing of a data set. What is there by another discount, or with less of it,
    ends the command: its rows would come among the table's. how: of prepare.build"""
    try:
        prepare.there_already(folder.parent, [folder.name], tasks, transitions, discount)
        prepare.build(folder.parent, [folder.name], tasks, transitions, discount=discount, **how)
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- runs

def start_or_resume(run, flags):
    """Flags of train.py for a run, a new one or one that was killed, which has to be of the same
    flags."""
    refuse_other(run, flags)
    if (run / "config.json").exists():
        return ["--resume", run]
    return ["--out", run, "--eval-every", 0, "--threads", 1, "--no-verify", *flags]


def refuse_other(run, flags):
    """RunError if the run's folder is there, and of other flags than these, which decide what it
    comes to."""
    asked = parse_args(list(map(str, flags)))
    if (run / "config.json").exists() and differences(read_config(run), asked):
        raise RunError(f"{run} is of another recipe than `{' '.join(map(str, flags))}`: "
                       "move it away")


def differences(config, asked):
    """What a run's rows depend on, and its config has otherwise: {name: (its value, the asked)}

    asked: flags, parsed. What an older config lacks is no difference.
    """
    run = TrainConfig(**asked.run)
    run.steps = run.steps or steps_of(run.size)
    settings = settings_for(run.algo, **asked.loss)
    nothing = {"out"}.union(*(names for names, _ in idle(settings)))  # changes nothing
    wanted = asdict(run) | asdict(settings)
    kept = config["train"] | config["settings"]
    return {name: (kept[name], value) for name, value in wanted.items()
            if (name in DECIDE or name not in MAY_CHANGE) and name not in nothing
            and kept.get(name, value) != value}


def refuse_own(flags, own=("algo", "seed", "data", "out")):
    """End the command if the user's flags of train.py have one that the study gives itself: rows
    would be named by the study's."""
    asked = parse_args(flags)
    for name in own:
        if name in asked.run:
            print(f"--{name} behind the -- is what the study gives: choose its rows by the "
                  "study's own flags, before the --", file=sys.stderr)
            sys.exit(2)


def result_of(path, command):
    """The summary that a command leaves in `path`. It is not run again if it is there.

    Its output goes to a log beside the run's folder, which the summary is in.
    """
    log = Path(f"{path.parent}.log")
    if not (summary := whole(path)):
        call(command, log)
        summary = whole(path)
    if not summary:
        raise RunError(f"a run has left no {path} of its last update; {log} says more")
    return summary


def whole(path):
    """The summary in `path`, if it is of its run's last update and of as many episodes as the run
    was to have: whoever looked at a run on the way has left one of less."""
    if not path.exists():
        return None
    summary, asked = json.loads(path.read_text()), read_config(path.parent)["train"]
    last = int(summary["checkpoint"]) == asked["steps"]
    return summary if last and summary["episodes"] >= asked["episodes"] else None


def call(command, path):
    """python COMMAND, in a process of one thread; its output goes to the end of the log `path`.

    Episodes that failed are no reason to stop: the summary counts them. RunError for other ends
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *map(str, command)]
    with open(path, "a") as log:
        ran = subprocess.run(command, stdout=log, stderr=log,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    if ran.returncode in STOPPED:
        raise RunError(f"a run was stopped; its log is {path}")
    if ran.returncode not in (0, EPISODES_FAILED):
        raise RunError(f"a run has failed; {path} says why")


def at_a_time(workers, work, jobs):
    """work(job) for every job, several at a time, each on one thread.

    One that fails by a RunError, which says why, stops no other; the command ends with 2 then.
    After Ctrl-C, which the runs get too and save by, no other is started, and it ends with 130.
    """
    failed = []

    def attempt(job):
        try:
            work(job)
        except RunError as error:
            failed.append(job)
            print(error, file=sys.stderr, flush=True)

    print(f"{len(jobs)} runs, {workers} at a time")
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(attempt, job) for job in jobs]:
                future.result()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second is for the runs in hand alone
            pool.shutdown(wait=False, cancel_futures=True)
            print(GOES_ON, file=sys.stderr)
            sys.exit(130)
    if failed:
        sys.exit(2)


def in_processes(workers, work, jobs):
    """Yield work(job) of every job when it is done, several at a time, each in a process of its
    own. Ctrl-C ends those in hand, and the command with 130."""
    ignore = signal.SIGINT, signal.SIG_IGN  # else each process may print a traceback
    with get_context("spawn").Pool(workers, signal.signal, ignore, maxtasksperchild=1) as pool:
        try:
            yield from pool.imap_unordered(work, jobs)
        except KeyboardInterrupt:
            print(GOES_ON, file=sys.stderr)
            sys.exit(130)


def rows_of(summary, table, job, **more):
    """A row of the table for each task of a summary."""
    failed = f", episodes failed: {len(summary['failed'])}" if summary["failed"] else ""
    print(time.strftime("%H:%M"), *job, f"IQM {shown(summary['iqm'])}{failed}", flush=True)
    columns = dict(zip(table.key, job), episodes=summary["episodes"], iqm=rounded(summary["iqm"]))
    rows = []
    for task, row in summary["tasks"].items():
        rows.append({**columns, **more, "task": task, "score": rounded(row["score"]),
                     "success": row.get("success", "")})
    return rows


def rounded(score):
    """As a table has it: nothing for a task without a reference."""
    return "" if score is None else round(score, 4)


def flags_of(job, data, more):
    """Of train.py, for a job: group, algorithm, seed, and what else is in the table's key."""
    _, algo, seed, *_ = job
    merit = ["--merit", "return"] if algo in BY_RETURN else []
    return ["--algo", algo.removesuffix("_return"), "--seed", seed, "--data", data,
            "--episodes", EPISODES, *merit, *more]


def train(table, job, flags, other_act=None):
    """One run of train.py to its end, and those of its rows that the table lacks.

    other_act: another way to act, by which it is played as well
    """
    run = table.runs / name_of(job)
    seed = job[table.key.index("seed")]
    summary = result_of(run / "eval.json", ["train.py", *start_or_resume(run, flags)])
    rows = rows_of(summary, table, job)
    if other_act:
        command = ["eval.py", run, "--act", other_act, "--seed", seed + 1,
                   "--episodes", summary["episodes"]]
        summary = result_of(run / f"eval-{other_act}.json", command)
        rows += rows_of(summary, table, played_otherwise(job, other_act))
    table.append(rows)
    table.keep_config(run)


def name_of(job):
    """Of the run's folder, and of its entry in NAME-configs.json."""
    return "-".join(map(str, job)).replace(", ", "-").replace(" ", "-")


def played_otherwise(job, act):
    """The key of the rows of a run that was played by another way to act."""
    group, algo, *others = job
    return group, f"{algo}-{act}", *others


def unfinished(table, jobs, flags_of, more, other_acts=None):
    """Those of the jobs that lack a row, in either way to act.

    Ends the command if the table has a row of one, or of another seed of it, that was made by
    other flags: they would be shown as what was asked for. flags_of: of train.py, for a job.
    more: the user's, among them. other_acts: an algorithm's
    """
    refuse_own(more)
    other_acts = other_acts or {}

    def rows(job):
        act = other_acts.get(job[1])
        return [job, played_otherwise(job, act)] if act else [job]

    place = table.key.index("seed")
    wanted = {(*job[:place], *job[place + 1:]) for job in jobs}
    present = dict.fromkeys(tuple(row[column] for column in table.key) for row in table.rows())
    for job in present:
        if (*job[:place], *job[place + 1:]) in wanted:
            if why := other_rows(table, job, flags_of(job), parse_args(list(map(str, more)))):
                print(f"{table.path} has rows of {name_of(job)} {why}: give a --folder of its own",
                      file=sys.stderr)
                sys.exit(2)
    return [job for job in jobs if table.missing(rows(job))]


def other_rows(table, job, flags, given):
    """In what a job's rows are of other flags, in words, or None. given: the user's, parsed"""
    config = table.kept_configs().get(name_of(job))
    if not config:
        return "whose settings were not kept" if given.run or given.loss else None
    for name, (kept, value) in differences(config, parse_args(list(map(str, flags)))).items():
        # Some of the oldest were evaluated later than trained, by the study's number.
        if name != "episodes" or "episodes" in given.run:
            return f"by {name} {kept}, and not {value}"


def new_parser(doc):
    """The flags that all studies have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=COUNT, default=2,
                        help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="no runs: only what is shown")
    parser.add_argument("--folder", type=Path, help="instead of runs/ and results/, for a trial")
    return parser


def add_choices(parser, name, groups, algos):
    """The flags of a study that compares algorithms on several data sets."""
    default = "default: %(default)s"
    parser.add_argument(f"--{name}", nargs="+", choices=groups, default=groups, help=default)
    parser.add_argument("--algo", nargs="+", choices=algos, default=algos, help=default)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help=default)
    parser.add_argument("flags", nargs="*", help="of train.py, behind a --")
