"""Data recorded elsewhere: readers and writers of other formats (`python prepare.py import`,
`export`).

A reader yields Episodes, and in the place of one that cannot be read a DataError. A writer takes a
data.Task. The packages that a format needs are imported where it is read or written.
"""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_origin
from zipfile import BadZipFile

import numpy as np

import envs
from behaviors import tables
from behaviors.steps import each, episodes_of, package, rewards, vectors
from data import DataError, Episode, notice, progress

FLAT = ("observations", "actions", "rewards", "terminals")  # D4RL's arrays, one row a step
# What an episode's arrays are called: ours, and those of `imitation`.
NAMES = {"obs": ("obs",), "action": ("action", "acts"), "reward": ("reward", "rews"),
         "terminated": ("terminated", "terminal")}
TOLD = ("instruction", "paraphrases", "embodiment")  # what a model is told of a task
# What is exported of a task beside its episodes, and of what kind it is.
ABOUT = {"env_id": str, "env_args": dict, "max_episode_steps": int, "wrappers": list,
         "instruction": str, "paraphrases": list[str], "embodiment": str, "discount": float,
         "reference": dict[str, float], "frame": list[int]}


# ---------------------------------------------------------------- .npz: ours, and imitation's

def read_npz(source, reading):
    """A folder of files, one an episode in the order of their names, or one file; see NAMES.

    A file with `indices` holds several episodes: where they begin in the arrays, as `imitation` has
    them.
    """
    paths = [Path(source)]
    if paths[0].is_dir():
        paths = sorted(paths[0].glob("*.npz"))
        others = sorted({path for path in Path(source).rglob("*")
                         if path.suffix.lower() == ".npz"} - set(paths))
        if others:
            reading.note(f"file(s) left out, which are not {source}/*.npz", len(others), others[0])

    def read(where, path):
        reading.without_parts(where)
        with np.load(path, allow_pickle=False) as file:
            arrays = {}
            for name, spellings in NAMES.items():
                found = [spelling for spelling in spellings if spelling in file]
                if not found and name != "reward":
                    raise DataError(f"{where}: the file is damaged or lacks an array: no {name}")
                arrays[name] = file[found[0]] if found else None
            arrays["reward"] = rewards(arrays["reward"], len(arrays["action"]), reading, where)
            if "indices" not in file:
                yield Episode(**arrays, frames=file["frames"] if "frames" in file else None)
                return
            cuts = file["indices"]
        counts = np.arange(len(cuts)) + 1  # each episode has one observation more
        parts = [np.split(arrays["obs"], cuts + counts), np.split(arrays["action"], cuts),
                 np.split(arrays["reward"], cuts), arrays["terminated"]]
        for obs, action, reward, terminated in zip(*parts, strict=True):
            yield Episode(obs, action, reward, terminated)

    return each([(str(path), path) for path in paths], read)


def about_npz(source):
    source = Path(source)
    path, first = source / "task.json", source
    if source.is_dir():
        first = min(source.glob("*.npz"), default=None)
    about = json.loads(path.read_text()) if path.exists() else {}
    if first and "frame" not in about:
        # What cannot be read is named when its turn comes.
        with suppress(OSError, ValueError, BadZipFile), np.load(first, allow_pickle=False) as file:
            if "frames" in file:  # (T+1, height, width, channels)
                about["frame"] = list(file["frames"].shape[1:])
    return about


def write_npz(task, folder):
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(about(task)))
    for number in exported(range(len(task.episodes))):
        arrays = vars(task.episode(number))
        arrays = {name: array for name, array in arrays.items() if array is not None}
        np.savez(folder / f"episode-{number:06d}.npz", **arrays)


def about(task):
    """What is exported of a task beside its episodes."""
    return {key: task.meta[key] for key in ABOUT if task.meta.get(key) not in (None, "", [], {})}


def exported(episodes):
    return progress(episodes, desc="export", unit="episode", delay=2)


# ---------------------------------------------------------------- HDF5: D4RL's, robomimic's

def open_hdf5(path):
    try:
        return package("h5py").File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: {error}") from None


def column(group, name, where, ndim=None, count=None):
    """An array of a group, not read yet; a DataError if there is none, or of another shape."""
    if name not in group:
        raise DataError(f"{where}: no {name}; there are: {', '.join(group)}")
    found = group[name]
    if not hasattr(found, "shape"):
        raise DataError(f"{where}: {name} is a group of {', '.join(found)}, expected an array")
    expected = f"({'n' if count is None else count},{' n' if ndim == 2 else ''})"
    if found.ndim != (ndim or found.ndim) or count not in (None, len(found)):
        raise DataError(f"{where}: {name} has shape {found.shape}, expected {expected}")
    return found


