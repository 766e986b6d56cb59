"""How fast an update is, per CPU-second: ours, the same mathematics written plainly, and with other projects' modules in it.

    python -m tests.bench step                            a table, and results/bench_step.json
    python -m tests.bench step --size medium --algos pac  another size

All of them start from the same weights, and those of the same mathematics must give the same loss. They take turns,
a few updates each, in processes of one thread; times are of the CPU, so that what else the machine does matters less,
and ratios are to ours, medians over turns. d3rlpy's updates are those of study 2: one task, networks and batches of its own.
What it needs besides: `pip install transformers perceiver-pytorch d3rlpy`, in an environment of their own; what is
missing is named.
"""

import copy
import importlib.util
import json
import multiprocessing
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
import model as parts
from kernels.categorical_projection import bellman_target
from learner import ALGORITHMS, Learner, data_weights, flops_per_update, mean_per_task, n_step_return, settings_for
from model import SIZES, Perceiver, TaskSpec, config_for, count_parameters, log_prob
from tests.bench import RESULTS
from train import keep_memory

STEPS = 4  # updates in a turn
ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- the same mathematics, written plainly

def copies(x, context, words, task):
    """What samples share, a copy for each."""
    if words is not None:
        context = torch.cat([context, words[task]], dim=1)
    if len(x) == 1:
        return x.expand(len(context), -1, -1), context
    return x if task is None else x[task], context


class PlainAttention(parts.Attention):
    """Every sample has its own copy of the queries and the words, and the scores are written out."""

    def forward(self, x, context=None, words=None, task=None, mask=None):
        x, context = copies(x, context, words, task)
        normed = self.norm(x)
        k, v = self.to_kv(normed if context is None else self.context_norm(context)).chunk(2, dim=-1)
        q, k, v = self.split(self.to_q(normed)), self.split(k), self.split(v)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        attended = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.mlp(x)


class ModuleAttention(parts.Attention):
    """torch.nn.MultiheadAttention between the norms."""

    @classmethod
    def of(cls, block):
        block.__class__ = cls
        width = block.out.in_features
        block.attention = nn.MultiheadAttention(width, block.heads, bias=False, batch_first=True)
        with torch.no_grad():
            block.attention.in_proj_weight.copy_(torch.cat([block.to_q.weight, block.to_kv.weight]))
            block.attention.out_proj.weight.copy_(block.out.weight)
        del block.to_q, block.to_kv, block.out

    def forward(self, x, context=None, words=None, task=None, mask=None):
        x, context = copies(x, context, words, task)
        normed = self.norm(x)
        context = normed if context is None else self.context_norm(context)
        x = x + self.attention(normed, context, context, None if mask is None else ~mask, need_weights=False)[0]
        return x + self.mlp(x)


def plain_tokens(encoder, x, task):
    """Each sample has its own copy of its task's matrix. x (B, dims), task (B,) -> (B, tokens, W)"""
    x = (x * encoder.mask[task])[..., None]
    x = torch.cat([x.clamp(-10, 10), torch.tanh(x * encoder.scales)], dim=-1).flatten(1)
    return (x[:, None] @ encoder.weight[task] + encoder.bias[task][:, None]).view(len(x), encoder.tokens, -1)


class PlainPerceiver(Perceiver):
    """Tables are indexed, every sample has its task's matrices, and each action has its own copy of the latents."""

    def inputs(self, obs, task):
        words = self.word_embedding(self.words[task]) + self.word_position
        tokens = plain_tokens(self.obs_encoder, (obs - self.obs_mean[task]) / self.obs_std[task], task)
        return torch.cat([tokens, words], dim=1), None, self.input_mask[task]

    def policy(self, latents, task):
        read = self.policy_decoder(self.policy_query, latents, task=task)
        bins = self.policy_head(read[:, 1:]).unflatten(2, (self.config.components, -1)).transpose(1, 2)
        return torch.log_softmax(self.component_head(read[:, 0]), dim=-1), torch.log_softmax(bins, dim=-1)

    def q(self, latents, action, task):
        B, N, A = action.shape
        rows = task.repeat_interleave(N)
        query = plain_tokens(self.action_encoder, action.reshape(B * N, A), rows)  # (B N, 1, W)
        return self.q_head(self.q_decoder(query, latents.repeat_interleave(N, 0))).view(B, N, -1)


