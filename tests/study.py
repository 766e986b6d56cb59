"""The studies behind the README's tables: many runs of train.py, two at a time, and what they show together.

    python -m tests.study 1                  every run that is missing, then results/study1.csv and study1.png
    python -m tests.study 1 --part levels    one part's runs only
    python -m tests.study 1 --table          no runs: the table and the figure from results/study1.csv
    python -m tests.study 1 --algo pac -- --eval-every 5000          flags for train.py

Study 1: five algorithms on the two parts of the default data. Study 3: BC and PAC on data with more or fewer
expert episodes. A run that was killed goes on from its checkpoint; one that is in the table is not made again.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from behaviors import TASKS, collect
from eval import checkpoints, evaluate, interval, iqm, load_run

RESULTS = Path(__file__).resolve().parent.parent / "results"
SEEDS = (0, 1, 2)
EPISODES = 20
OTHER_ACT = {"bcq": "improved", "pac": "mean"}  # what study 1 plays besides: is it the critic or the policy?
MINUTES = 7  # a run of `small` on one thread; two cores of an AMD EPYC (Zen 4) virtual machine, 2026-11-25


@dataclass
class Study:
    group: str  # the column that tells the data apart
    data: dict  # its values, and their folders
    algos: tuple
    columns: tuple


STUDIES = {
    1: Study("part", {part: f"datasets/{part}" for part in collect.PARTS}, ("bc", "fc", "bcq", "pacv", "pac"),
             ("part", "algo", "seed", "task", "episodes", "score")),
    3: Study("expert_share", {"0.0": "datasets/expert-0.0/levels", "0.02": "datasets/expert-0.02/levels", "0.1": "datasets/levels",
                               "0.5": "datasets/expert-0.5/levels"}, ("bc", "pac"),
             ("expert_share", "algo", "seed", "task", "score")),
}


def rows(path):
    if not path.exists():
        return []
    with open(path) as file:
        return [{**row, "seed": int(row["seed"]), "score": float(row["score"])} for row in csv.DictReader(file)]


def make_data(number, group):
    """Study 3's data: `levels` with another share of expert steps, the rest in the default's proportions."""
    if number == 3:
        share = float(group)
        scale = (1 - share) / (1 - collect.SHARES["expert"])
        shares = {level: share if level == "expert" else scale * part for level, part in collect.SHARES.items()}
        collect.build(Path(STUDIES[3].data[group]).parent, ["levels"], TASKS, collect.TRANSITIONS, shares)
    else:
        collect.build(parts=[group])


def copy_levels(algos, seeds):
    """Study 3's tenth is study 1's `levels`: the same data, so the same runs."""
    present = {(row["algo"], row["seed"]) for row in rows(RESULTS / "study3.csv") if row["expert_share"] == "0.1"}
    for row in rows(RESULTS / "study1.csv"):
        if row["part"] == "levels" and row["algo"] in algos and row["seed"] in seeds and (row["algo"], row["seed"]) not in present:
            append(3, [{**row, "expert_share": "0.1"}])


def append(number, new):
    """Add rows to a study's table."""
    path = RESULTS / f"study{number}.csv"
    first = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, STUDIES[number].columns, extrasaction="ignore")
        if first:
            writer.writeheader()
        writer.writerows(new)


def train(number, group, algo, seed, extra):
    """One run to its end -> its folder. Its output goes to a log beside it."""
    run = Path(f"runs/study{number}/{group}-{algo}-{seed}")
    if not (run / "eval.json").exists():
        run.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "train.py"]
        if checkpoints(run):
            command += ["--resume", run, "--no-verify"]
        else:
            command += ["--algo", algo, "--seed", seed, "--data", STUDIES[number].data[group], "--out", run, "--episodes",
                        EPISODES, "--eval-every", 0, "--threads", 1, "--no-verify", *extra]
        with open(f"{run}.log", "a") as log:
            subprocess.run(list(map(str, command)), stdout=log, stderr=log, check=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    return run


def run_all(number, groups, algos, seeds, workers, extra):
    study, lock = STUDIES[number], Lock()
    if number == 3 and "0.1" in groups:
        copy_levels(algos, seeds)
    present = {(row[study.group], row["algo"], row["seed"]) for row in rows(RESULTS / f"study{number}.csv")}
    jobs = [(group, algo, seed) for seed in seeds for group in groups for algo in algos if (group, algo, seed) not in present]
    print(f"{len(jobs)} runs, {workers} at a time: about {len(jobs) * MINUTES / workers / 60:.1f} hours")
    for group in {group: None for group, _, _ in jobs}:
        make_data(number, group)

    def job(group, algo, seed):
        run = train(number, group, algo, seed, extra)
        config, summary = (json.loads((run / name).read_text()) for name in ("config.json", "eval.json"))
        summaries = {algo: summary}
        if number == 1 and algo in OTHER_ACT:
            model, _ = load_run(run)
            summaries[f"{algo}-{OTHER_ACT[algo]}"] = evaluate(model, config["tasks"], EPISODES, seed + 1, OTHER_ACT[algo], config["settings"]["eta"])
        with lock:
            append(number, [{study.group: group, "algo": name, "seed": seed, "task": task, "episodes": EPISODES,
                             "score": round(row["score"], 4)}
                            for name, summary in summaries.items() for task, row in summary["tasks"].items()])
            configs_path = RESULTS / f"study{number}-configs.json"
            configs = json.loads(configs_path.read_text()) if configs_path.exists() else {}
            configs[run.name] = {key: config[key] for key in ("train", "settings")}
            configs_path.write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")
        print(f"{time.strftime('%H:%M')}  " + ", ".join(f"{name} {group} seed {seed}: IQM {summary['iqm']:.3f}"
                                                       for name, summary in summaries.items()), flush=True)

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(job, *entry) for entry in jobs]:
            future.result()


