"""Data sets in and out: made, converted, mixed, described, checked.

    python prepare.py build                         the default data, of the policies in behaviors/
    python prepare.py suite --tasks metaworld:10    tasks of a suite of 132: behaviors/suite.csv
    python prepare.py import hopper.hdf5 datasets/own --env-id Hopper-v5
    python prepare.py export datasets/own/Hopper-v5 hopper.hdf5
    python prepare.py mix datasets/both datasets/levels datasets/own --shares 1 0.5
    python prepare.py info datasets/switching       what is in a data set
    python prepare.py verify datasets/switching     check every byte of it

`import` and `export` know .hdf5 files as D4RL's, folders of .npz files, and minari:ID. `import`
also reads robomimic's .hdf5 files, `imitation`'s trajectories, and LeRobot's tables.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from behaviors import PARTS, SHARES, SUITES, TASKS, TRANSITIONS

DATASETS = Path("datasets")
DEFAULT_SETS = {DATASETS: TRANSITIONS, DATASETS / "tiny": 20_000}  # transitions a task and part


def natural(text):
    """An argument of 0, 1, 2 ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0, 1, 2 ...")
    return int(text)


def mapping(text):
    """An argument like '{"name": "value"}'"""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not like '{{\"name\": 1}}'") from None


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_makers(commands)
    add_converters(commands)
    add_mix(commands)
    texts = {"info": "what is in a data set", "verify": "read every byte and check it"}
    for name, text in texts.items():
        look = commands.add_parser(name, help=text)
        look.add_argument("folder", type=Path)
    return parser.parse_args(argv)


def add_makers(commands):
    """`build` and `suite`, which make data by the policies in behaviors/."""
    build = commands.add_parser("build", help="make the default data set (what is missing of it)")
    build.add_argument("--out", type=Path, default=DATASETS, help="folder (default: %(default)s)")
    build.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")

    suite = commands.add_parser("suite", help="make a suite of tasks of several domains")
    suite.add_argument("--name", choices=SUITES, default=SUITES[0],
                       help="of the suite (default: %(default)s)")
    suite.add_argument("--out", type=Path, help="folder (default: datasets/NAME)")
    suite.add_argument("--tasks", nargs="+", metavar="TASKS", help="tasks or domains, such as "
                       "metaworld, or metaworld:10 for the first 10 (default: all)")

    for made, transitions, parts in (build, TRANSITIONS, PARTS), (suite, 20_000, PARTS[:1]):
        made.add_argument("--part", nargs="+", choices=PARTS, default=parts,
                          help="default: %(default)s")
        made.add_argument("--transitions", type=natural, default=transitions,
                          help="a task and part (default: %(default)s)")
        made.add_argument("--shares", type=float, nargs=len(SHARES), metavar="SHARE",
                          default=list(SHARES.values()),
                          help=f"of {', '.join(SHARES)} (default: %(default)s)")
        made.add_argument("--discount", type=float, default=0.99,
                          help="of the returns to go (default: %(default)s)")
        made.add_argument("--seed", type=natural, default=0)


def add_converters(commands):
    """`import` and `export`, from and to other formats."""
    read = commands.add_parser("import", help="make a task of a data set in another format")
    # What begins as a negative number: to argparse alone, -7e0 and -5. are flags.
    read._negative_number_matcher = re.compile(r"-\.?\d")
    add = read.add_argument
    add("source", help="minari:ID, an .hdf5 file as D4RL's or robomimic's, a folder of .npz files, "
        "or of `imitation` or LeRobot")
    add("out", type=Path, help="data set to put it in")
    add("--env-id", help="the environment, Id-v0 or package:Id-v0 (default: what the source says)")
    add("--env-args", type=mapping, metavar="JSON", help="of its constructor: '{\"name\": 1}'")
    add("--max-episode-steps", type=int, metavar="N",
        help="its time limit, also the data's if that has none (default: the registered one)")
    add("--task", help="its name in the data set (default: the environment's)")
    add("--instruction", help="what the model reads (default: the environment's id)")
    add("--paraphrases", nargs="+", metavar="TEXT", help="other wordings of it, read in turns")
    add("--embodiment", help="tasks of one share all but the words (default: one of its own)")
    add("--discount", type=float, help="of the returns to go (default: 0.99)")
    add("--reference", type=float, nargs=2, metavar=("RANDOM", "EXPERT"),
        help="returns that score 0 and 1 (default: the source's; none: scores are returns)")
    add("--obs-keys", nargs="+", metavar="KEY", help="which parts of observations (default: all)")
    add("--no-rewards", action="store_true", help="take 0 for them, where the source has none")
    add("--skip-bad", action="store_true", help="leave bad episodes out, and say how many")
    add("--clip-actions", action="store_true", help="cut actions to the environment's box, "
        "however many lie outside")
    add("--fit-actions", action=argparse.BooleanOptionalAction, default=True,
        help="bin over the data's range of an action, where the box is 20 times as wide or more")

    write = commands.add_parser("export", help="write a task in another format")
    write.add_argument("task", type=Path, help="such as datasets/switching/Hopper-v5")
    write.add_argument("target", help="minari:ID, a new .hdf5 file, or a new folder for .npz files")


