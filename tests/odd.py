"""Environments with one oddity each, as users have them: imported as tests.odd:Odd-v0."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Tuple

MOST = np.finfo(np.float32).max


class Odd(gymnasium.Env):
    """`width` numbers, two actions; `steps` until it cuts an episode off itself."""

    def __init__(self, low=-1.0, high=1.0, steps=20, ends=False, width=3, kind="float32",
                 render_mode=None):
        self.steps, self.ends = steps, ends
        self.observation_space = Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = Box(low, high, (2,), kind)

    def obs(self):
        return np.full(self.observation_space.shape, self.t, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.obs(), {}

    def step(self, action):
        self.t += 1
        last = self.t >= self.steps
        return self.obs(), 1.0, last and self.ends, last and not self.ends, {}


class Parts(Odd):
    """Its observations are made of parts."""

    def __init__(self, kind, render_mode=None):
        super().__init__()
        vector, image = Box(-9, 9, (2,)), Box(0, 255, (8, 8, 3), np.uint8)
        self.observation_space = {
            "dict": Dict([("b", vector), ("a", Box(-9, 9, ()))]),
            "nested": Dict(b=Tuple([Box(-9, 9, (2, 2)), Box(-9, 9, (1,))]), a=Box(-9, 9, ())),
            "tuple": Tuple([vector, Box(-9, 9, ())]),
            "matrix": Box(-9, 9, (2, 3)),
            "image": Dict(a=vector, camera=image),
            "number": Dict(a=vector, b=Discrete(3)),
        }[kind]

    def obs(self):
        return self.observation_space.sample()


class Needs(Odd):
    """An argument that has no default."""

    def __init__(self, robot, render_mode=None):
        super().__init__(steps={"arm": 7, "leg": 9}[robot])


class Broken(Odd):
    """Its constructor raises what it likes, over several lines."""

    def __init__(self, render_mode=None):
        raise FileNotFoundError("robot.xml:\n  no such file")


class Blind(Odd):
    """It draws nothing, and says so by its signature."""

    def __init__(self):
        super().__init__()


class Unplayable(Odd):
    """Each step raises."""

    def step(self, action):
        raise RuntimeError("out of battery")


gymnasium.register("Odd-v0", "tests.odd:Odd")
gymnasium.register("Wide-v0", "tests.odd:Odd", kwargs=dict(low=-100.0, high=100.0))
gymnasium.register("Widest-v0", "tests.odd:Odd", kwargs=dict(low=-MOST, high=MOST))
gymnasium.register("Unbounded-v0", "tests.odd:Odd", kwargs=dict(low=0.0, high=np.inf))
gymnasium.register("Whole-v0", "tests.odd:Odd", kwargs=dict(low=-1, high=1, kind="int64"))
gymnasium.register("Endless-v0", "tests.odd:Odd", kwargs=dict(steps=10**9))
gymnasium.register("Falls-v0", "tests.odd:Odd", kwargs=dict(ends=True))
gymnasium.register("Parts-v0", "tests.odd:Parts", max_episode_steps=30)
gymnasium.register("Needs-v0", "tests.odd:Needs")
gymnasium.register("Broken-v0", "tests.odd:Broken")
gymnasium.register("Blind-v0", "tests.odd:Blind", max_episode_steps=30)
gymnasium.register("Unplayable-v0", "tests.odd:Unplayable")
gymnasium.register("Six-v0", "tests.odd:Odd", kwargs=dict(width=6))
