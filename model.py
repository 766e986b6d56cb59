"""The Perceiver: encoders, latents, and the policy, Q and V decoders.

    observation scalars ─┐
                         ├─ tokens ── cross-attention ──> latents ── M self-attention blocks ──> latents
    instruction words ───┘                                                                         │
             a learned query per action dimension, and one more ── policy decoder ── log pi(a|s) <─┤
                        the encoded action is the query ───────── Q decoder ─────── p(q|s,a) <─────┤
                        one learned query ─────────────────────── V decoder ─────── p(v|s) <───────┘

After Perceiver-IO (Jaegle et al. 2022, arXiv 2107.14795) and the Perceiver Actor-Critic
(Springenberg et al. 2024, arXiv 2402.05546). The latents are computed once per state; scoring N
actions costs only the decoder. Values live on [0, 1]: the learner scales each task's returns.

Shapes: B batch, I input tokens, O observation scalars, W width, L latents, N actions, A action
dimensions, K action bins, M value atoms, H heads, D head width.
"""

import zlib
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention

# The last five are after the paper's sizes: 32M, 73M, 164M, 0.4B, 988M parameters.
SIZES = {
    "tiny": dict(width=32, latents=4, blocks=1, heads=2, widening=2),
    "small": dict(width=64, latents=8, blocks=1, heads=4, widening=2),
    "medium": dict(width=128, latents=16, blocks=4, heads=4, widening=2),
    "large": dict(width=256, latents=32, blocks=6, heads=4, widening=4),
    "xxs": dict(width=512, latents=64, blocks=5, heads=8, widening=4),
    "xs": dict(width=768, latents=64, blocks=6, heads=12, widening=4),
    "s": dict(width=1024, latents=128, blocks=9, heads=16, widening=4),
    "m": dict(width=1536, latents=128, blocks=10, heads=24, widening=4),
    "l": dict(width=2048, latents=256, blocks=15, heads=32, widening=4),
}
SCALES = tuple(4.0**k for k in range(-1, 2))  # of the multi-scale normaliser [ours]
WORDS = 1024  # rows of the word table; words are hashed into it


@dataclass
class TaskSpec:
    """What the model must know of a task."""
    name: str
    instruction: str
    obs_dim: int
    action_dim: int


@dataclass
class ModelConfig:
    tasks: list  # of TaskSpec
    width: int
    latents: int
    blocks: int
    heads: int
    widening: int  # of the MLPs' inner layer
    obs_tokens: int = 8
    components: int = 4  # C of the policy's mixture
    bins: int = 51  # K, a dimension of the action; the paper likely has 101
    atoms: int = 101  # M

    def __post_init__(self):
        self.tasks = [TaskSpec(**task) if isinstance(task, dict) else task for task in self.tasks]

    to_dict = asdict


def config_for(size, tasks, **changes):
    """The ModelConfig of a named size; ValueError with the list of names if there is no such size."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are: {', '.join(SIZES)}")
    return ModelConfig(tasks=tasks, **{**SIZES[size], **changes})


class Scalars(nn.Module):
    """A vector of scalars -> tokens, each a linear map of all of it; every task has maps of its own.

    The multi-scale normaliser: a scalar is given as itself and as tanh(c x) for geometric c, so that it is resolved at
    some scale [formula ours]. It resolves what lies near 0, so observations are standardised first, against the paper's
    claim that no statistics are needed: Hopper's height, 1.25 ± 0.14, is nearly one number to all of tanh(c x), and a
    clone of the expert scored 0.36 with the raw scalars, 0.97 with standardised ones.

    A token for each scalar leaves it to attention, which averages, to form the sums that a controller is made of.
    """

    def __init__(self, dims, tokens, width):
        """dims: the number of scalars of each task"""
        super().__init__()
        self.tokens = tokens
        self.register_buffer("scales", torch.tensor(SCALES), persistent=False)
        self.register_buffer("mask", torch.arange(max(dims)) < torch.tensor(dims)[:, None], persistent=False)  # (tasks, dims)
        inputs = torch.tensor(dims, dtype=torch.float32) * (1 + len(SCALES))
        self.weight = nn.Parameter(torch.randn(len(dims), max(dims) * (1 + len(SCALES)), tokens * width)
                                   * inputs.rsqrt()[:, None, None])
        self.bias = nn.Parameter(torch.randn(len(dims), tokens * width))  # its differences keep the tokens apart

    def forward(self, x, task):
        """x: (B, dims) or (B, N, dims), task: (B,) -> (B, tokens, W) or (B, N, tokens, W). What is past a task's own is ignored."""
        x = torch.where(look_up(self.mask, task).view(len(x), *[1] * (x.dim() - 2), -1), x, 0)
        x = x[..., None]
        x = torch.cat([x.clamp(-10, 10), torch.tanh(x * self.scales)], dim=-1).flatten(-2)  # (..., dims * (1 + scales))
        return linear_of_task(x, self.weight, self.bias, task).unflatten(-1, (self.tokens, -1))


