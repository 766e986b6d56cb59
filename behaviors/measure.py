"""Measure the levels: returns, what noise costs the expert, and what their average is worth.

    python -m behaviors.measure --task Hopper-v5

The returns are those of returns.csv. README.md's noise table and `ACTION_NOISE` are from here too.
"""

import argparse

import gymnasium
import numpy as np

from behaviors import LEVELS, TASKS, UNSEEN, Policy, load

EPISODES = 20
# Searches draw their episode seeds below the first of these and levels are chosen between the two,
# so no episode serves two purposes. It matters: one expert picked from its search's own curve
# scored 88 instead of 435.
CHOICE_SEED, REPORT_SEED = 1_000_000, 2_000_000
LONGEST = 10_000  # steps of an episode, where an environment registers no limit
NOISES = (0.02, 0.05, 0.1, 0.2, 0.3)


def make_env(task: str, **options) -> gymnasium.Env:
    # Unwrapped: a loop over it ran at 70-100% of mj_step's rate. `rollout` keeps the time limit.
    return gymnasium.make(task, **options).unwrapped


def rollout(
    env, policy: Policy, rng: np.random.Generator, seed: int, noise: float = 0.0
) -> tuple[float, np.ndarray]:
    """One episode: its undiscounted return and the observations acted on (T, O)."""
    obs, _ = env.reset(seed=seed)
    seen, total = [], 0.0
    for _ in range(gymnasium.spec(env.spec.id).max_episode_steps or LONGEST):
        seen.append(obs)
        obs, reward, terminated, truncated, _ = env.step(policy(obs, rng, noise))
        total += reward
        if terminated or truncated:
            break
    return total, np.array(seen)


def evaluate(
    env, policy: Policy, seed: int, noise: float = 0.0, episodes: int = EPISODES
) -> tuple[float, float, float]:
    """The return's mean and standard deviation, and the mean length; episode i has seed + i."""
    rng = np.random.default_rng(seed)
    runs = [rollout(env, policy, rng, seed + i, noise) for i in range(episodes)]
    returns = np.array([total for total, _ in runs])
    return returns.mean(), returns.std(), np.mean([len(seen) for _, seen in runs])


def returns(task: str, policies: dict[str, Policy]) -> dict[str, tuple[float, float, float]]:
    """Each level's `evaluate`, on episodes that neither search nor choice has seen."""
    env = make_env(task)
    return {level: evaluate(env, policies[level], REPORT_SEED) for level in LEVELS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS + UNSEEN, required=True)
    task = parser.parse_args().task
    env, policies = make_env(task), load(task)
    scores = returns(task, policies)
    for level, (mean, std, length) in scores.items():
        print(f"{task} {level:9s} {mean:8.1f} ± {std:.1f}, {length:.0f} steps")
    floor, ceiling = scores["random"][0], scores["expert"][0]

    # If the average of the levels were good, so would be a clone of their mixture, without any RL.
    def average(obs, rng, noise):
        return np.mean([policies[level](obs, rng, noise) for level in LEVELS[1:]], 0)

    cases = [("average", average, 0.0)]
    cases += [(f"noise {noise}", policies["expert"], noise) for noise in NOISES]
    for name, policy, noise in cases:
        mean, std, _ = evaluate(env, policy, REPORT_SEED, noise)
        share = (mean - floor) / (ceiling - floor)
        print(f"{task} {name:9s} {mean:8.1f} ± {std:.1f}, {share:.0%} of the expert's")


if __name__ == "__main__":
    main()
