"""Behaviours recorded elsewhere: data sets from and to other formats, unions of data sets, and what is in one.

    python data.py import ...     from a folder of .npz files, an .hdf5 file as D4RL's, or minari:ID
    python data.py export ...     to the same
    python data.py mix ...        some of the episodes of several data sets, as one

The packages that a format needs (h5py, minari) are imported where it is read or written.
"""

import importlib
import zipfile
from pathlib import Path

import numpy as np

import data
from data import DataError, Episode

FLAT = ("observations", "actions", "rewards", "terminals", "timeouts")  # D4RL's arrays, one row a step


def package(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"this needs `pip install {name}`") from None


def read_npz(folder):
    """Files in the order of their names, one an episode: obs (T+1, O), action (T, A), reward (T,), terminated ()."""
    for path in sorted(Path(folder).glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                yield Episode(*(arrays[name] for name in ("obs", "action", "reward", "terminated")))
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: the file is damaged or lacks an array: {error}") from None


def write_npz(task, folder):
    folder.mkdir()
    for number in range(len(task.episodes)):
        np.savez(folder / f"episode-{number:06d}.npz", **vars(task.episode(number)))


def read_hdf5(path):
    """D4RL's layout: FLAT, and perhaps next_observations. Without these, the last transition before a time limit
    is dropped: the state that it led to is not in the file."""
    h5py = package("h5py")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: {error}") from None
    with file:
        for name in FLAT:
            if name not in file:
                raise DataError(f"{path}: no {name}; there are: {', '.join(file)}")
        obs, action, reward, terminated, timeout = columns = [file[name] for name in FLAT]
        for name, column, expected in zip(FLAT, columns, (2, 2, 1, 1, 1)):
            if column.ndim != expected or len(column) != len(reward):
                raise DataError(f"{path}: {name} has shape {column.shape}, expected ({len(reward)},{' n' if expected == 2 else ''})")
        terminated, start = terminated[:].astype(bool), 0
        for end in np.union1d(np.flatnonzero(terminated | timeout[:].astype(bool)) + 1, [len(terminated)][:len(terminated)]):
            if "next_observations" in file:
                final, stop = file["next_observations"][end - 1:end], end
            else:  # a terminal state's successor is never looked at
                final, stop = (obs[end - 1:end], end) if terminated[end - 1] else (obs[:0], end - 1)
            if stop > start:
                yield Episode(np.concatenate([obs[start:end], final]), action[start:stop], reward[start:stop], terminated[end - 1])
            start = end


def write_hdf5(task, path):
    O, A, N = task.meta["obs_dim"], task.meta["action_dim"], task.meta["transitions"]
    with package("h5py").File(path, "w") as file:
        for name, shape in zip((*FLAT, "next_observations"), ((N, O), (N, A), (N,), (N,), (N,), (N, O))):
            file.create_dataset(name, shape, bool if name in ("terminals", "timeouts") else np.float32)
        stop = 0
        for episode in task:
            part, stop = slice(stop, stop + len(episode.reward)), stop + len(episode.reward)
            file["observations"][part], file["next_observations"][part] = episode.obs[:-1], episode.obs[1:]
            file["actions"][part], file["rewards"][part] = episode.action, episode.reward
            file["terminals" if episode.terminated else "timeouts"][stop - 1] = True


def load_minari(name):
    try:
        return package("minari").load_dataset(name)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"minari:{name} cannot be opened ({error}); `minari download {name}` fetches a public one") from None


def read_minari(name):
    for episode in load_minari(name).iterate_episodes():
        yield Episode(episode.observations, episode.actions, episode.rewards, episode.terminations[-1])


def write_minari(task, name):
    minari = package("minari")
    from minari.data_collector import EpisodeBuffer

    def buffers():  # one at a time: the set may be larger than memory
        for episode in task:
            last = np.arange(1 - len(episode.reward), 1) == 0
            yield EpisodeBuffer(observations=episode.obs, actions=episode.action, rewards=episode.reward, infos={},
                                terminations=last & episode.terminated, truncations=last & (not episode.terminated))

    try:
        minari.create_dataset_from_buffers(name, buffers(), env=task.meta["env_id"])
    except ValueError as error:
        raise DataError(f"minari:{name}: {error}") from None


def reader(source):
    """A spelling, such as minari:mujoco/hopper/medium-v0, walks.hdf5 or a folder -> (function, what to give it)."""
    if source.startswith("minari:"):
        return read_minari, source.removeprefix("minari:")
    if Path(source).suffix in (".hdf5", ".h5"):
        return read_hdf5, source
    if Path(source).is_dir():
        return read_npz, source
    raise DataError(f"{source}: neither minari:ID nor an .hdf5 file nor a folder of .npz files")