def add_mix(commands):
    mix = commands.add_parser("mix", help="make one data set of some of the episodes of several")
    mix.add_argument("out", type=Path, help="a new data set")
    mix.add_argument("sources", type=Path, nargs="+", help="data sets")
    mix.add_argument("--shares", type=float, nargs="+",
                     help="of each source's episodes (default: all)")
    mix.add_argument("--seed", type=natural, default=0,
                     help="of which episodes (default: %(default)s)")


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports below, which take seconds: errors are answered at once

import os
import shutil
from contextlib import contextmanager, suppress

import numpy as np

import envs
from behaviors import INSTRUCTIONS, collect, formats, suite
from behaviors.imports import describe_import, report
from behaviors.steps import Reading
from data import (RETURN, DataError, Task, append, commit, notice, only_writer, progress,
                  row_width)

# What sources of one task must agree on.
MUST_AGREE = ("env_id", *envs.KEPT, "obs_dim", "action_dim", "action_low", "action_high",
              "discount", "embodiment", "instruction", "frame")
# Where both say it.
IF_KNOWN = ("reference", "read_parts")
# What a meta says of the episodes there are.
COUNTED = ("name", "episodes", "transitions", "return", "checksum", "sources", "played")


@contextmanager
def new_target(target, wait=False):
    """A path beside `target` to write to, renamed at the end: half a thing is never believed.

    wait: for another process that writes; None if it has made the target.
    """
    target = Path(target)
    if target.exists() and not wait:
        raise DataError(f"{target} exists already: delete it, or choose another name")
    partial = target.with_name(f".{target.name}.partial")
    new = [folder for folder in target.parents if not folder.exists()]
    with only_writer(target.parent, wait):
        if target.exists():
            yield None
            return
        remove(partial)
        try:
            yield partial
            os.replace(partial, target)
        except BaseException:  # nothing is left behind
            remove(partial)
            for folder in new:
                with suppress(OSError):  # it is not empty
                    (folder / ".lock").unlink(missing_ok=True)
                    folder.rmdir()
            raise


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    with suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()


# ---------------------------------------------------------------- opened

