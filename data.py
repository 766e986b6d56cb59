"""Episodes on disk, memory-mapped, and the sampler that makes a `Batch` of them.

A data set is a folder with one directory a task; `prepare.py` makes, converts and checks them.

    datasets/switching/Hopper-v5/
        meta.json      what it is, for people and programs; says how many episodes and rows count
        episodes.npy   one record an episode: start (row), length (transitions), return, checksum
        rows.bin       float32 rows,  obs | action | reward | return_to_go | flag
        frames.bin     uint8, a picture a row, if meta.json has its shape as `frame`

An episode of T transitions has T + 1 rows. The last row holds only the final observation, so that a
truncated episode can bootstrap from it. Rows t and t+1 make a transition: one gather reads a whole
window. Episodes are appended, and rows that meta.json counts never change. What lies behind them is
what a killed writer left, and the next writer cuts it off.
"""

import io
import json
import math
import mmap
import os
import sys
import zlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: there a folder has no lock
    fcntl = None

FORMAT = 3
REWARD, RETURN, FLAG = -3, -2, -1  # a row's last columns; before them stand obs and action
TERMINATED, TRUNCATED, FINAL_OBS = 1, 2, 4  # a row's flag; 0 is an ordinary step
EPISODE = np.dtype([("start", "<i8"), ("length", "<i8"), ("return", "<f8"), ("checksum", "<i8")])
AT_ONCE_BYTES = 3 << 20  # batches smaller than this are made several at once
LARGEST = 1e18  # the square of a larger number overflows in float32
# With which others a return is compared: into how many parts an episode's steps are cut.
MERITS = {"step": 100, "return": 1}
EPISODES_READ = 1000  # of a source, to know what is usual
HISTORY = 3  # pictures that are seen at a time: of a step, and of those before it


class DataError(Exception):
    """Something is wrong with a data set; the message says what, where, and what to do."""


@dataclass
class Episode:
    """obs (T+1, obs_dim), action (T, action_dim) in the environment's units, reward (T,).

    `terminated`: the last state has no future. Otherwise the episode was cut off (truncated).
    """
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    frames: np.ndarray = None  # (T+1, height, width, channels) uint8, if the task has pictures


@dataclass
class Batch:
    """Windows of T steps from several tasks, padded to the widest.

    `rows` (B, T+1, O + A + 3) are as on disk, save that actions are in [-1, 1]. The fields below
    are views of them: obs, next_obs (B, T, O); action (B, T, A); the others (B, T). A step after an
    episode's end is not `valid`: it has no reward, and shows the final observation again.
    """
    rows: torch.Tensor
    obs_dim: int  # O
    task: torch.Tensor  # (B,) int64, an index into the list of tasks
    alpha: torch.Tensor = None  # (B,) the weight of cloning, if the data's sources have their own
    worth: torch.Tensor = None  # (B,) the weight in the policy's terms; none: all count alike
    # Where the tasks have pictures: which are seen at a window's first state and at its last,
    # (B, 2, HISTORY, 2), and how they are read. They are read late, when rows have been chosen.
    place: torch.Tensor = None
    pictures: "Pictures" = None
    frames: torch.Tensor = None  # (B, 2, HISTORY, height, width, channels) uint8, once read

    obs = property(lambda self: self.rows[:, :-1, :self.obs_dim])
    next_obs = property(lambda self: self.rows[:, 1:, :self.obs_dim])
    action = property(lambda self: self.rows[:, :-1, self.obs_dim:REWARD])
    reward = property(lambda self: self.rows[:, :-1, REWARD])
    return_to_go = property(lambda self: self.rows[:, :-1, RETURN])
    terminated = property(lambda self: self.rows[:, :-1, FLAG] == TERMINATED)
    truncated = property(lambda self: self.rows[:, :-1, FLAG] == TRUNCATED)
    valid = property(lambda self: self.rows[:, :-1, FLAG] != FINAL_OBS)

    def map(self, function):
        """The Batch of function(x) for each tensor x there is."""
        changed = {}
        for name, value in vars(self).items():
            changed[name] = function(value) if isinstance(value, torch.Tensor) else value
        return Batch(**changed)

    def to(self, device):
        return self.map(lambda x: x.to(device, non_blocking=True))

    def take(self, rows):
        """The Batch of some rows; rows: indices (B',) or a slice."""
        return self.map(lambda x: x[rows])


