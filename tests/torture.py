"""Kill a training run at random, again and again, and compare its end with an undisturbed run's, to the bit.

    python -m tests.torture --kills 100

Each life is a fork of this process (Unix only), so that a hundred lives import torch once. A fifth of the kills
falls on a run's start, the rest on training, where a checkpoint is written every second update.
"""

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path

import torch

import train
from tests.conftest import write_task
from tests.test_train import log, tensors

STEPS_A_KILL = 15  # updates of a run for each kill it is meant to survive


def life(flags):
    """Start or resume a run in a process of its own."""
    def quiet():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        train.main([str(flag) for flag in flags])

    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills (default: %(default)s)")
    args = parser.parse_args()
    chance, began = random.Random(args.seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_task(folder / "data" / "Reacher-v5", [20, 30, 40])
        flags = ["--size", "tiny", "--data", folder / "data", "--steps", STEPS_A_KILL * args.kills, "--batch-size", 16,
                 "--eval-every", 0, "--episodes", 0, "--save-every", 2, "--log-every", 2, "--threads", 1]
        whole = life([*flags, "--out", folder / "whole"])
        start = time.time()
        while whole.is_alive() and not (folder / "whole" / "checkpoints" / "000000002").exists():
            time.sleep(0.002)
        to_train = time.time() - start
        whole.join()
        assert whole.exitcode == 0, "the undisturbed run failed"
        a_step = (time.time() - start - to_train) / (STEPS_A_KILL * args.kills)
        print(f"undisturbed: {to_train:.2f} s to the first checkpoint, {1000 * a_step:.1f} ms an update", flush=True)

        kills, early, writing, runs = 0, 0, 0, 0
        while kills < args.kills or runs == 0:
            out = folder / f"killed{runs}"
            while True:
                process = life(["--resume", out] if (out / "config.json").exists() else [*flags, "--out", out])
                at_start = chance.random() < 0.2
                process.join(chance.uniform(0, to_train) if at_start else
                             to_train + chance.uniform(0, 2 * STEPS_A_KILL * a_step))
                if process.exitcode is not None:
                    assert process.exitcode == 0, f"a run ended with exit code {process.exitcode}"
                    break
                process.kill()
                process.join()
                kills, early = kills + 1, early + at_start
                writing += bool(list((out / "checkpoints").glob("*.*")))
            one, two = tensors(folder / "whole"), tensors(out)
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), "weights differ"
            assert log(folder / "whole") == log(out), "logs differ"
            runs += 1
        print(f"{kills} kills over {runs} run(s): {early} while starting, {writing} left half a checkpoint. Weights, "
              f"optimiser, target and log equal the undisturbed run's to the bit. {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