def open_tasks(folder, names=None):
    """The tasks of a data set, those in `names` or all, in the order given (or of their names)."""
    folder = Path(folder)
    found = [path.parent.name for path in folder.glob("*/meta.json")]
    found = sorted(name for name in found if not name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no data set here; {instead_of(folder)}")
    for name in names or ():
        if name not in found:
            raise DataError(f"{folder}: no task {name!r}; there are: {', '.join(found)}")
    return [Task(folder / name) for name in dict.fromkeys(names or found)]


def instead_of(folder):
    """What to do about a folder that is no data set."""
    if (folder / "meta.json").exists():
        return f"it is a task of {folder.parent}: give that, and --tasks {folder.name}"
    below = sorted({str(path.parent.parent) for path in folder.glob("*/*/meta.json")})
    if below:
        return f"there are some in it: {', '.join(below)}"
    here = "" if folder.is_absolute() else f", seen from {Path.cwd()}"
    return f"`python prepare.py build` makes the default one in {DATASETS}/{here}"


def tell_of_copies(tasks):
    """DataError for two sources of a task that have the same episodes, a data set that is named
    twice, say; and a line on two that share some: they count twice."""
    for number, task in enumerate(tasks):
        for other in tasks[:number]:
            if other.name != task.name:
                continue
            if other.meta["checksum"] == task.meta["checksum"]:
                raise DataError(f"{task.folder} and {other.folder} have the same episodes: "
                                "give one")
            one, two = (set(source.episodes[["length", "return", "checksum"]].tolist())
                        for source in (task, other))
            if one & two:
                notice(f"{task.folder} and {other.folder} share {len(one & two):,} episode(s), "
                       "which count twice")


def open_sources(folders, names=None, weights=None, alphas=None, check=True):
    """Several data sets as keyword arguments of Sampler: their tasks, how often each is drawn, its
    alpha, and its odds beside the other sources of the task.

    weights, alphas: one for each folder; a folder's tasks are drawn equally. check: read every
    byte.
    """
    tasks, of_tasks, alphas_of_tasks, odds = [], [], [], []
    for number, folder in enumerate(map(Path, folders)):
        opened = open_tasks(folder, names)
        tasks += opened
        weight = weights[number] if weights else 1
        of_tasks += [weight / len(opened)] * len(opened)
        odds += [weight] * len(opened)
        if alphas:
            alphas_of_tasks += [alphas[number]] * len(opened)
    tell_of_copies(tasks)
    if check:
        verify(tasks)
    return dict(tasks=tasks, weights=of_tasks, alphas=alphas_of_tasks or None, odds=odds)


def merged_metas(tasks):
    """One meta for each name among the tasks; of several sources, with the range of all returns and
    all paraphrases"""
    metas = {}
    for task in tasks:
        meta = {"name": task.name, **task.meta}
        for key in ("rows", "checksum", "return"):
            del meta[key]
        one = metas.setdefault(task.name, meta)
        if one is meta:
            continue
        must_agree(task, one, "in another source", both_say(one, meta),
                   ": import both with --no-fit-actions")
        for key in IF_KNOWN:
            if meta.get(key) and not one.get(key):
                one[key] = meta[key]
        ranges = one["return_to_go"] + meta["return_to_go"]
        one["return_to_go"] = [min(ranges), max(ranges)]
        if told := [*one.get("paraphrases", ()), *meta.get("paraphrases", ())]:
            one["paraphrases"] = list(dict.fromkeys(told))
        one["transitions"] += meta["transitions"]
        one["episodes"] += meta["episodes"]
    return list(metas.values())


def both_say(meta, other):
    """What two metas of one task have to agree on."""
    return [*MUST_AGREE, *(key for key in IF_KNOWN if meta.get(key) and other.get(key))]


def must_agree(task, meta, where, keys, fitted=""):
    """DataError if a task's meta differs from another one's. fitted: what to do about boxes"""
    for key in keys:
        if task.meta.get(key) != meta.get(key):
            advice = fitted if key in ("action_low", "action_high") else ""
            raise DataError(f"{task.folder}/meta.json: {key} is {task.meta.get(key)}, but "
                            f"{meta.get(key)} {where}{advice}")


def refuse_other(folder, meta):
    """DataError if a task's folder holds episodes that those of `meta` cannot be put behind."""
    if (Path(folder) / "meta.json").exists():
        task = Task(folder)
        must_agree(task, meta, "in what is to be appended", both_say(task.meta, meta))


def anew(meta):
    """A task's meta as it was before the first episode."""
    meta = {key: value for key, value in meta.items() if key not in COUNTED}
    return {**meta, "rows": 0, "return_to_go": None}


def verify(tasks):
    """Read every byte; a DataError names the file, and the episode and step of a bad number."""
    total = sum(task.meta["transitions"] for task in tasks)
    with progress(total=total, unit="step", unit_scale=True, desc="verify", delay=2) as bar:
        for task in tasks:
            start, length = task.episodes["start"], task.episodes["length"]
            ends = np.cumsum(length + 1)
            in_order = start[0] == 0 and (start[1:] == ends[:-1]).all()
            if length.min() < 1 or not in_order or ends[-1] != task.meta["rows"]:
                raise task.fault("episodes.npy", "the episodes do not cover the rows")
            for number in range(len(task.episodes)):
                verify_episode(task, number)
                bar.update(int(length[number]))


def sound(task, number):
    """An episode, once its bytes are checked: written anew, it has a new checksum."""
    verify_episode(task, number)
    return task.episode(number)


def verify_episode(task, number):
    rows, where = task.episode_rows(number), f"task {task.name}, episode {number}"
    if task.checksum(number) != task.episodes["checksum"][number]:
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise task.fault("rows.bin", f"{where}, step {bad[0]}: a number is not finite")
        what = f"{where}: wrong checksum: the file was changed since it was written"
        raise task.fault("rows.bin", what)
    low, high = task.meta["return_to_go"]
    if not low <= rows[:-1, RETURN].min() <= rows[:-1, RETURN].max() <= high:
        what = f"{where}: its returns leave the bounds of meta.json, {low} to {high}"
        raise task.fault("rows.bin", what)


# ---------------------------------------------------------------- the default data set

def default_folder(size):
    """The data that a model of this size is trained on if none is named."""
    return DATASETS / ("tiny" if size == "tiny" else "") / "switching"


def known(names):
    """DataError for the name of a task that the default data does not have."""
    for name in names or ():
        if name not in TASKS:
            raise DataError(f"no task {name!r}; there are: {', '.join(TASKS)}")


def default_metas(names=None):
    """The metas of the default tasks before there is any data."""
    known(names)
    metas = []
    for name in names or TASKS:
        meta = envs.describe(name, INSTRUCTIONS[name])
        metas.append({**meta, "name": name, "return_to_go": [0, 1]})
    return metas


def lacks_default(folder, names=None):
    """Whether a folder is that of a default data set, and tasks of it are not there yet."""
    if folder.parent not in DEFAULT_SETS or folder.name not in PARTS:
        return False
    known(names)
    return not all((folder / task).exists() for task in names or TASKS)


def build_default(folder, names=None):
    """Make what is missing of a default data set; leave other folders alone."""
    if lacks_default(folder, names):
        wanted = folder.parent, [folder.name], names or TASKS, DEFAULT_SETS[folder.parent]
        there_already(*wanted)  # what is added has to be of one kind with it
        build(*wanted)


def build(folder=DATASETS, parts=PARTS, tasks=TASKS, transitions=TRANSITIONS, shares=SHARES, seed=0,
          discount=0.99, source=collect):
    """Make the missing tasks of a data set: folder/part/task, a function of the seed.

    source: what describes the tasks and plays them, `collect` for the default data
    """
    wanted = [(part, task) for part in parts for task in tasks]
    wanted = [pair for pair in wanted if not Path(folder, *pair).exists()]
    if not wanted:
        return
    described = dict.fromkeys(task for _, task in wanted)
    described = progress(described, unit="task", desc="environments", delay=2, leave=False)
    metas = {task: source.describe(task, discount) for task in described}
    total = len(wanted) * transitions
    bar = progress(total=total, unit="step", unit_scale=True, desc="data")
    with collect.processes() as pool, bar:

        def episodes(jobs):
            for block in pool.imap(source.play_block, jobs):
                for episode in block:
                    bar.update(min(len(episode.reward), total - bar.n))  # the last ones are longer
                    yield episode

        for part, task in wanted:
            bar.set_postfix_str(f"{part}/{task}")
            jobs = collect.jobs_of(task, part, transitions, shares, seed)
            with new_target(Path(folder, part, task), wait=True) as partial:
                if partial:
                    append(partial, episodes(jobs), metas[task])
            if partial and part == "levels":
                tell_of_shares(Task(Path(folder, part, task)), transitions)
        bar.update(total - bar.n)


def tell_of_shares(task, transitions):
    """Say so where `levels` has more than was asked for: its shares are others then, too."""
    made = task.meta["transitions"]
    if made > 1.1 * transitions:
        notice(f"{task.folder} has {made:,} transitions and not {transitions:,}: each level has at "
               "least an episode, so their shares are not as asked for; ask for more transitions")


def there_already(folder, parts, tasks, transitions, discount=0.99):
    """How many tasks of a data set `build` would leave as they are. DataError if one is not what is
    asked for, as far as its meta.json says."""
    found = [path for part in parts for task in tasks
             if (path := Path(folder, part, task)).exists()]
    for path in found:
        meta = Task(path).meta
        if meta["discount"] != discount:
            raise DataError(f"{path} is there already, with a discount of {meta['discount']:g} and "
                            f"not {discount:g}: choose another folder, or delete it")
        if meta["transitions"] < transitions:
            raise DataError(f"{path} is there already, with {meta['transitions']:,} transitions "
                            f"and not {transitions:,}: choose another folder, or delete it")
    return len(found)


# ---------------------------------------------------------------- the commands


def run_build(args, source=collect):
    if not (min(args.shares) >= 0 and abs(sum(args.shares) - 1) <= 1e-6):
        raise DataError(f"--shares {args.shares}: they add up to {sum(args.shares)}, not 1, or one "
                        "is negative")
    if not args.transitions:
        raise DataError("--transitions 0: there would be no data")
    shares = dict(zip(SHARES, args.shares))
    if "beyond" in args.part and shares["expert"] == 1:
        raise DataError(f"--shares {args.shares}: `beyond` has no expert, so nothing is left for "
                        "it; --part names the other parts")
    left = there_already(args.out, args.part, args.tasks, args.transitions, args.discount)
    build(args.out, args.part, args.tasks, args.transitions, shares, args.seed, args.discount,
          source)
    print(f"the data is in {', '.join(str(args.out / part) for part in args.part)}")
    if left:
        print(f"{left} of its tasks were there already, and were left as they were")


def run_suite(args):
    args.tasks = suite.chosen(args.tasks)
    suite.need(args.tasks)
    suite.need_levels(args.tasks)
    args.out = args.out or DATASETS / args.name
    run_build(args, suite)


def run_import(args):
    read, about = formats.reader(args.source)
    meta = describe_import(args, about)
    name = re.sub("[/:]", "-", meta["env_id"]) if args.task is None else args.task
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"--task {name!r}: a name has letters, digits, and . _ - after the first")
    reading = Reading(limit=args.max_episode_steps, longest=envs.make(meta).spec.max_episode_steps,
                      obs_keys=args.obs_keys, obs_parts=meta.get("obs_parts"),
                      rewards=not args.no_rewards)
    with new_target(args.out / name) as partial:
        episodes = progress(read(reading), desc="import", unit="episode", delay=2)
        tally = append(partial, episodes, meta, args.source, args.skip_bad)
        if reading.parts and not reading.obs_parts:
            said = ", ".join(f"{name} ({width})" for name, width in reading.parts)
            notice(f"{args.source}: observations of {said}, in this order")
            task = Task(partial)
            commit(partial, {**task.meta, "read_parts": reading.parts}, task.episodes.tolist())
        for what, (count, first) in reading.notes.items():
            notice(f"{args.source}: {count:,} {what}; the first: {first}")
        long = Task(partial).episodes["length"] > (reading.longest or np.inf)
        if long.any():
            notice(f"{args.source}: {long.sum():,} episode(s) are longer than the environment's "
                   f"{reading.longest:,} steps: are some of them joined?")
        report(Task(partial), tally, args)
    print(f"wrote {args.out / name}")


