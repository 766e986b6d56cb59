"""One model that sees four tasks through cameras alone: cloning against PAC.

    python -m studies.pixels              data and runs that are missing, then the table
    python -m studies.pixels --table      no runs: what results/pixels.csv says
    python -m studies.pixels --folder /tmp/try --transitions 200 -- --steps 4 --episodes 1

Positions are withheld: what stands beside three pictures of 64 x 64 is a one (behaviors/pixels.py).
"""

from pathlib import Path

from behaviors import pixels, suite
from data import DataError
from studies.runs import (Table, add_choices, at_a_time, flags_of, need_data, new_parser,
                          print_scores, train, unfinished)

TASKS = ("Reacher-v5", "InvertedDoublePendulum-v5", "metaworld-window-close",
         "metaworld-button-press-topdown")
ALGOS = ("bc", "rwr", "one_step", "pac_paper", "pac", "pac_return")
SHARES = dict(random=0.2, weak=0.3, medium=0.25, expert=0.25)
TRANSITIONS, UPDATES, EPISODES = 10_000, 3_000, 10
COLUMNS = ("part", "algo", "seed", "task", "episodes", "score", "success")


def main():
    parser = new_parser(__doc__)
    add_choices(parser, "part", ("switching",), ALGOS)
    parser.add_argument("--transitions", type=int, default=TRANSITIONS, help="a task, of new data")
    args = parser.parse_args()
    table = Table("pixels", COLUMNS, ("part", "algo", "seed"), args.folder)
    data = (args.folder or Path("datasets")) / "pixels"

    def flags(job):
        more = ["--steps", UPDATES, "--episodes", EPISODES, *args.flags]
        return flags_of(job, data / job[0], more)

    def work(job):
        train(table, job, flags(job))

    if not args.table:
        try:
            suite.need(TASKS)
        except DataError as error:
            parser.error(error)
        wanted = [(part, algo, seed)
                  for seed in args.seeds for part in args.part for algo in args.algo]
        jobs = unfinished(table, wanted, flags, args.flags)
        for part in args.part:
            need_data(data / part, TASKS, args.transitions, shares=SHARES, source=pixels)
        at_a_time(args.workers, work, jobs)
    table.need_rows()
    for part in args.part:
        print(f"\n{part}: mean ± standard deviation over seeds\n")
        print_scores(table.methods("algo", ALGOS, TASKS, part=part), TASKS)


if __name__ == "__main__":
    main()
