"""Controllers that are written down: Meta-World's own, and proportional ones for gymnasium-robotics.

A controller takes an observation (O,), as envs.make gives it, and returns an action (A,), which may
leave [-1, 1].
"""

import warnings

import numpy as np

from behaviors.steps import package


def scripted(row, env):
    """The controller of a row of suite.csv."""
    if row.domain == "metaworld":
        return metaworld(row.env_id.rpartition("/")[2])
    raise NotImplementedError(row.task)


def metaworld(name):
    """The package's own script for a task such as reach-v3."""
    policy = package("metaworld.policies").ENV_POLICY_MAP[name]()

    def control(obs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each time that an action leaves [-1, 1]
            return policy.get_action(np.asarray(obs, np.float64))

    return control
