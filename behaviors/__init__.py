"""Behaviours of known quality for seven MuJoCo tasks: what an offline data set is drawn from.

    policies = load("Hopper-v5")  # a dict of the levels: random, weak, medium, expert
    action = policies["medium"](obs, rng, noise=ACTION_NOISE["Hopper-v5"])

The levels of one task come from searches with different seeds (see `behaviors.ars`, which also
remakes them). This keeps their average from being a good policy on HalfCheetah, Hopper and
Walker2d, though not elsewhere (README.md).
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np

TASKS = (
    "HalfCheetah-v5",
    "Hopper-v5",
    "Walker2d-v5",
    "Swimmer-v5",
    "InvertedDoublePendulum-v5",
    "Reacher-v5",
    "Pusher-v5",
)
# Tasks that no choice of the recipe has seen; not in the default data (studies/ladder.py).
UNSEEN = ("InvertedPendulum-v5", "HalfCheetahGoal-v0")
LEVELS = ("random", "weak", "medium", "expert")
# Gaussian noise in half-widths of the action box: the scanned value that leaves the expert nearest
# to 90% of its return (README.md). Two fall between scanned values: InvertedDoublePendulum keeps
# 100% at 0.05 and 78% at 0.1, Walker2d 96% at 0.1 and 34% at 0.2.
ACTION_NOISE = {
    "HalfCheetah-v5": 0.1,
    "Hopper-v5": 0.1,
    "Walker2d-v5": 0.1,
    "Swimmer-v5": 0.2,
    "InvertedDoublePendulum-v5": 0.05,
    "Reacher-v5": 0.2,
    "Pusher-v5": 0.2,
    "InvertedPendulum-v5": 0.1,
    "HalfCheetahGoal-v0": 0.1,
}
INSTRUCTIONS = {  # the task description that the model reads
    "HalfCheetah-v5": "run forward as fast as you can with the half cheetah",
    "Hopper-v5": "hop forward on one leg without falling",
    "Walker2d-v5": "walk forward on two legs without falling",
    "Swimmer-v5": "swim forward by bending the three link snake",
    "InvertedDoublePendulum-v5": "balance the double pendulum upright on the cart",
    "Reacher-v5": "reach the target with the tip of the arm",
    "Pusher-v5": "push the cylinder to the goal with the arm",
    "InvertedPendulum-v5": "balance the pole upright on the cart",
    "HalfCheetahGoal-v0": "reach the goal ahead with the half cheetah",
}
# Shares of each level in the default data: by steps in `levels`, by stretches in the others.
SHARES = {"random": 0.2, "weak": 0.4, "medium": 0.3, "expert": 0.1}
PARTS = ("switching", "levels", "beyond")
TRANSITIONS = 300_000  # a task and part
SUITES = ("132",)  # what `python prepare.py suite` can make, see behaviors.suite
FILE = Path(__file__).with_name("levels.npz")

gymnasium.register("HalfCheetahGoal-v0", "behaviors.goal:HalfCheetahGoal", max_episode_steps=150)


@dataclass(frozen=True)
class Policy:
    """A feed-forward policy; `layers` holds (weight (in, out), bias (out,)) pairs.

    No layer means uniform actions. One layer is ARS's linear policy, cut off at the box; several
    are TD3's relu network, which ends in tanh.
    """

    low: np.ndarray  # (A,) the action box
    high: np.ndarray  # (A,)
    layers: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def __call__(self, obs: np.ndarray, rng: np.random.Generator, noise: float = 0.0) -> np.ndarray:
        """Actions (..., A), float32 inside the box, for observations (..., O).

        `noise` is the standard deviation of Gaussian noise in half-widths of the box. `rng` serves
        the noise and the random level; without noise the other levels leave it untouched.
        """
        if not self.layers:
            unit = rng.uniform(-1.0, 1.0, (*np.shape(obs)[:-1], len(self.low)))
        else:
            hidden = obs
            for weight, bias in self.layers[:-1]:
                hidden = np.maximum(hidden @ weight + bias, 0.0)
            weight, bias = self.layers[-1]
            unit = hidden @ weight + bias
            if len(self.layers) > 1:
                unit = np.tanh(unit)
        # minimum(maximum()) takes half the time of np.clip, which exceeds the linear policy's
        # product (6, 13 and 5 us on a busy Zen 3 core, 2026-11-23).
        unit = np.minimum(np.maximum(unit, -1.0), 1.0)
        if noise:
            # After the first cut: linear policies reach far outside the box, where noise is lost.
            unit = unit + noise * rng.standard_normal(unit.shape)
            unit = np.minimum(np.maximum(unit, -1.0), 1.0)
        half = (self.high - self.low) / 2
        return (self.low + half * (unit + 1.0)).astype(np.float32)


def load(task: str) -> dict[str, Policy]:
    """The four policies of a task, worst first."""
    if task not in TASKS + UNSEEN:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS + UNSEEN)}")
    with np.load(FILE, allow_pickle=False) as arrays:
        # float64, in which mujoco observes: a mixed product would convert the weights every step.
        own = [key for key in arrays if key.startswith(f"{task}/")]
        entries = {key: arrays[key].astype(np.float64) for key in own}
    if not entries:
        raise ValueError(f"{FILE.name} lacks {task}: run python -m behaviors.ars --task {task}")
    policies = {}
    for level in LEVELS:
        name = f"{task}/{level}"
        depth = sum(key.startswith(f"{name}/weight") for key in entries)
        layers = []
        for i in range(depth):
            layers.append((entries[f"{name}/weight{i}"], entries[f"{name}/bias{i}"]))
        policies[level] = Policy(entries[f"{task}/low"], entries[f"{task}/high"], tuple(layers))
    return policies
