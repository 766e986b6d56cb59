"""How fast batches of windows are drawn: ours beside raw memory and the loaders of other projects.

    python -m tests.bench data                     sets of 0.2M and 5M transitions; results/bench_data.json
    python -m tests.bench data --large             ... and 50M (5.2 GB of disk)

A row is `rate`, transitions a CPU-second of one thread (so that other processes on the machine matter
less), `ratio` to one np.take of the same bytes from memory, and `cold`, transitions a second of wall
time with nothing in the page cache. Other projects' loaders need `pip install torchrl d3rlpy h5py minari`,
in an environment of their own; those that are missing are named.
"""

import itertools
import json
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

import data
from train import keep_memory

OBS, ACTION, LENGTH = 17, 6, 1000  # HalfCheetah's
BATCHES, STEPS = (256, 4096), (1, 5)
SIZES = (200_000, 5_000_000)
SLOW = 200_000  # loaders that loop over items are measured on the small set alone


def generate(folder, transitions):
    """Write a set with data.append; every episode has the same numbers, which no loader can notice."""
    rng = np.random.default_rng(0)
    made = data.Episode(rng.normal(size=(LENGTH + 1, OBS)), rng.uniform(-1, 1, (LENGTH, ACTION)), rng.normal(size=LENGTH), False)
    meta = {"format": data.FORMAT, "env_id": "HalfCheetah-v5", "instruction": "run", "obs_dim": OBS, "action_dim": ACTION,
            "action_low": [-1.0] * ACTION, "action_high": [1.0] * ACTION, "discount": 0.99, "reference": None,
            "return_to_go": None, "shards": []}
    rows = data.pack(made, meta, "bench")
    data.pack, pack = lambda *_: rows, data.pack  # packed once: the writer is not what is measured
    data.append(folder, (made for _ in range(transitions // LENGTH)), meta)
    data.pack = pack


def all_rows(task):
    return np.concatenate([task.shard(number) for number in range(len(task.maps))])


# ---------------------------------------------------------------- sources: (task) -> draw(batch, steps)

def raw(task):
    """The yardstick: one gather of ready-made indices from an array in memory."""
    rows, rng, ready = all_rows(task), np.random.default_rng(0), {}

    def draw(batch, steps):
        if (batch, steps) not in ready:  # 64 MB of different rows, more than the caches hold
            count = max(4, (64 << 20) // (batch * (steps + 1) * rows[0].nbytes))
            begin = rng.integers(0, len(rows) - steps, (count, batch, 1))
            ready[batch, steps] = [0, begin + np.arange(steps + 1)]
        state = ready[batch, steps]
        state[0] = (state[0] + 1) % len(state[1])
        return np.take(rows, state[1][state[0]], axis=0)

    return draw


def ours(task):
    rng, samplers = np.random.default_rng(0), {}

    def draw(batch, steps):
        if (batch, steps) not in samplers:
            samplers[batch, steps] = data.Sampler([task], batch, steps).batches(itertools.repeat(rng))  # as train.py does
        return next(samplers[batch, steps])

    return draw


def columns(task):
    """Every transition's obs, action, reward, next_obs and whether an episode ends with it."""
    rows = all_rows(task).reshape(-1, LENGTH + 1, task.width)
    flat = lambda x: np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    return (flat(rows[:, :-1, :OBS]), flat(rows[:, :-1, OBS:-3]), flat(rows[:, :-1, -3:-2]), flat(rows[:, 1:, :OBS]),
            flat(rows[:, :-1, -1:] == data.TRUNCATED))


def torchrl(task):
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, ReplayBuffer
    from torchrl.data.replay_buffers.samplers import RandomSampler, SliceSampler
    obs, action, reward, next_obs, last = (torch.from_numpy(x) for x in columns(task))
    everything = TensorDict({"observation": obs, "action": action, "next": {
        "observation": next_obs, "reward": reward, "done": last}}, batch_size=[len(obs)])
    storage, buffers = LazyTensorStorage(len(obs)), {}

    def draw(batch, steps):
        if (batch, steps) not in buffers:
            sampler = RandomSampler() if steps == 1 else SliceSampler(
                num_slices=batch, end_key=("next", "done"), cache_values=True, strict_length=True)
            buffers[batch, steps] = ReplayBuffer(storage=storage, sampler=sampler, batch_size=batch * steps)
            if not len(storage):
                buffers[batch, steps].extend(everything)
        return buffers[batch, steps].sample()

    return draw


def d3rlpy(task):
    import d3rlpy
    obs, action, reward, _, last = columns(task)
    dataset = d3rlpy.dataset.MDPDataset(obs, action, reward, np.zeros(len(obs), bool), last[:, 0])
    return lambda batch, steps: (dataset.sample_transition_batch(batch) if steps == 1
                                 else dataset.sample_trajectory_batch(batch, steps))


def h5py(task):
    import h5py
    path = task.folder.parent / "flat.hdf5"
    with h5py.File(path, "w") as file:
        file["rows"] = all_rows(task)
    file, rng = h5py.File(path, "r"), np.random.default_rng(0)
    rows = file["rows"]
    return lambda batch, steps: np.stack([rows[t:t + steps + 1] for t in rng.integers(0, len(rows) - steps, batch)])


def minari(task):
    os.environ["MINARI_DATASETS_PATH"] = tempfile.mkdtemp(dir=task.folder.parent)
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer
    box = lambda n: gymnasium.spaces.Box(-np.inf, np.inf, (n,), np.float32)
    last = np.arange(LENGTH) == LENGTH - 1
    dataset = minari.create_dataset_from_buffers(
        "bench/rows-v0", (EpisodeBuffer(observations=e.obs, actions=e.action, rewards=e.reward, terminations=last & False,
                                        truncations=last, infos={}) for e in task),
        observation_space=box(OBS), action_space=box(ACTION))
    rng = np.random.default_rng(0)

    def draw(batch, steps):
        begin = rng.integers(0, LENGTH - steps, (batch // 64, 64))  # it draws no more episodes than there are
        return [(e.observations[t:t + steps + 1], e.actions[t:t + steps], e.rewards[t:t + steps])
                for row in begin for e, t in zip(dataset.sample_episodes(64), row)]

    return draw


SOURCES = {"np.take, memory": raw, "ours": ours, "torchrl SliceSampler": torchrl, "d3rlpy": d3rlpy, "h5py, flat": h5py,
           "Minari sample_episodes": minari}
LOOPS = ("d3rlpy", "h5py, flat", "Minari sample_episodes")


# ---------------------------------------------------------------- measuring

def rates(draws, batch, steps, seconds, rounds=10, clock=time.process_time):
    """Transitions a second of each of `draws`: the best of some stretches, taken in turn, for machines are not steady."""
    best = {}
    for name, draw in draws.items():
        draw(batch, steps)  # to warm up
        best[name] = 0
    for _ in range(rounds):
        for name, draw in draws.items():
            began, count = clock(), 0
            while clock() - began < seconds / rounds:
                draw(batch, steps)
                count += 1
            best[name] = max(best[name], count * batch * steps / (clock() - began))
    return best


def forget(folder):
    """Empty the page cache of a set that nobody maps; False where the system cannot be told to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.glob("rows-*.bin"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def cold_rate(folder, batch, steps, draws=20):
    """Ours with an empty page cache, in wall time; None where it cannot be emptied."""
    if not forget(folder):
        return None
    draw = ours(data.Task(folder))
    began = time.perf_counter()
    for _ in range(draws):
        draw(batch, steps)
    return draws * batch * steps / (time.perf_counter() - began)


def measure(folder, sizes, seconds, names):
    rows, missing, opening = [], {}, {}
    for transitions in sizes:
        path = Path(folder, str(transitions), "HalfCheetah-v5")
        if not path.exists():
            generate(path, transitions)
        forget(path)  # what was read before in any other order, or written, may lie in pages that are slower to look up
        began = time.process_time()
        task = data.Task(path)
        data.Sampler([task], 256, 5)
        opening[transitions] = round(time.process_time() - began, 4)
        task.verify()  # warm: every page is in the cache, and mapped; read in order, as train.py does before it trains
        draws = {}
        for name in names:
            if name in LOOPS and transitions > SLOW or name == "np.take, memory" and transitions > 5_000_000:
                continue
            try:
                draws[name] = SOURCES[name](task)
            except ImportError as error:
                missing[name] = str(error)
        for batch in BATCHES:
            for steps in STEPS:
                found = rates({name: draw for name, draw in draws.items() if batch == BATCHES[0] or not name.startswith("Minari")},
                              batch, steps, seconds)  # Minari's 4096 take seconds a draw
                for name, value in found.items():
                    row = {"source": name, "transitions": transitions, "batch": batch, "steps": steps, "rate": round(value)}
                    if "np.take, memory" in found:
                        row["ratio"] = round(value / found["np.take, memory"], 3)
                    rows.append(row)
                    print(f"{transitions:>11,} {batch:>5} x {steps}  {name:<24} {row['rate'] / 1e6:>8.3f}M  {row.get('ratio', ''):>6}",
                          flush=True)
        draws.clear()
        task = None  # its maps keep pages in the cache
        for batch in BATCHES:
            for steps in STEPS:
                cold = cold_rate(path, batch, steps)
                rows.append({"source": "ours, cold", "transitions": transitions, "batch": batch, "steps": steps, "cold": cold and round(cold)})
                print(f"{transitions:>11,} {batch:>5} x {steps}  ours, cold {'':<13} {(cold or 0) / 1e6:>8.3f}M", flush=True)
    return {"rows": rows, "missing": missing, "opening_cpu_seconds": opening}


def add_arguments(parser):
    parser.add_argument("--large", action="store_true", help="also a set of 50M transitions (5.2 GB of disk)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of CPU time a measurement (default: %(default)s)")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), metavar="SOURCE")
    parser.add_argument("--folder", help="where to keep the generated sets (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("results/bench_data.json"))
    parser.set_defaults(run=bench_data)


def bench_data(args):
    torch.set_num_threads(1)
    keep_memory()  # as in training, for every source
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(args.folder or temporary, SIZES + (50_000_000,) * args.large, args.seconds, args.sources)
    result = {"command": "python -m tests.bench data", "date": str(date.today()), "machine": f"{platform.processor() or platform.machine()}, "
              f"{os.cpu_count()} cores, one thread", "unit": "rate: transitions a CPU-second; cold: a second of wall time", **result}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, error in result["missing"].items():
        print(f"not measured: {name} ({error})")
