"""What each part of PAC is worth: runs with one of them changed, two at a time, and their table.

    python -m tests.ablations                 every run that is missing, then results/ablations.csv as a table
    python -m tests.ablations --only token    one of them
    python -m tests.ablations --table         the table alone

Single runs of half the default's updates: leads, no results. A change that no flag makes is a few lines here, put over
model.py and learner.py in a process of its own.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch

import learner
import model
import train
from behaviors import TASKS
from tests.study import RESULTS

TABLE = RESULTS / "ablations.csv"
COLUMNS = ("data", "ablation", "updates", "episodes", "seed", "task", "score", "iqm")
UPDATES, EPISODES, SEED = 5_000, 10, 0


# ---------------------------------------------------------------- changes

def action_as_token():
    """The action is one more input token, so that every action has latents of its own."""
    encode = model.Perceiver.encode

    def encode_and_keep(self, obs, task):
        self.obs = obs
        return encode(self, obs, task)

    def q(self, latents, action, task):
        B, N, _ = action.shape
        tokens, words, mask = self.inputs(self.obs, task)  # (B, obs_tokens, W), (tasks, J, W), (B, I)
        tokens = torch.cat([self.action_encoder(action, task), tokens[:, None].expand(-1, N, -1, -1)], dim=2).flatten(0, 1)
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1).repeat_interleave(N, 0)
        latents = self.encoder(self.latents, tokens, words, task.repeat_interleave(N), mask)
        for block in self.blocks:
            latents = block(latents)
        return self.q_head(self.q_decoder(self.v_query, latents)).view(B, N, -1).float()

    model.Perceiver.encode, model.Perceiver.q = encode_and_keep, q


def no_scales():
    """A scalar is given as itself alone."""
    model.SCALES = ()


def raw():
    """Observations as they are, without the data's mean and standard deviation."""
    start_at = learner.Learner.start_at

    def start_unscaled(self, batch):
        start_at(self, batch)
        for part in (self.model, self.target_model):
            part.obs_mean.zero_(), part.obs_std.fill_(1)

    learner.Learner.start_at = start_unscaled


def two_atoms():
    """With atoms at 0 and 1 alone a distribution is its mean: logistic regression of a scalar value."""
    model.SIZES["small"]["atoms"] = 2


def squared_error():
    """A scalar value, fitted by least squares."""
    two_atoms()

    def loss(value_logits, next_probs, shift, scale, observed, mc_share):
        target = mc_share * observed + (1 - mc_share) * (shift + scale * next_probs[:, 1]).clamp(0, 1)
        error = (torch.softmax(value_logits, dim=-1)[:, 1] - target).square().mean()
        return error, {"critic/loss": error}

    learner.critic_loss = loss


ABLATIONS = {  # name: what it is, changes, flags of train.py
    "recipe": ("the recipe", (), ()),
    "focus0": ("all of the data cloned alike: focus 0", (), ("--focus", 0)),
    "alpha0": ("no cloning after the warm-up: alpha 0", (), ("--alpha", 0)),
    "never": ("no cloning at all: alpha 0, no warm-up", (), ("--alpha", 0, "--warmup", 0)),
    "td": ("temporal differences alone after the warm-up: Monte-Carlo share 0", (), ("--mc-share", 0)),
    "logistic": ("a scalar critic, by logistic regression", (two_atoms,), ()),
    "squared": ("a scalar critic, by squared error; beta 30", (squared_error,), ("--beta", 30)),
    "standardised": ("standardised scalars alone, without tanh(c x)", (no_scales,), ()),
    "multiscale": ("the multi-scale normaliser of raw scalars, as the paper has it", (raw,), ()),
    "raw": ("raw scalars alone", (raw, no_scales), ()),
    "token": ("the action as an input token instead of the Q decoder's query", (action_as_token,), ()),
}


# ---------------------------------------------------------------- runs

def run(name, part):
    """One run in this process, to its end."""
    _, changes, flags = ABLATIONS[name]
    for change in changes:
        change()
    given = ["--size", "small", "--data", f"datasets/{part}", "--out", f"runs/ablations/{part}-{name}", "--steps", UPDATES,
             "--seed", SEED, "--episodes", EPISODES, "--eval-every", 0, "--threads", 1, "--no-verify", *flags]
    train.main(list(map(str, given)))


def table():
    with open(TABLE) as file:
        rows = list(csv.DictReader(file))
    columns = ["PAC with", "data", *(task.removesuffix("-v5") for task in TASKS), "IQM"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, (words, _, _) in ABLATIONS.items():
        for part in dict.fromkeys(row["data"] for row in rows if row["ablation"] == name):
            own = {row["task"]: row for row in rows if row["ablation"] == name and row["data"] == part}
            print(f"| {words} | {part} | " + " | ".join(f"{float(own[task]['score']):.2f}" for task in TASKS)
                  + f" | {float(own[TASKS[0]]['iqm']):.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    parser.add_argument("--part", default="switching")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="no runs: only the table")
    parser.add_argument("--here", choices=ABLATIONS, help="one run, in this process")
    args = parser.parse_args()
    if args.here:
        return run(args.here, args.part)
    lock = Lock()

    def job(name):
        folder = Path(f"runs/ablations/{args.part}-{name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not (folder / "eval.json").exists():
            with open(f"{folder}.log", "a") as log:
                subprocess.run([sys.executable, "-m", "tests.ablations", "--here", name, "--part", args.part], stdout=log,
                               stderr=log, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        summary = json.loads((folder / "eval.json").read_text())
        with lock:
            first = not TABLE.exists()
            with open(TABLE, "a", newline="") as file:
                writer = csv.writer(file)
                if first:
                    writer.writerow(COLUMNS)
                for task, row in summary["tasks"].items():
                    writer.writerow([args.part, name, UPDATES, EPISODES, SEED, task, round(row["score"], 4),
                                     round(summary["iqm"], 4)])
        print(f"{name}: IQM {summary['iqm']:.3f}", flush=True)

    present = set()
    if TABLE.exists():
        with open(TABLE) as file:
            present = {(row["data"], row["ablation"]) for row in csv.DictReader(file)}
    if not args.table:
        with ThreadPoolExecutor(args.workers) as pool:
            for future in [pool.submit(job, name) for name in args.only if (args.part, name) not in present]:
                future.result()
    table()


if __name__ == "__main__":
    main()
