"""One model on many tasks of the suite: how often is PAC above cloning, and what do its maps cost?

    python -m studies.suite --tasks metaworld:10     the runs that are missing, then the table
    python -m studies.suite --table                  no runs: what results/suite.csv says
    python -m studies.suite --cost                   parameters, memory and speed by number of tasks
    python -m studies.suite --weights DATA           which steps weights by returns weigh

A group of tasks, such as metaworld:10, or all, is one data set and one model. What stands behind
`--` is for train.py. `prepare.py suite` makes the data that is not there.
"""

import math
import resource
import time
from pathlib import Path

import numpy as np
import torch

import prepare
from behaviors import suite
from data import FINAL_OBS, FLAG, MERITS, RETURN, Batch, DataError, Worth
from eval import COUNT, iqm
from learner import Learner, LossSettings, settings_for
from model import SIZES, config_for, count_parameters
from studies import print_table
from studies.runs import (NUMBERS, OTHER_ACTS, Table, at_a_time, flags_of, need_data, new_parser,
                          refuse_own, train, unfinished)
from train import steps_of

ALGOS = ("bc", "filtered_bc", "rwr", "bc_q", "one_step", "pac_paper", "pac",
         "rwr_return", "pac_return")
SHOWN = ("bc", "bc-sharpened", "filtered_bc", "filtered_bc-sharpened", "rwr", "rwr-sharpened",
         "bc_q", "bc_q-improved", *ALGOS[4:])
COLUMNS = ("domain", "task", "algo", "seed", "updates", "episodes", "score", "success")
KEY = ("domain", "algo", "seed", "updates")  # "domain" is a group of tasks, such as metaworld:10
EPISODES = 10
UPDATES = 4  # that are timed
EXACT = 20  # differences: with five all positive the normal approximation has 0.043 for 0.0625


def suite_table(folder=None):
    return Table("suite", COLUMNS, KEY, folder, {**NUMBERS, "updates": int})


# ---------------------------------------------------------------- statistics

def signed_rank(differences):
    """Wilcoxon's signed-rank test, two-sided: the p-value.

    Exact for up to EXACT differences, by the normal approximation for more. differences: one for
    each task; zeros are left out, equal sizes share their ranks
    """
    differences = np.array([x for x in differences if x != 0])
    count = len(differences)
    if count == 0:
        return 1.0
    sizes = np.abs(differences)
    below = (sizes[:, None] > sizes).sum(1)
    ranks = below + ((sizes[:, None] == sizes).sum(1) + 1) / 2
    off = abs(ranks[differences > 0].sum() - ranks.sum() / 2)
    if count <= EXACT:
        sums, chances = rank_sums(ranks)
        return float(chances[abs(sums - ranks.sum() / 2) >= off].sum())
    spread = math.sqrt((ranks**2).sum() / 4)
    return math.erfc(off / spread / math.sqrt(2))


def rank_sums(ranks):
    """The sums that the positive ranks can have if a coin is tossed for each sign, with chances.

    A shared rank may end in a half: so it counts in halves.
    """
    chances = np.ones(1)
    for halves in (2 * ranks).astype(int):
        negative, positive = np.pad(chances, (0, halves)), np.pad(chances, (halves, 0))
        chances = (negative + positive) / 2
    return np.arange(len(chances)) / 2, chances


def by_task(rows, algo):
    """{task: (mean score, mean success or None)} over seeds; without tasks that have no score"""
    found, rows = {}, [row for row in rows if row["score"] is not None]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task and row["algo"] == algo]
        if mine:
            successes = [float(row["success"]) for row in mine if row["success"] != ""]
            success = np.mean(successes) if successes else None
            found[task] = np.mean([row["score"] for row in mine]), success
    return found


def show(table):
    """A table of each group after so many updates; and where its tasks are of several domains, one
    of each domain."""
    scored = {task for task in suite.TABLE if suite.reference(task)}
    all_rows = [row for row in table.rows() if row["task"] in scored]
    for group, updates in dict.fromkeys((row["domain"], row["updates"]) for row in all_rows):
        rows = [row for row in all_rows if (row["domain"], row["updates"]) == (group, updates)]
        title = f"{group}, {updates:,} updates"
        show_rows(title, rows)
        domains = [suite.TABLE[row["task"]].domain for row in rows]
        if len(set(domains)) > 1:
            for domain in dict.fromkeys(domains):
                of_domain = [row for row, other in zip(rows, domains) if other == domain]
                show_rows(f"{title}: {domain}", of_domain)


def show_rows(title, rows):
    scores = {algo: by_task(rows, algo) for algo in SHOWN}
    lines = []
    for algo, found in scores.items():
        if not found:
            continue
        successes = [success for _, success in found.values() if success is not None]
        success = f"{np.mean(successes):.0%}" if successes else ""
        means = [score for score, _ in found.values()]
        seeds = len({row["seed"] for row in rows if row["algo"] == algo})
        lines.append([algo, seeds, len(found), f"{iqm(means):.3f}", success,
                      *above(found, scores["bc"]), *above(found, scores["rwr"])])
    print(f"\n{title}\n")
    print_table(["algo", "seeds", "tasks", "IQM", "success", "above bc on", "p",
                 "above rwr on", "p"], lines)


def above(found, others):
    """On how many of the tasks that both have one is above the other, and p"""
    differences = [found[task][0] - others[task][0] for task in found if task in others]
    count = sum(difference > 0 for difference in differences)
    return f"{count} of {len(differences)}", f"{signed_rank(differences):.2g}"


