"""Rolls the behaviours out into the default data set: `python data.py build`."""

import csv
import multiprocessing
import os
from pathlib import Path

import gymnasium
import numpy as np
from tqdm import tqdm

import behaviors
import data

INSTRUCTIONS = {  # the task description that the model reads
    "HalfCheetah-v5": "run forward as fast as you can with the half cheetah",
    "Hopper-v5": "hop forward on one leg without falling",
    "Walker2d-v5": "walk forward on two legs without falling",
    "Swimmer-v5": "swim forward by bending the three link snake",
    "InvertedDoublePendulum-v5": "balance the double pendulum upright on the cart",
    "Reacher-v5": "reach the target with the tip of the arm",
    "Pusher-v5": "push the cylinder to the goal with the arm",
}
# Shares of each level in the default data: by steps in `levels`, by stretches in `switching`.
SHARES = {"random": 0.2, "weak": 0.4, "medium": 0.3, "expert": 0.1}
PARTS = ("switching", "levels")
TRANSITIONS = 300_000  # a task and part
BLOCK = 10_000  # transitions made by one worker at a time


def collect(job):
    """Roll out one block of episodes; `job` = (env_id, part, level, transitions, shares, seed)."""
    env_id, part, level, transitions, shares, seed = job
    rng = np.random.default_rng(seed)
    policies = behaviors.load(env_id)
    env = gymnasium.make(env_id, disable_env_checker=True)
    noise = behaviors.ACTION_NOISE[env_id]
    episodes, count = [], 0
    while count < transitions:
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        observations, actions, rewards, stretch = [obs], [], [], 0
        terminated = truncated = False
        while not (terminated or truncated):
            if part == "switching" and stretch == 0:
                level = rng.choice(list(shares), p=list(shares.values()))
                stretch = rng.integers(5, 31) if level == "random" else rng.integers(20, 151)
            stretch -= 1
            action = policies[level](obs, rng, noise)
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs), actions.append(action), rewards.append(reward)
        episodes.append(data.Episode(np.array(observations, np.float32), np.array(actions, np.float32),
                                     np.array(rewards, np.float32), terminated))
        count += len(rewards)
    return episodes


def reference(env_id):
    """The returns that score 0 and 1: of the uniform random policy and of the expert, from behaviors/returns.csv."""
    with open(Path(behaviors.__file__).with_name("returns.csv")) as file:
        means = {row["level"]: float(row["mean_return"]) for row in csv.DictReader(file) if row["task"] == env_id}
    return {level: means[level] for level in ("random", "expert")}


def build(folder=data.DEFAULT_DATA, parts=PARTS, tasks=behaviors.TASKS, transitions=TRANSITIONS, shares=SHARES,
          seed=0, discount=0.99):
    """Make the missing tasks of the default data set: folder/part/task. The result depends on the seed alone."""
    wanted = [(part, task) for part in parts for task in tasks if not (Path(folder) / part / task).exists()]
    if not wanted:
        return
    processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 8)
    # spawn: a fork of a process that has used torch's threads can hang
    with multiprocessing.get_context("spawn").Pool(processes) as pool, \
            tqdm(total=len(wanted) * transitions, unit="step", unit_scale=True, desc="data") as bar:
        for part, task in wanted:
            amounts = {level: share * transitions for level, share in shares.items()} if part == "levels" \
                else {None: transitions}
            jobs = [(task, part, level, min(BLOCK, amount - block), shares, [seed, PARTS.index(part), number, block])
                    for number, (level, amount) in enumerate(amounts.items()) for block in range(0, round(amount), BLOCK)]

            def episodes():
                for block in pool.imap(collect, jobs):
                    bar.set_postfix_str(f"{part}/{task}")
                    for episode in block:
                        bar.update(len(episode.reward))
                        yield episode

            meta = data.new_meta(task, INSTRUCTIONS[task], discount, reference(task))
            with data.whole(Path(folder) / part / task) as partial:
                data.append(partial, episodes(), meta)


def add_commands(commands):
    command = commands.add_parser("build", help="make the default data set (what is missing of it)")
    command.add_argument("--out", type=Path, default=data.DEFAULT_DATA, help="folder (default: %(default)s)")
    command.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    command.add_argument("--tasks", nargs="+", choices=behaviors.TASKS, default=behaviors.TASKS, metavar="TASK")
    command.add_argument("--transitions", type=int, default=TRANSITIONS, help="a task and part (default: %(default)s)")
    command.add_argument("--shares", type=float, nargs=4, default=list(SHARES.values()), metavar="SHARE",
                         help=f"of {', '.join(SHARES)} (default: {' '.join(map(str, SHARES.values()))})")
    command.add_argument("--discount", type=float, default=0.99, help="of the returns to go (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=run)


def run(args):
    if abs(sum(args.shares) - 1) > 1e-6:
        raise data.DataError(f"--shares add up to {sum(args.shares)}, not 1")
    build(args.out, args.part, args.tasks, args.transitions, dict(zip(SHARES, args.shares)), args.seed, args.discount)