def categorical(policy, count, generator):
    """Draws by torch.multinomial, which torch.distributions.Categorical uses."""
    components, bins = policy
    B, C, A, K = bins.shape
    component = torch.multinomial(components.exp(), count, replacement=True, generator=generator)  # (B, N)
    index = torch.multinomial(bins.exp().reshape(-1, K), count, replacement=True, generator=generator).view(B, C, A, count)
    index = index.gather(1, component[:, None, None].expand(-1, 1, A, -1)).squeeze(1)
    return ((2 * index + 1) / K - 1).transpose(1, 2)


def plain_loss(self, batch, generator, warm=False):
    """The equation of learner.py term by term, each with its own passes."""
    s, model, target, task = self.settings, self.model, self.target_model, batch.task
    obs, action, next_obs = batch.obs[:, 0], batch.action[:, 0], batch.next_obs[:, -1]
    mask = model.action_mask[task]
    policy = model.policy(model.encode(obs, task), task)
    low, span = self.low[task], self.range[task]
    observed = (batch.return_to_go[:, 0] - low) / span
    clone = -log_prob(policy, action[:, None], mask)[:, 0]
    worth = 1.0 if batch.worth is None else batch.worth
    if s.beta == 0:
        return (worth * clone).mean(), {"loss": (worth * clone).mean()}
    reward, bootstrap = n_step_return(batch, self.discount[task])
    shift = (reward - (1 - bootstrap) * low) / span
    with torch.no_grad():
        if s.critic == "v":
            now, after = (target.v(target.encode(x, task)) for x in (obs, next_obs))
            advantage = shift + bootstrap * target.expectation(after) - target.expectation(now)
            weight = data_weights(advantage, task, len(self.low), 1 / s.eta)
            next_probs = torch.softmax(after, dim=-1)
        else:
            drawn, q, probs = [], [], []
            for x in (obs, next_obs):
                latents = target.encode(x, task)
                drawn.append(self.draw(parts.sharpen(target.policy(latents, task)), s.samples, generator))
                probs.append(torch.softmax(target.q(latents, drawn[-1], task), dim=-1))
                q.append(probs[-1] @ target.value_atoms)
            spread = mean_per_task(q[0].std(1), task, len(self.low))[:, None]
            w = torch.softmax(q[0] / (s.eta * spread + 1e-8), dim=-1)
            next_probs = probs[1].mean(1)
        gamma = bellman_target(next_probs, shift, bootstrap, observed, s.mc_share)
    latents = model.encode(obs, task)
    logits = model.v(latents) if s.critic == "v" else model.q(latents, action[:, None], task)[:, 0]
    loss = worth * (s.alpha + (1 - s.alpha) * weight if s.critic == "v" else s.alpha) * clone
    loss = loss - s.beta * (gamma * torch.log_softmax(logits, dim=-1)).sum(1)
    if s.critic == "q" and s.alpha < 1:
        loss = loss - (1 - s.alpha) * worth * (w * log_prob(policy, drawn[0], mask)).sum(1)
    return loss.mean(), {"loss": loss.mean()}


def plain_update(self, batch, generator):
    self.optimizer.zero_grad()
    loss, metrics = self.loss(batch, generator)
    loss.backward()
    nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
    self.optimizer.step()
    with torch.no_grad():
        for slow, fast in zip(self.target_model.parameters(), self.model.parameters()):
            slow.mul_(1 - self.settings.target_rate).add_(self.settings.target_rate * fast)
    return metrics


def plainly(learner):
    """Turn a Learner into the plain one: its loss, its update, and draws by torch.multinomial."""
    for model in (learner.model, learner.target_model):
        model.__class__ = PlainPerceiver
        for block in [m for m in model.modules() if isinstance(m, parts.Attention)]:
            block.__class__ = PlainAttention
    learner.draw = categorical
    learner.loss, learner.update = MethodType(plain_loss, learner), MethodType(plain_update, learner)
    learner.optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-4, weight_decay=1e-4)
    return learner


def with_modules(learner):
    """Put torch.nn.MultiheadAttention into both of a Learner's models."""
    for model in (learner.model, learner.target_model):
        for block in [m for m in model.modules() if isinstance(m, parts.Attention)]:
            ModuleAttention.of(block)
        model.requires_grad_(model is learner.model)
    learner.make_optimizer() if learner.update.__func__ is Learner.update else \
        setattr(learner, "optimizer", torch.optim.AdamW(learner.model.parameters(), lr=1e-4, weight_decay=1e-4))
    return learner


# ---------------------------------------------------------------- other projects' trunks

