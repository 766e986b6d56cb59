"""What it is worth to choose a way of acting by true returns, as arXiv 2504.11453 asks to be told.

    python -m studies.choice            the episodes that are missing, then tables and figure
    python -m studies.choice --table    no episodes: tables and figure from results/choice.csv
    python -m studies.choice runs/mine --folder /tmp/try --episodes 8    another run, as a trial

One trained run acts in several ways. Each plays the same episodes, once. Of these a practitioner
sees K a task and way, and takes the way with the best IQM. What it scores is read from other
episodes, so that luck in the choice earns nothing. All of this is repeated, on random halves.
"""

import argparse
import sys
import zlib
from collections import Counter
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import plots
from checkpoint import RunError, load_run
from eval import COUNT, iqm, normalise, rollout
from studies import print_table
from studies.runs import Table

# (act, eta) of the candidates. The recipe's own is the first: it is taken where nothing is seen, or
# where several are level.
WAYS = [("improved", "2"), ("improved", "0.5"), ("improved", "1"), ("improved", "4"),
        ("improved", "8"), ("sharpened", ""), ("mean", ""), ("best", "")]
SEEN = (0, 1, 2, 4, 8, 16)  # K
EPISODES, SEED = 32, 50  # no other evaluation has this seed
REPEATS = 2000
COLUMNS = ("run", "model", "act", "eta", "task", "episode", "score")
NUMBERS = {"episode": int, "score": float}


def name_of(way):
    act, eta = way
    return f"{act}, eta {eta}" if eta else act


# ---------------------------------------------------------------- episodes

def rows_of(table, run):
    """The rows of a run, by (way, task, episode)."""
    rows = [row for row in table.rows() if row["run"] == str(run)]
    if len({row["model"] for row in rows}) > 1:
        raise RunError(f"{table.path} has episodes of several models that were called {run}")
    return {((row["act"], row["eta"]), row["task"], row["episode"]): row for row in rows}


def fingerprint(model):
    """Tells one model from another that was trained under its name."""
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(tensor.contiguous().numpy(), checksum)
    return f"{checksum:08x}"


def play(table, run, episodes):
    """Play the episodes that the table lacks, and add a row for each."""
    model, config = load_run(run)
    if config["settings"]["beta"] == 0 or config["settings"]["critic"] == "v":
        raise RunError(f"{run}: {config['algo']} trains no Q decoder, which these ways to act need")
    rows, weights = rows_of(table, run), fingerprint(model)
    if any(row["model"] != weights for row in rows.values()):
        raise RunError(f"{table.path} has episodes of another model that was called {run}: "
                       "move it away, or give a --folder")
    played = Counter((way, task) for way, task, _ in rows)
    for (act, eta), (index, meta) in product(WAYS, enumerate(config["tasks"])):
        before = played[(act, eta), meta["name"]]
        if before < episodes:
            metas = [None] * len(config["tasks"])
            metas[index] = meta
            plays = rollout(model, metas, episodes - before, SEED, act, float(eta or 1),
                            first=[before] * len(metas))
            common = {"run": run, "model": weights, "act": act, "eta": eta, "task": meta["name"]}
            table.append([{**common, "episode": one.number, "score": score_of(one)}
                          for one in plays])
            print(*common.values(), flush=True)


def score_of(one):
    """The score of a Play."""
    if one.failed:
        raise RunError(f"an episode failed: {one.failed}")
    score = normalise(one.total, one.meta)
    if score is None:
        raise RunError(f"{one.meta['name']} has no reference, so its episodes have no scores")
    return round(float(score), 4)


def scores_of(table, run):
    """The names of the tasks, and the scores (ways, tasks, episodes)."""
    rows = rows_of(table, run)
    if not rows:
        raise RunError(f"{table.path} has no episodes of {run} yet: play them, without --table")
    tasks = list(dict.fromkeys(task for _, task, _ in rows))
    shape = (len(WAYS), len(tasks), 1 + max(episode for _, _, episode in rows))
    keys = product(WAYS, tasks, range(shape[2]))
    try:
        return tasks, np.reshape([rows[key]["score"] for key in keys], shape)
    except KeyError as error:
        raise RunError(f"{table.path} lacks {error}: play it, without --table") from None


# ---------------------------------------------------------------- the choice

def iqms(scores):
    """(ways, tasks, episodes) -> the IQM over tasks of each way's means (ways,)"""
    return np.array([iqm(means) for means in scores.mean(-1)])


