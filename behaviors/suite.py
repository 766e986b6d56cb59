"""The suite of 132 tasks of four domains: what `python prepare.py suite` makes its data from.

    suite.csv           a row a task: its environment, instruction, kind of behaviour, success
    suite_levels.csv    what the levels of each task were measured to be worth
    suite.npz           the policies that `behaviors.search` found
    wordings.csv        other words for some tasks; a model is not trained on those held out

A task has one controller, a script or a policy that was searched for. Its levels are that
controller with an error: it leans to one side, always the same one, by more the worse the level.
Noise alone would not do: it has a mean of zero, so a clone of any noisy level acts like the expert.
The tasks of levels.npz keep the levels that they have there.
"""

import csv
import importlib.util
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np

import behaviors
import envs
from behaviors import LEVELS, Policy, collect
from behaviors.controllers import scripted
from data import DataError

FOLDER = Path(behaviors.__file__).parent
POLICIES = FOLDER / "suite.npz"
PACKAGES = {  # what a domain's environments need: modules, and the line that installs them
    "gymnasium": ((), ""),
    "metaworld": (("metaworld",), "metaworld==3.1.1"),
    "dm_control": (("dm_control", "shimmy"), "dm_control==1.0.28 shimmy==2.0.1"),
    "robotics": (("gymnasium_robotics",), "gymnasium-robotics==1.4.2"),
}
NOISE = 0.1  # of every level's actions, in half-widths of the box


class Row(NamedTuple):
    """A row of suite.csv.

    Empty are: the step limit that an id is registered with; the key of `info` of a task without a
    signal of success; and expert_from of a task with behaviors.LEVELS.
    """
    task: str
    domain: str
    env_id: str
    max_episode_steps: str
    obs_dim: str
    action_dim: str
    behavior: str  # levels: of behaviors/levels.npz; scripted; ars or td3: searched for
    success: str  # the key in `info`
    expert_from: str  # the success rate from which a level is an expert; or without one the return
    instruction: str


def read(name):
    with open(FOLDER / name, newline="") as file:
        return list(csv.DictReader(file))


TABLE = {row["task"]: Row(**row) for row in read("suite.csv")}


def embodiment(task):
    """Tasks of one share the robot and what is observed of it: all of Meta-World's do.

    Of dm_control and gymnasium-robotics the beginning of the name tells the robot.
    """
    row = TABLE[task]
    if row.domain == "gymnasium":
        return ""
    robot = re.match(r"metaworld|dm-[^-]+|[A-Z][a-z]+", task)[0]
    return f"{robot}-{row.obs_dim}-{row.action_dim}"


def paraphrases(task, held_out=False):
    """Other wordings of a task's instruction; held_out: those that no model is trained on."""
    return [row["instruction"] for row in read("wordings.csv")
            if row["task"] == task and bool(row["held_out"]) == held_out]


def chosen(texts):
    """The names of tasks: `texts` are names of tasks or domains, metaworld:10 for the first 10, or
    all.
    """
    names = []
    for text in texts or ["all"]:
        domain, _, count = text.partition(":")
        found = [row.task for row in TABLE.values() if domain in (row.domain, "all")]
        if text in TABLE:
            found, count = [text], ""
        if not found:
            raise DataError(f"--tasks {text}: no such task or domain; the domains are "
                            f"{', '.join(PACKAGES)}, and behaviors/suite.csv lists the tasks")
        if not (count or ":" not in text) or not (count or "1").isdecimal() or count == "0":
            raise DataError(f"--tasks {text}: behind the colon stands a number, 1 or more")
        if count and int(count) > len(found):
            raise DataError(f"--tasks {text}: {domain} has {len(found)} tasks")
        names += found[:int(count)] if count else found
    return list(dict.fromkeys(names))


def need(names):
    """DataError if a package is missing that these tasks' environments need."""
    for domain in dict.fromkeys(TABLE[name].domain for name in names):
        modules, install = PACKAGES[domain]
        if not all(map(importlib.util.find_spec, modules)):
            raise DataError(f"the tasks of {domain} need `pip install {install}`")


def need_levels(names):
    """DataError if the levels of some of these tasks are not measured yet."""
    there = {row["task"] for row in read("suite_levels.csv")}
    there |= {row.task for row in TABLE.values() if row.behavior == "levels"}
    missing = [name for name in names if name not in there]
    if missing:
        some = " ".join(missing[:3]) + " ..." * (len(missing) > 3)
        raise DataError(f"suite_levels.csv lacks {len(missing)} of these {len(names)} tasks: "
                        f"`python -m behaviors.search --tasks {some}` measures them")


# ---------------------------------------------------------------- the behaviours

