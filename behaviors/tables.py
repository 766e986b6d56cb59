"""Readers of Arrow tables: LeRobot's folders of .parquet files, and `imitation`'s saved data sets.

Both need pyarrow. As in behaviors.formats, a reader yields Episodes, and in the place of one that
cannot be read a DataError.
"""

from pathlib import Path

import numpy as np

from behaviors.steps import each, episodes_of, package, rewards, vectors
from data import DataError, Episode


def numbers(column):
    """An Arrow column of numbers, or of lists of as many each -> an array"""
    return np.array(column.to_pylist())


# ---------------------------------------------------------------- LeRobot

def is_lerobot(folder):
    return (folder / "meta" / "info.json").exists()


def read_lerobot(folder, reading):
    """Tables of steps: observation.*, action, next.reward, episode_index, frame_index.

    A file holds one episode or several. A step is terminal where next.terminated says so, or
    next.done and next.success together [ours]; next.done alone may be a time limit. Videos and
    images are left out.
    """
    parquet = package("pyarrow.parquet")

    def read(where, path):
        table = parquet.read_table(path)
        for name in ("action", "episode_index", "frame_index"):
            if name not in table.column_names:
                raise DataError(f"{where}: no {name}; there are: {', '.join(table.column_names)}")
        index = numbers(table["episode_index"])
        cuts = [0, *(np.flatnonzero(np.diff(index)) + 1), len(index)]
        if len(index) and len(set(index)) != len(cuts) - 1:
            raise DataError(f"{where}: the steps of an episode do not stand together")
        parts = [(f"{where}, episode {index[first]}", table[first:last])
                 for first, last in zip(cuts, cuts[1:]) if last > first]
        yield from each(parts, lambda where, part: read_steps(where, part, reading))

    paths = sorted(Path(folder).glob("data/**/*.parquet"))
    return each([(str(path), path) for path in paths], read)


def read_steps(where, table, reading):
    """The steps of one of LeRobot's episodes."""
    count, obs = len(table), {}
    if "task_index" in table.column_names:
        task = int(numbers(table["task_index"])[0])
        if reading.task is None:
            reading.task = task
        if task != reading.task:
            raise DataError(f"{where}: task_index is {task}, and {reading.task} before: one task "
                            "is imported at a time; with --skip-bad that is the first one's")
    if not np.array_equal(numbers(table["frame_index"]), np.arange(count)):
        raise DataError(f"{where}: frame_index is not 0, 1, 2 ...: steps are missing")
    for name in table.column_names:
        if name.startswith("observation."):
            found = numbers(table[name].slice(0, 1))
            if found.dtype.kind not in "fiub":
                reading.note(f"episode(s) without {name}, which are no numbers", 1, where)
                continue
            obs[name.removeprefix("observation.")] = numbers(table[name])
    ends = {}
    for name in ("done", "success", "terminated"):
        ends[name] = np.zeros(count)
        if f"next.{name}" in table.column_names:
            ends[name] = numbers(table[f"next.{name}"])
    terminated = ends["terminated"] + ends["done"] * ends["success"] > 0
    found = numbers(table["next.reward"]) if "next.reward" in table.column_names else None
    return episodes_of(vectors(obs, reading, where), None, numbers(table["action"]),
                       rewards(found, count, reading, where), terminated,
                       np.arange(count) == count - 1, reading, where)


# ---------------------------------------------------------------- imitation

def is_imitation(folder):
    return (folder / "state.json").exists() and any(folder.glob("*.arrow"))


def read_imitation(folder, reading):
    """Trajectories, a row each: obs (T+1, O), acts (T, A), rews (T,) and terminal."""
    arrow = package("pyarrow")

    def read(where, path):
        with arrow.memory_map(str(path)) as file:
            table = arrow.ipc.open_stream(file).read_all()
        rows = [(f"{where}, trajectory {row}", table.slice(row, 1)) for row in range(len(table))]
        yield from each(rows, read_trajectory)

    def read_trajectory(where, row):
        reading.without_parts(where)
        for name in ("obs", "acts", "terminal"):
            if name not in row.column_names:
                raise DataError(f"{where}: no {name}; there are: {', '.join(row.column_names)}")
        found, = numbers(row["rews"]) if "rews" in row.column_names else (None,)
        (action,), (obs,) = numbers(row["acts"]), numbers(row["obs"])
        terminal, = numbers(row["terminal"])
        yield Episode(obs, action, rewards(found, len(action), reading, where), terminal)

    paths = sorted(Path(folder).glob("*.arrow"))
    return each([(str(path), path) for path in paths], read)
