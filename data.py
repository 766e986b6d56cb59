"""Episodes on disk, and the sampler that makes a `Batch` of them.

    python data.py build                                    the default data set, from the policies in behaviors/
    python data.py info datasets/switching                  what is in a data set
    python data.py verify datasets/switching                check every byte of it
    python data.py import hopper.hdf5 datasets/own --env-id Hopper-v5     and `export`: also .npz and Minari
    python data.py mix datasets/both datasets/levels datasets/own --shares 1 0.5

A data set is a folder with one directory a task:

    datasets/switching/Hopper-v5/
        meta.json      what it is, for people and programs; names the shards and says how many episodes count
        episodes.npy   one record an episode: start (row), length (transitions), score (undiscounted return), checksum
        rows-000.bin   a shard: float32 rows,  obs | action | reward | return_to_go | flag; the next are in rows-001.bin

An episode of T transitions has T + 1 rows in one shard; the last holds only the final observation, so that
a truncated episode can bootstrap from it. Rows t and t+1 make a transition, so one gather
reads a whole window. `meta.json` is the commit point: a shard that it names never changes again, and
one that it does not name is what a killed writer left: ignored, and removed by the next writer.
"""

import argparse
import io
import json
import mmap
import os
import shutil
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import gymnasium
import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None

FORMAT = 2
DEFAULT_DATA = Path("datasets")
SHARD_BYTES = 1 << 30  # a shard is closed before it grows beyond this
AT_ONCE_BYTES = 3 << 20  # batches smaller than this are made several at once
TERMINATED, TRUNCATED, FINAL_OBS = 1, 2, 4  # a row's flag; 0 is an ordinary step
EPISODE = np.dtype([("start", "<i8"), ("length", "<i8"), ("score", "<f8"), ("checksum", "<i8")])


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


@dataclass
class Batch:
    """Windows of T steps from several tasks, padded to the widest: `rows` (B, T+1, O + A + 3) as on disk, save that actions
    are in [-1, 1]. Its fields are views of them:

    obs, next_obs (B, T, O); action (B, T, A); reward, return_to_go (B, T); terminated, truncated, valid (B, T) bool.
    Steps after an episode's end are not `valid`: zero reward, and its final observation again.
    Beside them: task (B,) int64, an index into the list of tasks; alpha (B,), the weight of cloning, if the data's sources
    have their own; worth (B,), the weight in the policy's terms, if the learner chose the rows.
    """
    rows: torch.Tensor
    obs_dim: int  # O
    task: torch.Tensor
    alpha: torch.Tensor = None
    worth: torch.Tensor = None

    obs = property(lambda self: self.rows[:, :-1, :self.obs_dim])
    next_obs = property(lambda self: self.rows[:, 1:, :self.obs_dim])
    action = property(lambda self: self.rows[:, :-1, self.obs_dim:-3])
    reward = property(lambda self: self.rows[:, :-1, -3])
    return_to_go = property(lambda self: self.rows[:, :-1, -2])
    terminated = property(lambda self: self.rows[:, :-1, -1] == TERMINATED)
    truncated = property(lambda self: self.rows[:, :-1, -1] == TRUNCATED)
    valid = property(lambda self: self.rows[:, :-1, -1] != FINAL_OBS)

    def map(self, function):
        """The Batch of function(x) for each tensor x there is."""
        return Batch(**{name: function(x) if isinstance(x, torch.Tensor) else x for name, x in vars(self).items()})

    def to(self, device):
        return self.map(lambda x: x.to(device, non_blocking=True))

    def take(self, rows):
        """The Batch of some rows; rows: indices (B',) or a slice."""
        return self.map(lambda x: x[rows])

    def split(self, parts):
        """`parts` batches of equal size, each with every task's share."""
        return [self.take(slice(i, None, parts)) for i in range(parts)]


# ---------------------------------------------------------------- writing

