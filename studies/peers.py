"""Study 2: d3rlpy's specialists, one for each task, beside PAC's one model, by time.

    pip install d3rlpy -r requirements.txt   in a virtual environment of its own
    python -m studies.peers                  the runs of a minute that are missing, then the tables
    python -m studies.peers --minutes 1 5 15 --methods td3+bc iql --seeds 0 1      with more time
    python -m studies.peers --minutes 5 15 --methods pac --seeds 0 1      and PAC, as often as long
    python -m studies.peers --part beyond --minutes 5 --methods td3+bc iql --seeds 0
    python -m studies.peers --table          no runs: tables and figures from results/study2.csv

TD3+BC, IQL and AWAC as d3rlpy's own reproductions set them, on the data that PAC's run trained on,
`switching` or `beyond`. A specialist trains on one thread, for minutes that are counted without
loading and playing. PAC's own budget, 10,000 updates, is less than a minute a task on an
undisturbed thread; with that its scores are those of results/study1.csv.
"""

import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import data
import plots
from behaviors import TASKS
from envs import Play
from eval import seed_of, summarise
from studies import print_table
from studies.ladder import study1
from studies.runs import (DRAWN, EPISODES, NUMBERS, SEEDS, SHOWN_ROWS, Table, at_a_time,
                          in_processes, need_data, new_parser, points, print_scores, result_of,
                          start_or_resume)
from train import steps_of

PARTS = ("switching", "beyond")
METHODS = ("td3+bc", "iql", "awac")
COLUMNS = ("part", "method", "minutes", "seed", "task", "seconds", "score", "updates")
MINUTES = (1, 5, 15)
MARKS = tuple(map(str, MINUTES))
LONG = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5")  # get more than a minute
CHUNK = 100  # updates between two looks at the clock


# ---------------------------------------------------------------- d3rlpy's side

def make(method):
    """The algorithm, as d3rlpy's reproduction scripts set it: its defaults, and what is here."""
    from d3rlpy import algos, preprocessing
    from d3rlpy.models.encoders import VectorEncoderFactory
    if method == "td3+bc":
        scaler = preprocessing.StandardObservationScaler()
        config = algos.TD3PlusBCConfig(observation_scaler=scaler)
    elif method == "iql":
        scaler = preprocessing.ReturnBasedRewardScaler(multiplier=1000.0)
        config = algos.IQLConfig(reward_scaler=scaler)
    else:
        network = VectorEncoderFactory([256] * 4)
        config = algos.AWACConfig(actor_encoder_factory=network, critic_encoder_factory=network)
    return config.create(device=False)


def replay_buffer(task):
    """A data.Task as d3rlpy's data set, actions scaled to [-1, 1].

    It drops the last step of a truncated episode.
    """
    from d3rlpy.dataset import MDPDataset
    low, high = np.float32(task.meta["action_low"]), np.float32(task.meta["action_high"])
    columns = [], [], [], [], []
    for episode in task:
        last = np.arange(len(episode.reward)) == len(episode.reward) - 1
        action = 2 * (episode.action - low) / (high - low) - 1
        rows = (episode.obs[:-1], action, episode.reward, last & episode.terminated,
                last & (not episode.terminated))
        for column, values in zip(columns, rows):
            column.append(values)
    return MDPDataset(*map(np.concatenate, columns))


def training(method, task):
    """-> the algorithm, and a generator that trains it on the task, CHUNK updates at a time."""
    from d3rlpy.logging import NoopAdapterFactory
    algo = make(method)
    return algo, algo.fitter(replay_buffer(task), n_steps=10**9, n_steps_per_epoch=CHUNK,
                             show_progress=False, logger_adapter=NoopAdapterFactory())


# ---------------------------------------------------------------- runs

def play(algo, meta, seed):
    """The score of EPISODES episodes, from the same starts as eval.py's with this seed."""
    plays = [Play(0, number, meta, False, False) for number in range(EPISODES)]
    for one in plays:
        one.start(seed_of(seed, one.number))
    while live := [one for one in plays if one.live]:
        actions = algo.predict(np.array([one.obs[-1] for one in live], np.float32))
        for one, action in zip(live, actions):
            one.step(np.clip(action, -1, 1))
    return summarise(plays)["tasks"][meta["name"]]["score"]


def run(job):
    """A specialist, played after so many minutes of training each -> its rows of the table"""
    (part, method, seed, name), marks = job
    import d3rlpy
    import torch
    torch.set_num_threads(1)
    d3rlpy.seed(seed)
    task = data.Task(f"datasets/{part}/{name}")
    algo, fit = training(method, task)
    updates, trained, rows = 0, 0.0, []
    for minutes in sorted(marks):
        began = time.monotonic() - trained
        while trained < 60 * minutes:
            next(fit)
            updates += CHUNK
            trained = time.monotonic() - began
        score = play(algo, {"name": name, **task.meta}, seed + 1)
        rows.append({"part": part, "method": method, "minutes": minutes, "seed": seed, "task": name,
                     "seconds": round(trained, 1), "score": round(score, 4), "updates": updates})
    return rows