def linear_of_task(x, weight, bias, task):
    """x (B, ..., F), weight (tasks, F, W), bias (tasks, W), task (B,) -> (B, ..., W): a product for each task there is.

    weight[task] would copy a matrix for every sample.
    """
    if x.is_meta:  # a dry run: the same work
        return x @ weight[0] + bias[0]
    counts = (task == torch.arange(len(weight), device=task.device)[:, None]).sum(1).tolist()  # bincount: not for --compile
    order = task.argsort(stable=True)
    # unbind: its backward pass writes the gradient once; that of weight[t] would fill one of its whole size for every t
    products = [part @ w + b for part, w, b in zip(x[order].split(counts), weight.unbind(), bias.unbind())]
    return torch.cat(products)[order.argsort()]


def look_up(table, task):
    """table[task], of which an embedding's backward pass is the faster one. (tasks, ...), (B,) -> (B, ...)"""
    return F.embedding(task, table.flatten(1)).view(len(task), *table.shape[1:])


class Attention(nn.Module):
    """Multi-head attention from x to context (x itself if there is none), and an MLP; both pre-norm and residual."""

    def __init__(self, width, heads, widening, cross=False):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width) if cross else None
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, widening * width), nn.ReLU(inplace=True),
                                 nn.Linear(widening * width, width))

    def split(self, x):
        B, L, W = x.shape
        return x.view(B, L, self.heads, W // self.heads).transpose(1, 2)  # (B, H, L, D)

    def qkv(self, x, context=None, shared=None, task=None):
        """-> x, a row for each sample, and q, k, v. What samples share is projected once, not once for each of them."""
        normed = self.norm(x)
        q, kv = self.to_q(normed), self.to_kv(normed if context is None else self.context_norm(context))
        if shared is not None:
            kv = torch.cat([kv, look_up(self.to_kv(self.context_norm(shared)), task)], dim=1)
        if len(x) == 1:
            x, q = x.expand(len(kv), -1, -1), q.expand(len(kv), -1, -1)
        elif task is not None:
            x, q = look_up(x, task), look_up(q, task)
        return x, self.split(q), *map(self.split, kv.chunk(2, dim=-1))

    def forward(self, x, context=None, shared=None, task=None, mask=None):
        """x: (B, L, W), or (1, L, W) for all samples, or (tasks, L, W) if `task` (B,) is given; context: (B, I, W);
        shared: (tasks, J, W), more of the context; mask: (B, I + J) bool, True = attend -> (B, L, W)"""
        x, q, k, v = self.qkv(x, context, shared, task)
        x = x + self.out(attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Perceiver(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # keep a block's input alone, and compute the rest again in the backward pass
        tasks, W = config.tasks, config.width
        obs_dim, action_dim = max(t.obs_dim for t in tasks), max(t.action_dim for t in tasks)
        words = [tokenize(t.instruction) for t in tasks]
        longest = max(len(ids) for ids in words)

        def table(rows, fill):
            return torch.tensor([[*row, *[fill] * (width - len(row))] for row, width in rows])

        # What is padding, for each task; rows are looked up by a batch's `task`.
        input_mask = table([([True] * (config.obs_tokens + len(ids)), config.obs_tokens + longest) for ids in words], False)
        self.register_buffer("input_mask", input_mask, persistent=False)  # (tasks, I)
        self.register_buffer("action_mask", table([([True] * t.action_dim, action_dim) for t in tasks], False),
                             persistent=False)  # (tasks, A)
        self.register_buffer("words", table([(ids, longest) for ids in words], 0), persistent=False)

        self.register_buffer("obs_mean", torch.zeros(len(tasks), obs_dim))
        self.register_buffer("obs_std", torch.ones(len(tasks), obs_dim))
        self.register_buffer("q_spread", torch.ones(len(tasks)))  # Q's standard deviation over a state's actions, by task
        self.obs_encoder = Scalars([t.obs_dim for t in tasks], config.obs_tokens, W)
        self.word_embedding = nn.Embedding(WORDS, W)
        self.word_position = nn.Parameter(torch.randn(longest, W))
        self.latents = nn.Parameter(torch.randn(1, config.latents, W))
        self.encoder = Attention(W, config.heads, config.widening, cross=True)
        self.blocks = nn.ModuleList(Attention(W, config.heads, config.widening) for _ in range(config.blocks))

        self.policy_query = nn.Parameter(torch.randn(len(tasks), action_dim + 1, W))
        self.policy_decoder = Attention(W, config.heads, config.widening, cross=True)
        self.component_head = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, config.components))
        self.policy_head = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, config.components * config.bins))
        self.action_encoder = Scalars([t.action_dim for t in tasks], 1, W)
        self.q_decoder = Attention(W, config.heads, config.widening, cross=True)
        self.q_head = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, config.atoms))
        self.v_query = nn.Parameter(torch.randn(1, 1, W))
        self.v_decoder = Attention(W, config.heads, config.widening, cross=True)
        self.v_head = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, config.atoms))

        self.register_buffer("value_atoms", torch.linspace(0, 1, config.atoms), persistent=False)
        self.apply(self._init)
        for attention_block in (m for m in self.modules() if isinstance(m, Attention)):
            nn.init.zeros_(attention_block.mlp[-1].weight)

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def inputs(self, obs, task):
        """obs: (B, O), task: (B,) -> tokens (B, obs_tokens, W), words (tasks, longest, W), and the mask (B, I) of both"""
        tokens = self.obs_encoder((obs - self.obs_mean[task]) / self.obs_std[task], task)
        return tokens, self.word_embedding(self.words) + self.word_position, self.input_mask[task]

    def encode(self, obs, task):
        """obs: (B, O), task: (B,) int64 -> latents (B, L, W). Scalars past a task's own are ignored."""
        tokens, words, mask = self.inputs(obs, task)
        latents = self.encoder(self.latents, tokens, words, task, mask)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                latents = checkpoint(block, latents, use_reentrant=False, preserve_rng_state=False)
            else:
                latents = block(latents)
        return latents

    def policy(self, latents, task):
        """latents: (B, L, W), task: (B,) -> log-probabilities of the components (B, C), and of their bins (B, C, A, K)"""
        read = self.policy_decoder(self.policy_query, latents, task=task)  # (B, A + 1, W)
        bins = self.policy_head(read[:, 1:]).unflatten(2, (self.config.components, -1))  # (B, A, C, K)
        components, bins = (torch.log_softmax(logits.float(), dim=-1) for logits in (self.component_head(read[:, 0]), bins))
        return components, bins.transpose(1, 2)

    def q(self, latents, action, task):
        """latents: (B, L, W), action: (B, N, A) in [-1, 1], task: (B,) -> logits (B, N, M) of the value atoms"""
        query = self.action_encoder(action, task).squeeze(2)  # (B, N, W)
        return self.q_head(self.q_decoder(query, latents)).float()

    def v(self, latents):
        """latents: (B, L, W) -> logits (B, M) of the value atoms"""
        return self.v_head(self.v_decoder(self.v_query, latents)).squeeze(1).float()

    def expectation(self, logits):
        """logits (..., M) of the value atoms -> their mean (...)"""
        return self.mean_value(torch.softmax(logits, dim=-1))

    def mean_value(self, probs):
        """probs (..., M) of the value atoms -> their mean (...). No matrix product: under autocast that would round values
        to 8 bits, more coarsely than they differ from action to action."""
        return (probs * self.value_atoms).sum(-1)

    def attention_entropy(self, obs, task):
        """Mean entropy in nats of the latents' attention over the inputs; it falls when attention collapses."""
        tokens, words, mask = self.inputs(obs, task)
        _, q, k, _ = self.encoder.qkv(self.latents, tokens, words, task)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # (B, H, L, I)
        return torch.distributions.Categorical(logits=scores.masked_fill(~mask[:, None, None], -1e9)).entropy().mean()


