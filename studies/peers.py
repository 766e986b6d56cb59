"""Study 2: d3rlpy's specialists, one for each task, beside PAC's one model: equal seconds a task.

    pip install d3rlpy -r requirements.txt   in a virtual environment of its own
    python -m studies.peers                  the runs that are missing, then table and figure
    python -m studies.peers --table          no runs: table and figure from results/study2.csv

PAC's scores are those of results/study1.csv.

TD3+BC, IQL and AWAC as d3rlpy's own reproductions set them, on the `switching` data that PAC's run
trained on. A specialist may train, on one thread, for a seventh of the time that PAC's run took;
loading the data does not count.
"""

import os
import time
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import data
import plots
from behaviors import TASKS
from envs import Play
from eval import summarise
from studies.ladder import (DRAWN, EPISODES, SEEDS, SHOWN_ROWS, Table, new_parser, points,
                            print_scores, study1)

SECONDS = 60  # a task: PAC's 10,000 updates take about 7 minutes on an undisturbed thread
DATA = "datasets/switching"
METHODS = ("td3+bc", "iql", "awac")
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
        one.start(seed * 10_000 + one.number)
    while live := [one for one in plays if one.live]:
        actions = algo.predict(np.array([one.obs[-1] for one in live], np.float32))
        for one, action in zip(live, actions):
            one.step(np.clip(action, -1, 1))
    return summarise(plays)["tasks"][meta["name"]]["score"]


def run(job):
    """A specialist -> its row of the table"""
    (method, seed, name), seconds = job
    import d3rlpy
    import torch
    torch.set_num_threads(1)
    d3rlpy.seed(seed)
    task = data.Task(f"{DATA}/{name}")
    algo, fit = training(method, task)
    updates, trained, began = 0, 0, time.monotonic()
    while trained < seconds:
        next(fit)
        updates += CHUNK
        trained = time.monotonic() - began
    score = play(algo, {"name": name, **task.meta}, seed + 1)
    return {"method": method, "seed": seed, "task": name, "seconds": round(trained, 1),
            "score": round(score, 4), "updates": updates}


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training, a task")
    args = parser.parse_args()
    columns = ("method", "seed", "task", "seconds", "score", "updates")
    table = Table("study2", columns, ("method", "seed", "task"), args.folder)
    if not args.table:
        wanted = [(method, seed, task)
                  for seed in args.seeds for method in args.methods for task in TASKS]
        jobs = [(job, args.seconds) for job in table.missing(wanted)]
        hours = len(jobs) * (args.seconds + 15) / args.workers / 3600
        print(f"{len(jobs)} runs, {args.workers} at a time: about {hours:.1f} hours")
        with get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
            for row in pool.imap_unordered(run, jobs):
                table.append([row])
                print(time.strftime("%H:%M"), *row.values(), flush=True)

    table.need_rows()
    methods = table.methods("method", METHODS)
    methods |= study1().methods("algo", ("pac_before",), part="switching")
    print_scores(methods)
    if len(methods) > 1:
        *specialists, pac = [matrix.mean(0) for matrix in methods.values()]
        level = (pac >= np.max(specialists, 0) - 0.02).sum()
        print(f"\nPAC: level with the best specialist, or better, on {level} of {len(TASKS)} tasks")
    drawn = {name: points(matrix) for name, matrix in methods.items()}
    drawn["pac, one model"] = drawn.pop("pac_before")
    plots.compare(drawn, SHOWN_ROWS, table.figure, DRAWN)
    print(f"wrote {table.figure}")


if __name__ == "__main__":
    main()