@dataclass(frozen=True)
class Leaning:
    """A controller that errs to one side: `lean` (A,) is added to its actions."""
    low: np.ndarray  # (A,) the action box
    high: np.ndarray
    controller: Callable  # obs (O,) -> an action (A,) in [-1, 1]; what lies outside is cut off
    lean: np.ndarray

    def __call__(self, obs, rng, noise=0.0):
        """-> an action (A,) in the box; noise as of behaviors.Policy"""
        unit = np.clip(self.controller(obs), -1, 1) + self.lean
        if noise:
            unit = unit + noise * rng.standard_normal(unit.shape)
        half = (self.high - self.low) / 2
        return (self.low + half * (np.clip(unit, -1, 1) + 1)).astype(np.float32)


def side(task, width):
    """The side that a task's levels lean to: (width,) of -1 and 1"""
    return np.random.default_rng(zlib.crc32(task.encode())).choice([-1.0, 1.0], width)


def searched(task):
    """The policy that was searched for, as a controller."""
    layers, depth = [], 0
    with np.load(POLICIES, allow_pickle=False) as arrays:
        while f"{task}/weight{depth}" in arrays:
            pair = (arrays[f"{task}/{kind}{depth}"] for kind in ("weight", "bias"))
            layers.append(tuple(array.astype(np.float64) for array in pair))
            depth += 1
    if not layers:
        raise DataError(f"suite.npz lacks {task}: `python -m behaviors.search --tasks {task}`")
    width = len(layers[-1][1])
    return controller_of(Policy(-np.ones(width), np.ones(width), tuple(layers)))


def controller_of(policy):
    return lambda obs: policy(obs, None)


def controller(task, env):
    row = TABLE[task]
    return scripted(row, env) if row.behavior == "scripted" else searched(task)


def leaning(env, task, control, lean):
    """The level of a task that leans so far."""
    box = env.action_space
    return Leaning(box.low, box.high, control, lean * side(task, len(box.low)))


def measured(task):
    """The rows of suite_levels.csv, by level."""
    need_levels([task])
    return {row["level"]: row for row in read("suite_levels.csv") if row["task"] == task}


def reference(task):
    """The returns that score 0 and 1: of uniform actions and of the best level. None if they lie
    within two standard errors of each other, for a score would then be noise."""
    if TABLE[task].behavior == "levels":
        return collect.reference(task)
    rows = [measured(task)[level] for level in ("random", "expert")]
    low, high = (float(row["mean_return"]) for row in rows)
    variance = sum(float(row["std_return"]) ** 2 / int(row["episodes"]) for row in rows)
    return {"random": low, "expert": high} if high > low + 2 * variance**0.5 else None


def sub_optimal(task):
    """Whether the best level of a task is no expert: what it reaches is less than expert_from."""
    row, best = TABLE[task], measured(task)["expert"]
    return float(best["success"] or best["mean_return"]) < float(row.expert_from)


def policies_of(task, env):
    """The four levels, and their noise."""
    if TABLE[task].behavior == "levels":
        return behaviors.load(task), behaviors.ACTION_NOISE[task]
    control, rows = controller(task, env), measured(task)
    levels = {"random": Policy(env.action_space.low, env.action_space.high)}
    for level in LEVELS[1:]:
        levels[level] = leaning(env, task, control, float(rows[level]["lean"]))
    return levels, NOISE


# ---------------------------------------------------------------- for prepare.build

def environment(task):
    """What envs.make takes of a task."""
    row = TABLE[task]
    kept = {"env_id": row.env_id}
    if row.max_episode_steps:
        kept["max_episode_steps"] = int(row.max_episode_steps)
    return kept


class Breakable(gymnasium.Wrapper):
    """An episode ends where its physics breaks down: dm_control then raises an error."""

    def reset(self, **options):
        self.obs, info = self.env.reset(**options)
        return self.obs, info

    def step(self, action):
        try:
            self.obs, *rest = self.env.step(action)
        except Exception as error:
            if type(error).__name__ != "PhysicsError":  # of a package that is optional
                raise
            return self.obs, 0.0, True, False, {}
        return self.obs, *rest


def make(task, frame=None):
    """The environment that a task's behaviours act in; frame: the shape of its pictures, if any"""
    return Breakable(envs.make({**environment(task), "frame": frame}))


def describe(task, discount):
    """The meta of a task before its first episode."""
    if TABLE[task].behavior == "levels":
        return collect.describe(task, discount)
    meta = envs.describe(instruction=TABLE[task].instruction, discount=discount,
                         reference=reference(task), **environment(task))
    meta |= {"embodiment": embodiment(task), "paraphrases": paraphrases(task)}
    return {**meta, "sub_optimal": True} if sub_optimal(task) else meta


def play_block(job):
    """A list of episodes; job as of collect.jobs_of"""
    env = make(job[0])
    return collect.play_some(env, *policies_of(job[0], env), job)