def import_(args):
    read, what = reader(args.source)
    env_id = args.env_id
    if read is read_minari and not env_id:
        spec = load_minari(what).env_spec
        env_id = spec and spec.id
    if not env_id:
        raise DataError(f"{args.source} does not name its environment: give --env-id, such as --env-id Hopper-v5")
    reference = dict(zip(("random", "expert"), args.reference)) if args.reference else None
    meta = data.new_meta(env_id, args.instruction or env_id, args.discount, reference)
    with data.whole(args.out / (args.task or env_id.replace("/", "-").replace(":", "-"))) as partial:
        data.append(partial, read(what), meta, args.source)


def export(args):
    task = data.Task(args.task)
    if args.target.startswith("minari:"):
        write_minari(task, args.target.removeprefix("minari:"))
    else:
        with data.whole(args.target) as partial:
            (write_hdf5 if Path(args.target).suffix in (".hdf5", ".h5") else write_npz)(task, partial)


def mix(args):
    """Whole episodes, a share of each source's, drawn without replacement; what was drawn stands in meta.json."""
    shares = args.shares or [1.0] * len(args.sources)
    if len(shares) != len(args.sources) or not all(0 < share <= 1 for share in shares):
        raise DataError(f"--shares {shares}: one for each of the {len(args.sources)} data sets, above 0 and at most 1")
    sources = [(task, share) for folder, share in zip(args.sources, shares) for task in data.open_tasks(folder)]
    rng = np.random.default_rng(args.seed)
    with data.whole(args.out) as partial:
        for merged in data.merged_metas([task for task, _ in sources]):
            kept = [(task, np.sort(rng.permutation(len(task.episodes))[:max(1, round(share * len(task.episodes)))]))
                    for task, share in sources if task.name == merged["name"]]
            meta = {**kept[0][0].meta, "shards": [], "return_to_go": None,
                    "sources": [{"folder": str(task.folder), "episodes": len(numbers)} for task, numbers in kept]}
            data.append(partial / merged["name"], (task.episode(n) for task, numbers in kept for n in numbers), meta)


def describe(args):
    """`info` and `verify`: a line a task."""
    for task in data.open_tasks(args.folder):
        if args.command == "verify":
            task.verify()
        meta, score = task.meta, task.meta["score"]
        print(f"{task.name:<28} {meta['episodes']:>7,} episodes {meta['transitions']:>11,} transitions   score "
              f"{score['mean']:.0f} ± {score['std']:.0f}, best {score['max']:.0f}   obs {meta['obs_dim']}, action "
              f"{meta['action_dim']}" + (", every byte checked" if args.command == "verify" else ""))
        for path in data.leftovers(task.folder, meta):
            print(f"  ignored: {path} ({path.stat().st_size:,} bytes), the rest of a writer that was killed")


def add_commands(commands):
    for name, text in (("info", "what is in a data set"), ("verify", "read every byte and check it")):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path)
        command.set_defaults(run=describe)
    command = commands.add_parser("import", help="make a task of a data set in another format")
    command.add_argument("source", help="minari:ID, an .hdf5 file as D4RL's, or a folder of .npz files, one an episode")
    command.add_argument("out", type=Path, help="data set to put it in")
    command.add_argument("--env-id", help="the Gymnasium environment that it is of (default: what a Minari set says)")
    command.add_argument("--task", help="its name in the data set (default: the environment's)")
    command.add_argument("--instruction", help="the task description that the model reads (default: the environment's name)")
    command.add_argument("--discount", type=float, default=0.99, help="of the returns to go (default: %(default)s)")
    command.add_argument("--reference", type=float, nargs=2, metavar=("RANDOM", "EXPERT"),
                         help="returns that score 0 and 1 (default: scores are returns)")
    command.set_defaults(run=import_)
    command = commands.add_parser("export", help="write a task in another format")
    command.add_argument("task", type=Path, help="such as datasets/switching/Hopper-v5")
    command.add_argument("target", help="minari:ID, a new .hdf5 file, or a new folder for .npz files")
    command.set_defaults(run=export)
    command = commands.add_parser("mix", help="make one data set of some of the episodes of several")
    command.add_argument("out", type=Path, help="a new data set")
    command.add_argument("sources", type=Path, nargs="+", help="data sets")
    command.add_argument("--shares", type=float, nargs="+", help="of each source's episodes (default: all)")
    command.add_argument("--seed", type=int, default=0, help="of which episodes (default: %(default)s)")
    command.set_defaults(run=mix)
