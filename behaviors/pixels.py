"""Tasks that are seen through a camera alone: behaviors.pixels:pixels/metaworld-window-close.

Any task of the suite, with its behaviours, which see the true state. A model sees pictures of 64 x
64; what it has for an observation is a one, so positions are withheld.
"""

import gymnasium
import numpy as np
from gymnasium.spaces import Box

import envs
from behaviors import collect, suite, worlds
from data import Episode

FRAME = [64, 64, 3]


class Blind(gymnasium.Wrapper):
    """A task of the suite whose observation is a one."""

    def __init__(self, task, render_mode=None):
        frame = {"frame": FRAME} if render_mode else {}
        super().__init__(envs.make({**suite.environment(task), **frame}))
        self.observation_space = Box(1, 1, (1,), np.float32)

    def reset(self, **options):
        _, info = self.env.reset(**options)
        return np.ones(1, np.float32), info

    def step(self, action):
        _, *rest = self.env.step(action)
        return np.ones(1, np.float32), *rest


class Camera(gymnasium.Wrapper):
    """Keeps, for each episode, a picture of each state."""

    def __init__(self, env):
        super().__init__(env)
        self.pictures = []

    def reset(self, **options):
        out = self.env.reset(**options)
        self.pictures.append([envs.picture(self.env, FRAME)])
        return out

    def step(self, action):
        out = self.env.step(action)
        self.pictures[-1].append(envs.picture(self.env, FRAME))
        return out


# ---------------------------------------------------------------- for prepare.build

def describe(task, discount):
    """The meta of a task before its first episode."""
    true = suite.describe(task, discount)
    meta = envs.describe(f"behaviors.pixels:pixels/{task}", true["instruction"], discount,
                         true["reference"])
    return {**meta, "frame": FRAME}


def play_block(job):
    """A list of episodes; job as of collect.jobs_of"""
    env = Camera(suite.make(job[0], FRAME))
    true = collect.play_some(env, *suite.policies_of(job[0], env), job)
    return [Episode(np.ones((len(pictures), 1), np.float32), episode.action, episode.reward,
                    episode.terminated, np.stack(pictures))
            for episode, pictures in zip(true, env.pictures, strict=True)]


for name, row in suite.TABLE.items():
    limit = int(row.max_episode_steps) if row.max_episode_steps else None
    if row.domain == "metaworld":
        limit = worlds.STEPS
    gymnasium.register(f"pixels/{name}", "behaviors.pixels:Blind", max_episode_steps=limit,
                       kwargs={"task": name})
