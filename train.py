"""Train one model on a data set of several tasks, then evaluate it.

    python train.py                                   the default: PAC, size small, seven tasks
    python train.py --size tiny                       the whole tour, data to evaluation, in minutes
    python train.py --algo bc --seed 1                another algorithm, another seed
    python train.py --tasks Hopper-v5 --eta 0.1       one task; any setting of the loss is a flag
    python train.py --data datasets/own datasets/levels --alphas 1 0.5        two sources, each with its own alpha
    python train.py --resume runs/pac-small-0         go on where a run was stopped
    python train.py --size l --dry-run                what it would take: memory, operations, time
    torchrun --nproc-per-node 8 train.py --size l     on several GPUs (torchrun has flags for several machines)

A run's folder holds config.json, metrics.jsonl, curve.png, checkpoints/ and, at the end, eval.json.
Exit codes: 0; 2, the message says what is wrong; 3, trained, but episodes of the evaluation failed;
128 + n, stopped by signal n (Ctrl-C: 130) after the update in hand, saved; a second signal ends at once.
"""

import argparse
import ctypes
import faulthandler
import json
import os
import shutil
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tqdm import tqdm

import data
from behaviors import TASKS, collect
from eval import (CHECKPOINT_FORMAT, EPISODES_FAILED, RunError, checkpoints, crc32, curve, default_act, evaluate,
                  find_checkpoint, load_tensors, read_config, table, verify, write_whole)
from learner import ALGORITHMS, Learner, LossSettings, NonFinite, flops_per_update, join, report, settings_for, whole
from model import SIZES, TaskSpec, config_for, count_parameters

DEFAULT_SETS = {data.DEFAULT_DATA: collect.TRANSITIONS, data.DEFAULT_DATA / "tiny": 20_000}  # transitions a task and part
STEPS = {"tiny": 600, "small": 10_000}  # updates by default; other sizes: 100,000
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
ONE_THREAD = ("tiny", "small")  # a second would mostly wait: beside other work on the cores it made a run 8 times slower
LARGE = ("s", "m", "l")  # these are sharded over the ranks and recompute activations, unless a flag says otherwise
RANK, RANKS, LOCAL_RANK = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) \
    if dist.is_torchelastic_launched() else (0, 1, 0)
# Metrics that a sound run keeps on this side of a threshold; past it, a warning, once. Sound runs of ours had
# an entropy above 2 and |value - observed| below 0.05 [ours].
WARNINGS = {
    "the policy's entropy has collapsed (below 0.1 nats a dimension): raise --eta or --alpha":
        lambda m: m["policy/entropy"] < 0.1,
    "the critic overestimates (mean Q exceeds the observed returns by 0.25 of the range of values): raise --mc-share "
    "or --alpha, or lower --n-step": lambda m: m.get("critic/value", 0) - m.get("critic/observed", 0) > 0.25,
}


def option(default, text):
    return field(default=default, metadata={"help": text + ("" if "(default" in text else f" (default: {default})")})


@dataclass
class TrainConfig:
    size: str = option("small", f"of the model: {', '.join(SIZES)}")
    algo: str = option("pac", ", ".join(ALGORITHMS))
    data: list[str] = option(None, "data sets: folders with one directory a task (default, made if missing: "
                             f"{data.DEFAULT_DATA / 'switching'}; size tiny: {data.DEFAULT_DATA / 'tiny' / 'switching'})")
    weights: list[float] = option(None, "how often each data set is drawn from, its tasks equally (default: equal)")
    alphas: list[float] = option(None, "alpha for each data set, in the place of --alpha (default: --alpha for all)")
    verify: bool = option(True, "read every byte of the data before training")
    prefetch: bool = option(False, "make batches ahead in a thread: the same batches, in the same order")
    tasks: list[str] = option(None, "some of the data set's tasks (default: all)")
    steps: int = option(None, f"updates (default: {', '.join(f'{s} {n}' for s, n in STEPS.items())}, others 100000)")
    batch_size: int = option(128, "transitions an update, of all ranks together")
    seed: int = option(0, "of everything random")
    out: str = option(None, "the run's folder (default: runs/ALGO-SIZE-SEED)")
    eval_every: int = option(3_000, "updates between evaluations on the way; 0: none")
    eval_episodes: int = option(3, "a task in those evaluations")
    episodes: int = option(10, "a task in the evaluation at the end; 0: none")
    save_every: int = option(500, "updates between checkpoints")
    keep: int = option(2, "checkpoints, the newest")
    log_every: int = option(50, "updates between lines of metrics.jsonl")
    threads: int = option(None, f"of the CPU (default: 1 for {' and '.join(ONE_THREAD)}, otherwise torch's choice)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda; bf16 on cuda")
    compile: bool = option(False, "the loss, by torch.compile: faster updates after a minute or two; needs a C++ compiler")
    accumulate: int = option(1, "work a batch off in so many parts, for less memory")
    recompute: bool = option(None, f"activations, for less memory and a third more work (default: for {', '.join(LARGE)})")
    shard: bool = option(None, f"the weights over the ranks: FSDP instead of DDP (default: for {', '.join(LARGE)})")
    deterministic: bool = option(False, "on a GPU: only operations that give the same bits every time; a CPU's always do")