def hugging_face(config):
    from transformers import PerceiverConfig, PerceiverModel
    trunk = PerceiverModel(PerceiverConfig(
        num_latents=config.latents, d_latents=config.width, d_model=config.width, num_blocks=1,
        num_self_attends_per_block=config.blocks, num_self_attention_heads=config.heads, num_cross_attention_heads=config.heads,
        self_attention_widening_factor=config.widening, cross_attention_widening_factor=config.widening,
        attention_probs_dropout_prob=0.0))
    return trunk, lambda tokens, mask: trunk(inputs=tokens, attention_mask=mask.float()).last_hidden_state


def perceiver_pytorch(config):
    from perceiver_pytorch import Perceiver as Trunk
    trunk = Trunk(num_freq_bands=1, max_freq=1.0, depth=1, input_channels=config.width, input_axis=1, num_latents=config.latents,
                  latent_dim=config.width, cross_heads=config.heads, latent_heads=config.heads,
                  cross_dim_head=config.width // config.heads, latent_dim_head=config.width // config.heads,
                  self_per_cross_attn=config.blocks, fourier_encode_data=False, final_classifier_head=False)
    return trunk, lambda tokens, mask: trunk(tokens, mask=mask, return_embeddings=True)


def all_tokens(tokens, words, mask, task):
    return tokens if words is None else torch.cat([tokens, words[task]], dim=1), mask


def with_trunk(learner, make):
    """Encode by another project's Perceiver; the tokens, the decoders and the loss stay as they are."""
    for model in (learner.model, learner.target_model):
        model.trunk, run = make(model.config)
        model.latents, model.encoder, model.blocks = None, None, None
        model.encode = lambda obs, task, model=model, run=run: run(*all_tokens(*model.inputs(obs, task), task))
        model.requires_grad_(model is learner.model)
    if learner.update.__func__ is Learner.update:
        learner.make_optimizer()
    else:
        learner.optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-4, weight_decay=1e-4)
    return learner


def import_apart(name):
    """Import a package that must not see this folder: transformers would take `kernels/` for the package of that name."""
    path, hidden = list(sys.path), {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == "kernels"}
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != ROOT]
    try:
        return getattr(__import__(name), "__version__", "installed")
    except ImportError:
        return None
    finally:
        sys.path[:] = path
        sys.modules.update(hidden)


# ---------------------------------------------------------------- the measurement

def autocast(learner):
    """bf16 products, fp32 weights."""
    loss = learner.forward

    def forward(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*args)

    learner.forward = forward
    return learner


def compiled(learner):
    learner.compile()
    return learner


CONTENDERS = {  # name: what it makes of a Learner, whether its mathematics is ours, the package it needs
    "ours": (lambda x: x, True, None),
    "ours, bf16": (autocast, False, None),
    "ours, compiled": (compiled, True, None),
    "plain": (plainly, True, None),
    "our loss, nn.MultiheadAttention": (with_modules, True, None),
    "plain loss, nn.MultiheadAttention": (lambda x: with_modules(plainly(x)), True, None),
    "our loss, trunk of transformers": (lambda x: with_trunk(x, hugging_face), False, "transformers"),
    "plain loss, trunk of transformers": (lambda x: with_trunk(plainly(x), hugging_face), False, "transformers"),
    "our loss, trunk of perceiver-pytorch": (lambda x: with_trunk(x, perceiver_pytorch), False, "perceiver_pytorch"),
    "plain loss, trunk of perceiver-pytorch": (lambda x: with_trunk(plainly(x), perceiver_pytorch), False, "perceiver_pytorch"),
}


def loss_with_fixed_draws(learner, batch):
    """The loss of an untouched copy, by the same random numbers at every state: equal mathematics give an equal one."""
    learner = copy.deepcopy(learner)
    noise = learner.noise(batch, torch.Generator().manual_seed(0))[:1].expand(2 * len(batch.task), -1, -1)
    learner.draw = lambda policy, *_: parts.sample_actions(policy, noise[:len(policy[0])])
    return learner.loss(batch, noise, False)[0].item()


def matrix_rate(size=1024):
    """FLOP/s of a large fp32 product."""
    a = torch.randn(size, size)
    a @ a
    began, count = time.process_time(), 0
    while time.process_time() - began < 1:
        a @ a
        count += 1
    return 2 * size**3 * count / (time.process_time() - began)