def run_export(args):
    task = Task(args.task)
    if task.meta.get("frame") and re.search(r"(?i)^minari:|\.(hdf5|h5)$", args.target):
        raise DataError(f"{task.folder} has pictures, and only a folder of .npz files takes these")
    verify([task])
    if args.target.startswith("minari:"):
        formats.write_minari(task, args.target.removeprefix("minari:"))
    else:
        write = formats.write_npz
        if Path(args.target).suffix.lower() in (".hdf5", ".h5"):
            write = formats.write_hdf5
        with new_target(args.target) as partial:
            write(task, partial)
    print(f"wrote {args.target}")


def run_mix(args):
    """A share of each source's episodes, without replacement; meta.json says what was drawn."""
    shares = args.shares or [1.0] * len(args.sources)
    if len(shares) != len(args.sources) or not all(0 < share <= 1 for share in shares):
        raise DataError(f"--shares {shares}: one for each of the {len(args.sources)} data sets, "
                        "above 0 and at most 1")
    sources = []
    for folder, share in zip(args.sources, shares):
        sources += [(task, share) for task in open_tasks(folder)]
    tell_of_copies([task for task, _ in sources])
    rng = np.random.default_rng(args.seed)
    with new_target(args.out) as partial:
        for merged in merged_metas([task for task, _ in sources]):
            kept = []
            for task, share in sources:
                if task.name == merged["name"]:
                    count = max(1, round(share * len(task.episodes)))
                    kept.append((task, np.sort(rng.permutation(len(task.episodes))[:count])))
            drawn = [{"folder": str(task.folder), "episodes": len(some)} for task, some in kept]
            meta = {**anew(merged), "sources": drawn}
            total = sum(len(some) for _, some in kept)
            episodes = (sound(task, number) for task, some in kept for number in some)
            bar = progress(episodes, desc="mix", unit="episode", total=total, delay=2)
            append(partial / merged["name"], bar, meta)
    print(f"wrote {args.out}")


def run_info(args):
    """`info` and `verify`: a line a task."""
    for task in open_tasks(args.folder):
        meta, returns = task.meta, task.meta["return"]
        checked = ", without an expert" if meta.get("sub_optimal") else ""
        if args.command == "verify":
            verify([task])
            checked += ", every byte checked"
        print(f"{task.name:<28} {meta['episodes']:>7,} episodes {meta['transitions']:>11,} "
              f"transitions   return {returns['mean']:.0f} ± {returns['std']:.0f}, "
              f"best {returns['max']:.0f}   obs {meta['obs_dim']}, action {meta['action_dim']}"
              f"{checked}")
        rest = task.map.size() - meta["rows"] * row_width(meta) * 4
        if rest:
            print(f"  ignored: {rest:,} bytes at the end of rows.bin, of a writer that was killed")


COMMANDS = {"build": run_build, "suite": run_suite, "import": run_import, "export": run_export,
            "mix": run_mix, "info": run_info, "verify": run_info}


def main(argv=None, args=None):
    args = args or parse_args(argv)
    try:
        COMMANDS[args.command](args)
    except (DataError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("prepare.py: stopped; what was not finished is not there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(args=ARGS)
