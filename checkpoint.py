"""A run's folder: its configuration and checkpoints, written whole, verified, restored, found.

    runs/pac-small-0/
        config.json              the flags, the settings of the loss, the model, the tasks
        metrics.jsonl            a line every --log-every updates
        checkpoints/000010000/   tensors as safetensors, a file from each rank, and checkpoint.json
        eval.json, curve.png     at the end
        aside-1/                 after --at: what was newer, a run's folder too

A checkpoint counts when it is renamed to its update's number, which is done last. checkpoint.json
holds the checksums of its files. What is being written, or deleted, is in checkpoints/.partial.
torch's distributed checkpoints are stored as safetensors: no pickle is ever read.
"""

import json
import math
import os
import secrets
import shutil
import sys
import time
import warnings
import zlib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from shlex import quote

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

import parallel
from data import write_file
from model import ModelConfig, Perceiver

FORMAT = 4  # of a run's config.json and checkpoints
# One process may read a checkpoint of several.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


class RunError(Exception):
    """Something is wrong with a run's folder; the message says what, and what to do."""


# ---------------------------------------------------------------- finding and verifying

def read_config(run):
    try:
        config = json.loads(Path(run, "config.json").read_text())
    except FileNotFoundError:
        raise RunError(f"{run}: not a run's folder (config.json is missing)") from None
    except ValueError as error:
        raise RunError(f"{run}/config.json is damaged: {error}") from None
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise RunError(f"{run}/config.json has format {found}, but this code reads format "
                       f"{FORMAT}: train it again, or use the version that made it")
    for key in ("algo", "train", "settings", "model", "tasks"):
        if key not in config:
            raise RunError(f"{run}/config.json is damaged: it has no {key!r}")
    return config


def from_config(kind, values, run):
    """The dataclass `kind` of what config.json holds; RunError names a key of another version."""
    known = {field.name for field in fields(kind)}
    for key in sorted(known ^ set(values)):
        what, more = "has", ""
        if key in known:  # a setting of one's own, say, that is newer than the run
            what, more = "lacks", f". If the default of {key} changes nothing, write it in"
        raise RunError(f"{run}/config.json {what} {key!r}: another version of this code made it; "
                       f"use that, or train it again{more}")
    return kind(**values)


def check_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: torch finds no GPU here; there is --device cpu")


def checkpoints(run):
    """A run's checkpoints, oldest first: folders named after their update, in nine digits."""
    found = [path for path in Path(run, "checkpoints").glob("*")
             if path.name.isdecimal() and len(path.name) >= 9 and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def find_checkpoint(run, update=None):
    """The path of a run's newest checkpoint, or of that of an update; RunError if there is none."""
    found = {int(path.name): path for path in checkpoints(run)}
    if not found:
        raise RunError(f"{run}: no checkpoint in {run}/checkpoints; train with "
                       f"`python train.py --out {quote(str(run))}`")
    if update is None:
        return found[max(found)]
    if update not in found:
        known = ", ".join(map(str, found))
        raise RunError(f"{run}: no checkpoint of update {update}; there are: {known}")
    return found[update]


def crc32(path):
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def verify(path):
    """Read a checkpoint's every byte; RunError names the file that is not what was written."""
    run = path.parent.parent
    older = [int(other.name) for other in checkpoints(run) if other.name < path.name]
    advice = "there is none before it"
    if older:
        advice = ("the one before it is used if you ask for it: "
                  f"--resume {quote(str(run))} --at {older[-1]}")
    try:
        stored = json.loads((path / "checkpoint.json").read_text())
        if stored["format"] != FORMAT or stored["updates"] != int(path.name):
            raise RunError(f"{path}/checkpoint.json is of another format or update; {advice}")
        for name, checksum in stored["crc32"].items():
            with open(path / name, "rb") as file:
                if file.read(9)[8:] != b"{":  # what every safetensors file has there, and no pickle
                    raise RunError(f"{path / name} is not a safetensors file; if it is a pickle, "
                                   f"reading it could run anything: refused unread; {advice}")
            if crc32(path / name) != checksum:
                raise RunError(f"{path / name} is damaged: its checksum is wrong; {advice}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}/checkpoint.json, or a file it lists, is damaged ({error!r}); "
                       f"{advice}") from None


# ---------------------------------------------------------------- reading

def load_tensors(path, into):
    """Fill the dict of tensors `into`, whole or sharded, from a checkpoint of any number of ranks.

    RunError on any mismatch.
    """
    try:
        stored = dcp.HuggingFaceStorageReader(path).read_metadata().state_dict_metadata
        for name, tensor in into.items():
            shape = tuple(stored[name].size) if name in stored else "no such tensor"
            if shape != tuple(tensor.shape):
                raise RunError(f"{path}: {name}: {shape} in the checkpoint, but "
                               f"{tuple(tensor.shape)} in the model of config.json: "
                               "the checkpoint is of another configuration")
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(path))
    except (SafetensorError, OSError, dcp.api.CheckpointException) as error:
        raise RunError(f"{path}: the checkpoint cannot be read ({error})") from None