# On --resume: how, not what, is computed. Then the bits may differ; with `accumulate` also the statistics within a part.
MAY_CHANGE = ("verify", "prefetch", "keep", "threads", "device", "compile", "accumulate", "recompute", "shard")


def parse_args(argv):
    """-> dicts of the run's flags given and of the loss settings given, and the flags that are not kept in the run"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    run = parser.add_argument_group("the run")
    for f in fields(TrainConfig):
        element = get_args(f.type)  # of a list
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(metavar=f.name.upper(), **(dict(nargs="+", type=element[0]) if element else dict(type=f.type)))
        run.add_argument(flag(f.name), help=f.metadata["help"], **kind)
    run.add_argument("--resume", metavar="RUN", default=None, help="go on with this run, with its own flags")
    run.add_argument("--at", metavar="UPDATE", type=int, default=None,
                     help="with --resume: from the checkpoint of this update (default: the newest)")
    run.add_argument("--dry-run", action="store_true", default=False, help="print what the run would take, and stop")
    loss = parser.add_argument_group("the loss (default: the algorithm's own value, see ALGORITHMS in learner.py)")
    for f in fields(LossSettings):
        loss.add_argument(flag(f.name), metavar=f.name.upper(), type=f.type, help=f"pac: {f.default}")
    given = vars(parser.parse_args(argv))
    if given["at"] is not None and not given["resume"]:
        parser.error("--at goes with --resume")
    settings = {f.name: given.pop(f.name) for f in fields(LossSettings) if f.name in given}
    return given, settings, *(given.pop(name) for name in ("resume", "at", "dry_run"))


def flag(name):
    return "--" + name.replace("_", "-")


def random_streams(seed, step, device):
    """The numpy and torch generators of one update: functions of the seed, the step and the rank alone,

    so that a resumed run draws what the undisturbed one would have drawn, with no state to save.
    """
    rng = np.random.default_rng([seed, step])  # the same on every rank: each reads its share of one batch
    return rng, torch.Generator(device).manual_seed(int(rng.integers(2**62)) + RANK)


# ---------------------------------------------------------------- several ranks: torchrun starts them, torch joins them

@contextmanager
def ranks(device):
    """Join the other ranks, if torchrun started several, and say what happened when one is lost."""
    if RANKS == 1:
        yield
        return
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    # Rank 0 evaluates alone, and the others wait as long. A rank that dies is noticed at once all the same.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's own are plain RuntimeErrors
            raise
        raise RunError(f"rank {RANK} stops, since another rank has ended ({str(error).splitlines()[0]}); the newest "
                       "checkpoint is whole: start again with --resume") from None
    dist.destroy_process_group()


def over_ranks(values, device, operation=dist.ReduceOp.SUM):
    """The sum, or another reduction, of a list of numbers over the ranks."""
    if RANKS == 1:
        return values
    values = torch.tensor(values, device=device, dtype=torch.float64)
    dist.all_reduce(values, operation)
    return values.tolist()


def made_ahead(batches, count):
    """What the generator `batches` yields, in order, made up to `count` early by one thread."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, batches, None) for _ in range(count))
        while (batch := waiting.popleft().result()) is not None:  # what failed in the thread is raised here
            waiting.append(thread.submit(next, batches, None))
            yield batch


# ---------------------------------------------------------------- checkpoints

