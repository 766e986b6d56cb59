"""A small model to start from: the averaged model of a run alone, and a film of it.

    python -m studies.pretrained runs/pac-small-0     makes results/pretrained anew

The folder is a run without its training: `python eval.py results/pretrained` scores it, as any run.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch.distributed.checkpoint as dcp

import checkpoint
import envs
from checkpoint import RunError
from data import DataError, write_file
from eval import evaluate, rollout, table
from studies import RESULTS

COLUMNS, EDGE, FRAMES = 4, 128, 60  # of the film: tasks in a row, pixels of one, its length
EPISODES = 10
WRITTEN = {"checkpoints", "config.json", "eval.json", "tasks.gif"}  # what the folder comes to hold


def strip(run, folder):
    """A run's averaged model and configuration -> a folder that is read like a run."""
    model, config = checkpoint.load_run(run)
    updates = int(checkpoint.find_checkpoint(run).name)
    path = folder / "checkpoints" / f"{updates:09d}"
    partial = path.with_suffix(".partial")
    partial.mkdir(parents=True)
    tensors = {f"target.{name}": tensor for name, tensor in model.state_dict().items()}
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(partial, save_distributed=True))
    checkpoint.finish(folder, path, partial, updates, keep=1)
    write_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return model, config


def smaller(frame):
    """(RENDER_SIZE, RENDER_SIZE, 3) -> (EDGE, EDGE, 3), each pixel the mean of a square's"""
    factor = envs.RENDER_SIZE // EDGE
    squares = frame.reshape(EDGE, factor, EDGE, factor, 3)
    return squares.mean(axis=(1, 3)).astype(np.uint8)


def film(plays):
    """The first episodes of all tasks, side by side; a short one's last frame stays."""
    rows = -(-len(plays) // COLUMNS)
    frames = []
    for time in range(FRAMES):
        sheet = np.full((rows * EDGE, COLUMNS * EDGE, 3), 255, np.uint8)
        for place, play in enumerate(plays):
            y, x = EDGE * (place // COLUMNS), EDGE * (place % COLUMNS)
            shown = play.frames[min(time, len(play.frames) - 1)]
            sheet[y:y + EDGE, x:x + EDGE] = smaller(shown)
        frames.append(sheet)
    return frames


def check_out(folder, run):
    """RunError unless the folder may be deleted: it is not there, or this command has made it."""
    if folder == run.resolve():
        raise RunError(f"{folder} is the run itself: give another --out")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: give a folder as --out")
    for path in sorted(folder.glob("*")):
        if path.name.removesuffix(".partial") not in WRITTEN:
            raise RunError(f"{path} is not this command's, and would be deleted: give another "
                           "--out, or move it away")


def make(run, out):
    """Put the model, its scores and its film into the folder `out`, whole or not at all."""
    out = out.resolve()
    partial = out.with_name(f"{out.name}.partial")  # what a killed one left may be there
    for folder in (out, partial):
        check_out(folder, run)
    shutil.rmtree(partial, ignore_errors=True)
    model, config = strip(run, partial)
    settings, metas = config["settings"], config["tasks"]
    how, eta, seed = settings["act"], settings["eta"], config["train"]["seed"] + 1
    summary = evaluate(model, metas, EPISODES, seed, how, eta)
    about = {"act": how, "eta": eta, "seed": seed, "episodes": EPISODES}
    write_file(partial / "eval.json", json.dumps(about | summary, indent=2) + "\n")
    plays = rollout(model, metas, 1, seed, how, eta, render=True)
    envs.write_video(partial / "tasks.gif", film(plays))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"{table(summary)}\nwrote {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m studies.pretrained", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "pretrained")
    args = parser.parse_args(argv)
    try:
        make(args.run, args.out)
    except (RunError, DataError, OSError) as error:
        print(f"studies.pretrained: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
