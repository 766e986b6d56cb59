"""How fast batches of windows are drawn: ours beside raw memory and the loaders of other projects.

    python -m studies.sampler            sets of 0.2M and 5M transitions; results/bench_data.json
    python -m studies.sampler --large    and one of 50M (5.2 GB of disk)

A row is `rate`, transitions a CPU-second of one thread, so that other work on the machine matters
less; `ratio` to one np.take of the same bytes from memory; and `cold`, transitions a second of wall
time with nothing in the page cache. Other projects' loaders need
`pip install torchrl d3rlpy h5py minari`, in an environment of their own; what is missing is named.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import data
import prepare
from data import FLAG, RETURN, REWARD
from parallel import keep_memory
from studies import RESULTS

OBS, ACTION, LENGTH = 17, 6, 1000  # HalfCheetah's
SHAPES = [(256, 1), (256, 5), (4096, 1), (4096, 5)]  # batch, steps
SMALL, MEDIUM, LARGE = 200_000, 5_000_000, 50_000_000  # transitions
READY_BYTES = 64 << 20  # more than the caches hold


def generate(folder, transitions):
    """Write a set with data.append. Every episode has the same numbers, which no loader notices."""
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(LENGTH + 1, OBS)), rng.uniform(-1, 1, (LENGTH, ACTION))
    episode = data.Episode(obs, action, rng.normal(size=LENGTH), False)
    meta = {"format": data.FORMAT, "env_id": "HalfCheetah-v5", "instruction": "run",
            "obs_dim": OBS, "action_dim": ACTION, "action_low": [-1.0] * ACTION,
            "action_high": [1.0] * ACTION, "discount": 0.99, "reference": None,
            "return_to_go": None, "rows": 0}
    data.append(folder, itertools.repeat(episode, transitions // LENGTH), meta)


# ---------------------------------------------------------------- (task) -> draw(batch, steps)

def raw(task):
    """The yardstick: one gather of ready-made indices from an array in memory."""
    rows, rng = np.array(task.rows()), np.random.default_rng(0)

    @functools.cache
    def indices(batch, steps):
        count = max(4, READY_BYTES // (batch * (steps + 1) * rows[0].nbytes))
        begin = rng.integers(0, len(rows) - steps, (count, batch, 1))
        return itertools.cycle(begin + np.arange(steps + 1))

    return lambda batch, steps: np.take(rows, next(indices(batch, steps)), axis=0)


def ours(task):
    rng = np.random.default_rng(0)

    @functools.cache
    def batches(batch, steps):  # as train.py has them made
        return data.Sampler([task], batch, steps).batches(itertools.repeat(rng))

    return lambda batch, steps: next(batches(batch, steps))


def columns(task):
    """Every transition's obs, action, reward, next_obs, and whether an episode ends with it."""
    rows = task.rows().reshape(-1, LENGTH + 1, data.row_width(task.meta))
    now, after = rows[:, :-1], rows[:, 1:]
    parts = (now[..., :OBS], now[..., OBS:REWARD], now[..., REWARD:RETURN], after[..., :OBS],
             now[..., FLAG:] == data.TRUNCATED)
    return [np.ascontiguousarray(part).reshape(-1, part.shape[-1]) for part in parts]


def torchrl(task):
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, ReplayBuffer
    from torchrl.data.replay_buffers.samplers import RandomSampler, SliceSampler
    obs, action, reward, next_obs, last = map(torch.from_numpy, columns(task))
    after = {"observation": next_obs, "reward": reward, "done": last}
    everything = {"observation": obs, "action": action, "next": after}
    storage = LazyTensorStorage(len(obs))

    @functools.cache
    def buffer(batch, steps):
        sampler = RandomSampler()
        if steps > 1:
            sampler = SliceSampler(num_slices=batch, end_key=("next", "done"), cache_values=True,
                                   strict_length=True)
        made = ReplayBuffer(storage=storage, sampler=sampler, batch_size=batch * steps)
        if not len(storage):
            made.extend(TensorDict(everything, batch_size=[len(obs)]))
        return made

    return lambda batch, steps: buffer(batch, steps).sample()


def d3rlpy(task):
    from d3rlpy.dataset import MDPDataset
    obs, action, reward, _, last = columns(task)
    dataset = MDPDataset(obs, action, reward, np.zeros(len(obs), bool), last[:, 0])

    def draw(batch, steps):
        if steps == 1:
            return dataset.sample_transition_batch(batch)
        return dataset.sample_trajectory_batch(batch, steps)

    return draw


def h5py(task):
    import h5py
    path = task.folder.parent / "flat.hdf5"
    with h5py.File(path, "w") as file:
        file["rows"] = task.rows()
    rows, rng = h5py.File(path, "r")["rows"], np.random.default_rng(0)

    def draw(batch, steps):
        begin = rng.integers(0, len(rows) - steps, batch)
        return np.stack([rows[t:t + steps + 1] for t in begin])

    return draw