def tokenize(instruction):
    """Words -> ids below WORDS, by a hash: no vocabulary to keep, any text is accepted."""
    return [zlib.crc32(word.encode()) % WORDS for word in instruction.lower().split()]


# ---------------------------------------------------------------- the policy's distribution

def to_bins(action, bins):
    """action (...) in [-1, 1] -> the index (...) of its bin among `bins` equal ones"""
    return ((action + 1) / 2 * bins).long().clamp(0, bins - 1)


def mean_action(policy):
    """The policy's mean (B, A)."""
    components, bins = policy
    K = bins.shape[-1]
    centres = (2 * torch.arange(K, device=bins.device) + 1) / K - 1  # (K,)
    return (components.exp()[:, :, None] * (bins.exp() @ centres)).sum(1)


def sharpen(policy, power=2):
    """The policy to a power, not normalised: each component's bins, and the components. What is drawn is drawn from it [ours].

    A clone of noisy behaviours is as noisy as they are, and Q errs most on the noise: drawn from the policy itself,
    pi_imp steered Swimmer out of its gait: at eta 2, 0.06 without this and 0.91 with it, where the policy's mean scored 0.81
    (one run of 5,000 updates, 3 and 4 episodes, 2026-11-25; at eta 1 it did not help: 0.16).
    """
    return tuple(power * x for x in policy)