def return_to_go(reward, terminated, discount):
    """Discounted Monte-Carlo returns, (T,) -> (T,).

    A truncated episode goes on unseen: its tail is taken to earn for ever what the last 1 / (1 - discount)
    steps earned on average [ours]. Counting it as zero would tell the critic that time limits kill; a
    shorter average would stretch the range of the returns, and so the atoms, by its noise.
    """
    horizon = round(1 / (1 - discount))
    tail = 0.0 if terminated else float(np.mean(reward[-horizon:])) / (1 - discount)
    returns = np.empty(len(reward), np.float32)
    for t in range(len(reward) - 1, -1, -1):
        tail = float(reward[t]) + discount * tail
        returns[t] = tail
    return returns


def pack(episode, meta, where):
    """An episode -> its rows (T+1, obs_dim + action_dim + 3); a DataError names the first bad step."""
    length, obs_dim, action_dim = len(np.atleast_1d(episode.reward)), meta["obs_dim"], meta["action_dim"]
    rows = np.zeros((length + 1, obs_dim + action_dim + 3), np.float32)
    for name, shape, place in (("obs", (length + 1, obs_dim), rows[:, :obs_dim]),
                               ("action", (length, action_dim), rows[:-1, obs_dim:-3]),
                               ("reward", (length,), rows[:-1, -3]), ("terminated", (), np.empty(()))):
        array = np.asarray(getattr(episode, name))
        if array.dtype.kind not in "fiub":
            raise DataError(f"{where}: {name} has dtype {array.dtype}, expected numbers")
        if array.shape != shape:
            raise DataError(f"{where}: {name} has shape {array.shape}, expected {shape}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is named below
            place[...] = array
        for step in np.argwhere(np.atleast_1d(~np.isfinite(place)))[:1, 0]:
            raise DataError(f"{where}: {name} is not finite at step {step}")
    if length == 0:
        raise DataError(f"{where}: the episode has no transitions")
    rows[:-1, obs_dim:-3] = np.clip(rows[:-1, obs_dim:-3], meta["action_low"], meta["action_high"])  # as the environment does
    rows[:-1, -2] = return_to_go(rows[:-1, -3], episode.terminated, meta["discount"])
    rows[-2, -1] = TERMINATED if episode.terminated else TRUNCATED
    rows[-1, -1] = FINAL_OBS
    return rows


def new_meta(env_id, instruction, discount=0.99, reference=None):
    """What meta.json says of a task before its first episode. `reference`: returns that score 0 and 1."""
    try:
        env = gymnasium.make(env_id)
    except (gymnasium.error.Error, ImportError) as error:
        raise DataError(f"environment {env_id!r} cannot be made: {error}") from None
    boxes = env.observation_space, env.action_space
    env.close()
    for name, box in zip(("observations", "actions"), boxes):
        if not isinstance(box, gymnasium.spaces.Box) or len(box.shape) != 1:
            raise DataError(f"{env_id}: its {name} are {box}, and only vectors (a flat Box) can be learnt from")
    if not boxes[1].is_bounded():
        raise DataError(f"{env_id}: its actions have no bounds: {boxes[1]}")
    return {"format": FORMAT, "env_id": env_id, "instruction": instruction, "obs_dim": boxes[0].shape[0],
            "action_dim": boxes[1].shape[0], "action_low": boxes[1].low.tolist(), "action_high": boxes[1].high.tolist(),
            "discount": discount, "reference": reference, "return_to_go": None, "shards": []}


@contextmanager
def only_writer(folder):
    """Hold a folder's lock, or refuse. The system frees it when its process ends, however it ends: no lock is stale."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) if fcntl else msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            raise DataError(f"{folder}: another process is writing here; try again when it has ended") from None
        yield


@contextmanager
def whole(target):
    """A path beside `target` to write to, renamed when all of it is written: half a thing is never believed."""
    target = Path(target)
    if target.exists():
        raise DataError(f"{target} exists already: delete it, or choose another name")
    with only_writer(target.parent):
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        yield partial
        os.replace(partial, target)


def replace(path, content):
    """Write a small file whole or not at all."""
    file = open(path.with_name(path.name + ".new"), "wb")
    file.write(content)
    close(file)
    os.replace(file.name, path)


def shard_path(folder, number):
    return folder / f"rows-{number:03d}.bin"


def append(folder, episodes, meta=None, source=None):
    """Write `episodes` (an iterable of Episode) behind those in `folder`; with `meta`, start it anew.

    They go to new shards, and count once meta.json is replaced, in one step, at the end: a killed
    writer leaves what was there before. `source`: what errors name, instead of `folder`.
    """
    folder = Path(folder)
    with only_writer(folder):
        if meta is not None and (folder / "meta.json").exists():
            raise DataError(f"{folder}: there is a data set already; append to it, or delete it")
        task = None if meta else Task(folder)
        meta, table = (dict(meta), []) if meta else (task.meta, task.episodes.tolist())
        for path in leftovers(folder, meta):
            path.unlink()
        low, high = meta["return_to_go"] or (np.inf, -np.inf)
        shards, file = list(meta["shards"]), None
        start = sum(shards)
        try:
            for episode in episodes:
                rows = pack(episode, meta, f"{source or folder}, episode {len(table)}")
                if file is None or shards[-1] * rows[0].nbytes + rows.nbytes > SHARD_BYTES:
                    close(file)
                    file = open(shard_path(folder, len(shards)), "wb")
                    shards.append(0)
                file.write(rows)
                table.append((start, len(rows) - 1, np.sum(rows[:, -3], dtype=np.float64), zlib.crc32(rows)))
                low, high = min(low, float(rows[:-1, -2].min())), max(high, float(rows[:-1, -2].max()))
                start, shards[-1] = start + len(rows), shards[-1] + len(rows)
        finally:
            close(file)
        if not table:
            raise DataError(f"{source or folder}: there are no episodes")
        table, buffer = np.array(table, EPISODE), io.BytesIO()
        np.save(buffer, table)
        meta.update(episodes=len(table), transitions=int(table["length"].sum()), return_to_go=[low, high], shards=shards,
                    score={name: getattr(table["score"], name)() for name in ("mean", "std", "min", "max")},
                    checksum=zlib.crc32(table))
        replace(folder / "episodes.npy", buffer.getbuffer())
        replace(folder / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())


def close(file):
    if file:
        file.flush(), os.fsync(file.fileno()), file.close()


def leftovers(folder, meta):
    """The shards that meta.json does not name."""
    return sorted(set(folder.glob("rows-*.bin")) - {shard_path(folder, k) for k in range(len(meta["shards"]))})


# ---------------------------------------------------------------- reading

class Task:
    """One task's episodes: `meta` (dict), `episodes` (E,) records, and memory-mapped shards, of which `first` has the
    numbers of the first rows. Opening reads meta.json and episodes.npy alone."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        try:
            meta = self.meta = json.loads((self.folder / "meta.json").read_text())
        except FileNotFoundError:
            raise DataError(f"{self.folder}: no data set here (meta.json is missing)") from None
        except ValueError as error:
            raise self.fault("meta.json", f"it is damaged ({error})") from None
        if meta.get("format") != FORMAT:
            raise self.fault("meta.json", f"format {meta.get('format')}, but this code reads format {FORMAT}")
        self.width = meta["obs_dim"] + meta["action_dim"] + 3
        try:
            table = np.load(self.folder / "episodes.npy", allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise self.fault("episodes.npy", f"it is missing or damaged ({error})") from None
        if table.dtype != EPISODE or table.ndim != 1:
            raise self.fault("episodes.npy", f"{table.shape} records of {table.dtype}, expected {EPISODE}")
        self.episodes = table[:meta["episodes"]]  # a killed writer may have left a longer table
        if zlib.crc32(self.episodes) != meta["checksum"]:
            raise self.fault("episodes.npy", "wrong checksum: it was changed since it was written")
        self.first, self.maps = np.cumsum([0, *meta["shards"]])[:-1], []
        for number in range(len(meta["shards"])):
            path = shard_path(self.folder, number)
            try:
                with open(path, "rb") as file:
                    self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (FileNotFoundError, ValueError):
                raise self.fault(path.name, "the shard is missing or empty") from None
            self.shard(number)

    def fault(self, name, what):
        return DataError(f"{self.folder / name}: {what}; delete {self.folder} and make it again")

    def shard(self, number):
        """A shard's rows (R, width). To read a map beyond the end of a file cut short since would kill the process (SIGBUS)."""
        found, expected = self.maps[number].size(), self.meta["shards"][number] * self.width * 4
        if found != expected:
            what = "was cut short" if found < expected else "has grown"
            raise self.fault(shard_path(self.folder, number).name, f"{found:,} bytes, expected {expected:,}: the file {what}")
        return np.frombuffer(self.maps[number], "<f4").reshape(-1, self.width)

    def rows(self, number):
        """An episode's shard, and its rows (T+1, width), not copied."""
        start, length = self.episodes["start"][number], self.episodes["length"][number]
        shard = int(np.searchsorted(self.first, start, "right")) - 1
        return shard, self.shard(shard)[start - self.first[shard]:][:length + 1]

    def episode(self, number):
        rows, obs_dim = self.rows(number)[1], self.meta["obs_dim"]
        return Episode(rows[:, :obs_dim], rows[:-1, obs_dim:-3], rows[:-1, -3], bool(rows[-2, -1] == TERMINATED))

    def __iter__(self):
        return (self.episode(number) for number in range(len(self.episodes)))

    def verify(self):
        """Read every byte, one episode at a time; a DataError names the file, and the episode and step of a bad number."""
        start, length = self.episodes["start"], self.episodes["length"]
        ends = np.cumsum(length + 1)
        if length.min() < 1 or start[0] or (start[1:] != ends[:-1]).any() or ends[-1] != sum(self.meta["shards"]) \
                or not np.isin(self.first, start).all():
            raise self.fault("episodes.npy", "the episodes do not cover the rows")
        low, high = self.meta["return_to_go"]
        for number, checksum in enumerate(self.episodes["checksum"]):
            shard, rows = self.rows(number)
            name, where = shard_path(self.folder, shard).name, f"task {self.name}, episode {number}"
            if zlib.crc32(rows) != checksum:
                for step in np.flatnonzero(~np.isfinite(rows).all(1)):
                    raise self.fault(name, f"{where}, step {step}: a number is not finite")
                raise self.fault(name, f"{where}: wrong checksum: the file was changed since it was written")
            if not low <= rows[:-1, -2].min() <= rows[:-1, -2].max() <= high:
                raise self.fault(name, f"{where}: its returns leave the bounds of meta.json, {low} to {high}")


def open_tasks(folder, names=None):
    """The tasks of a data set, those in `names` or all, in the order given (or of their names)."""
    folder = Path(folder)
    found = sorted(path.parent.name for path in folder.glob("*/meta.json") if not path.parent.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no data set here; `python data.py build` makes the default one in {DEFAULT_DATA}/")
    for name in names or ():
        if name not in found:
            raise DataError(f"{folder}: no task {name!r}; there are: {', '.join(found)}")
    return [Task(folder / name) for name in names or found]


def merged_metas(tasks):
    """One meta for each name among the tasks; a task that several sources hold has the range of all their returns."""
    metas = {}
    for task in tasks:
        meta = {"name": task.name, **{k: v for k, v in task.meta.items() if k not in ("shards", "checksum", "score")}}
        one = metas.setdefault(task.name, meta)
        for key in ("env_id", "obs_dim", "action_dim", "action_low", "action_high", "discount"):
            if one[key] != meta[key]:
                raise DataError(f"{task.folder}/meta.json: {key} is {meta[key]}, but {one[key]} in another source")
        if one is not meta:
            ranges = one["return_to_go"] + meta["return_to_go"]
            one.update(return_to_go=[min(ranges), max(ranges)], transitions=one["transitions"] + meta["transitions"],
                       episodes=one["episodes"] + meta["episodes"])
    return list(metas.values())


class Sampler:
    """Draws mixed-task batches of windows of T = `steps` transitions from memory maps.

    Each of `tasks` is drawn from in proportion to its entry of `weights` (default: equally), and within it every
    transition of every chosen episode is equally likely. Those of one name, from several sources, are one task.
    `top`: use only this share of each task's episodes, those with the highest scores (filtered BC).
    `alphas`: the weight of cloning for each of `tasks`.
    """

    def __init__(self, tasks, batch_size, steps=1, top=1.0, weights=None, alphas=None, device="cpu"):
        self.batch_size, self.steps, self.device = batch_size, steps, torch.device(device)
        weights = np.ones(len(tasks)) if weights is None else np.array(weights, float)
        names = list(dict.fromkeys(task.name for task in tasks))
        self.obs_dim = max(task.meta["obs_dim"] for task in tasks)
        self.action_dim = max(task.meta["action_dim"] for task in tasks)
        self.width = self.obs_dim + self.action_dim + 3
        padded = any(task.width < self.width for task in tasks)
        self.new_rows = np.zeros if padded else np.empty  # what has no padding is written whole
        self.at_once = max(1, AT_ONCE_BYTES // (batch_size * (steps + 1) * self.width * 4))  # batches
        begin, length, chances, place, self.places = [], [], [], [], []
        for task, weight in zip(tasks, weights / weights.sum()):
            keep = max(1, round(top * len(task.episodes)))
            best = np.sort(np.argsort(-task.episodes["score"], kind="stable")[:keep]) if top < 1 else slice(None)
            episodes = task.episodes[best]
            shard = np.searchsorted(task.first, episodes["start"], "right") - 1
            begin.append(episodes["start"] - task.first[shard]), length.append(episodes["length"])
            chances.append(weight * length[-1] / length[-1].sum())
            place.append(len(self.places) + shard)
            low, high = (np.array(task.meta[key], np.float32) for key in ("action_low", "action_high"))
            scale = (low + high) / 2, np.where(high > low, (high - low) / 2, np.float32(1))  # a constant action becomes 0
            scale = None if (low == -1).all() and (high == 1).all() else scale  # to scale is a fifth of the work
            self.places += [(task, k, scale) for k in range(len(task.maps))]
        self.task = [names.index(task.name) for task, *_ in self.places]
        self.alpha = alphas and [alpha for task, alpha in zip(tasks, alphas) for _ in task.maps]
        # Of each episode of all sources: which of `places` it is in, its final row there, where the interval of [0, 1]
        # that draws it ends, and how dense its transitions are in that: a millionth of one less, so that no rounding
        # leads out at its start.
        begin, length, chances, self.place = (np.concatenate(x) for x in (begin, length, chances, place))
        self.final, self.ends = begin + length, np.cumsum(chances)
        self.ends[self.ends == self.ends[-1]] = 1 + 1e-15
        self.density = (length - 1e-6) / np.maximum(chances, 1e-100)
        # At equal distances in [0, 1], which episode's interval it is, and how many end between two such places at the most.
        self.guide = np.searchsorted(self.ends, np.linspace(0, 1, 4 * len(chances) + 1), "right")
        self.most = np.diff(self.guide).max()

    def draw(self, rngs, rank=0, ranks=1):
        """The windows of a batch for each of `rngs`, one batch after the other: which episodes they are of, their first
        rows in their shards, and how many transitions their episodes have from there on; each (len(rngs) * B,).

        A batch is stratified: of each of B equal parts of [0, 1] it has one number (Schaul et al. 2016, appendix B.2.1).
        So they are in order: those of one shard are together, and memory is read forwards.
        """
        uniform = np.empty((len(rngs), self.batch_size))
        for rng, numbers in zip(rngs, uniform):
            rng.random(out=numbers)
        uniform = ((uniform + np.arange(self.batch_size)) / self.batch_size)[:, rank::ranks].ravel()
        episode = self.guide.take((uniform * (len(self.guide) - 1)).astype(np.int64))  # or one soon after it
        for _ in range(self.most):
            past = uniform >= self.ends.take(episode)
            if not past.any():
                break
            episode += past
        left = ((self.ends.take(episode) - uniform) * self.density.take(episode)).astype(np.int64) + 1
        return episode, self.final.take(episode) - left, left

    def sample(self, rng, rank=0, ranks=1):
        """One Batch; everything random comes from `rng`, a numpy Generator.

        Of several ranks with the same `rng`, each reads its own share of the windows of one and the same batch.
        """
        return self.sample_each([rng], rank, ranks)[0]

    def batches(self, rngs, rank=0, ranks=1):
        """Yield sample(rng, rank, ranks) for each of `rngs`; small batches are made several at once, in half the time."""
        rngs = iter(rngs)
        while some := list(islice(rngs, self.at_once)):
            yield from self.sample_each(some, rank, ranks)

    def sample_each(self, rngs, rank, ranks):
        """A list of sample(rng, rank, ranks) for each of `rngs`, all made at once; their rows are parts of one tensor."""
        T, O = self.steps, self.obs_dim
        episode, begin, left = self.draw(rngs, rank, ranks)
        index = np.empty((len(begin), T + 1), np.int64)
        for t in range(T + 1):  # past its end a window stays on the episode's final row; one is always left
            np.add(begin, np.minimum(left, t) if t > 1 else t, out=index[:, t])
        rows = self.new_rows((len(begin), T + 1, self.width), np.float32)
        tasks, alphas = np.empty(len(begin), np.int64), self.alpha and np.empty(len(begin), np.float32)
        cuts = [0, len(begin)]
        if len(self.places) > 1:  # wherever another shard begins
            place = self.place.take(episode)
            cuts[1:1] = (np.flatnonzero(place[1:] != place[:-1]) + 1).tolist()
        for part in map(slice, cuts, cuts[1:]):  # one gather for each shard of a batch
            place = self.place[episode[part.start]]
            task, shard, scale = self.places[place]
            tasks[part] = self.task[place]
            if self.alpha:
                alphas[part] = self.alpha[place]
            wide, obs_dim, action_dim = task.width == self.width, task.meta["obs_dim"], task.meta["action_dim"]
            # mode: "raise" would gather to a copy first
            read = task.shard(shard).take(index[part], axis=0, out=rows[part] if wide else None, mode="clip")
            if not wide:  # the columns move apart
                rows[part, :, :obs_dim] = read[..., :obs_dim]
                rows[part, :, O:O + action_dim], rows[part, :, -3:] = read[..., obs_dim:-3], read[..., -3:]
            if scale:
                action = rows[part, :, O:O + action_dim]
                np.clip((action - scale[0]) / scale[1], -1, 1, out=action)
        made = [torch.from_numpy(x).unflatten(0, (len(rngs), -1)) for x in (rows, tasks, alphas) if x is not None]
        if self.device.type == "cuda":  # copies that the GPU makes beside its work
            made = [x.pin_memory().to(self.device, non_blocking=True) for x in made]
        return [Batch(rows, O, *others) for rows, *others in zip(*made)]


# ---------------------------------------------------------------- the command line

def main():
    from behaviors import collect, formats  # which need this module
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collect.add_commands(commands), formats.add_commands(commands)
    args = parser.parse_args()
    try:
        args.run(args)
    except DataError as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    from data import main  # not this copy, __main__: the exceptions of data's other users are the other one's
    main()
