"""How fast an update is: ours, its plain reference, and with other projects' modules in it.

    python -m studies.step                               a table, and results/bench_step.json
    python -m studies.step --sizes medium --algos pac    another size

The first half of this file is the readable reference of model.py and learner.py: the same
mathematics without what makes them fast. Read it beside them; tests/test_learner.py holds the two
to the same loss and the same gradient.

The second half takes the time. All contenders start from the same weights, and those of the same
mathematics must give the same loss. They take turns, a few updates each, in processes of one
thread. Times are of the CPU, so that other work on the machine matters less, and ratios are medians
over turns. The trunks need `pip install transformers perceiver-pytorch`; what is missing is named.
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import platform
import statistics
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import prepare
from kernels.categorical_projection import bellman_target
from learner import ALGORITHMS, Learner, data_weights, n_step_return, settings_for
from model import SIZES, Attention, Perceiver, Shared, bin_centre, config_for, count_parameters
from parallel import flops_per_update, keep_memory
from studies import RESULTS, print_table

STEPS = 4  # updates in a turn


# ---------------------------------------------------------------- the reference of model.py

def own_rows(x):
    """What samples share, as a copy for each sample. -> (B, J, W)"""
    if not isinstance(x, Shared):
        return x
    if len(x.table) == 1:
        return x.table.expand(len(x.index), -1, -1)
    return x.table[x.index]


def normed_inputs(block, x, contexts):
    """x (B, L, W); x after its norm; and what it attends to after its norm (B, I, W)"""
    x = own_rows(x)
    normed = block.norm(x)
    if not contexts:
        return x, normed, normed
    context = torch.cat([own_rows(c) for c in contexts], dim=1)
    return x, normed, block.context_norm(context)


class PlainAttention(Attention):
    """The reference of model.Attention: a pre-norm block of a Transformer, its scores written out.

    Every sample projects its own copy of the queries and of the words.
    """

    def forward(self, x, *contexts, mask=None):
        x, normed, context = normed_inputs(self, x, contexts)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q = self.split(self.to_q(normed))  # (B, H, L, D)
        k, v = self.split(k), self.split(v)  # (B, H, I, D)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, H, L, I)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        read = torch.softmax(scores, dim=-1) @ v  # (B, H, L, D)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def plain_tokens(encoder, x, task):
    """The reference of model.Scalars: each sample has a copy of its task's matrix.

    x (B, dims), task (B,) -> (B, tokens, W)
    """
    x = x[..., None]
    x = torch.cat([x.clamp(-10, 10), torch.tanh(x * encoder.scales)], dim=-1).flatten(1)  # (B, F)
    maps = pad_sequence(encoder.weight.split(encoder.heights), batch_first=True)  # (T, F, tokens W)
    tokens = x[:, None] @ maps[task] + encoder.bias[task][:, None]  # (B, 1, tokens W)
    return tokens.view(len(x), encoder.tokens, -1)


class PlainPerceiver(Perceiver):
    """The reference of model.Perceiver: tables are indexed, and each action has its own latents."""

    def inputs(self, obs, task, frames=None):
        obs = (obs - self.obs_mean[task]) / self.obs_std[task]
        words = self.word_embedding(self.words[task]) + self.word_position
        return (plain_tokens(self.obs_encoder, obs, task), words), self.input_mask[task]

    def q(self, latents, action, task):
        B, N, A = action.shape
        tasks = task.repeat_interleave(N)
        query = plain_tokens(self.action_encoder, action.reshape(B * N, A), tasks)  # (B N, 1, W)
        read = self.q_decoder(query, latents.repeat_interleave(N, 0))
        return self.q_head(read).view(B, N, -1)


# ---------------------------------------------------------------- the reference of learner.py

def categorical(policy, count, generator):
    """Actions (B, N, A) by torch.multinomial, which torch.distributions.Categorical uses."""
    B, C, A, K = policy.log_bins.shape
    components, bins = policy.log_components.exp(), policy.log_bins.exp().reshape(-1, K)
    component = torch.multinomial(components, count, True, generator=generator)  # (B, N)
    index = torch.multinomial(bins, count, True, generator=generator).view(B, C, A, count)
    index = index.gather(1, component[:, None, None].expand(-1, 1, A, -1))  # (B, 1, A, N)
    return bin_centre(index.squeeze(1), K).transpose(1, 2)


class PlainLearner(Learner):
    """The reference of learner.Learner: each term of L^Q with its own passes through the networks.

    `draw(policy, count, generator)` says how actions are drawn. With the same draws the loss is
    that of Learner.loss.
    """
    draw = staticmethod(categorical)

    def loss(self, batch, generator, share=0.5):
        s, task = self.settings, batch.task
        obs, action = batch.obs[:, 0], batch.action[:, 0]
        worth = 1.0 if batch.worth is None else batch.worth
        alpha = s.alpha if batch.alpha is None else batch.alpha
        if share == 1:
            alpha = 1.0

        policy = self.model.policy(self.model.encode(obs, task), task)
        clone = -policy.log_prob(action[:, None])[:, 0]  # (B,)
        improve = td = torch.zeros_like(clone)
        if s.beta > 0:
            reward, bootstrap = n_step_return(batch, self.discount[task])
            shift = (reward - (1 - bootstrap) * self.low[task]) / self.range[task]
            if s.critic == "v":
                logits = self.model.v(self.model.encode(obs, task))  # (B, M)
                improve, next_probs = self.improve_on_data(batch, clone, shift, bootstrap)
            else:
                logits = self.model.q(self.model.encode(obs, task), action[:, None], task)[:, 0]
                improve, next_probs = self.improve_on_target(batch, policy, generator)
            observed = self.scale(batch.return_to_go[:, 0], task)
            gamma = bellman_target(next_probs, shift, bootstrap, observed, share)  # (B, M)
            td = -(gamma * torch.log_softmax(logits, dim=-1)).sum(1)  # (B,)

        loss = (worth * ((1 - alpha) * improve + alpha * clone) + s.beta * td).mean()
        return loss, {"loss": loss}

    def improve_on_target(self, batch, policy, generator):
        """-> the improvement term (B,), and the next value's distribution (B, M)"""
        target, task = self.target_model, batch.task
        with torch.no_grad():
            actions, probs = self.look(batch.obs[:, 0], task, generator)
            q = probs @ target.value_atoms  # (B, N)
            self.follow_spread(q, task)
            eta = self.settings.eta * target.q_spread[task][:, None]  # (B, 1)
            w = torch.softmax(q / (eta + 1e-8), dim=-1)  # (B, N)
            _, next_probs = self.look(batch.next_obs[:, -1], task, generator)
        return -(w * policy.log_prob(actions)).sum(1), next_probs.mean(1)

    def look(self, obs, task, generator):
        """What the target says of states: actions (B, N, A), and their values' distributions."""
        target = self.target_model
        latents = target.encode(obs, task)
        policy = target.policy(latents, task)
        actions = self.draw(policy, self.settings.samples, generator)
        return actions, torch.softmax(target.q(latents, actions, task), dim=-1)

    def improve_on_data(self, batch, clone, shift, bootstrap):
        """The same for L^V, where the data's actions are weighted by their advantage."""
        target, task = self.target_model, batch.task
        with torch.no_grad():
            now = target.v(target.encode(batch.obs[:, 0], task))  # (B, M)
            after = target.v(target.encode(batch.next_obs[:, -1], task))
            advantage = shift + bootstrap * target.expectation(after) - target.expectation(now)
            w = data_weights(advantage, task, self.num_tasks, 1 / self.settings.eta)
        return w * clone, torch.softmax(after, dim=-1)

    def make_optimizer(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-4)

    def update(self, batch, generator):
        self.optimizer.zero_grad()
        loss, metrics = self.loss(batch, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        rate = self.settings.target_rate
        with torch.no_grad():
            for slow, fast in zip(self.target_model.parameters(), self.model.parameters()):
                slow.mul_(1 - rate).add_(rate * fast)
        return metrics


def blocks_of(learner):
    for model in (learner.model, learner.target_model):
        yield from [module for module in model.modules() if isinstance(module, Attention)]


def plainly(learner):
    """Turn a Learner into the plain one, with the same weights."""
    for block in blocks_of(learner):
        block.__class__ = PlainAttention
    learner.model.__class__ = learner.target_model.__class__ = PlainPerceiver
    learner.__class__ = PlainLearner
    learner.make_optimizer()
    return learner


# ---------------------------------------------------------------- other projects' modules

class ModuleAttention(Attention):
    """torch.nn.MultiheadAttention between the norms."""

    @classmethod
    def replace(cls, block):
        block.__class__ = cls
        width = block.out.in_features
        block.attention = nn.MultiheadAttention(width, block.heads, bias=False, batch_first=True)
        projections = torch.cat([block.to_q.weight, block.to_kv.weight])
        block.attention.in_proj_weight.data.copy_(projections)
        block.attention.out_proj.weight.data.copy_(block.out.weight)
        del block.to_q, block.to_kv, block.out

    def forward(self, x, *contexts, mask=None):
        x, normed, context = normed_inputs(self, x, contexts)
        padding = None if mask is None else ~mask
        x = x + self.attention(normed, context, context, padding, need_weights=False)[0]
        return x + self.mlp(x)


def with_modules(learner):
    """Put torch.nn.MultiheadAttention into both of a Learner's models."""
    for block in blocks_of(learner):
        ModuleAttention.replace(block)
    learner.target_model.requires_grad_(False)
    learner.make_optimizer()


def transformers(config):
    from transformers import PerceiverConfig, PerceiverModel
    trunk = PerceiverModel(PerceiverConfig(
        num_latents=config.latents, d_latents=config.width, d_model=config.width,
        num_blocks=1, num_self_attends_per_block=config.blocks,
        num_self_attention_heads=config.heads, num_cross_attention_heads=config.heads,
        self_attention_widening_factor=config.widening,
        cross_attention_widening_factor=config.widening, attention_probs_dropout_prob=0.0))

    def run(tokens, mask):
        return trunk(inputs=tokens, attention_mask=mask.float()).last_hidden_state

    return trunk, run


def perceiver_pytorch(config):
    from perceiver_pytorch import Perceiver as Trunk
    head = config.width // config.heads
    trunk = Trunk(
        num_freq_bands=1, max_freq=1.0, depth=1, input_channels=config.width, input_axis=1,
        num_latents=config.latents, latent_dim=config.width, cross_heads=config.heads,
        latent_heads=config.heads, cross_dim_head=head, latent_dim_head=head,
        self_per_cross_attn=config.blocks, fourier_encode_data=False, final_classifier_head=False)
    return trunk, lambda tokens, mask: trunk(tokens, mask=mask, return_embeddings=True)


def with_trunk(learner, make):
    """Encode by another project's Perceiver; the tokens, decoders and the loss stay as they are."""
    for model in (learner.model, learner.target_model):
        model.trunk, run = make(model.config)
        model.latents = model.encoder = model.blocks = None

        def encode(obs, task, model=model, run=run):
            contexts, mask = model.inputs(obs, task)
            return run(torch.cat([own_rows(context) for context in contexts], dim=1), mask)

        model.encode = encode
    learner.target_model.requires_grad_(False)
    learner.make_optimizer()


# ---------------------------------------------------------------- the contenders

def in_bf16(learner):
    """bf16 products, fp32 weights."""
    loss = learner.forward

    def forward(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*args)

    learner.forward = forward


class Contender(NamedTuple):
    plain: bool = False  # it starts from the reference
    change: Callable = lambda learner: None  # what is done to the Learner
    same: bool = True  # its loss has to be ours
    package: str = None  # what it needs


def with_trunk_of(package, make, plain=False):
    return Contender(plain, partial(with_trunk, make=make), False, package)


CONTENDERS = {
    "ours": Contender(),
    "ours, bf16": Contender(change=in_bf16, same=False),
    "ours, compiled": Contender(change=Learner.compile, same=False),
    "plain": Contender(plain=True),
    "our loss, nn.MultiheadAttention": Contender(change=with_modules),
    "plain loss, nn.MultiheadAttention": Contender(plain=True, change=with_modules),
    "our loss, trunk of transformers": with_trunk_of("transformers", transformers),
    "plain loss, trunk of transformers": with_trunk_of("transformers", transformers, True),
    "our loss, trunk of perceiver-pytorch": with_trunk_of("perceiver_pytorch", perceiver_pytorch),
    "plain loss, trunk of perceiver-pytorch":
        with_trunk_of("perceiver_pytorch", perceiver_pytorch, True),
}


# ---------------------------------------------------------------- the measurement

def new_learner(size, algo, folder, device="cpu"):
    """-> a Learner without a warm-up, and the tasks of its data"""
    tasks = prepare.open_tasks(folder)
    metas = prepare.merged_metas(tasks)
    settings = settings_for(algo, warmup=0.0)
    return Learner(config_for(size, metas), settings, metas, 10_000, device), tasks


def loss_by_fixed_draws(learner, batch):
    """The loss of an untouched copy, by the same random numbers at every state."""
    learner = copy.deepcopy(learner)
    noise = learner.noise(batch, torch.Generator().manual_seed(0))[:1]
    noise = noise.expand(2 * len(batch.task), -1, -1)
    learner.draw = lambda policy, *_: policy.sample(noise[:len(batch.task)])
    return learner.loss(batch, noise, 0.5)[0].item()


def contender(pipe, name, size, algo, batch_size, folder):
    """A process of its own: says its loss and size, then makes STEPS updates whenever it is told.

    It answers with the CPU-seconds an update. Those with our loss keep their memory, as train.py
    does; a plain training script does not.
    """
    torch.set_num_threads(1)
    plain, change, same, _ = CONTENDERS[name]
    if not plain:
        keep_memory()
    learner, tasks = new_learner(size, algo, folder)
    sampler = data.Sampler(tasks, batch_size * learner.pool, learner.settings.n_step,
                           focus=learner.settings.focus)
    batches = [sampler.sample(np.random.default_rng(seed)) for seed in range(STEPS)]
    learner.start_at(batches[0])
    learner.with_metrics = False  # as in 49 of 50 updates
    generator = torch.Generator().manual_seed(0)
    first = learner.choose(batches[0], generator)
    learner.target_model.policy_head[-1].weight.data.mul_(3)  # an even policy would hide mistakes
    if plain:
        plainly(learner)
    change(learner)
    loss = loss_by_fixed_draws(learner, first) if same else None
    pipe.send((loss, count_parameters(learner.model)))
    while pipe.recv():
        began = time.process_time()
        for batch in batches:
            learner.update(learner.choose(batch, generator), generator)
        pipe.send((time.process_time() - began) / STEPS)


def matrix_rate(size=1024):
    """FLOP/s of a large fp32 product."""
    a = torch.randn(size, size)
    a @ a
    began, count = time.process_time(), 0
    while time.process_time() - began < 1:
        a @ a
        count += 1
    return 2 * size**3 * count / (time.process_time() - began)


def start(name, *args):
    """A contender's process -> the pipe to it; None without its package"""
    package = CONTENDERS[name].package
    if package and not importlib.util.find_spec(package):
        print(f"{package} is not installed: left out")
        return None
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    context.Process(target=contender, args=(other, name, *args), daemon=True).start()
    other.close()
    return pipe


def measure(size, algo, args):
    """Rows of the table: the contenders, in turns. "ours" is the first of them."""
    names = dict.fromkeys(["ours", *args.contenders])
    started = {name: start(name, size, algo, args.batch_size, args.data) for name in names}
    pipes = {name: pipe for name, pipe in started.items() if pipe}
    said = {name: pipe.recv() for name, pipe in pipes.items()}
    ours = said["ours"][0]
    for name, (loss, _) in said.items():
        if loss is not None and abs(loss - ours) > 1e-4 * abs(ours):
            sys.exit(f"{name}: another loss, {loss}, than ours, {ours}")
    times = {name: [] for name in pipes}
    for number in tqdm(range(args.rounds + 1), desc=f"{size} {algo}", leave=False):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds = pipe.recv()
            if number > 0:  # the first round warms up
                times[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(False)
    rows = []
    for name, seconds in times.items():
        ratio = statistics.median(s / o for s, o in zip(seconds, times["ours"]))
        rows.append({"name": name, "size": size, "algo": algo, "parameters": said[name][1],
                     "updates_per_second": round(1 / statistics.median(seconds), 2),
                     "ratio": round(ratio, 2), "of_matrix_rate": ""})
    flops = flops_per_update(new_learner(size, algo, args.data, "meta")[0], args.batch_size)
    rate = flops / statistics.median(times["ours"])
    rows[0]["of_matrix_rate"] = round(rate / matrix_rate(), 3)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=["bc", "pac", "pacv"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS),
                        metavar="NAME", help="some of: " + "; ".join(CONTENDERS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20, help="turns (default: %(default)s)")
    parser.add_argument("--data", default="datasets/switching")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_step.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        for algo in args.algos:
            rows += measure(size, algo, args)
    columns = {"size": "size", "algo": "algorithm", "name": "", "ratio": "time, ours = 1",
               "updates_per_second": "updates a CPU-second",
               "of_matrix_rate": "of the rate of matrix products"}
    print_table(columns.values(), [[row[column] for column in columns] for row in rows])
    result = {"date": str(date.today()), "machine": platform.processor() or platform.machine(),
              "torch": torch.__version__, "threads": 1, "batch_size": args.batch_size, "rows": rows}
    data.write_file(args.out, json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