def run_specialists(table, jobs, workers):
    """jobs: keys of the table's rows. Those of one specialist are one run."""
    marks = {}
    for part, method, minutes, seed, task in jobs:
        marks.setdefault((part, method, seed, task), []).append(minutes)
    hours = sum(max(some) for some in marks.values()) / workers / 60
    print(f"{len(marks)} runs, {workers} at a time: about {hours:.1f} hours, and the episodes")
    for rows in in_processes(workers, run, marks.items()):
        table.append(rows)
        for row in rows:
            print(time.strftime("%H:%M"), *row.values(), flush=True)


def run_pac(table, part, minutes, seed):
    """PAC with `minutes` times its default's updates -> rows of the table"""
    folder = table.runs / f"{part}-pac-{minutes}-{seed}"
    steps = minutes * steps_of("small")
    flags = ["--data", f"datasets/{part}", "--steps", steps, "--seed", seed, "--episodes", EPISODES]
    summary = result_of(folder / "eval.json", ["train.py", *start_or_resume(folder, flags)])
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    seconds = json.loads(last)["seconds"] / len(TASKS)
    about = {"part": part, "method": "pac", "minutes": minutes, "seed": seed, "updates": steps,
             "seconds": round(seconds, 1)}
    table.append([{**about, "task": task, "score": round(row["score"], 4)}
                  for task, row in summary["tasks"].items()])
    table.keep_config(folder)


# ---------------------------------------------------------------- what is shown

def by_time(table, part):
    """task -> {method: {minutes: (mean, least, most) over seeds}}, of the tasks in LONG"""
    panels = {}
    for task in LONG:
        for method in (*METHODS, "pac"):
            for minutes in MINUTES:
                which = dict(task=task, part=part)
                matrix = table.scores((task,), method=method, minutes=minutes, **which)
                if method == "pac" and minutes == 1:
                    matrix = study1().scores((task,), algo="pac", **which)
                if len(matrix):
                    line = panels.setdefault(task, {}).setdefault(method, {})
                    line[f"{minutes}"] = matrix.mean(), matrix.min(), matrix.max()
    return panels


def show_minute(table):
    """The table and the figure of equal seconds a task."""
    methods = table.methods("method", METHODS, minutes=1, part="switching")
    methods |= study1().methods("algo", ("pac",), part="switching")
    print_scores(methods)
    if len(methods) > 1:
        *specialists, pac = [matrix.mean(0) for matrix in methods.values()]
        level = (pac >= np.max(specialists, 0) - 0.02).sum()
        print(f"\nPAC: level with the best specialist, or better, on {level} of {len(TASKS)} tasks")
    drawn = {name: points(matrix) for name, matrix in methods.items()}
    drawn["pac, one model"] = drawn.pop("pac")
    plots.compare(drawn, SHOWN_ROWS, table.figure, DRAWN)
    print(f"wrote {table.figure}")


def show_time(table, part):
    """The table of scores by time, where some have had more than a minute; of `switching` with the
    figure."""
    if all(row["minutes"] == 1 for row in table.rows() if row["part"] == part):
        return
    panels = by_time(table, part)
    lines = [[task, method, *(f"{line[mark][0]:.2f}" if mark in line else "" for mark in MARKS)]
             for task, methods in panels.items() for method, line in methods.items()]
    print(f"\n{part}\n")
    print_table(["task", "method", *(f"{mark} min" for mark in MARKS)], lines)
    if part != "switching":
        return
    path = table.figure.with_name("study2_time.png")
    plots.against(panels, MARKS, path, "minutes a task", "score: mean and range over seeds")
    print(f"wrote {path}")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--part", choices=PARTS, default=PARTS[0], help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "pac"), default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--minutes", nargs="+", type=int, default=(1,), choices=MINUTES,
                        help="of training, a task; more than one on four of the tasks")
    args = parser.parse_args()
    table = Table("study2", COLUMNS, COLUMNS[:5], args.folder, {**NUMBERS, "minutes": int})
    if not args.table:
        wanted = [(args.part, method, minutes, seed, task)
                  for seed in args.seeds for method in args.methods for minutes in args.minutes
                  if (method, minutes) != ("pac", 1)  # is study 1's
                  for task in (TASKS if minutes == 1 or method == "pac" else LONG)]
        if jobs := table.missing(wanted):
            need_data(Path("datasets", args.part))
        budgets = dict.fromkeys((part, *rest) for part, method, *rest, _ in jobs if method == "pac")
        at_a_time(args.workers, lambda job: run_pac(table, *job), budgets)
        if specialists := [job for job in jobs if job[1] != "pac"]:
            run_specialists(table, specialists, args.workers)
    table.need_rows()
    show_minute(table)
    for part in PARTS:
        show_time(table, part)


if __name__ == "__main__":
    main()