def scores(table, study, group, algo):
    """-> (seeds, tasks), and the tasks' names"""
    own = [row for row in table if row[study.group] == group and row["algo"] == algo]
    seeds, tasks = sorted({row["seed"] for row in own}), [task for task in TASKS if any(row["task"] == task for row in own)]
    found = {(row["seed"], row["task"]): row["score"] for row in own}
    return np.array([[found[seed, task] for task in tasks] for seed in seeds]), tasks


def iqm_interval(matrix):
    """IQM over runs and tasks, and its 95% interval: seeds are resampled task by task, as rliable does."""
    return iqm(matrix), interval(list(matrix.T), iqm)


def cells(matrix):
    """The table's entries of one algorithm: each task's mean and spread over seeds, and the IQM; of one seed, no spread."""
    many, (value, bounds) = len(matrix) > 1, iqm_interval(matrix)
    return [*(f"{mean:.2f}" + many * f" ± {std:.2f}" for mean, std in zip(matrix.mean(0), matrix.std(0))),
            f"**{value:.3f}**" + many * " [{:.3f}, {:.3f}]".format(*bounds)]


def report(number):
    """The table on the screen, in markdown, and the figure."""
    study, table = STUDIES[number], rows(RESULTS / f"study{number}.csv")
    for group in [group for group in study.data if any(row[study.group] == group for row in table)]:
        have = {algo: scores(table, study, group, algo) for algo in MARKERS
                if any(row[study.group] == group and row["algo"] == algo for row in table)}
        print(f"\n{study.group} {group}: mean ± standard deviation over seeds, {EPISODES} episodes each\n")
        print("| | " + " | ".join(f"{algo}, {len(m)} seed{'s'[:len(m) - 1]}" for algo, (m, _) in have.items()) + " |")
        print("|---" * (1 + len(have)) + "|")
        for row in zip([*TASKS, "**IQM**"], *(cells(m) for m, _ in have.values())):
            print("| " + " | ".join(row) + " |")
    (figure1 if number == 1 else figure3)(study, table, RESULTS / f"study{number}.png")


MARKERS = {"bc": "o", "fc": "s", "bcq": "D", "bcq-improved": "d", "pacv": "^", "pac-mean": "<", "pac": "v"}


def figure1(study, table, path):
    """A panel for each part: tasks downwards, a marker for each algorithm; the last row is the IQM with its interval."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [part for part in study.data if any(row["part"] == part for row in table)]
    figure, axes = plt.subplots(1, len(parts), figsize=(5.5 * len(parts) + 1.5, 5), sharey=True, layout="constrained", squeeze=False)
    for part, ax in zip(parts, axes[0]):
        for number, algo in enumerate(MARKERS):
            if not any(row["part"] == part and row["algo"] == algo for row in table):
                continue
            matrix, tasks = scores(table, study, part, algo)
            value, bounds = iqm_interval(matrix)
            centre = [*matrix.mean(0), value]
            low, high = [*matrix.min(0), bounds[0]], [*matrix.max(0), bounds[1]]
            y = np.arange(len(centre))[::-1] + 0.7 * (0.5 - (number + 0.5) / len(MARKERS))
            ax.errorbar(centre, y, xerr=[np.subtract(centre, low), np.subtract(high, centre)], fmt=MARKERS[algo], capsize=2,
                        color=plt.cm.viridis(0.85 * number / (len(MARKERS) - 1)), label=algo)
        for x in (0, 1):
            ax.axvline(x, color="grey", linewidth=0.8, linestyle=":")
        ax.set_yticks(range(len(TASKS) + 1), ["IQM", *reversed(TASKS)])
        ax.set_xlabel("normalised score (0: random, 1: expert)"), ax.set_title(f"data: {part}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("mean and range over seeds; IQM with its 95% interval", fontsize=9)
    figure.savefig(path, dpi=130)


def figure3(study, table, path):
    """IQM against the share of expert steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    seeds = len({row["seed"] for row in table})
    for number, algo in enumerate(study.algos):
        groups = [group for group in study.data if any(row["expert_share"] == group and row["algo"] == algo for row in table)]
        if not groups:
            continue
        places = np.array([list(study.data).index(group) for group in groups])
        values = [iqm_interval(scores(table, study, group, algo)[0]) for group in groups]
        centre, bounds = np.array([value for value, _ in values]), np.array([bounds for _, bounds in values])
        ax.errorbar(places + 0.05 * number, centre, yerr=[centre - bounds[:, 0], bounds[:, 1] - centre],
                    fmt=MARKERS[algo] + "-", capsize=3, color=plt.cm.viridis(0.7 * number), label=algo)
    ax.set_xticks(range(len(study.data)), [f"{float(group):.0%}" for group in study.data])
    ax.set_xlabel("share of expert steps in the data")
    ax.set_ylabel("IQM of normalised scores, " + ("95% interval over seeds" if seeds > 1 else "one seed"))
    ax.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=int, choices=STUDIES)
    parser.add_argument("--part", nargs="+", help="only these parts or shares of the data")
    parser.add_argument("--algo", nargs="+", help="only these algorithms")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="no runs: only the table and the figure")
    parser.add_argument("flags", nargs="*", help="of train.py, behind a --")
    args = parser.parse_args()
    study = STUDIES[args.study]
    torch.set_num_threads(1)
    if not args.table:
        run_all(args.study, args.part or list(study.data), args.algo or study.algos, args.seeds, args.workers, args.flags)
    report(args.study)


if __name__ == "__main__":
    main()
