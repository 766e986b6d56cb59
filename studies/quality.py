"""Study 3: BC and PAC on data with more or fewer expert episodes.

    python -m studies.quality            the runs that are missing, then table and figure
    python -m studies.quality --seeds 0  of one seed
    python -m studies.quality --table    no runs: table and figure from results/study3.csv

The data is `levels` with another share of expert steps; the other levels keep their proportions.
"""

from pathlib import Path

import plots
from behaviors import SHARES
from studies.ladder import study1
from studies.runs import (Table, add_choices, at_a_time, flags_of, iqm_interval, need_data,
                          new_parser, print_scores, train, unfinished)

DATA = {  # the share of expert steps, and the data
    "0.0": "datasets/expert-0.0/levels",
    "0.02": "datasets/expert-0.02/levels",
    "0.1": "datasets/levels",
    "0.5": "datasets/expert-0.5/levels",
}
ALGOS = ("bc", "pac")
SHOWN = ("bc", "pac_before", "pac")  # the second by the recipe of 2026-11-25


def shares_of(share):
    """Of all levels, where the expert has this share of the steps."""
    expert = float(share)
    scale = (1 - expert) / (1 - SHARES["expert"])
    shares = {level: scale * part for level, part in SHARES.items()}
    return shares | {"expert": expert}


def copy_of_study1(table, jobs, folder):
    """A tenth of expert steps is study 1's `levels`: the same data, so the same runs."""
    wanted = [(algo, seed) for share, algo, seed in jobs if share == "0.1"]
    source = study1(folder)
    for row in source.rows():
        if row["part"] == "levels" and (row["algo"], row["seed"]) in wanted:
            table.append([{**row, "expert_share": "0.1"}])
    for algo, seed in wanted:
        table.copy_config(source, ("levels", algo, seed), ("0.1", algo, seed))


def main():
    parser = new_parser(__doc__)
    add_choices(parser, "share", tuple(DATA), ALGOS)
    args = parser.parse_args()
    columns = ("expert_share", "algo", "seed", "task", "score")
    table = Table("study3", columns, ("expert_share", "algo", "seed"), args.folder)

    def flags(job):
        return flags_of(job, DATA[job[0]], args.flags)

    def work(job):
        train(table, job, flags(job))

    if not args.table:
        wanted = [(share, algo, seed)
                  for seed in args.seeds for share in args.share for algo in args.algo]
        copy_of_study1(table, table.missing(wanted), args.folder)
        jobs = unfinished(table, wanted, flags, args.flags)
        for share in dict.fromkeys(share for share, _, _ in jobs):
            need_data(Path(DATA[share]), shares=shares_of(share))
        at_a_time(args.workers, work, jobs)

    table.need_rows()
    lines = {algo: {} for algo in SHOWN}
    for share in DATA:
        methods = table.methods("algo", SHOWN, expert_share=share)
        if methods:
            print(f"\n{float(share):.0%} of expert steps\n")
            print_scores(methods)
        for algo, matrix in methods.items():
            lines[algo][f"{float(share):.0%}"] = iqm_interval(matrix)
    seeds = len({row["seed"] for row in table.rows()})
    spread = f"95% interval over {seeds} seeds" if seeds > 1 else "one seed"
    names = [f"{float(share):.0%}" for share in DATA]
    lines = {algo: line for algo, line in lines.items() if line}
    plots.against({"": lines}, names, table.figure, "share of expert steps in the data",
                  f"IQM of normalised scores, {spread}")
    print(f"\nwrote {table.figure}")


if __name__ == "__main__":
    main()