def progress(iterable=None, **options):
    """A progress bar; in a log file, a line every 30 seconds."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(iterable, dynamic_ncols=True, mininterval=seconds, **options)


def notice(text):
    """A line for the user, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


# ---------------------------------------------------------------- writing

@contextmanager
def only_writer(folder, wait=False):
    """Hold a folder's lock, or refuse, or wait for it. The system frees it when its process ends
    in any way."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is writing here; try again later") from None
        yield


def close(file):
    """Close a file that was written, once it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def write_file(path, content):
    """Replace a small file in one step: a killed writer leaves the old one. content: text, bytes"""
    partial = path.with_name(path.name + ".partial")
    file = open(partial, "wb")
    file.write(content.encode() if isinstance(content, str) else content)
    close(file)
    os.replace(partial, path)


def return_to_go(reward, terminated, discount):
    """Discounted Monte-Carlo returns, (T,) -> (T,).

    A truncated episode goes on unseen: its tail is taken to earn for ever what the last 1 / (1 -
    discount) steps earned on average [ours]. Counting it as zero would tell the critic that time
    limits kill; a shorter average would stretch the range of the returns by its noise.
    """
    horizon = round(1 / (1 - discount))
    future = 0.0
    if not terminated:
        future = float(np.mean(reward[-horizon:])) / (1 - discount)
    returns = np.empty(len(reward))
    for t in reversed(range(len(reward))):
        future = float(reward[t]) + discount * future
        returns[t] = future
    return returns


def flatten(obs, steps=True):
    """Observations as one array (T+1, O), or (O,) if they are not of several steps: the parts of a
    dict in the order of their names, those of a tuple in theirs, each read row by row."""
    if isinstance(obs, Mapping):
        obs = tuple(obs[name] for name in sorted(obs))
    if isinstance(obs, tuple):
        return np.concatenate([flatten(part, steps) for part in obs], axis=-1)
    obs = np.asarray(obs)
    return obs.reshape(len(obs), -1) if steps else obs.ravel()