def read_hdf5(path, reading):
    """robomimic's layout if there is a group `data`, otherwise D4RL's."""
    with open_hdf5(path) as file:
        if "data" in file:
            demos = sorted(file["data"], key=lambda name: (len(name), name))  # demo_2, demo_10
            items = [(f"{path}, data/{name}", file["data"][name]) for name in demos]
            yield from each(items, lambda where, demo: read_demo(where, demo, reading))
        else:
            yield from each([(str(path), file)], lambda where, it: read_d4rl(where, it, reading))


def read_d4rl(where, file, reading):
    """D4RL's layout: FLAT, and perhaps timeouts and next_observations."""
    reading.without_parts(where)
    count = len(column(file, "rewards", where, 1))
    obs, action, reward, terminated = (column(file, name, where, ndim, count)
                                       for name, ndim in zip(FLAT, (2, 2, 1, 1)))
    timeout = next_obs = None
    if "timeouts" in file:
        timeout = column(file, "timeouts", where, 1, count)
    if "next_observations" in file:
        next_obs = column(file, "next_observations", where, 2, count)
    return episodes_of(obs, next_obs, action, reward, terminated, timeout, reading, where)


def read_demo(where, demo, reading):
    """One of robomimic's demonstrations: obs/*, perhaps next_obs/*, actions, rewards, dones."""
    if "obs" not in demo:
        raise DataError(f"{where}: no obs; robomimic's dataset_states_to_obs.py puts them in")
    action = column(demo, "actions", where, 2)[:]
    count, sides = len(action), []
    for name in ("obs", "next_obs"):
        parts = {}
        for key in demo.get(name, ()):
            parts[key] = column(demo[name], key, f"{where}/{name}", count=count)[:]
        sides.append(vectors(parts, reading, f"{where}/{name}") if parts else None)
    reward = column(demo, "rewards", where, 1, count)[:] if "rewards" in demo else None
    terminated = demo["dones"][:] if "dones" in demo else np.zeros(count)
    yield from episodes_of(*sides, action, rewards(reward, count, reading, where), terminated,
                           np.arange(count) == count - 1, reading, where)


def about_hdf5(path):
    with open_hdf5(path) as file:
        said = file.attrs.get("task", "{}")
    with suppress(ValueError, TypeError):
        if isinstance(found := json.loads(said), dict):
            return found
    notice(f"{path}: its attribute `task` is none that export writes, and is not read: {said!r}")
    return {}


def write_hdf5(task, path):
    O, A, N = task.meta["obs_dim"], task.meta["action_dim"], task.meta["transitions"]
    shapes = {"observations": (N, O), "actions": (N, A), "rewards": (N,), "terminals": (N,),
              "timeouts": (N,), "next_observations": (N, O)}
    with package("h5py").File(path, "w") as file:
        file.attrs["task"] = json.dumps(about(task))
        for name, shape in shapes.items():
            kind = bool if name in ("terminals", "timeouts") else np.float32
            file.create_dataset(name, shape, kind)
        stop = 0
        for episode in exported(task):
            part = slice(stop, stop + len(episode.reward))
            stop = part.stop
            file["observations"][part] = episode.obs[:-1]
            file["next_observations"][part] = episode.obs[1:]
            file["actions"][part] = episode.action
            file["rewards"][part] = episode.reward
            file["terminals" if episode.terminated else "timeouts"][stop - 1] = True


# ---------------------------------------------------------------- Minari

def load_minari(name):
    try:
        return package("minari").load_dataset(name)
    except DataError:
        raise
    except Exception as error:  # a half-made set may raise anything
        raise DataError(f"minari:{name} cannot be opened ({envs.in_a_line(error)}); "
                        f"`minari download {name}` fetches a public one") from None


def read_minari(name, reading):
    dataset = load_minari(name)

    def read(where, number):
        made = dataset[number]
        obs, reward = vectors(made.observations, reading, where), made.rewards
        if len(obs) != len(reward) + 1 or isinstance(made.actions, (dict, tuple)):
            raise DataError(f"{where}: {len(obs)} observations and actions of "
                            f"{type(made.actions).__name__} for {len(reward)} rewards")
        return episodes_of(obs[:-1], obs[1:], made.actions, reward, made.terminations,
                           made.truncations, reading, where)

    return each(((f"minari:{name}, episode {number}", number) for number in range(len(dataset))),
                read)


