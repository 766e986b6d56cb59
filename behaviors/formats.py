"""Behaviours recorded elsewhere: readers and writers of other formats (`python prepare.py import`, `export`).

A reader yields Episodes; a writer takes a data.Task. The packages that a format needs (h5py, minari) are
imported where it is read or written.
"""

import importlib
import zipfile
from pathlib import Path

import numpy as np

from data import DataError, Episode, progress

FLAT = ("observations", "actions", "rewards", "terminals", "timeouts")  # D4RL's arrays, one row a step


def package(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"this needs `pip install {name}`") from None


def exported(episodes):
    return progress(episodes, desc="export", unit="episode", delay=2)


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
    for number in exported(range(len(task.episodes))):
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
        for episode in exported(task):
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
        for episode in exported(task):
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


def env_id_of(read, what):
    """The environment that a source names, or None."""
    if read is not read_minari:
        return None
    spec = load_minari(what).env_spec
    return spec and spec.id
