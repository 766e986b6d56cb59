"""Measure the levels of the suite's tasks, and search for the policies that some of them need.

    python -m behaviors.search --tasks metaworld:10     what suite_levels.csv lacks of these
    python -m behaviors.search --tasks metaworld-push --again

Weak and medium are chosen among a few leans (behaviors.suite), by their returns in a few episodes.
What suite_levels.csv says of a level is from other episodes, without noise.
"""

import argparse
import csv
import io
import time

import numpy as np

import envs
from behaviors import LEVELS, Policy, suite
from behaviors.ars import BANDS, replacing
from behaviors.measure import CHOICE_SEED, REPORT_SEED

LEANS = (0.2, 0.4, 0.7, 1.0)
CHOICE_EPISODES, EPISODES = 1, 5
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


def choose_leans(env, task, control, uniform):
    """level -> lean: those whose returns come nearest to the middle of the level's band."""
    floor = mean_return(env, uniform)
    height = mean_return(env, suite.leaning(env, task, control, 0.0)) - floor
    share = {}
    for lean in LEANS:
        level = suite.leaning(env, task, control, lean)
        share[lean] = (mean_return(env, level) - floor) / (abs(height) + 1e-9)
        if share[lean] < 0.1:
            break
    chosen = {"random": "", "expert": 0.0}
    for level, band in BANDS.items():
        chosen[level] = min(share, key=lambda lean: abs(share[lean] - np.mean(band)))
    return chosen


def levels_of(task):
    """The rows of suite_levels.csv of a task."""
    env = envs.make(suite.environment(task))
    control = suite.controller(task, env)
    uniform = Policy(env.action_space.low, env.action_space.high)
    leans, rows = choose_leans(env, task, control, uniform), []
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
    names = suite.chosen(args.tasks)
    suite.need(names)
    done = {row["task"] for row in suite.read("suite_levels.csv")}
    for task in names:
        if suite.TABLE[task].behavior == "levels" or (task in done and not args.again):
            continue
        began = time.process_time()
        rows = levels_of(task)
        record(task, rows)
        shown = [f"{row['mean_return']} ({row['success']})" for row in rows]
        print(task, *shown, f"{time.process_time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
