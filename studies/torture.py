"""Kill a training run at random, again and again, and compare its end with an undisturbed run's.

    python -m studies.torture --kills 100

Weights, optimiser, target network and log have to be equal to the bit. Each life is a fork of this
process (Unix only), so that a hundred lives import torch once. A fifth of the kills falls on a
run's start, the rest on training, where a checkpoint is written every second update.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

import prepare
import train
from checkpoint import find_checkpoint

STEPS_A_KILL = 15  # updates of a run for each kill it is meant to survive


def life(flags):
    """Start or resume a run in a process of its own."""
    def quiet():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        train.main([str(flag) for flag in flags])

    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process


def everything(run):
    """What has to be equal at the end of a run: tensors by name, and the lines of the log."""
    found = {}
    for path in find_checkpoint(run).glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found[name] = tensor.numpy().tobytes()
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        del line["seconds"]
        found[f"the log of update {line['update']}"] = line
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture(Path(folder), args.kills, random.Random(args.seed))


def torture(folder, wanted, chance):
    began, steps = time.time(), STEPS_A_KILL * wanted
    prepare.build(folder, ["switching"], ["Reacher-v5"], 100)
    flags = ["--size", "tiny", "--data", folder / "switching", "--steps", steps,
             "--batch-size", 16, "--eval-every", 0, "--episodes", 0, "--save-every", 2,
             "--log-every", 2, "--threads", 1]

    whole = life([*flags, "--out", folder / "whole"])
    start = time.time()
    while whole.is_alive() and not (folder / "whole" / "checkpoints" / "000000002").exists():
        time.sleep(0.002)
    to_train = time.time() - start
    whole.join()
    a_step = (time.time() - start - to_train) / steps
    undisturbed = everything(folder / "whole")
    print(f"undisturbed: {to_train:.2f} s to a checkpoint, then {1000 * a_step:.1f} ms an update")

    kills, early, writing, runs = 0, 0, 0, 0
    while kills < wanted or runs == 0:
        out = folder / f"killed{runs}"
        while True:
            resumes = (out / "config.json").exists()
            process = life(["--resume", out] if resumes else [*flags, "--out", out])
            at_start = chance.random() < 0.2
            seconds = chance.uniform(0, to_train)
            if not at_start:
                seconds = to_train + chance.uniform(0, 2 * STEPS_A_KILL * a_step)
            process.join(seconds)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            early += at_start
            writing += bool(list((out / "checkpoints").glob("*.*")))
        runs += 1
        if process.exitcode != 0:
            sys.exit(f"run {runs} ended with exit code {process.exitcode}")
        killed = everything(out)
        for name in undisturbed | killed:
            if undisturbed.get(name) != killed.get(name):
                sys.exit(f"run {runs}: {name} differs")
    print(f"{kills} kills over {runs} run(s): {early} while starting, {writing} left half a "
          "checkpoint. Weights, optimiser, target and log equal the undisturbed run's to the bit. "
          f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
