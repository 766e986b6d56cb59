"""Study 2: d3rlpy's specialists, one for each task, beside PAC's one model: equal seconds a task, on one thread.

    pip install d3rlpy -r requirements.txt     in a virtual environment of its own
    python -m tests.peers                      every run that is missing, then results/study2.csv and study2.png
    python -m tests.peers --table              the table and the figure alone, with PAC from results/study1.csv

TD3+BC, IQL and AWAC as d3rlpy's own reproductions set them, on the `switching` data that PAC's run trained on. A
specialist may train for a seventh of the time that PAC's run took; loading the data does not count.
"""

import argparse
import csv
import os
import time
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import data
from behaviors import TASKS
from eval import make_env, normalise
from tests.study import EPISODES, RESULTS, SEEDS, cells, iqm_interval, rows, scores

SECONDS = 60  # a task: PAC's 10,000 updates take about 7 minutes on an undisturbed thread
DATA = "datasets/switching"
METHODS = ("td3+bc", "iql", "awac")
CHUNK = 100  # updates between two looks at the clock
COLUMNS = ("method", "seed", "task", "seconds", "score", "updates")


def make(method):
    """The algorithm, with the settings of d3rlpy's reproduction scripts (its defaults, and what is named here)."""
    from d3rlpy import algos, preprocessing
    from d3rlpy.models.encoders import VectorEncoderFactory
    if method == "td3+bc":
        config = algos.TD3PlusBCConfig(observation_scaler=preprocessing.StandardObservationScaler())
    elif method == "iql":
        config = algos.IQLConfig(reward_scaler=preprocessing.ReturnBasedRewardScaler(multiplier=1000.0))
    else:
        config = algos.AWACConfig(actor_encoder_factory=VectorEncoderFactory([256] * 4),
                                  critic_encoder_factory=VectorEncoderFactory([256] * 4))
    return config.create(device=False)


def replay_buffer(task):
    """A data.Task as d3rlpy's data set, actions scaled to [-1, 1]. It drops the last step of a truncated episode."""
    from d3rlpy.dataset import MDPDataset
    low, high = (np.array(task.meta[name], np.float32) for name in ("action_low", "action_high"))
    obs, action, reward, terminated, truncated = [], [], [], [], []
    for episode in task:
        last = np.arange(len(episode.reward)) == len(episode.reward) - 1
        obs.append(episode.obs[:-1]), action.append(2 * (episode.action - low) / (high - low) - 1)
        reward.append(episode.reward), terminated.append(last & episode.terminated), truncated.append(last & (not episode.terminated))
    return MDPDataset(*(np.concatenate(x) for x in (obs, action, reward, terminated, truncated)))


def training(method, task):
    """-> the algorithm, and a generator that trains it on the task, CHUNK updates at a time."""
    from d3rlpy.logging import NoopAdapterFactory
    algo = make(method)
    return algo, algo.fitter(replay_buffer(task), n_steps=10**9, n_steps_per_epoch=CHUNK, show_progress=False,
                             logger_adapter=NoopAdapterFactory())


def play(algo, meta, seed):
    """The returns of EPISODES episodes, from the same starts as eval.py's with this seed."""
    low, high = (np.array(meta[name], np.float32) for name in ("action_low", "action_high"))
    envs = {number: make_env(meta) for number in range(EPISODES)}
    live = {number: env.reset(seed=seed * 10_000 + number)[0] for number, env in envs.items()}
    returns = np.zeros(EPISODES)
    while live:
        actions = algo.predict(np.array(list(live.values()), np.float32))
        for number, action in zip(list(live), actions):
            live[number], reward, terminated, truncated, _ = envs[number].step(low + (np.clip(action, -1, 1) + 1) / 2 * (high - low))
            returns[number] += reward
            if terminated or truncated:
                del live[number]
    return returns


def run(job):
    method, seed, name, seconds = job
    import d3rlpy
    import torch
    torch.set_num_threads(1)
    d3rlpy.seed(seed)
    task = data.Task(f"{DATA}/{name}")
    (algo, fit), updates = training(method, task), 0
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        next(fit)
        updates += CHUNK
    trained = time.monotonic() - began
    score = normalise(play(algo, task.meta, seed + 1), task.meta).mean()
    return {"method": method, "seed": seed, "task": name, "seconds": round(trained, 1), "score": round(float(score), 4),
            "updates": updates}


def report():
    """The table in markdown, and the figure: a row for each task, a marker for each method, and PAC's one model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = [{**row, "part": "switching", "algo": row["method"]} for row in rows(RESULTS / "study2.csv")]
    pac = [row for row in rows(RESULTS / "study1.csv") if row["part"] == "switching" and row["algo"] == "pac"]

    class Both:
        group = "part"
    whole = [m for m in (*METHODS, "pac") if {row["task"] for row in table + pac if row["algo"] == m} == set(TASKS)]
    have = {method: scores(table + pac, Both, "switching", method)[0] for method in whole}
    print("| | " + " | ".join(f"{method}, {len(m)} seed{'s'[:len(m) - 1]}" for method, m in have.items()) + " |\n|---" + "|---" * len(have) + "|")
    for row in zip([*TASKS, "**IQM**"], *map(cells, have.values())):
        print("| " + " | ".join(row) + " |")
    intervals = {method: iqm_interval(m) for method, m in have.items()}
    best = np.max([have[method].mean(0) for method in whole[:-1]], 0)
    print(f"\nPAC is level with the best specialist, or better, on {(have['pac'].mean(0) >= best - 0.02).sum()} of {len(TASKS)} tasks")

    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    for number, (method, matrix) in enumerate(have.items()):
        value, bounds = intervals[method]
        centre, low, high = [*matrix.mean(0), value], [*matrix.min(0), bounds[0]], [*matrix.max(0), bounds[1]]
        y = np.arange(len(centre))[::-1] + 0.6 * (0.5 - (number + 0.5) / len(have))
        ax.errorbar(centre, y, xerr=[np.subtract(centre, low), np.subtract(high, centre)], fmt="osDv"[number], capsize=2,
                    color=plt.cm.viridis(0.85 * number / (len(have) - 1)), label="pac, one model" if method == "pac" else method)
    for x in (0, 1):
        ax.axvline(x, color="grey", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(TASKS) + 1), ["IQM", *reversed(TASKS)])
    ax.set_xlabel("normalised score (0: random, 1: expert)")
    ax.set_title("mean and range over seeds; IQM with its 95% interval", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(have), frameon=False)
    figure.savefig(RESULTS / "study2.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training, a task")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="no runs: only the table and the figure")
    args = parser.parse_args()
    path = RESULTS / "study2.csv"
    present = {(row["method"], row["seed"], row["task"]) for row in rows(path)}
    jobs = [(method, seed, task, args.seconds) for seed in args.seeds for method in args.methods for task in TASKS
            if (method, seed, task) not in present]
    if jobs and not args.table:
        print(f"{len(jobs)} runs, {args.workers} at a time: about {len(jobs) * (args.seconds + 15) / args.workers / 3600:.1f} hours")
        with get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
            for row in pool.imap_unordered(run, jobs):
                new = not path.exists()
                with open(path, "a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(time.strftime("%H:%M"), *row.values(), flush=True)
    report()


if __name__ == "__main__":
    main()
