"""Do words tell a model what to do? Ten tasks of Meta-World, which share one robot.

    python -m studies.words               the runs that are missing, then what each does when told
    python -m studies.words --table       no runs: what results/words.csv says

Observations and actions are alike in all of these tasks, so they share the whole model
(`embodiment` in their metas), and the scene aside, only words tell them apart. Each model is told
its tasks in four wordings by turns. Here it is told

    own        the first of these
    held out   two wordings that it was never trained on
    another's  the words of another task with the same scene

and what it then does is read off the observations, whatever it was told.
"""

from pathlib import Path

import numpy as np

from behaviors import suite
from checkpoint import load_run
from data import DataError
from eval import rollout
from studies import print_table
from studies.runs import (Table, at_a_time, call, name_of, need_data, new_parser, start_or_resume,
                          unfinished)

GROUP = "metaworld:10"
ALGOS = {  # flags of train.py
    "bc": ["--algo", "bc"], "rwr": ["--algo", "rwr"], "pac": ["--algo", "pac"],
    "pac, focus 0": ["--algo", "pac", "--focus", "0"],
    "rwr_return": ["--algo", "rwr", "--merit", "return"],
    "pac_return": ["--algo", "pac", "--merit", "return"],
    "pac_return, own maps": ["--algo", "pac", "--merit", "return", "--no-embodiments"]}
EPISODES = 10
COLUMNS = ("algo", "seed", "task", "told", "words", "episodes", "success", "reach", "push", "lift",
           "none")
# Tasks whose scenes have the same things in them.
SCENES = (("reach", "push", "pick-place"), ("drawer-open", "drawer-close"),
          ("window-open", "window-close"))
NEAR, MOVED, LIFTED = 0.05, 0.03, 0.04  # metres
HAND, PUCK, GOAL = slice(0, 3), slice(4, 7), slice(36, 39)  # of an observation


def did(obs):
    """What an episode with the puck came to: "lift", "push", "reach" or "none". obs: (T, 39)

    Lifted or moved is the puck; and without that the hand may have reached the goal.
    """
    puck, start = obs[:, PUCK], obs[0, PUCK]
    if (puck[:, 2] - start[2]).max() > LIFTED:
        return "lift"
    if np.linalg.norm(puck[-1, :2] - start[:2]) > MOVED:
        return "push"
    if np.linalg.norm(obs[:, HAND] - obs[:, GOAL], axis=1).min() < NEAR:
        return "reach"
    return "none"


def tellings(task):
    """(what is told: own, held out or another task; the words)"""
    yield "own", suite.TABLE[task].instruction
    for text in suite.paraphrases(task, held_out=True):
        yield "held out", text
    for scene in SCENES:
        if task.removeprefix("metaworld-") in scene:
            for other in scene:
                if f"metaworld-{other}" != task:
                    yield other, suite.TABLE[f"metaworld-{other}"].instruction


def play(run, algo, seed):
    """The rows of a run: each task, told in each way."""
    model, config = load_run(run)
    metas, settings, rows = config["tasks"], config["settings"], []
    for index, meta in enumerate(metas):
        only = [meta if other is meta else None for other in metas]
        with_puck = meta["name"].removeprefix("metaworld-") in SCENES[0]
        for told, words in tellings(meta["name"]):
            model.set_instruction(index, words)
            plays = rollout(model, only, EPISODES, seed + 1, settings["act"], settings["eta"],
                            keep=True)
            row = {"algo": algo, "seed": seed, "task": meta["name"], "told": told, "words": words,
                   "episodes": EPISODES, "success": np.mean([bool(play.success) for play in plays])}
            if with_puck:
                found = [did(np.array(play.obs)) for play in plays]
                row |= {name: found.count(name) / EPISODES for name in COLUMNS[-4:]}
            rows.append(row)
            print(algo, seed, meta["name"], told, f"success {row['success']:.0%}", flush=True)
    return rows


def show(rows):
    """Success when told in its own and in other words, by algorithm; and what is done instead."""
    head = ["algo", "seeds", "own words", "held-out words", "own words, where a scene is shared",
            "another's words there"]
    lines = []
    for algo in dict.fromkeys(row["algo"] for row in rows):
        mine = [row for row in rows if row["algo"] == algo]
        swapped = {row["task"] for row in mine if row["told"] not in ("own", "held out")}
        own, held_out, own_of_swapped, others = [], [], [], []
        for row in mine:
            success = float(row["success"])
            if row["told"] == "own":
                own.append(success)
                own_of_swapped += [success] * (row["task"] in swapped)
            else:
                (held_out if row["told"] == "held out" else others).append(success)
        means = [f"{np.mean(some):.0%}" for some in (own, held_out, own_of_swapped, others)]
        lines.append([algo, len({row["seed"] for row in mine}), *means])
    print_table(head, lines)
    print("\nwhat the episodes with the puck come to, over its scenes\n")
    lines = []
    with_puck = [row for row in rows if row["reach"] != "" and row["told"] != "held out"]
    for algo, words in dict.fromkeys((row["algo"], row["words"]) for row in with_puck):
        same = [row for row in with_puck if (row["algo"], row["words"]) == (algo, words)]
        shares = [np.mean([float(row[name]) for row in same]) for name in COLUMNS[-4:]]
        lines.append([algo, words, *(f"{share:.0%}" for share in shares)])
    print_table(["algo", "told", *COLUMNS[-4:]], lines)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--algo", nargs="+", choices=ALGOS, default=list(ALGOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("flags", nargs="*", help="of train.py, behind a --")
    args = parser.parse_args()
    table = Table("words", COLUMNS, ("algo", "seed"), args.folder, {"seed": int})
    data = (args.folder or Path("datasets")) / "132"
    if not args.table:
        wanted = [(algo, seed) for seed in args.seeds for algo in args.algo]
        names = suite.chosen([GROUP])

        def flags(job):
            algo, seed = job
            return [*ALGOS[algo], "--seed", seed, "--data", data / "switching", "--tasks", *names,
                    "--episodes", 0, *args.flags]

        jobs = unfinished(table, wanted, flags, args.flags)
        try:
            suite.need(names)
        except DataError as error:
            parser.error(error)
        need_data(data / "switching", names, 20_000, source=suite)

        def work(job):
            run = table.runs / name_of(job)
            call(["train.py", *start_or_resume(run, flags(job))], run.with_suffix(".log"))
            table.append(play(run, *job))
            table.keep_config(run)

        at_a_time(args.workers, work, jobs)
    table.need_rows()
    show(table.rows())


if __name__ == "__main__":
    main()
