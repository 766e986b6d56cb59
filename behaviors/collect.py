"""Rolls the behaviours out: the episodes of the default data set (`python prepare.py build`)."""

import csv
import multiprocessing
import os
import signal
from pathlib import Path

import gymnasium
import numpy as np

import behaviors
import envs
from behaviors import INSTRUCTIONS, PARTS
from data import Episode

BLOCK = 10_000  # transitions made by one worker at a time
RANDOM_STRETCH, STRETCH = (5, 31), (20, 151)  # steps until the level may change, in `switching`


def play(env, policies, noise, level, shares, rng):
    """One episode of one level, or, if None, of levels that change on the way, by their shares."""
    switching, stretch = level is None, 0
    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    observations, actions, rewards = [obs], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        if switching and stretch == 0:
            level = rng.choice(list(shares), p=list(shares.values()))
            stretch = rng.integers(*(RANDOM_STRETCH if level == "random" else STRETCH))
        stretch -= 1
        action = policies[level](obs, rng, noise)
        obs, reward, terminated, truncated, _ = env.step(action)
        observations.append(obs)
        actions.append(action)
        rewards.append(reward)
    arrays = [np.array(x, np.float32) for x in (observations, actions, rewards)]
    return Episode(*arrays, terminated)


def play_block(job):
    """A list of episodes; job as of `jobs_of`"""
    env_id = job[0]
    env = gymnasium.make(env_id, disable_env_checker=True)
    return play_some(env, behaviors.load(env_id), behaviors.ACTION_NOISE[env_id], job)


def play_some(env, policies, noise, job):
    """A list of episodes, of as many transitions as the job asks for, or a few more."""
    _, level, transitions, shares, seed = job
    rng = np.random.default_rng(seed)
    episodes, count = [], 0
    while count < transitions:
        episodes.append(play(env, policies, noise, level, shares, rng))
        count += len(episodes[-1].reward)
    return episodes


def jobs_of(task, part, transitions, shares, seed):
    """What play_block is asked for: tuples (task, level, transitions, shares, seed).

    `beyond` is `switching` without the expert: the other levels keep their proportions.
    """
    if part == "beyond":
        rest = 1 - shares["expert"]
        shares = {level: shares[level] / rest for level in shares if level != "expert"}
    amounts = {None: transitions}
    if part == "levels":
        amounts = {level: share * transitions for level, share in shares.items()}
    jobs = []
    for number, (level, amount) in enumerate(amounts.items()):
        for block in range(0, round(amount), BLOCK):
            block_seed = [seed, PARTS.index(part), number, block]
            jobs.append((task, level, min(BLOCK, amount - block), shares, block_seed))
    return jobs


def processes():
    """A pool of as many processes as there are cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # spawn: a fork of a process that has used torch's threads can hang
    # Ctrl-C is the parent's to answer: without it, the others end.
    return multiprocessing.get_context("spawn").Pool(min(cores, 8), signal.signal,
                                                     (signal.SIGINT, signal.SIG_IGN))


def describe(task, discount):
    """The meta of a task of the default data before its first episode."""
    return envs.describe(task, INSTRUCTIONS[task], discount, reference(task))


def reference(env_id):
    """The returns that score 0 and 1, from returns.csv: the random policy's and the expert's."""
    with open(Path(behaviors.__file__).with_name("returns.csv")) as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == env_id]
    means = {row["level"]: float(row["mean_return"]) for row in rows}
    return {level: means[level] for level in ("random", "expert")}
