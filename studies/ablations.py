"""What each part of PAC is worth: runs with one of them changed, and their table.

    python -m studies.ablations                 the runs that are missing, then the tables
    python -m studies.ablations --only token    one of them
    python -m studies.ablations --table         no runs: the tables from results/ablations.csv

Runs of half the default's updates. Some changes set a knob, a field of LossSettings, to what takes
it out. One that no flag makes is a few lines here, put over model.py and learner.py in a process of
its own. A row says which recipe it is of, by its day.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

import learner
import model
import train
from behaviors import TASKS
from checkpoint import read_config
from model import Shared
from studies import print_table
from studies.ladder import DATA, need_part
from studies.runs import (Table, at_a_time, cells, name_of, new_parser, refuse_other, result_of,
                          rows_of, start_or_resume, unfinished)

COLUMNS = ("recipe", "data", "ablation", "updates", "episodes", "seed", "task", "score", "iqm")
KEY = ("recipe", "data", "ablation", "seed")
RECIPE = "2026-11-27"
UPDATES, EPISODES, SEEDS = 5_000, 10, (0, 1, 2)


# ---------------------------------------------------------------- changes

def action_as_token():
    """The action is one more input token, so that every action has latents of its own."""
    encode = model.Perceiver.encode

    def encode_and_keep(self, obs, task, frames=None):
        self.obs = obs
        return encode(self, obs, task, frames)

    def q(self, _, action, task):
        B, N, _ = action.shape
        tasks = task.repeat_interleave(N)  # (B N,)
        (tokens, words), mask = self.inputs(self.obs, task)
        tokens = tokens[:, None].expand(-1, N, -1, -1)  # (B, N, obs_tokens, W)
        tokens = torch.cat([self.action_encoder(action, task), tokens], dim=2).flatten(0, 1)
        mask = F.pad(mask, (1, 0), value=True).repeat_interleave(N, 0)
        queries, words = Shared(self.latents, tasks), Shared(words.table, tasks)
        latents = self.encoder(queries, tokens, words, mask=mask)  # (B N, L, W)
        for block in self.blocks:
            latents = block(latents)
        read = self.q_decoder(Shared(self.v_query, tasks), latents)
        return self.q_head(read).view(B, N, -1).float()

    model.Perceiver.encode = encode_and_keep
    model.Perceiver.q = q


def no_scales():
    """A scalar is given as itself alone."""
    model.SCALES = ()


def raw():
    """Observations as they are, without the data's mean and standard deviation."""
    start_at = learner.Learner.start_at

    def start_unscaled(self, batch):
        start_at(self, batch)
        for part in (self.model, self.target_model):
            part.obs_mean.zero_()
            part.obs_std.fill_(1)

    learner.Learner.start_at = start_unscaled


def two_atoms():
    """With atoms at 0 and 1 alone a distribution is its mean: logistic regression of a value."""
    for shape in model.SIZES.values():
        shape["atoms"] = 2


def squared_error():
    """A scalar value, fitted by least squares."""
    two_atoms()

    def loss(logits, next_probs, shift, bootstrap, observed, share):
        bootstrapped = (shift + bootstrap * next_probs[:, 1]).clamp(0, 1)
        target = share * observed + (1 - share) * bootstrapped
        return (torch.softmax(logits, dim=-1)[:, 1] - target).square()  # (B,)

    learner.bellman_cross_entropy = loss


def no_returns_after():
    """After the warm-up the observed returns have no share in the critic's target."""
    learner.observed_share = lambda update, warmup_updates, total: float(update < warmup_updates)


class Ablation(NamedTuple):
    words: str  # PAC with ...
    changes: tuple = ()  # functions that make it
    flags: tuple = ()  # of train.py


