"""How fast one robot acts: a step of the policy, from an observation to an action, on a CPU.

    python -m studies.latency                             a table, and results/latency.json
    python -m studies.latency --sizes tiny small --no-compile

A model of the seven default tasks, with the weights it begins with, at a batch of 1 and on one
thread. `improved` draws 64 actions and weighs them by Q, `mean` asks the policy alone. Compiled:
the whole of `eval.act` by torch.compile, for `improved`. Times are of the CPU, so that other work
on the machine matters less. A robot at 20 Hz has 50 ms for a step: a size keeps up if 95
of 100 steps are within that.

On an H100 by arithmetic, `improved` and eager: each launch at 5 µs, which is our guess, and the
bytes that it moves at 3.35 TB/s.
"""

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from data import write_file
from eval import act, draws
from model import SIZES, Perceiver, config_for, count_parameters
from prepare import default_metas
from studies import RESULTS, print_table
from studies.kernels import H100, Traffic

HERTZ = 20
WAYS = ("improved", "mean")
LAUNCH_MS = 5e-3  # on a GPU [a guess]
WARM_UP = 5  # steps
ENOUGH = 4  # sizes that need so many times a step's time are the last that are tried


def timed(step, seconds):
    """The CPU time in milliseconds of each of as many steps as fit."""
    for _ in range(WARM_UP):
        step()
    times, end = [], time.process_time() + seconds
    while len(times) < 10 or time.process_time() < end:
        began = time.process_time()
        step()
        times.append(1000 * (time.process_time() - began))
    return times


def one_robot(model, how):
    """A function that acts once, from an observation in numpy to an action in numpy."""
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((1, model.obs_mean.shape[1]), np.float32)
    task = torch.zeros(1, dtype=torch.int64)

    def step(function=act):
        noise = torch.from_numpy(rng.random((1, *draws(model, how)), np.float32))
        return function(model, torch.from_numpy(obs), task, how, noise=noise).numpy()

    return step


def on_h100(step):
    """What a step would take on a GPU, in ms."""
    with Traffic() as traffic:
        step()
    found = traffic.launches * LAUNCH_MS + 1000 * traffic.bytes / H100["bytes"]
    return {"launches": traffic.launches, "h100_ms": round(found, 2)}


def measure(size, compiles, seconds):
    """A row of the table; its times are the median and the 95th of 100, in ms."""
    model = Perceiver(config_for(size, default_metas())).eval()
    steps = {how: one_robot(model, how) for how in WAYS}
    row = {"size": size, "parameters": count_parameters(model), **on_h100(steps["improved"])}
    if compiles:
        torch._dynamo.reset()  # else it gives up after some models
        torch._dynamo.config.capture_scalar_outputs = True  # as Learner.compile
        compiled = torch.compile(act, dynamic=False)
        steps["improved, compiled"] = lambda: steps["improved"](compiled)
    row["ms"] = {}
    for name, step in steps.items():
        row["ms"][name] = np.percentile(timed(step, seconds), [50, 95]).round(2).tolist()
        print(size, name, *row["ms"][name], flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=3.0,
                        help="of CPU time a measurement (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="(default: results/latency.json, if it is whole)")
    args = parser.parse_args()
    whole = args.compile and set(args.sizes) == set(SIZES)
    out = args.out or (RESULTS / "latency.json" if whole else None)
    if out and not out.parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.parent}")
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        rows.append(measure(size, args.compile, args.seconds))
        if rows[-1]["ms"]["improved"][0] > ENOUGH * 1000 / HERTZ:
            break
    show(rows)
    if out is None:
        print("not written: it is a part of the table; --out FILE writes it")
        return
    written = {"command": " ".join(["python -m studies.latency", *sys.argv[1:]]),
               "date": str(date.today()), "machine": platform.machine(), "threads": 1, "batch": 1,
               "torch": torch.__version__, "rows": rows}
    write_file(out, json.dumps(written, indent=1) + "\n")
    print(f"wrote {out}")


def show(rows):
    lines = []
    for row in rows:
        times = [f"{middle:.3g} ({late:.3g})" for middle, late in row["ms"].values()]
        lines.append([row["size"], f"{row['parameters']:,}", *times, row["h100_ms"]])
    print_table(["size", "parameters", *rows[0]["ms"], "H100, by arithmetic"], lines)
    able = [row for row in rows if row["ms"]["improved"][1] <= 1000 / HERTZ]
    largest = max(able, key=lambda row: row["parameters"], default={"size": "none"})
    print(f"the largest that acts at {HERTZ} Hz: {largest['size']}")


if __name__ == "__main__":
    main()