def load_run(run, device="cpu"):
    """A run's folder -> (the averaged model theta', config and its checkpoint's name).

    Neither data nor pickles are read.
    """
    check_device(device)
    config = read_config(run)
    model = Perceiver(from_config(ModelConfig, config["model"], run)).to(device)
    tensors = {f"target.{name}": tensor for name, tensor in model.state_dict().items()}
    while True:
        path = find_checkpoint(run)
        try:
            verify(path)
            load_tensors(path, tensors)
        except RunError:
            if path.exists():
                raise
            continue  # the run goes on, and has replaced it by a newer one
        return model.eval(), {**config, "checkpoint": path.name}


def learner_tensors(learner):
    """Every tensor that the run's future depends on, by name; restore and save share this list."""
    tensors = {}
    for prefix, model in (("model", learner.model), ("target", learner.target_model)):
        for name, tensor in model.state_dict().items():
            tensors[f"{prefix}.{name}"] = tensor
    for name, parameter in learner.model.named_parameters():
        for key, value in learner.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def restore(path, learner):
    """Make a learner what it was when the checkpoint was saved."""
    if parallel.RANK == 0:
        verify(path)
    load_tensors(path, learner_tensors(learner))
    learner.updates = int(path.name)


# ---------------------------------------------------------------- writing