def log_prob(policy, action, action_mask):
    """log pi(a|s). action (B, N, A), action_mask (B, A) -> (B, N)"""
    components, bins = policy
    index = to_bins(action, bins.shape[-1]).transpose(1, 2)  # (B, A, N)
    of_dims = bins.gather(3, index[:, None].expand(-1, bins.shape[1], -1, -1))  # (B, C, A, N)
    of_actions = (of_dims * action_mask[:, None, :, None]).sum(2)  # (B, C, N)
    return torch.logsumexp(components[..., None] + of_actions, dim=1)


def sample_actions(policy, noise):
    """Actions (B, N, A) drawn from the policy: a component, then each dimension's bin, whose centre is returned.

    noise (B, N, 1 + A): numbers uniform on [0, 1). The policy need not be normalised.
    """
    cdf_of_components, cdf_of_bins = (log_probs.exp().cumsum(-1) for log_probs in policy)
    component = draw(cdf_of_components[:, None].expand(-1, noise.shape[1], -1), noise[..., 0])  # (B, N)
    rows = torch.arange(len(noise), device=noise.device)[:, None]  # (B, 1)
    index = draw(cdf_of_bins[rows, component], noise[..., 1:])  # (B, N, A)
    return (2 * index + 1).to(noise.dtype) / cdf_of_bins.shape[-1] - 1


def draw(cdf, noise):
    """An index (...) from each distribution, given by its running sums (..., K), for each number (...) on [0, 1)."""
    # Inverse CDF: several times faster than torch.multinomial.
    index = torch.searchsorted(cdf.contiguous(), noise[..., None] * cdf[..., -1:], right=True).squeeze(-1)
    return index.clamp(max=cdf.shape[-1] - 1)


# ---------------------------------------------------------------- arithmetic

def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())