def choose(scores, seen, repeats=REPEATS, seed=0):
    """What is scored by who has seen some episodes of each way and task.

    Each repeat puts the episodes in a random order, which all ways share. The first are seen, and
    the last half is what scores are read from. The spread of half a sample's mean is the standard
    error of the whole sample's: so the intervals are those of all episodes. [ours]

    scores: (ways, tasks, episodes) -> each repeat's way (repeats,), and its scores by name: of one
    way for all tasks, of a way for each task, of a way by chance, and of the first (repeats,)
    """
    ways, tasks, episodes = scores.shape
    rng, picks = np.random.default_rng(seed), np.zeros(repeats, int)
    found = {name: np.zeros(repeats) for name in ("one", "each", "chance", "own")}
    for repeat in range(repeats):
        order = rng.permuted(np.tile(np.arange(episodes), (tasks, 1)), axis=1)
        mixed = np.take_along_axis(scores, order[None], axis=2)
        others = mixed[:, :, -(episodes // 2):]
        by_way, by_task = iqms(others), np.zeros(tasks, int)
        if seen:
            picks[repeat] = iqms(mixed[:, :, :seen]).argmax()
            by_task = mixed[:, :, :seen].mean(-1).argmax(0)  # (tasks,)
        found["one"][repeat] = by_way[picks[repeat]]
        found["each"][repeat] = iqm(others.mean(-1)[by_task, np.arange(tasks)])
        found["chance"][repeat] = by_way.mean()
        found["own"][repeat] = by_way[0]
    return picks, found


def point(values):
    """The mean over repeats, and what 95 of 100 lie between."""
    return values.mean(), *np.percentile(values, [2.5, 97.5])


def shown(values, sign=""):
    return "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(*point(values), s=sign)


# ---------------------------------------------------------------- what is shown

def show(tasks, scores, path):
    """Both tables and the figure."""
    heads = [task.removesuffix("-v5") for task in tasks]
    rows = []
    for way, of_tasks, value in zip(WAYS, scores.mean(-1), iqms(scores)):
        rows.append([name_of(way), *(f"{mean:.2f}" for mean in of_tasks), f"{value:.3f}"])
    print_table([f"{scores.shape[2]} episodes", *heads, "IQM"], rows)
    print()
    counts = [seen for seen in SEEN if 2 * seen <= scores.shape[2]]
    choices = {seen: choose(scores, seen) for seen in counts}
    rows = [["a way by chance", "", shown(choices[0][1]["chance"]), "", "", ""]]
    for seen, (picks, found) in choices.items():
        way, times = Counter(picks.tolist()).most_common(1)[0]
        rows.append([seen, seen * scores[:, :, 0].size, shown(found["one"]),
                     shown(found["one"] - found["own"], "+"),
                     f"{name_of(WAYS[way])} ({times / len(picks):.0%})",
                     shown(found["each"] - found["own"], "+")])
    print_table(["K", "episodes seen", "IQM", "above the recipe's way", "most often chosen",
                 "a way for each task: above the recipe's"], rows)
    draw(choices, path)
    print(f"wrote {path}")


def draw(choices, path):
    """The gain over the recipe's own way against K."""
    names = {"one": "one way for all tasks", "each": "a way for each task"}
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, (name, label) in enumerate(reversed(names.items())):
        gains = [point(found[name] - found["own"]) for _, found in choices.values()]
        centre, low, high = np.array(gains).T
        ax.errorbar(np.arange(len(gains)) + 0.1 * number, centre, [centre - low, high - centre],
                    label=label, linestyle="-", **plots.style(number, len(names)))
    found = choices[0][1]
    ax.axhline((found["chance"] - found["own"]).mean(), color="grey", linestyle="--", linewidth=0.8,
               label="a way by chance")
    ax.axhline(0, color="grey", linewidth=0.8, linestyle=":", label="the recipe's own way")
    ax.set_xticks(range(len(choices)), choices)
    ax.set_xlabel("K, episodes of each task and way that are seen before the choice")
    ax.set_ylabel("IQM above the recipe's own way")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    plots.save(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m studies.choice", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("results/pretrained"))
    parser.add_argument("--episodes", type=COUNT, default=EPISODES,
                        help="a task and way (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="no episodes: only what is shown")
    parser.add_argument("--folder", type=Path, help="instead of results/, for a trial")
    args = parser.parse_args(argv)
    if args.episodes < 2:
        parser.error("--episodes: 2 or more, for half of them are not seen")
    table = Table("choice", COLUMNS, COLUMNS[:-1], args.folder, NUMBERS)
    try:
        if not args.table:
            play(table, args.run, args.episodes)
        show(*scores_of(table, args.run), table.figure)
    except (RunError, OSError) as error:
        print(f"studies.choice: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