def save(run, learner, keep):
    """Write checkpoints/UPDATE whole or not at all, then drop all but the `keep` newest.

    Every rank takes part.
    """
    path = Path(run, "checkpoints", f"{learner.updates:09d}")
    partial = path.parent / ".partial" / path.name
    try:
        if parallel.RANK == 0:
            shutil.rmtree(partial.parent, ignore_errors=True)  # what a killed one left
            partial.mkdir(parents=True, exist_ok=True)
        tensors = learner_tensors(learner)
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        writer = dcp.HuggingFaceStorageWriter(partial, save_distributed=True)  # it calls fsync
        dcp.save(tensors, storage_writer=writer)
        if parallel.RANK == 0:
            finish(run, path, partial, learner.updates, keep)
    except (OSError, dcp.api.CheckpointException) as error:
        if isinstance(error, dcp.api.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        raise RunError(f"{path} could not be written ({error}); older checkpoints are as they "
                       "were. Free some space or mend the folder's permissions, then: "
                       f"python train.py --resume {quote(str(run))}") from None


def finish(run, path, partial, updates, keep):
    """Add the checksums to what was written, make it count, and drop old checkpoints."""
    checksums = {file.name: crc32(file) for file in sorted(partial.glob("*.safetensors"))}
    content = {"format": FORMAT, "updates": updates, "crc32": checksums}
    write_file(partial / "checkpoint.json", json.dumps(content, indent=2) + "\n")
    if path.exists():
        drop(path, partial.parent)
    partial.rename(path)
    older = [other for other in checkpoints(run) if int(other.name) < updates]
    for old in older[:max(0, len(older) + 1 - keep)]:
        drop(old, partial.parent)
    with suppress(OSError):  # not empty: the next save tries again
        partial.parent.rmdir()


def drop(path, partial):
    """Delete a checkpoint; a file in use, or one that is protected, is no reason to stop."""
    try:
        shutil.rmtree(path.rename(partial / f"dropped-{path.name}"))
    except OSError as error:
        print(f"warning: the old checkpoint {path} cannot be deleted ({error})", file=sys.stderr)


def set_aside(run, at):
    """Move the checkpoints after update `at`, which the run goes back to, to a run's folder of
    their own, with what is of their model: evaluations, curve and figures; and copy the log."""
    newer = [path for path in checkpoints(run) if int(path.name) > at]
    if not newer:
        return
    number = 1
    while (aside := run / f"aside-{number}").exists():
        number += 1
    (aside / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        if (run / name).exists():
            shutil.copy(run / name, aside)
    # Before the checkpoints: a kill between leaves some of these, and --at goes on from there.
    for path in (*run.glob("eval*.json"), *run.glob("curve.png"), *run.glob("figures")):
        path.rename(aside / path.name)
    for path in newer:
        path.rename(aside / "checkpoints" / path.name)
    print(f"the checkpoints after update {at}, their evaluations and the log so far are now in "
          f"{aside}")


# ---------------------------------------------------------------- the log

class Log:
    """metrics.jsonl, on rank 0, and the loggers asked for."""

    def __init__(self, run, updates, loggers):
        """updates: those of the checkpoint that the run goes on from; later lines are dropped."""
        path, seconds, self.loggers = run / "metrics.jsonl", 0, []
        if parallel.RANK > 0:
            path = Path(os.devnull)
        else:
            kept = kept_lines(path, updates) if path.exists() else []
            seconds = json.loads(kept[-1]).get("seconds", 0) if kept else 0
            write_file(path, "".join(kept))
            self.loggers = [LOGGERS[name](run, updates) for name in loggers or ()]
        self.began = time.time() - seconds
        self.file = open(path, "a")

    def write(self, update, metrics):
        line = {"update": update, "seconds": round(time.time() - self.began, 2)}
        for name, value in metrics.items():
            line[name] = value if math.isfinite(value) else None  # JSON has no NaN
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for logger in self.loggers:
            logger(update, metrics)

    def sync(self):
        if parallel.RANK == 0:
            os.fsync(self.file.fileno())


def kept_lines(path, updates):
    """A log's lines up to an update; one that is damaged is named, if it would have counted."""
    kept = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        if not line.endswith("\n"):  # a kill has cut it
            break
        try:
            if json.loads(line)["update"] > updates:  # it is made again, and what follows
                break
            kept.append(line)
        except (ValueError, TypeError, KeyError):
            print(f"warning: {path}, line {number} is damaged and left out", file=sys.stderr)
    return kept


def tensorboard(run, updates):
    from torch.utils.tensorboard import SummaryWriter
    # What came after the checkpoint is made again.
    writer = SummaryWriter(run / "tensorboard", purge_step=updates + 1)

    def write(update, metrics):
        for name, value in metrics.items():
            writer.add_scalar(name, value, update)
        writer.flush()

    return write


def wandb(run, updates):
    import wandb
    known = run / "wandb_id"  # two runs of one name are two
    if not known.exists():
        write_file(known, f"{run.name}-{secrets.token_hex(4)}")
    logged = wandb.init(project="pac", name=run.name, id=known.read_text(), resume="allow", dir=run,
                        config=read_config(run))
    return lambda update, metrics: logged.log(metrics, step=update)


# By the packages they need.
LOGGERS = {"tensorboard": tensorboard, "wandb": wandb}
