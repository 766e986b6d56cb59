"""Study 1: what each ingredient adds, on the parts of the default data.

    python -m studies.ladder                 the default parts' missing runs, then table and figure
    python -m studies.ladder --part levels   one part's runs only
    python -m studies.ladder --table         no runs: table and figure from results/study1.csv
    python -m studies.ladder --folder /tmp/try -- --size tiny --steps 20 --episodes 1     a trial

What stands behind `--` is for train.py.
"""

from pathlib import Path

import plots
from behaviors import PARTS, TASKS, UNSEEN
from studies import print_table
from studies.runs import (BY_RETURN, OTHER_ACTS, Table, add_choices, at_a_time, cells, flags_of,
                          iqm_interval, need_data, new_parser, print_scores, train, unfinished)

ALGOS = ("bc", "filtered_bc", "rwr", "bc_q", "one_step", "pac_paper", "pacv", "pac")
# First those that take all of the data alike, then those that choose or weigh it.
SHOWN = ("bc", "bc-sharpened", "bc_q-improved", "pac_paper", "filtered_bc",
         "filtered_bc-sharpened", "rwr", "rwr-sharpened", "one_step", "pacv", "pacv-sharpened",
         "pac")

# The parts of the default data; and tasks that no choice of the recipe has seen, with data that is
# made as `switching` is. One of them has a sparse reward.
DATA = {part: Path("datasets", part) for part in PARTS}
DATA["unseen"] = Path("datasets/unseen/switching")
# The default parts' episodes again, with returns of a horizon of 200 or 330 steps instead of 100.
DISCOUNTS = {"mid": 0.995, "long": 0.997}
SEE_RETURNS = ("rwr", "bc_q", "one_step", "pac_paper", "pacv", "pac")  # to others it is the same
OTHER_HORIZONS = {f"{name}-{part}": Path("datasets", name, part)
                  for name in DISCOUNTS for part in PARTS}
DATA |= OTHER_HORIZONS


def tasks_of(part):
    return UNSEEN if part == "unseen" else TASKS


def need_part(part):
    """Make what is missing of a part's data."""
    need_data(DATA[part], tasks_of(part), discount=DISCOUNTS.get(part.split("-")[0], 0.99))


def study1(folder=None):
    columns = ("part", "algo", "seed", "task", "episodes", "score")
    return Table("study1", columns, ("part", "algo", "seed"), folder)


def main():
    parser = new_parser(__doc__)
    parts = [part for part in DATA if part not in OTHER_HORIZONS]
    add_choices(parser, "part", tuple(DATA), (*ALGOS, *BY_RETURN))
    parser.set_defaults(part=parts, algo=ALGOS)
    args = parser.parse_args()
    table = study1(args.folder)

    def flags(job):
        return flags_of(job, DATA[job[0]], args.flags)

    def work(job):
        train(table, job, flags(job), OTHER_ACTS.get(job[1]))

    if not args.table:
        wanted = [(part, algo, seed)
                  for seed in args.seeds for part in args.part for algo in args.algo
                  if part not in OTHER_HORIZONS or algo in SEE_RETURNS]
        jobs = unfinished(table, wanted, flags, args.flags, OTHER_ACTS)
        for part in dict.fromkeys(part for part, _, _ in jobs):
            need_part(part)
        at_a_time(args.workers, work, jobs)

    table.need_rows()
    panels = {}
    for part in DATA:
        methods = table.methods("algo", SHOWN, tasks_of(part), part=part)
        if methods:
            print(f"\n{part}: mean ± standard deviation over seeds\n")
            print_scores(methods, tasks_of(part))
            # Of other horizons some have one seed, which is a lead.
            if part not in OTHER_HORIZONS or max(map(len, methods.values())) > 1:
                panels[part] = {name: iqm_interval(matrix) for name, matrix in methods.items()}
    print("\nIQMs with --merit return, the recipe of 2026-11-26\n")
    print_table(["", *parts], [[name, *(iqm_of(table, part, name) for part in parts)]
                               for name in BY_RETURN])
    if not panels:
        print("\nno seed has a score for every task, by today's recipe: nothing is drawn")
        return
    drawn = [name for name in SHOWN if any(name in methods for methods in panels.values())]
    plots.ladder(panels, drawn, table.figure, "IQM over tasks and seeds, with its 95% interval")
    print(f"wrote {table.figure}")


def iqm_of(table, part, name):
    """A cell of the IQM, and of how many seeds; empty without a row."""
    matrix = table.scores(tasks_of(part), part=part, algo=name)
    return f"{cells(matrix)[-1]}, seeds: {len(matrix)}" if len(matrix) else ""


if __name__ == "__main__":
    main()