# ---------------------------------------------------------------- whom weights by returns weigh

def print_weights(folder):
    """Of each task of a data set, what share of the weights by returns each fifth of an episode's
    steps gets, by either merit."""
    lines = []
    for task in prepare.open_tasks(folder):
        lengths = task.episodes["length"]
        returns = [task.episode_rows(number)[:-1, RETURN] for number in range(len(lengths))]
        returns, step = np.concatenate(returns), np.concatenate([*map(np.arange, lengths)])
        fifth = 5 * step // np.repeat(lengths, lengths)
        for merit in MERITS:
            w = Worth([(task, task.episodes, 1.0)], LossSettings.focus, merit)(step, returns)
            shares = np.bincount(fifth, w) / w.sum()
            lines.append([task.name, merit, *(f"{share:.0%}" for share in shares)])
    print_table(["task", "merit", "first fifth", "second", "third", "fourth", "last"], lines)


# ---------------------------------------------------------------- what the maps cost

def metas_of(names):
    """What the model must know of these tasks; no environment is made."""
    metas = []
    for name in names:
        row = suite.TABLE[name]
        metas.append({"name": name, "instruction": row.instruction, "obs_dim": int(row.obs_dim),
                      "action_dim": int(row.action_dim), "discount": 0.99,
                      "embodiment": suite.embodiment(name), "return_to_go": [0.0, 1.0]})
    return metas


def random_batch(metas, size):
    """A Batch of one-step windows of these tasks, all numbers random."""
    obs_dim = max(meta["obs_dim"] for meta in metas)
    width = obs_dim + max(meta["action_dim"] for meta in metas) + 3
    rows = torch.rand(size, 4, width)
    rows[:, :, FLAG] = 0
    rows[:, -1, FLAG] = FINAL_OBS
    task = torch.arange(size) * len(metas) // size
    return Batch(rows, obs_dim, task, worth=torch.rand(size))


def cost(texts, size, shares, algo="pac"):
    """A line of the table: a model of these tasks, and a few updates of it. shares: whether tasks
    of one embodiment share their maps"""
    metas = metas_of(suite.chosen(texts))
    if not shares:
        metas = [{**meta, "embodiment": ""} for meta in metas]
    learner = Learner(config_for(size, metas), settings_for(algo, warmup=0.0), metas, 100, "cpu")
    encoders = (learner.model.obs_encoder, learner.model.action_encoder)
    maps = sum(map(count_parameters, encoders))
    batch, generator = random_batch(metas, 128 * learner.pool), torch.Generator().manual_seed(0)
    learner.update_from(batch, generator)
    began = time.process_time()
    for _ in range(UPDATES):
        learner.update_from(batch, generator)
    seconds = (time.process_time() - began) / UPDATES
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GB, of the process so far
    parameters = f"{count_parameters(learner.model) / 1e6:.2f}M"
    return [" ".join(texts), len(metas), len(learner.model.obs_mean), parameters,
            f"{maps / 1e6:.2f}M", f"{1 / seconds:.2g}", f"{memory:.1f}"]


def print_cost(sizes):
    torch.set_num_threads(1)
    head = ["tasks", "count", "maps", "parameters", "of these maps", "updates a CPU-second",
            "peak memory, GB"]
    groups = (["metaworld:10"], ["metaworld"], ["dm_control"], ["all"])
    for size in sizes:
        print(f"\n{size}\n")
        lines = [cost(texts, size, shares) for texts in groups for shares in (True, False)]
        print_table(head, lines)


# ---------------------------------------------------------------- the runs

def main():
    parser = new_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", default=["metaworld:10"], metavar="GROUP",
                        help="each one a data set and a model (default: metaworld:10)")
    parser.add_argument("--algo", nargs="+", choices=ALGOS, default=ALGOS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--updates", type=COUNT, default=steps_of("small"),
                        help="of a run (default: %(default)s)")
    parser.add_argument("--transitions", type=int, default=20_000, help="a task, of new data")
    parser.add_argument("--cost", nargs="*", metavar="SIZE", choices=SIZES,
                        help="what the maps cost, by size")
    parser.add_argument("flags", nargs="*", help="of train.py, behind a --")
    parser.add_argument("--weights", type=Path, metavar="DATA", help="of this data set")
    args = parser.parse_args()
    if args.weights:
        try:
            print_weights(args.weights)
        except DataError as error:
            parser.error(error)
        return
    if args.cost is not None:
        print_cost(args.cost or ["small"])
        return
    refuse_own(args.flags, ("steps", "tasks"))
    table = suite_table(args.folder)
    data = (args.folder or Path("datasets")) / "132"

    def flags(job):
        more = ["--tasks", *suite.chosen([job[0]]), "--steps", args.updates,
                "--episodes", EPISODES, *args.flags]
        return flags_of(job, data / "switching", more)

    def work(job):
        train(table, job, flags(job), OTHER_ACTS.get(job[1]))

    if not args.table:
        wanted = [(group, algo, seed, args.updates)
                  for seed in args.seeds for group in args.tasks for algo in args.algo]
        jobs = unfinished(table, wanted, flags, args.flags, OTHER_ACTS)
        groups = list(dict.fromkeys(job[0] for job in jobs))
        try:
            names = suite.chosen(groups) if groups else []
            suite.need(names)
            suite.need_levels(names)
        except DataError as error:
            parser.error(error)
        need_data(data / "switching", names, args.transitions, source=suite)
        at_a_time(args.workers, work, jobs)
    table.need_rows()
    show(table)


if __name__ == "__main__":
    main()
