"""Search for the policies that the suite's tasks need, and measure their levels.

    python -m behaviors.search --tasks dm_control       what suite_levels.csv lacks of these
    python -m behaviors.search --tasks metaworld-push --again

A search is short: some ten seconds of a core. On the harder tasks it finds nothing good, and the
best of what it saw is the best level that there is. suite.csv says of which tasks it is an expert.

Weak and medium are chosen among a few leans (behaviors.suite), by their returns in a few episodes.
What suite_levels.csv says of a level is from other episodes, without noise.
"""

import argparse
import csv
import io
import time

import numpy as np
import torch._dynamo  # Adam loads it, which ends the process if dm_control was loaded before

from behaviors import LEVELS, Policy, ars, suite, td3
from behaviors.ars import BANDS, replacing
from behaviors.measure import CHOICE_SEED, REPORT_SEED
from data import DataError

LEANS, HALVINGS = (0.05, 0.2, 0.8), 3  # tried at first; then between the two nearest, so often
CHOICE_EPISODES, EPISODES = 1, 5
# Two searches for any task; nothing in them was tuned. dm_control pays at each step.
ARS = ars.Settings(directions=8, best=4, nu=0.03, alpha=0.02, steps=40_000, seed=0, snapshots=8)
TD3 = td3.Settings(steps=12_000, discount=0.98, every=2)
SNAPSHOTS = 8  # of a search, that are looked at
COLUMNS = ("task", "level", "lean", "episodes", "mean_return", "std_return", "mean_length",
           "success")


def play(env, policy, rng, seed):
    """One episode without noise: its return, its length, and whether it succeeded (or None)."""
    obs, _ = env.reset(seed=seed)
    total, length, success, over = 0.0, 0, None, False
    while not over:
        obs, reward, terminated, truncated, info = env.step(policy(obs, rng))
        total, length, over = total + float(reward), length + 1, terminated or truncated
        for name in ("success", "is_success"):
            if name in info:
                success = bool(success or info[name])
    return total, length, success


def played(env, policy, seed, episodes):
    """-> returns (E,), lengths (E,) and successes, a list"""
    rng = np.random.default_rng(seed)
    found = [play(env, policy, rng, seed + number) for number in range(episodes)]
    totals, lengths, successes = zip(*found)
    return np.array(totals), np.array(lengths), successes


def mean_return(env, policy):
    return played(env, policy, CHOICE_SEED, CHOICE_EPISODES)[0].mean()


def snapshots(row, env):
    """(steps, policy) of a search, some eight times."""
    if row.behavior == "ars":
        yield from ars.climb(env, ARS, ARS.seed)
        return
    shown = TD3.warmup
    for steps, policy in td3.learn(env, TD3, TD3.steps, td3.SEED):
        if steps - shown >= (TD3.steps - TD3.warmup) / SNAPSHOTS:
            shown = steps
            yield steps, policy


def find(task, env):
    """Search for a task's policy, and put the best into suite.npz."""
    best, worth = None, -np.inf
    for steps, policy in snapshots(suite.TABLE[task], env):
        found = played(env, policy, CHOICE_SEED, 2)[0].mean()
        print(f"{task}, {steps:,} steps: {found:.4g}", flush=True)
        if found > worth:
            best, worth = policy, found
    entries = {}
    for number, pair in enumerate(best.layers):
        for kind, array in zip(("weight", "bias"), pair):
            entries[f"{task}/{kind}{number}"] = np.float32(array)
    with replacing(suite.POLICIES) as partial:
        if suite.POLICIES.exists():
            with np.load(suite.POLICIES, allow_pickle=False) as old:
                rest = {key: old[key] for key in old if not key.startswith(f"{task}/")}
            entries = rest | entries
        np.savez_compressed(partial, **{key: entries[key] for key in sorted(entries)})


def choose_leans(share_at):
    """level -> lean, so that the shares come near the middle of the levels' bands.

    share_at: a function of the lean, from 1 at 0 downwards: where a level's return lies between
    that of random (0) and that of the expert (1)
    """
    share, chosen = {0.0: 1.0}, {"random": "", "expert": 0.0}
    for lean in LEANS:
        share[lean] = share_at(lean)
        if share[lean] < 0.1:
            break
    for level, band in BANDS.items():
        middle = np.mean(band)
        for _ in range(HALVINGS):
            above = max(lean for lean in share if share[lean] >= middle)
            further = [lean for lean in share if lean > above]
            if further:
                lean = (above + min(further)) / 2
                share[lean] = share_at(lean)
        chosen[level] = min(list(share)[1:], key=lambda lean: abs(share[lean] - middle))
    # A share is measured by an episode: where these say little, the order may be wrong.
    chosen["medium"], chosen["weak"] = sorted((chosen["medium"], chosen["weak"]))
    return chosen


def levels_of(task):
    """The rows of suite_levels.csv of a task."""
    env = suite.make(task)
    if suite.TABLE[task].behavior != "scripted":
        find(task, env)
    control = suite.controller(task, env)
    uniform = Policy(env.action_space.low, env.action_space.high)
    floor = mean_return(env, uniform)
    height = mean_return(env, suite.leaning(env, task, control, 0.0)) - floor

    def share_at(lean):
        level = suite.leaning(env, task, control, lean)
        return (mean_return(env, level) - floor) / (abs(height) + 1e-9)

    leans, rows = choose_leans(share_at), []
    for name in LEVELS:
        policy = uniform if name == "random" else suite.leaning(env, task, control, leans[name])
        returns, lengths, successes = played(env, policy, REPORT_SEED, EPISODES)
        success = "" if None in successes else np.mean(successes)
        figures = (f"{returns.mean():.4g}", f"{returns.std():.3g}", f"{lengths.mean():.0f}")
        rows.append(dict(zip(COLUMNS, (task, name, leans[name], EPISODES, *figures, success))))
    env.close()
    return rows


def record(task, rows):
    """Replace a task's rows in suite_levels.csv."""
    path = suite.FOLDER / "suite_levels.csv"
    with replacing(path) as partial:
        if path.exists():
            rows = rows + [row for row in suite.read(path.name) if row["task"] != task]
        order = list(suite.TABLE)
        rows.sort(key=lambda row: (order.index(row["task"]), LEVELS.index(row["level"])))
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        partial.write_text(text.getvalue())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help="as of `prepare.py suite` (default: all)")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    args = parser.parse_args()
    try:
        names = suite.chosen(args.tasks)
        suite.need(names)
    except DataError as error:
        parser.error(error)
    present = {row["task"] for row in suite.read("suite_levels.csv")}
    for task in names:
        if suite.TABLE[task].behavior == "levels" or (task in present and not args.again):
            continue
        began = time.process_time()
        rows = levels_of(task)
        record(task, rows)
        shown = [f"{row['mean_return']} ({row['success']})" for row in rows]
        print(task, *shown, f"{time.process_time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
