"""Environments of other packages that need some care: behaviors.worlds:metaworld/reach-v3.

Meta-World's own ids either fix the goal, or spend seconds on a list of goals. Here each `reset`
draws a goal from its seed, and the observation shows it.

dm_control's LQR takes actions of any size: a uniform one of its box moves masses 1e20 m away. Here
they are forces from -1 to 1: behaviors.worlds:lqr/lqr_2_1.
"""

import gymnasium

from behaviors.suite import TABLE
from behaviors.steps import package

STEPS = 500  # of an episode: the package's own limit


class MetaWorld(gymnasium.Wrapper):
    """One of the tasks; `env_name` is what the package calls it, such as reach-v3."""

    def __init__(self, env_name, render_mode=None):
        env = package("metaworld.env_dict").ALL_V3_ENVIRONMENTS[env_name]()
        # What the package itself sets where goals are shown and drawn anew.
        env._partially_observable = False
        env._freeze_rand_vec = False
        env._set_task_called = True
        env.seeded_rand_vec = True
        del env.sawyer_observation_space  # it is kept; the next one has room for the goal
        env.render_mode = render_mode
        super().__init__(env)

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.env.seed(seed)
        return self.env.reset()


class Bounded(gymnasium.ActionWrapper):
    """One of the LQRs, `name`."""

    def __init__(self, name, render_mode=None):
        package("shimmy")
        super().__init__(gymnasium.make(f"dm_control/{name}-v0", render_mode=render_mode))
        self.action_space = gymnasium.spaces.Box(-1, 1, self.env.action_space.shape)

    def action(self, action):
        return action.astype(self.env.action_space.dtype)


for name in ("lqr_2_1", "lqr_6_2"):
    gymnasium.register(f"lqr/{name}", "behaviors.worlds:Bounded", max_episode_steps=1000,
                       kwargs={"name": f"lqr-{name}"})
for row in TABLE.values():
    if row.domain == "metaworld":
        name = row.env_id.split(":")[1]
        gymnasium.register(name, "behaviors.worlds:MetaWorld", max_episode_steps=STEPS,
                           kwargs={"env_name": name.split("/")[1]})