def minari(task):
    os.environ["MINARI_DATASETS_PATH"] = tempfile.mkdtemp(dir=task.folder.parent)
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer
    last = np.arange(LENGTH) == LENGTH - 1
    buffers = (EpisodeBuffer(observations=episode.obs, actions=episode.action,
                             rewards=episode.reward, terminations=last & False, truncations=last,
                             infos={}) for episode in task)
    dataset = minari.create_dataset_from_buffers(
        "bench/rows-v0", buffers, observation_space=Box(-np.inf, np.inf, (OBS,), np.float32),
        action_space=Box(-np.inf, np.inf, (ACTION,), np.float32))
    rng = np.random.default_rng(0)

    def draw(batch, steps):
        windows = []
        for _ in range(batch // 64):  # it draws no more episodes than there are
            for episode in dataset.sample_episodes(64):
                t = rng.integers(0, LENGTH - steps)
                windows.append((episode.observations[t:t + steps + 1],
                                episode.actions[t:t + steps], episode.rewards[t:t + steps]))
        return windows

    return draw


class Source(NamedTuple):
    make: Callable
    largest: int = SMALL  # the largest set that it is measured on; loaders that loop are slow
    largest_batch: int = 4096


SOURCES = {
    "np.take, memory": Source(raw, MEDIUM),
    "ours": Source(ours, LARGE),
    "torchrl SliceSampler": Source(torchrl, LARGE),
    "d3rlpy": Source(d3rlpy),
    "h5py, flat": Source(h5py),
    "Minari sample_episodes": Source(minari, largest_batch=256),  # 4096 take seconds a draw
}


# ---------------------------------------------------------------- measuring

def rates(draws, batch, steps, seconds, rounds=10):
    """Transitions a CPU-second of each of `draws`.

    The best of some stretches, taken in turn, for machines are not steady.
    """
    best = {}
    for name, draw in draws.items():
        draw(batch, steps)  # to warm up
        best[name] = 0
    for _ in range(rounds):
        for name, draw in draws.items():
            began, count = time.process_time(), 0
            while time.process_time() - began < seconds / rounds:
                draw(batch, steps)
                count += 1
            rate = count * batch * steps / (time.process_time() - began)
            best[name] = max(best[name], rate)
    return best


def forget(folder):
    """Empty the page cache of a set that nobody maps; False where the system cannot be told to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(folder / "rows.bin", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def cold_rate(folder, batch, steps, draws=20):
    """Ours with an empty page cache, in wall time; 0 where it cannot be emptied."""
    if not forget(folder):
        return 0
    draw = ours(data.Task(folder))
    began = time.perf_counter()
    for _ in range(draws):
        draw(batch, steps)
    return draws * batch * steps / (time.perf_counter() - began)


class Results:
    def __init__(self):
        self.rows, self.missing, self.opening = [], {}, {}

    def add(self, source, transitions, batch, steps, **numbers):
        row = {"source": source, "transitions": transitions, "batch": batch, "steps": steps}
        self.rows.append(row | numbers)
        shown = "  ".join(f"{name} {value:,}" for name, value in numbers.items())
        print(f"{transitions:>11,} {batch:>5} x {steps}  {source:<24} {shown}", flush=True)


def measure_set(results, path, transitions, seconds, names):
    """All sources on one set."""
    # What was written, or read in another order, may lie in pages that are slower to look up.
    # So the set is read anew and in order, as train.py does before it trains.
    forget(path)
    began = time.process_time()
    task = data.Task(path)
    data.Sampler([task], 256, 5)
    results.opening[transitions] = round(time.process_time() - began, 4)
    prepare.verify([task])
    draws = {}
    for name in names:
        if transitions <= SOURCES[name].largest:
            try:
                draws[name] = SOURCES[name].make(task)
            except ImportError as error:
                results.missing[name] = str(error)
    for batch, steps in SHAPES:
        able = {name: draw for name, draw in draws.items() if batch <= SOURCES[name].largest_batch}
        found = rates(able, batch, steps, seconds)
        yardstick = found.get("np.take, memory")
        for name, rate in found.items():
            ratio = {"ratio": round(rate / yardstick, 3)} if yardstick else {}
            results.add(name, transitions, batch, steps, rate=round(rate), **ratio)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also a set of 50M transitions")
    parser.add_argument("--sizes", nargs="+", type=int, default=[SMALL, MEDIUM], help="of the sets")
    parser.add_argument("--seconds", type=float, default=2.0,
                        help="of CPU time a measurement (default: %(default)s)")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES),
                        metavar="SOURCE", help="some of: " + "; ".join(SOURCES))
    parser.add_argument("--folder", help="to keep the generated sets in (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_data.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()  # as in training, for every source
    results = Results()
    with tempfile.TemporaryDirectory() as temporary:
        for transitions in args.sizes + [LARGE] * args.large:
            path = Path(args.folder or temporary, str(transitions), "HalfCheetah-v5")
            if not path.exists():
                generate(path, transitions)
            measure_set(results, path, transitions, args.seconds, args.sources)
            for batch, steps in SHAPES:  # now that no source maps the set any more
                cold = round(cold_rate(path, batch, steps))
                results.add("ours, cold", transitions, batch, steps, cold=cold)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread"
    written = {"command": "python -m studies.sampler", "date": str(date.today()),
               "machine": machine,
               "unit": "rate: transitions a CPU-second; cold: a second of wall time",
               "rows": results.rows, "missing": results.missing,
               "opening_cpu_seconds": results.opening}
    data.write_file(args.out, json.dumps(written, indent=1) + "\n")
    for name, error in results.missing.items():
        print(f"not measured: {name} ({error})")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