def checkpoint_tensors(learner):
    """Every tensor that the run's future depends on, by name; load and save share this list."""
    tensors = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
    tensors |= {f"target.{k}": v for k, v in learner.target_model.state_dict().items()}
    for name, parameter in learner.model.named_parameters():
        for key, value in learner.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def save(run, learner, keep):
    """Write checkpoints/UPDATE whole or not at all, then drop all but the `keep` newest.

    A checkpoint is a folder: the tensors, one safetensors file from each rank, and checkpoint.json with their
    checksums. It is written under another name; the rename at the end is the commit point.
    """
    path = Path(run, "checkpoints", f"{learner.updates:09d}")
    partial = path.with_suffix(".partial")
    try:
        if RANK == 0:
            for leftover in path.parent.glob("*.*"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint_tensors(learner).items()}
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(partial, save_distributed=True))  # with fsync
        if RANK == 0:
            write_whole(partial / "checkpoint.json", json.dumps({
                "format": CHECKPOINT_FORMAT, "updates": learner.updates,
                "crc32": {file.name: crc32(file) for file in sorted(partial.glob("*.safetensors"))}}, indent=2) + "\n")
            if path.exists():  # after --at, the same updates are made again
                path.rename(path.with_suffix(".old"))
            partial.rename(path)
            older = [other for other in checkpoints(run) if other.name < path.name]
            for old in older[:max(0, len(older) + 1 - keep)]:
                shutil.rmtree(old.rename(old.with_suffix(".old")))
    except (OSError, dcp.api.CheckpointException) as error:
        if isinstance(error, dcp.api.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        raise RunError(f"{path} could not be written ({error}); older checkpoints are as they were. Free some space or "
                       f"mend the folder's permissions, then: python train.py --resume {run}") from None


def restore(path, learner):
    if RANK == 0:
        verify(path)
    load_tensors(path, checkpoint_tensors(learner))
    learner.updates = int(path.name)


# ---------------------------------------------------------------- one run

def prepare(given, changes, resume):
    """Flags -> (TrainConfig, its LossSettings). Errors here leave the disk as it was."""
    if resume:
        stored = read_config(resume)
        before = stored["train"] | stored["settings"]
        for name, value in (given | changes).items():
            if name not in MAY_CHANGE and value != before[name]:
                raise RunError(f"{resume} was trained with {flag(name)} {before[name]}, not {value}: "
                               "resume without the flag, or start a new run")
        config, settings = TrainConfig(**stored["train"] | given), LossSettings(**stored["settings"])
    else:
        config = TrainConfig(**given)
        settings = settings_for(config.algo, **changes)
        if config.alphas and settings.beta == 0:
            raise RunError(f"--alphas: {config.algo} only clones, so alpha changes nothing")
        config_for(config.size, [])
        config.data = config.data or [str(data.DEFAULT_DATA / ("tiny" if config.size == "tiny" else "") / "switching")]
        config.steps = config.steps or STEPS.get(config.size, 100_000)
        config.threads = config.threads or (1 if config.size in ONE_THREAD else None)
        for name in ("recompute", "shard"):
            if getattr(config, name) is None:
                setattr(config, name, config.size in LARGE)
        config.out = config.out or f"runs/{config.algo}-{config.size}-{config.seed}"
        # config.json makes a folder a run: what a run killed before that has left is no obstacle
        found = {path.name for path in Path(config.out).iterdir()} if Path(config.out).exists() else set()
        if RANK == 0 and found - {".lock", "checkpoints", "config.json.partial"}:
            raise RunError(f"{config.out} is in use: continue it with --resume {config.out}, or choose another --out")
    counts = asdict(config) | asdict(settings)
    for name in ("batch_size", "accumulate", "pool", "samples", "n_step"):
        if counts[name] < 1:
            raise RunError(f"--{name.replace('_', '-')} {counts[name]}: it has to be 1 at the least")
    if config.batch_size % (RANKS * config.accumulate):
        raise RunError(f"--batch-size {config.batch_size} cannot be divided among {RANKS} ranks "
                       f"in {config.accumulate} parts each")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if config.compile and not shutil.which(compiler):
        raise RunError(f"--compile needs a C++ compiler, and there is no {compiler}: `apt install g++`, or name yours in CXX")
    if config.compile and config.shard:
        raise RunError("--compile and --shard do not go together: choose one")
    return config, settings


def open_data(config):
    """The data sets' tasks, verified; a default one is made first if some of it is missing.

    -> keyword arguments of Sampler: the tasks, their weights, and their alphas if they have their own.
    """
    for name in ("weights", "alphas"):
        if getattr(config, name) and len(getattr(config, name)) != len(config.data):
            raise RunError(f"--{name}: {len(getattr(config, name))} for {len(config.data)} data set(s); give one for each")
    opened = []
    for number, folder in enumerate(map(Path, config.data)):
        if RANK == 0 and folder.parent in DEFAULT_SETS and folder.name in collect.PARTS:
            collect.build(folder.parent, [folder.name], config.tasks or TASKS, DEFAULT_SETS[folder.parent])
        over_ranks([0], config.device)  # the others wait for rank 0
        tasks = data.open_tasks(folder, config.tasks)
        opened += [(task, (config.weights[number] if config.weights else 1) / len(tasks),
                    config.alphas and config.alphas[number]) for task in tasks]
    tasks, weights, alphas = zip(*opened)
    for task in tasks if config.verify and RANK == 0 else ():
        task.verify()
    return dict(tasks=tasks, weights=weights, alphas=alphas if config.alphas else None)


def main(argv=None):
    given, changes, resume, at, dry_run = parse_args(argv)
    try:
        config, settings = prepare(given, changes, resume)
        if dry_run:
            return print(dry_run_report(config, settings))
        with ranks(config.device):
            sources, run = open_data(config), Path(resume or config.out)
            with data.only_writer(run) if RANK == 0 else nullcontext():
                train(config, settings, sources, run, resume, at)
    except (RunError, data.DataError, ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


def dry_run_report(config, settings):
    try:
        metas = data.merged_metas([task for folder in config.data for task in data.open_tasks(folder, config.tasks)])
    except data.DataError:  # not made yet
        metas = [data.new_meta(name, collect.INSTRUCTIONS[name]) | {"return_to_go": [0, 1]}
                 for name in config.tasks or TASKS]
    return report(model_config_for(config, metas), settings, metas, config.batch_size, config.accumulate,
                  config.recompute, config.shard)


def model_config_for(config, metas):
    return config_for(config.size, [TaskSpec(m.get("name", m["env_id"]), m["instruction"], m["obs_dim"], m["action_dim"])
                                    for m in metas])


def keep_memory():
    """Tell glibc to keep the memory it is given back.

    It would return an update's large tensors to the kernel, and every page costs a fault when the next update asks for
    it again: on a CPU up to 4% of an update of BC, 9% of PAC and 14% of PAC+V.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20), libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def train(config, settings, sources, run, resume=None, at=None):
    keep_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS keeps an order of sums only with this
        torch.use_deterministic_algorithms(True, warn_only=True)
    metas = data.merged_metas(sources["tasks"])
    model_config = model_config_for(config, metas)
    learner = Learner(model_config, settings, metas, config.steps, config.device, config.seed, config.accumulate)
    learner.model.recompute = config.recompute
    if config.compile:
        learner.compile()
    sampler = data.Sampler(**sources, batch_size=config.batch_size * learner.pool, steps=settings.n_step, top=settings.top,
                           device=f"cuda:{LOCAL_RANK}" if config.device == "cuda" else config.device)
    learner.start_at(data.Sampler(**sources, batch_size=20_000).sample(
        random_streams(config.seed, config.steps, "cpu")[0]))
    if RANKS > 1:
        join(learner, config.shard)
    if resume:
        if read_config(run)["tasks"] != metas:
            raise RunError(f"{config.data} is not the data that {run} was trained on (its config.json lists that)")
        if checkpoints(run) or at is not None:  # otherwise it was stopped before the first: start again
            restore(find_checkpoint(run, at), learner)
    elif RANK == 0:
        write_whole(run / "config.json", json.dumps({
            "algo": config.algo, "train": asdict(config), "settings": asdict(settings),
            "model": model_config.to_dict(), "tasks": metas}, indent=2) + "\n")
    flops = flops_per_update(model_config, settings, config.batch_size)
    print(f"{run}: {config.algo}, {config.size}, {count_parameters(learner.model):,} parameters, "
          f"{flops / 1e9:.2f} GFLOP an update, {len(metas)} tasks, "
          f"{sum(m['transitions'] for m in metas):,} transitions, {config.device}")

    stop, stopped = [], 0
    for name in (signal.SIGINT, signal.SIGTERM):  # finish the update in hand, save, leave; a second one kills at once
        signal.signal(name, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    batches = sampler.batches((random_streams(config.seed, step, "cpu")[0] for step in range(learner.updates, config.steps)),
                              RANK, RANKS)
    if config.prefetch:
        batches = made_ahead(batches, 2)
    how, warnings = default_act(asdict(settings)), dict(WARNINGS)
    began = time.time() - keep_lines(run / "metrics.jsonl", learner.updates)
    log = open(run / "metrics.jsonl" if RANK == 0 else os.devnull, "a")
    with log, tqdm(total=config.steps, initial=learner.updates, desc="train", unit="update", dynamic_ncols=True,
                   mininterval=0.1 if sys.stderr.isatty() else 30, disable=RANK > 0) as bar:
        while learner.updates < config.steps and not stopped:
            candidates, (_, generator) = next(batches), random_streams(config.seed, learner.updates, config.device)
            try:
                metrics = learner.update(learner.choose(candidates, generator), generator)
            except NonFinite as error:
                raise RunError(f"{error} The rows that the update was made from, and its metrics, are in "
                               f"{dump(run, config, learner, sampler, error)}; the newest checkpoint is from before it") from None
            step = learner.updates
            bar.update()
            # A signal that reached one rank stops all of them after the same update.
            stopped = int(over_ranks([max(stop, default=0)], learner.device, dist.ReduceOp.MAX)[0])
            line = {}
            if step % config.log_every == 0 or step == config.steps:
                totals = over_ranks([value.item() for value in metrics.values()], learner.device)
                line = {name: total / RANKS for name, total in zip(metrics, totals)}
                bar.set_postfix({k.split("/")[-1]: f"{line[k]:.3g}" for k in
                                 ("loss", "critic/value", "critic/observed", "policy/entropy", "policy/ess") if k in line}, refresh=False)
                for text in [text for text, unsound in warnings.items() if unsound(line)]:
                    bar.write(f"update {step}: warning: {text}")
                    del warnings[text]
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                target = whole(learner.target_model)
                if RANK == 0:
                    summary = evaluate(target, metas, config.eval_episodes, config.seed, how, settings.eta)
                    line |= {f"eval/{name}/score": row["score"] for name, row in summary["tasks"].items()}
                    line["eval/iqm"], line["eval/failed"] = summary["iqm"], len(summary["failed"])
                    batch = candidates.to(learner.device)
                    line["model/attention_entropy"] = target.attention_entropy(batch.obs[:, 0], batch.task).item()
                    bar.write(f"update {step}: IQM {summary['iqm']:.3f}   " + "  ".join(
                        f"{name.split('-')[0]} {row['score']:.2f}" for name, row in summary["tasks"].items())
                        + "".join(f"\n  failed, and left out: {text}" for text in summary["failed"]))
            if line:
                log.write(json.dumps({"update": step, "seconds": round(time.time() - began, 2), **line}) + "\n")
                log.flush()
            if step % config.save_every == 0 or step == config.steps or stopped:
                if RANK == 0:
                    os.fsync(log.fileno())  # the log first: a checkpoint's lines are there when it is
                save(run, learner, config.keep)
    batches.close()
    if stopped:
        print(f"stopped at update {learner.updates:,}; go on with: python train.py --resume {run}")
        sys.exit(128 + stopped)
    for name in (signal.SIGINT, signal.SIGTERM):  # all is saved: from here on a signal ends at once
        signal.signal(name, signal.SIG_DFL)
    target = whole(learner.target_model)
    if RANK == 0:
        finish(run, config, settings, target, metas, how)


def finish(run, config, settings, target, metas, how):
    """The curve, and the evaluation at the end."""
    curve(run)
    print(f"the run is in {run}; look closer with: python eval.py {run} --episodes 20")
    if config.episodes:
        summary = {"run": str(run), "act": how, "eta": settings.eta, "seed": config.seed + 1, "episodes": config.episodes,
                   **evaluate(target, metas, config.episodes, config.seed + 1, how, settings.eta)}
        write_whole(run / "eval.json", json.dumps(summary, indent=2) + "\n")
        print(f"{config.episodes} episodes a task, acting by {how}:\n{table(summary)}")
        if summary["failed"]:
            sys.exit(EPISODES_FAILED)


def dump(run, config, learner, sampler, error):
    """Write run/nonfinite.json, what one needs to make a failed update again, and return its path."""
    episode, begin, _ = sampler.draw([random_streams(config.seed, learner.updates, "cpu")[0]])
    rows = {str(data.shard_path(task.folder, shard)): begin[sampler.place[episode] == place].tolist()
            for place, (task, shard, _) in enumerate(sampler.places)}
    path = run / "nonfinite.json"
    if RANK == 0:
        write_whole(path, json.dumps({"update": learner.updates, "seed": config.seed, "message": str(error),
                                      "metrics": error.metrics, "rows": rows}, indent=2) + "\n")
    return path


def keep_lines(path, updates):
    """Drop the log's lines after the checkpoint: those updates are made again. -> seconds trained until then"""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= updates]
    if RANK == 0:
        write_whole(path, "".join(kept))
    return json.loads(kept[-1])["seconds"] if kept else 0


if __name__ == "__main__":
    faulthandler.enable()  # a data file that is cut short during a read ends the process: this tells where
    main()