def contender(pipe, name, size, algo, batch_size, folder):
    """A process of its own: says its loss and size, then makes STEPS updates whenever it is told to, and says how long
    they took. Those with our loss keep their memory, as train.py does; a plain training script does not."""
    torch.set_num_threads(1)
    if name.startswith("our"):
        keep_memory()
    change, same, package = CONTENDERS[name]
    if package:
        import_apart(package)
    tasks, settings = data.open_tasks(folder), settings_for(algo, warmup=0.0)
    metas = data.merged_metas(tasks)
    config = config_for(size, [TaskSpec(m["name"], m["instruction"], m["obs_dim"], m["action_dim"]) for m in metas])
    learner, generator = Learner(config, settings, metas, 10_000), torch.Generator().manual_seed(0)
    sampler = data.Sampler(tasks, batch_size * learner.pool, settings.n_step)
    batches = [sampler.sample(np.random.default_rng(seed)) for seed in range(STEPS)]
    learner.start_at(batches[0])
    first = learner.choose(batches[0], torch.Generator().manual_seed(1))
    with torch.no_grad():  # the untrained policy head is too even to tell mistakes
        learner.target_model.policy_head[-1].weight.mul_(3)
    learner = change(learner)
    pipe.send((loss_with_fixed_draws(learner, first) if same and change is not compiled else None,
               count_parameters(learner.model), flops_per_update(config, settings, batch_size)))
    while pipe.recv():
        began = time.process_time()
        for batch in batches:
            learner.update(learner.choose(batch, generator), generator)
        pipe.send((time.process_time() - began) / STEPS)


def measure(size, algo, args):
    """CPU-seconds an update of each contender, in turns; a list of rows."""
    context, pipes, said = multiprocessing.get_context("spawn"), {}, {}
    for name, (_, _, package) in CONTENDERS.items():
        if package and not importlib.util.find_spec(package):
            print(f"{package} is not installed: left out")
            continue
        pipes[name], other = context.Pipe()
        context.Process(target=contender, args=(other, name, size, algo, args.batch_size, args.data), daemon=True).start()
        other.close()
    times = {name: [] for name in pipes}
    for name, pipe in pipes.items():
        said[name] = loss, _, flops = pipe.recv()
        if loss is not None and abs(loss - said["ours"][0]) > 1e-4 * abs(loss):
            raise SystemExit(f"{name}: another loss, {loss}, than ours, {said['ours'][0]}")
    for number in tqdm(range(args.rounds + 1), desc=f"{size} {algo}", leave=False):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds = pipe.recv()
            if number:  # the first round warms up
                times[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(False)
    rate, base = matrix_rate(), statistics.median(times["ours"])
    return [{"name": name, "size": size, "algo": algo, "parameters": said[name][1],
             "updates_per_second": round(1 / statistics.median(seconds), 2),
             "ratio": round(statistics.median(s / o for s, o in zip(seconds, times["ours"])), 2),
             "of_matrix_rate": round(flops / base / rate, 3) if name == "ours" else None}
            for name, seconds in times.items()]


def specialists(task, rounds):
    """d3rlpy's updates, with its own batches; rows."""
    try:
        import d3rlpy
    except ImportError:
        print("d3rlpy is not installed: left out")
        return []
    from tests.peers import CHUNK, METHODS, training
    rows = []
    for method in METHODS:
        (algo, fit), seconds = training(method, task), []
        for number in range(rounds // 4 + 2):
            began = time.process_time()
            next(fit)
            if number:
                seconds.append((time.process_time() - began) / CHUNK)
        rows.append({"name": f"d3rlpy {d3rlpy.__version__}, {task.name}, batch {algo.batch_size}", "size": "its own",
                     "algo": method, "parameters": None, "updates_per_second": round(1 / statistics.median(seconds), 2),
                     "ratio": None, "of_matrix_rate": None})
    return rows


def bench_step(args):
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        for algo in args.algos:
            rows += measure(size, algo, args)
    rows += specialists(data.open_tasks(args.data)[0], args.rounds)
    print("| size | algorithm | | updates a CPU-second | time, ours = 1 | of the matrix rate |\n|---|---|---|---|---|---|")
    for row in rows:
        share = "" if row["of_matrix_rate"] is None else f"{row['of_matrix_rate']:.0%}"
        print(f"| {row['size']} | {row['algo']} | {row['name']} | {row['updates_per_second']:.1f} | {row['ratio'] or ''} | {share} |")
    RESULTS.mkdir(exist_ok=True)
    result = {"date": str(date.today()), "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
              "threads": 1, "batch_size": args.batch_size, "rows": rows}
    (RESULTS / "bench_step.json").write_text(json.dumps(result, indent=1) + "\n")


def add_arguments(parser):
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=["bc", "pac", "pacv"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--data", default="datasets/switching")
    parser.set_defaults(run=bench_step)