def checked(array, shape, what):
    """The array in float32; a DataError says what is wrong with it, and at which step."""
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{what} has dtype {array.dtype}, expected numbers")
    if array.shape != shape:
        raise DataError(f"{what} has shape {array.shape}, expected {shape}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        array = array.astype(np.float32)
    bad = np.argwhere(~np.isfinite(np.atleast_1d(array)))
    if len(bad):
        raise DataError(f"{what} is not finite at step {bad[0, 0]}")
    bad = np.argwhere(np.abs(np.atleast_1d(array)) > LARGEST)
    if len(bad):
        raise DataError(f"{what} exceeds {LARGEST:g} at step {bad[0, 0]}: float32 cannot hold its "
                        "square; scale it down")
    return array


def row_width(meta):
    return meta["obs_dim"] + meta["action_dim"] + 3


def checked_frames(frames, steps, meta, what):
    """An episode's pictures, if the task has any; DataError if they are not those of meta.json."""
    shape = meta.get("frame")
    if frames is None and shape is None:
        return b""
    found = "none" if frames is None else f"{frames.shape} of {frames.dtype}"
    expected = "none" if shape is None else f"{(steps + 1, *shape)} of uint8"
    if found != expected:
        raise DataError(f"{what}: pictures: {found}, expected {expected}")
    return np.ascontiguousarray(frames)


@dataclass
class Tally:
    """What could not be kept of episodes as it was."""
    clipped: int = 0  # transitions whose action lay outside of the box, by more than rounding
    skipped: list = field(default_factory=list)  # why an episode was left out, for each such
    low: np.ndarray = np.inf  # (O,) of the observations, and so on
    high: np.ndarray = -np.inf
    moved: np.ndarray = False  # whether it changed within an episode
    held: np.ndarray = False  # whether float32 holds its changes within some episode

    def see(self, obs):
        low, high = obs.min(axis=0), obs.max(axis=0)
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.moved |= high > low
        self.held |= held(low, high)

    def coarse(self):
        """(O,) the columns whose changes, within episodes or between them, float32 cannot hold"""
        between = (self.high > self.low) & ~held(self.low, self.high)
        return between | (self.moved & ~self.held)


def held(low, high):
    """Whether float32 has eight steps between two numbers, or more."""
    return high - low >= 8 * np.spacing(np.maximum(np.abs(low), np.abs(high)).astype(np.float32))


def pack(episode, meta, where, tally):
    """An episode -> its rows (T+1, obs_dim + action_dim + 3). where: what errors name."""
    if isinstance(episode, DataError):  # what a reader gives in the place of a bad one
        raise episode
    O, A = meta["obs_dim"], meta["action_dim"]
    T = len(np.atleast_1d(episode.reward))
    obs = checked(episode.obs, (T + 1, O), f"{where}: obs")
    action = checked(episode.action, (T, A), f"{where}: action")
    reward = checked(episode.reward, (T,), f"{where}: reward")
    terminated = checked(episode.terminated, (), f"{where}: terminated") != 0
    if T == 0:
        raise DataError(f"{where}: the episode has no transitions")
    returns = return_to_go(reward, terminated, meta["discount"])
    low, high = np.array(meta["action_low"]), np.array(meta["action_high"])
    rows = np.zeros((T + 1, row_width(meta)), np.float32)
    rows[:, :O] = obs
    # What lies outside the box is cut to it, as environments do.
    rows[:-1, O:REWARD] = np.clip(action, low, high)
    rows[:-1, REWARD] = reward
    rows[:-1, RETURN] = checked(returns, (T,), f"{where}: the return to go")
    rows[-2, FLAG] = TERMINATED if terminated else TRUNCATED
    rows[-1, FLAG] = FINAL_OBS
    outside = np.maximum(low - action, action - high) > 1e-3 * (high - low)  # (T, A)
    tally.clipped += int(outside.any(axis=1).sum())
    tally.see(np.asarray(episode.obs, np.float64))
    return rows


def frames_file(folder, meta):
    """frames.bin, open behind the pictures that count; none of a task that has none."""
    if not meta.get("frame"):
        return nullcontext()
    file = open(folder / "frames.bin", "ab")
    file.truncate(meta["rows"] * math.prod(meta["frame"]))
    return file


def append(folder, episodes, meta=None, source=None, skip=False, **more):
    """Write `episodes` (an iterable of Episode) behind those in `folder`; with `meta`, start it
    anew. more: what else meta.json is to say -> a Tally

    They count once meta.json is replaced, in one step, at the end: a killed writer leaves what was
    there before. source: what errors name, instead of `folder`. skip: leave bad episodes out.
    """
    folder, records, tally = Path(folder), [], Tally()
    with only_writer(folder):
        if meta is None:
            task = Task(folder)
            meta, records = task.meta, task.episodes.tolist()
        elif (folder / "meta.json").exists():
            raise DataError(f"{folder}: there is a data set already; append to it, or delete it")
        before, start = len(records), meta["rows"]
        low, high = meta["return_to_go"] or (np.inf, -np.inf)
        with open(folder / "rows.bin", "ab") as file, frames_file(folder, meta) as pictures:
            file.truncate(start * row_width(meta) * 4)
            for number, episode in enumerate(episodes, before):
                where = f"{source or folder}, episode {number}"
                try:
                    rows = pack(episode, meta, where, tally)
                    frames = checked_frames(episode.frames, len(rows) - 1, meta, where)
                except DataError as error:
                    if not skip:
                        raise
                    tally.skipped.append(str(error))
                    continue
                total = np.sum(rows[:, REWARD], dtype=np.float64)
                records.append((start, len(rows) - 1, total, zlib.crc32(frames, zlib.crc32(rows))))
                low = min(low, float(rows[:-1, RETURN].min()))
                high = max(high, float(rows[:-1, RETURN].max()))
                file.write(rows)
                if pictures:
                    pictures.write(frames)
                start += len(rows)
            for written in filter(None, (pictures, file)):
                close(written)
        if len(records) == before:
            why = f": {tally.skipped[0]}" if tally.skipped else ""
            raise DataError(f"{source or folder}: there are no episodes{why}")
        commit(folder, {**meta, **more, "return_to_go": [low, high], "rows": start}, records)
    return tally


def commit(folder, meta, records):
    """Write episodes.npy, then meta.json: from then on the episodes count."""
    table, buffer = np.array(records, EPISODE), io.BytesIO()
    np.save(buffer, table)
    returns = table["return"]
    meta = {**meta, "episodes": len(table), "transitions": int(table["length"].sum()),
            "return": {"mean": returns.mean(), "std": returns.std(),
                       "min": returns.min(), "max": returns.max()},
            "checksum": zlib.crc32(table)}
    write_file(folder / "episodes.npy", buffer.getvalue())
    write_file(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


# ---------------------------------------------------------------- reading

class Task:
    """One task's episodes: `meta` (dict), `episodes` (E,) records, and memory-mapped rows.

    Opening reads meta.json and episodes.npy alone.
    """

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        self.meta = self.read_meta()
        self.episodes = self.read_episodes()
        self.map, self.frames_map = self.opened("rows.bin"), None
        self.rows()
        if self.meta.get("frame"):
            self.frames_map = self.opened("frames.bin")
            self.frames()

    def opened(self, name):
        try:
            with open(self.folder / name, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):
            raise self.fault(name, "the file is missing or empty") from None

    def fault(self, name, what):
        return DataError(f"{self.folder / name}: {what}; delete {self.folder} and make it again")

    def read_meta(self):
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
        except FileNotFoundError:
            raise DataError(f"{self.folder}: no data set here (meta.json is missing)") from None
        except ValueError as error:
            raise self.fault("meta.json", f"it is damaged ({error})") from None
        if meta.get("format") != FORMAT:
            what = f"format {meta.get('format')}, but this code reads format {FORMAT}"
            raise self.fault("meta.json", what)
        return meta

    def read_episodes(self):
        try:
            table = np.load(self.folder / "episodes.npy", allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise self.fault("episodes.npy", f"it is missing or damaged ({error})") from None
        if table.dtype != EPISODE or table.ndim != 1:
            what = f"{table.shape} records of {table.dtype}, expected {EPISODE}"
            raise self.fault("episodes.npy", what)
        table = table[:self.meta["episodes"]]  # a killed writer may have left a longer table
        if zlib.crc32(table) != self.meta["checksum"]:
            raise self.fault("episodes.npy", "wrong checksum: it was changed since it was written")
        return table

    def rows(self):
        """All rows (R, width), not copied."""
        return self.array("rows.bin", self.map, "<f4", (row_width(self.meta),))

    def frames(self):
        """All pictures (R, height, width, channels), not copied; None if the task has none."""
        if self.frames_map is None:
            return None
        return self.array("frames.bin", self.frames_map, np.uint8, self.meta["frame"])

    def array(self, name, map, dtype, shape):
        count = self.meta["rows"] * math.prod(shape)
        found, expected = map.size(), count * np.dtype(dtype).itemsize
        if found < expected:  # to read a map beyond its file's end would kill the process
            what = f"{found:,} bytes, expected {expected:,}: the file was cut short"
            raise self.fault(name, what)
        return np.frombuffer(map, dtype, count).reshape(-1, *shape)

    def of_episode(self, array, number):
        """What belongs to an episode: (T+1, ...), not copied."""
        start, length = self.episodes["start"][number], self.episodes["length"][number]
        return None if array is None else array[start:start + length + 1]

    def episode_rows(self, number):
        """An episode's rows (T+1, width), not copied."""
        return self.of_episode(self.rows(), number)

    def episode(self, number):
        rows, O = self.episode_rows(number), self.meta["obs_dim"]
        terminated = bool(rows[-2, FLAG] == TERMINATED)
        return Episode(rows[:, :O], rows[:-1, O:REWARD], rows[:-1, REWARD], terminated,
                       self.of_episode(self.frames(), number))

    def checksum(self, number):
        """What an episode's bytes come to; its record has what they came to when it was written."""
        found = zlib.crc32(self.episode_rows(number))
        frames = self.of_episode(self.frames(), number)
        return found if frames is None else zlib.crc32(frames, found)

    def __iter__(self):
        return (self.episode(number) for number in range(len(self.episodes)))


# ---------------------------------------------------------------- sampling

class Source(NamedTuple):
    """A task's folder that is drawn from, and what its rows have in common."""
    data: Task
    task: int  # index into the list of tasks
    box: tuple  # centre and half-width (A,) of the action box; None if it is [-1, 1]
    alpha: float  # None if the sources have none


def action_box(meta):
    low, high = np.array(meta["action_low"], np.float32), np.array(meta["action_high"], np.float32)
    if (low == -1).all() and (high == 1).all():
        return None  # to scale is a fifth of a batch's work
    half = np.where(high > low, (high - low) / 2, np.float32(1))  # a constant action becomes 0
    return (low + high) / 2, half


def best_episodes(tasks, share):
    """Of each source the records of the episodes that are among this share of its task's, those
    with the highest returns, in their order. Sources of one name are one task."""
    chosen = [None] * len(tasks)
    for name in {task.name for task in tasks}:
        numbers = [number for number, task in enumerate(tasks) if task.name == name]
        tables = [tasks[number].episodes for number in numbers]
        returns = np.concatenate([table["return"] for table in tables])
        best = np.zeros(len(returns), bool)
        best[np.argsort(-returns, kind="stable")[:max(1, round(share * len(returns)))]] = True
        ends = np.cumsum([len(table) for table in tables])
        for number, table, some in zip(numbers, tables, np.split(best, ends)):
            chosen[number] = table[some]
    return chosen


def divided(weights, tasks, chosen, odds):
    """The sources' weights, once each task's sum of them is divided among its sources in proportion
    to their chosen transitions, times `odds`."""
    parts = np.array([episodes["length"].sum() for episodes in chosen]) * odds
    names, out = np.array([task.name for task in tasks]), np.empty(len(tasks))
    for name in set(names):
        here = names == name
        out[here] = weights[here].sum() * (parts[here] / parts[here].sum())
    return out


class Worth:
    """How much the transitions of a task count: exp(focus * merit), as if a better policy had drawn
    them [ours].

    Merit is a return to go, compared with those of other episodes at the same step: less their
    mean, in mean deviations, and clipped at two of them. A few outliers (falls) would rule raw
    weights, and what is good enough shall count alike. Each step keeps its share of the weight.

    Compared with all of its task's ("return"), a return ranks states before actions. Meta-World's
    is high once a task is done, and little weight was left for the way there.

    It is reward-weighted regression (Peters and Schaal 2007), which Hong et al. 2023 (arXiv
    2306.13085) advise for mixed data of which the good part is small.
    """

    def __init__(self, sources, focus, merit):
        """sources: of one task, (Task, its chosen episodes, how often it is drawn); merit: one of
        MERITS"""
        self.focus = focus
        steps, returns, odds = [], [], []
        for task, episodes, often in sources:
            numbers = np.linspace(0, len(episodes) - 1, EPISODES_READ).round().astype(int)
            read = episodes[np.unique(numbers)]
            for start, length in zip(read["start"], read["length"]):
                returns.append(task.rows()[start:start + length, RETURN])
                steps.append(np.arange(length))
            odds.append(np.full(read["length"].sum(), often / read["length"].sum()))
        steps, returns = np.concatenate(steps), np.concatenate(returns).astype(np.float64)
        longest = max(episodes["length"].max() for _, episodes, _ in sources)
        self.usual = self.measure(steps, returns, np.concatenate(odds), longest, MERITS[merit])

    def measure(self, steps, returns, odds, longest, parts):
        """Of each step the mean return, the mean deviation and the mean weight. (longest, 3)

        Neighbouring steps are taken together, as one of `parts` with equally many transitions. odds
        (B,): how often each transition is drawn.
        """
        counts = np.bincount(steps, minlength=longest)
        part = parts * (counts.cumsum() - counts) // len(steps)  # of each step
        part[steps.max():] = part[steps.max()]  # later ones than any that was read

        def mean(values):
            sums = np.bincount(part[steps], odds * values, parts)
            return (sums / np.maximum(np.bincount(part[steps], odds, parts), 1e-100))[part]

        usual = mean(returns)
        deviation = mean(np.abs(returns - usual[steps]))
        # Returns that are alike but for rounding shall count alike.
        middle = np.average(returns, weights=odds)
        apart = np.average(np.abs(returns - middle), weights=odds)
        least = 0.01 * apart + 1e-4 * np.average(np.abs(returns), weights=odds)
        deviation = np.maximum(deviation, least + 1e-12)
        weights = self.weights(returns, usual[steps], deviation[steps])
        return np.stack([usual, deviation, mean(weights)], axis=1)

    def weights(self, returns, usual, deviation):
        return np.exp(self.focus * np.clip((returns - usual) / deviation, -2, 2))

    def __call__(self, steps, returns):
        """Of transitions at these steps of their episodes, with these returns: (B,), mean 1"""
        usual, deviation, mean = self.usual[steps].T
        return self.weights(returns, usual, deviation) / mean


class Pictures:
    """The pictures of several sources' rows, read where they lie on the disk."""

    def __init__(self, tasks):
        shapes = {tuple(task.meta["frame"]) for task in tasks if task.meta.get("frame")}
        if len(shapes) > 1:
            raise DataError(f"pictures of several shapes: {shapes}; one model takes one")
        self.maps = [task.frames() for task in tasks]
        self.shape, = shapes

    def read(self, place):
        """place (..., 2), of each picture its source and row -> (..., height, width, channels); of
        a source without pictures zeros"""
        flat = place.cpu().numpy().reshape(-1, 2)
        out = np.zeros((len(flat), *self.shape), np.uint8)
        for number, frames in enumerate(self.maps):
            here = np.flatnonzero(flat[:, 0] == number)
            if frames is not None:
                out[here] = frames[flat[here, 1]]
        return torch.from_numpy(out).view(*place.shape[:-1], *self.shape)


class Sampler:
    """Draws mixed-task batches of windows of T = `steps` transitions from memory maps.

    Each of `tasks` is drawn from in proportion to its entry of `weights` (default: equally), and
    within it every transition of every chosen episode is equally likely. Those of one name, from
    several sources, are one task. `top`: only this share of each task's episodes, the best ones.
    Below 1 its transitions are equally likely in all of the task's sources, times `odds`, one for
    each of `tasks`. `alphas`: the weight of cloning for each of them. `focus`, `merit`: of the
    rows' Worth; with a focus of 0 they have none.
    """

    def __init__(self, tasks, batch_size, steps=1, top=1.0, weights=None, alphas=None, odds=None,
                 focus=0, merit="step", device="cpu"):
        self.batch_size, self.steps, self.device = batch_size, steps, torch.device(device)
        self.obs_dim = max(task.meta["obs_dim"] for task in tasks)
        self.action_dim = max(task.meta["action_dim"] for task in tasks)
        self.width = self.obs_dim + self.action_dim + 3
        self.padded = any(row_width(task.meta) < self.width for task in tasks)
        batch_bytes = batch_size * (steps + 1) * self.width * 4
        self.at_once = max(1, AT_ONCE_BYTES // batch_bytes)  # batches
        self.has_alphas = alphas is not None
        weights = np.ones(len(tasks)) if weights is None else np.array(weights, float)
        names = list(dict.fromkeys(task.name for task in tasks))
        has_pictures = any(task.meta.get("frame") for task in tasks)
        self.pictures = Pictures(tasks) if has_pictures else None
        chosen = best_episodes(tasks, top)
        if top < 1:
            weights = divided(weights, tasks, chosen, odds or 1)
        self.sources, source, final, length, chance = [], [], [], [], []
        for number, (task, episodes) in enumerate(zip(tasks, chosen)):
            alpha = alphas[number] if self.has_alphas else None
            self.sources.append(Source(task, names.index(task.name), action_box(task.meta), alpha))
            if not len(episodes):  # another source of this task has all of the best
                continue
            source.append(np.full(len(episodes), number))
            final.append(episodes["start"] + episodes["length"])
            length.append(episodes["length"])
            share = weights[number] / weights.sum()
            chance.append(share * episodes["length"] / episodes["length"].sum())
        # Of each episode that may be drawn: its source, its final row there, where the interval of
        # [0, 1] that draws it ends, and how many transitions lie in a unit of that interval. It is
        # a millionth of one too few: no rounding leads to a row before the episode's first.
        self.source, self.final = np.concatenate(source), np.concatenate(final)
        length, chance = np.concatenate(length), np.concatenate(chance)
        self.first = self.final - length  # an episode's first row
        self.ends = np.cumsum(chance)
        self.ends[self.ends == self.ends[-1]] = 1 + 1e-15
        self.density = (length - 1e-6) / np.maximum(chance, 1e-100)
        self.worths = []  # of each task
        if focus:
            drawn = [one for one in zip(tasks, chosen, weights) if len(one[1])]
            for name in names:
                of_name = [one for one in drawn if one[0].name == name]
                self.worths.append(Worth(of_name, focus, merit))

    def draw(self, rngs, rank=0, ranks=1):
        """The windows of a batch for each of `rngs`, one batch after the other, each (len(rngs) *
        B,): which episodes they are of, their first rows, and how many transitions the episodes
        have from there on.

        A batch is stratified: it has one number of each of B equal parts of [0, 1] (Schaul et al.
        2016, appendix B.2.1). So windows of one source are together, and memory is read forwards.
        """
        uniform = np.empty((len(rngs), self.batch_size))
        for rng, numbers in zip(rngs, uniform):
            rng.random(out=numbers)
        uniform = (uniform + np.arange(self.batch_size)) / self.batch_size
        uniform = uniform[:, rank::ranks].ravel()
        episode = np.searchsorted(self.ends, uniform, side="right")
        to_end = self.ends.take(episode) - uniform
        left = (to_end * self.density.take(episode)).astype(np.int64) + 1
        return episode, self.final.take(episode) - left, left

    def sample(self, rng, rank=0, ranks=1):
        """One Batch; everything random comes from `rng`, a numpy Generator.

        Of several ranks with the same `rng`, each reads its own share of the windows of one batch.
        """
        return self.sample_each([rng], rank, ranks)[0]

    def batches(self, rngs, rank=0, ranks=1):
        """Yield sample(rng, rank, ranks) for each of `rngs`; small ones are made several at once"""
        rngs = iter(rngs)
        while some := list(islice(rngs, self.at_once)):
            yield from self.sample_each(some, rank, ranks)

    def sample_each(self, rngs, rank, ranks):
        """A list of sample(rng, rank, ranks) for each of `rngs`, all made at once."""
        episode, begin, left = self.draw(rngs, rank, ranks)
        source = self.source.take(episode)
        index = np.empty((len(begin), self.steps + 1), np.int64)
        for t in range(self.steps + 1):  # past its end a window stays on the episode's final row
            np.add(begin, np.minimum(left, t), out=index[:, t])
        new = np.zeros if self.padded else np.empty  # what has no padding is written whole
        rows = new((*index.shape, self.width), np.float32)
        tasks = np.empty(len(begin), np.int64)
        alphas, worths = np.empty((2, len(begin)), np.float32)
        cuts = (np.flatnonzero(source[1:] != source[:-1]) + 1).tolist()  # where another one begins
        for first, last in zip([0, *cuts], [*cuts, len(begin)]):
            here = self.sources[source[first]]
            self.gather(here, index[first:last], rows[first:last])
            tasks[first:last] = here.task
            if self.has_alphas:
                alphas[first:last] = here.alpha
            if self.worths:
                t = begin[first:last] - self.first.take(episode[first:last])
                worths[first:last] = self.worths[here.task](t, rows[first:last, 0, RETURN])
        made = {"rows": rows, "task": tasks}
        if self.has_alphas:
            made["alpha"] = alphas
        if self.worths:
            made["worth"] = worths
        if self.pictures:
            made["place"] = self.places(source, self.first.take(episode), index)
        batches = [{} for _ in rngs]
        for name, array in made.items():
            tensor = torch.from_numpy(array).unflatten(0, (len(rngs), -1))
            if self.device.type == "cuda":  # copies that the GPU makes beside its work
                tensor = tensor.pin_memory().to(self.device, non_blocking=True)
            for batch, part in zip(batches, tensor):
                batch[name] = part
        return [Batch(obs_dim=self.obs_dim, pictures=self.pictures, **batch) for batch in batches]

    def places(self, source, first, index):
        """Which pictures are seen at the first and last states of windows `index` (B, T+1): (B, 2,
        HISTORY, 2), each a source and a row, the latest last. Before an episode's start stands its
        first one."""
        ends = index[:, [0, -1], None]  # (B, 2, 1)
        rows = np.maximum(ends - np.arange(HISTORY)[::-1], first[:, None, None])
        return np.stack([np.broadcast_to(source[:, None, None], rows.shape), rows], axis=-1)

    def gather(self, source, index, out):
        """Copy a source's rows `index` (B, T+1) to `out` (B, T+1, width), actions in [-1, 1]."""
        rows, O = source.data.rows(), self.obs_dim
        obs_dim, action_dim = source.data.meta["obs_dim"], source.data.meta["action_dim"]
        if rows.shape[1] == self.width:
            rows.take(index, axis=0, out=out, mode="clip")  # "raise" would gather to a copy first
        else:  # the columns move apart
            read = rows.take(index, axis=0, mode="clip")
            out[..., :obs_dim] = read[..., :obs_dim]
            out[..., O:O + action_dim] = read[..., obs_dim:REWARD]
            out[..., REWARD:] = read[..., REWARD:]
        if source.box:
            centre, half = source.box
            action = out[..., O:O + action_dim]
            np.clip((action - centre) / half, -1, 1, out=action)


def prefetch(batches, count):
    """What the generator `batches` yields, in order, made up to `count` early by one thread."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, batches, None) for _ in range(count))
        while (batch := waiting.popleft().result()) is not None:  # raises what failed in the thread
            waiting.append(thread.submit(next, batches, None))
            yield batch
