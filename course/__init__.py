"""A course in offline reinforcement learning on this repository; README.md has its sessions.

Nothing of the program imports it. This file imports nothing heavy, so that a typing error is
answered at once.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Wrong(Exception):
    """What is wrong with an answer, in a sentence."""


class Exercise(NamedTuple):
    """A function whose body a student writes again."""
    module: str
    function: str  # with its class, if it has one

    @property
    def file(self):
        return self.module.replace(".", "/") + ".py"


EXERCISES = {  # in the order of the sessions
    "return_to_go": Exercise("data", "return_to_go"),
    "n_step_return": Exercise("learner", "n_step_return"),
    "project": Exercise("kernels.categorical_projection", "project"),
    "bellman": Exercise("kernels.categorical_projection", "bellman_cross_entropy_reference"),
    "log_prob": Exercise("model", "Policy.log_prob"),
    "sample": Exercise("model", "Policy.sample"),
    "entropy": Exercise("model", "Policy.entropy"),
    "cloning_loss": Exercise("learner", "cloning_loss"),
    "data_weights": Exercise("learner", "data_weights"),
    "improvement_weights": Exercise("learner", "improvement_weights"),
    "improve_on_data": Exercise("learner", "Learner.improve_on_data"),
    "iqm": Exercise("eval", "iqm"),
    "interval": Exercise("eval", "interval"),
    "attention": Exercise("kernels.attention", "attention_reference"),
    "forward_kernel": Exercise("kernels.attention", "forward_kernel"),
}
