"""A small TD3 (Fujimoto, van Hoof and Meger 2018, arXiv 1802.09477) for Reacher and Pusher.

ARS's linear policies stay at -8 and -47 there. Start it with
`python -m behaviors.ars --task Pusher-v5`, which chooses the levels for all seven tasks.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from behaviors import Policy
from behaviors.measure import CHOICE_SEED, make_env

SEED = 0  # of the expert's search; medium's follow at 100, weak's at 200


class Settings(NamedTuple):
    steps: int
    discount: float
    warmup: int = 2_000  # steps of uniform actions; they also fix the observations' mean and scale
    batch: int = 256
    learning_rate: float = 1e-3
    explore: float = 0.1  # noise on the actions taken, in half-widths of the box
    smooth: float = 0.2  # noise on the target's actions, cut at `smooth_cut`
    smooth_cut: float = 0.5
    delay: int = 2  # critic updates per actor update
    every: int = 1  # steps per critic update
    polyak: float = 0.005


# Both tasks reward every step, so a short horizon loses little.
SETTINGS = {"Reacher-v5": Settings(16_000, 0.95), "Pusher-v5": Settings(30_000, 0.97)}


class Critics(nn.Module):
    """Two independent Q networks, evaluated as one batched product."""

    def __init__(self, inputs: int, width: int = 128):
        super().__init__()
        sizes = ((inputs, width), (width, width), (width, 1))
        weights = [torch.empty(2, i, o).uniform_(-1, 1) / i**0.5 for i, o in sizes]
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(torch.zeros(2, 1, o) for _, o in sizes)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat((obs, action), -1).expand(2, -1, -1)  # (2, B, O + A)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i > 0:
                x = F.relu(x)
            x = torch.baddbmm(bias, x, weight)
        return x.squeeze(-1)  # (2, B)


def fold(
    actor: nn.Sequential, mean: Tensor, std: Tensor, low: np.ndarray, high: np.ndarray
) -> Policy:
    """The actor as a Policy on raw observations: the standardisation goes into its first layer."""
    linear = [module for module in actor if isinstance(module, nn.Linear)]
    layers = [(m.weight.detach().T.clone(), m.bias.detach().clone()) for m in linear]
    weight, bias = layers[0]
    layers[0] = weight / std[:, None], bias - (mean / std) @ weight
    return Policy(low, high, tuple((weight.numpy(), bias.numpy()) for weight, bias in layers))


def search(task: str, seed: int) -> Iterator[tuple[int, Policy]]:
    """`learn` on one of the tasks of SETTINGS."""
    return learn(make_env(task), SETTINGS[task], gymnasium.spec(task).max_episode_steps, seed)


def learn(env, s: Settings, limit: int, seed: int) -> Iterator[tuple[int, Policy]]:
    """Yield (environment steps so far, policy) at intervals in one TD3 run.

    An interval is a twentieth of the updates made so far.

    limit: steps of an episode at most
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    low, high = env.action_space.low, env.action_space.high
    n_obs, n_action = env.observation_space.shape[0], low.size

    hidden = (nn.Linear(n_obs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    actor = nn.Sequential(*hidden, nn.Linear(64, n_action), nn.Tanh())
    critics = Critics(n_obs + n_action)
    target_actor, target_critics = deepcopy(actor), deepcopy(critics)
    actor_optimiser = torch.optim.Adam(actor.parameters(), s.learning_rate, fused=True)
    critic_optimiser = torch.optim.Adam(critics.parameters(), s.learning_rate, fused=True)

    # One row a transition: obs, action in [-1, 1], reward, next_obs, terminated.
    buffer = torch.zeros(s.steps, 2 * n_obs + n_action + 2)
    policy = Policy(low, high)  # uniform until the warm-up ends
    due, length = 10, 0
    obs, _ = env.reset(seed=int(rng.integers(CHOICE_SEED)))
    for step in range(s.steps):
        action = policy(obs, rng, s.explore)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        unit = 2 * (action - low) / (high - low) - 1
        transition = np.concatenate((obs, unit, [reward], next_obs, [terminated]))
        buffer[step] = torch.from_numpy(transition)
        obs, length = next_obs, length + 1
        if terminated or truncated or length == limit:
            obs, _ = env.reset(seed=int(rng.integers(CHOICE_SEED)))
            length = 0
        if step + 1 < s.warmup or (step + 1 - s.warmup) % s.every:
            continue
        if step + 1 == s.warmup:
            std, mean = torch.std_mean(buffer[: s.warmup, :n_obs], 0)
            std[std < 1e-4] = torch.inf  # Pusher's goal never moves

        rows = buffer[torch.from_numpy(rng.integers(step + 1, size=s.batch))]
        seen, taken, rewards, after, ended = rows.split((n_obs, n_action, 1, n_obs, 1), -1)
        seen, after = (seen - mean) / std, (after - mean) / std
        rewards = rewards.squeeze(-1)  # (B,)
        # y = r + discount * min_i Q'_i(s', pi'(s') + cut noise)
        with torch.no_grad():
            jitter = (s.smooth * torch.randn_like(taken)).clamp(-s.smooth_cut, s.smooth_cut)
            next_action = (target_actor(after) + jitter).clamp(-1, 1)
            next_value = target_critics(after, next_action).amin(0)  # (B,)
            goal = rewards + s.discount * (1 - ended[:, 0]) * next_value
        values = critics(seen, taken)  # (2, B)
        critic_loss = F.mse_loss(values, goal.expand(2, -1), reduction="sum") / s.batch
        critic_optimiser.zero_grad()
        critic_loss.backward()
        critic_optimiser.step()
        if step // s.every % s.delay == 0:
            actor_loss = -critics(seen, actor(seen))[0].mean()
            actor_optimiser.zero_grad()
            actor_loss.backward()
            actor_optimiser.step()
            with torch.no_grad():
                for old, new in ((target_actor, actor), (target_critics, critics)):
                    torch._foreach_lerp_(list(old.parameters()), list(new.parameters()), s.polyak)
        policy = fold(actor, mean, std, low, high)
        # Reacher goes from random to 80% of the way within 500 updates: look often early on.
        if step + 1 - s.warmup >= due:
            due = max(due + 10, int(due * 1.05))
            yield step + 1, policy