ABLATIONS = {
    "recipe": Ablation("the recipe"),
    "alpha1": Ablation("no improvement in the loop: alpha 1", flags=("--alpha", 1)),
    "eta": Ablation("pi_imp without Q, in loop and acting: eta 1,000,000", flags=("--eta", 1e6)),
    "samples": Ablation("two draws at a state: samples 2", flags=("--samples", 2)),
    "n_step": Ablation("one-step targets: n_step 1", flags=("--n-step", 1)),
    "warmup": Ablation("no warm-up", flags=("--warmup", 0)),
    "target_rate": Ablation("no average: target_rate 1", flags=("--target-rate", 1)),
    "max_grad_norm": Ablation("no clipping: max_grad_norm 0", flags=("--max-grad-norm", 0)),
    "focus0": Ablation("all of the data cloned alike: focus 0", flags=("--focus", 0)),
    "alpha0": Ablation("no cloning after the warm-up: alpha 0", flags=("--alpha", 0)),
    "never": Ablation(
        "no cloning at all: alpha 0, no warm-up", flags=("--alpha", 0, "--warmup", 0)),
    "td": Ablation("temporal differences alone after the warm-up", (no_returns_after,)),
    "logistic": Ablation("a scalar critic, by logistic regression", (two_atoms,)),
    "squared": Ablation(
        "a scalar critic, by squared error; beta 30", (squared_error,), ("--beta", 30)),
    "standardised": Ablation("standardised scalars alone, without tanh(c x)", (no_scales,)),
    "multiscale": Ablation(
        "the multi-scale normaliser of raw scalars, as the paper has it", (raw,)),
    "raw": Ablation("raw scalars alone", (raw, no_scales)),
    "token": Ablation("the action as an input token instead of the Q decoder's query",
                      (action_as_token,)),
}


# ---------------------------------------------------------------- runs

def flags_of(name, part, seed, more):
    """Of train.py."""
    return ["--data", DATA[part], "--steps", UPDATES, "--seed", seed,
            "--episodes", EPISODES, *more, *ABLATIONS[name].flags]


def run_here(name, part, seed, run, more):
    """One run in this process, to its end."""
    for change in ABLATIONS[name].changes:
        change()
    train.main(list(map(str, start_or_resume(run, flags_of(name, part, seed, more)))))


def print_runs(table):
    """For each recipe and part a line an ablation, in the order of ABLATIONS."""
    groups = dict.fromkeys((row["recipe"], row["data"]) for row in table.rows())
    for recipe, part in groups:
        print(f"\nthe recipe of {recipe}, on {part}: mean ± standard deviation over seeds\n")
        methods = table.methods("ablation", ABLATIONS, recipe=recipe, data=part)
        lines = []
        for name, matrix in methods.items():
            lines.append([ABLATIONS[name].words, len(matrix), *cells(matrix),
                          f"{matrix.mean():.3f}"])
        tasks = [task.removesuffix("-v5") for task in TASKS]
        print_table(["PAC with", "seeds", *tasks, "IQM", "mean"], lines)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    parts = [part for part in DATA if part != "unseen"]  # that has other tasks
    parser.add_argument("--part", default="switching", choices=parts)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--here", type=Path, metavar="RUN", help="one run, in this process")
    parser.add_argument("flags", nargs="*", help="of train.py, behind a --")
    args = parser.parse_args()
    if args.here:
        run_here(args.only[0], args.part, args.seeds[0], args.here, args.flags)
        return
    table = Table("ablations", COLUMNS, KEY, args.folder)

    def flags(job):
        _, part, name, seed = job
        return flags_of(name, part, seed, args.flags)

    def work(job):
        _, part, name, seed = job
        run = table.runs / name_of(job)
        refuse_other(run, flags(job))
        command = ["-m", "studies.ablations", "--only", name, "--part", part, "--seeds", seed,
                   "--here", run, "--", *args.flags]
        summary = result_of(run / "eval.json", command)
        updates = read_config(run)["train"]["steps"]
        table.append(rows_of(summary, table, job, updates=updates))
        table.keep_config(run)

    if not args.table:
        jobs = [(RECIPE, args.part, name, seed) for seed in args.seeds for name in args.only]
        if jobs := unfinished(table, jobs, flags, args.flags):
            need_part(args.part)
        at_a_time(args.workers, work, jobs)
    table.need_rows()
    print_runs(table)


if __name__ == "__main__":
    main()