def about_minari(name):
    """Its environment (the one for evaluation, if it has its own), its bounds and references."""
    dataset = load_minari(name)
    metadata, found = dataset.storage.metadata, {}
    spec = dataset.env_spec if dataset._eval_env_spec is None else dataset._eval_env_spec
    if spec:
        found = envs.kept_of(spec)
    if dataset._eval_env_spec is not None and dataset.env_spec is not None:
        found["recorded_in"] = json.loads(dataset.env_spec.to_json())
    if hasattr(dataset.action_space, "low"):
        space = dataset.action_space
        found["box"] = [space.low.tolist(), space.high.tolist()]
    low, high = (metadata.get(f"ref_{end}_score") for end in ("min", "max"))
    if low is not None and high is not None:
        found["reference"] = {"random": float(low), "expert": float(high)}
    told = metadata.get("task")  # as write_minari leaves it
    if isinstance(told, dict):
        found |= {key: told[key] for key in (*TOLD, "discount") if key in told}
    return found


def write_minari(task, name):
    minari = package("minari")
    from minari.data_collector import EpisodeBuffer
    from minari.storage.datasets_root_dir import get_dataset_path

    env = envs.make(task.meta)
    # The set holds vectors, and names the environment that is not flattened yet.
    spec = env.env.spec if isinstance(env, envs.Flat) else env.spec
    spec = replace(spec, id=task.meta["env_id"])  # with its package, to be found again
    reference = task.meta["reference"] or dict(random=None, expert=None)

    def buffers():  # one at a time: the set may be larger than memory
        for episode in exported(task):
            last = np.arange(1 - len(episode.reward), 1) == 0
            yield EpisodeBuffer(observations=episode.obs, actions=episode.action,
                                rewards=episode.reward, infos={},
                                terminations=last & episode.terminated,
                                truncations=last & (not episode.terminated))

    target = get_dataset_path(name)
    if target.exists():
        raise DataError(f"minari:{name} exists already: delete it, or choose another name")
    try:
        made = minari.create_dataset_from_buffers(
            name, buffers(), env=spec, observation_space=env.observation_space,
            action_space=env.action_space, ref_min_score=reference["random"],
            ref_max_score=reference["expert"], description=task.meta["instruction"])
        made.storage.update_metadata({"task": about(task)})
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, Exception):
            raise DataError(f"minari:{name}: {envs.in_a_line(error)}") from None
        raise


# ---------------------------------------------------------------- which one

def reader(source):
    """A source, such as minari:mujoco/hopper/medium-v0, walks.hdf5 or a folder -> (a function of a
    Reading that yields its Episodes, what it says of its task: see ABOUT)"""
    path, found = Path(source), {}
    if source.startswith("minari:"):
        read, ask, source = read_minari, about_minari, source.removeprefix("minari:")
    elif path.suffix.lower() in (".hdf5", ".h5") and path.is_file():
        read, ask = read_hdf5, about_hdf5
    elif path.is_dir() and tables.is_lerobot(path):
        read, ask = tables.read_lerobot, None
    elif path.is_dir() and tables.is_imitation(path):
        read, ask = tables.read_imitation, None
    elif path.is_dir() or path.suffix == ".npz" and path.is_file():
        read, ask = read_npz, about_npz
    else:
        raise DataError(f"{source}: neither minari:ID nor an .hdf5 file nor a folder of .npz files")
    try:
        found = ask(source) if ask else {}
    except (ValueError, OSError) as error:
        raise DataError(f"{source}: what it says of its task is damaged: {error}") from None
    check_about(found, source)
    return (lambda reading: read(source, reading)), found


def check_about(found, source):
    """DataError if what a source says of its task is not what ABOUT expects."""
    if not isinstance(found, dict):
        raise DataError(f"{source}: what it says of its task is no object: {found!r}")
    for key, kind in ABOUT.items():
        if found.get(key) is not None and not is_of(found[key], kind):
            expected = kind if get_args(kind) else kind.__name__
            raise DataError(f"{source}: what it says of its task is damaged: {key} is "
                            f"{found[key]!r}, expected {expected}")


def is_of(value, kind):
    """Whether a value of a JSON file is of a type, such as list[str] or dict[str, float]."""
    kind, parts = get_origin(kind) or kind, get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if not isinstance(value, kind):
        return False
    values = value.values() if kind is dict else value
    return not parts or all(is_of(one, parts[-1]) for one in values)
