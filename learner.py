"""The losses, the target network, and one update.

    L^Q = (1 - alpha) KL(pi_imp || pi)  +  alpha KL(b || pi)  +  beta KL(Gamma || p)         (arXiv 2402.05546)

    policy improvement   -(1 - alpha) sum_j w_j log pi(a'_j|s),  a'_j ~ pi_theta'(.|s),  w = softmax_j(Q_theta'(s, a'_j) / eta)
    cloning              -alpha log pi(a|s)                      both on data as if drawn by exp(focus * return) [ours]
    critic               -beta sum_q Gamma(q) log p(q|s, a),     Gamma: the projected Bellman target

theta' is the target model, a lagged average of theta; draws are from its policy squared [ours]. Values are scaled task by task to [0, 1],
so that one set of atoms serves returns of any size: q = (return - low) / (high - low).
"""

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from kernels.categorical_projection import bellman_cross_entropy, point_mass
from model import Attention, Perceiver, count_parameters, log_prob, sample_actions, sharpen

GPUS = {"H100": (989e12, 80e9), "A100": (312e12, 80e9), "RTX 4090": (165e12, 24e9)}  # data sheets: bf16 FLOP/s, bytes
SPEED = 0.3  # share of the peak that a dry run reckons with [ours]
VALUE_MARGIN = 0.2  # atoms reach past the data's returns by this share of their range, on either side


@dataclass
class LossSettings:
    """What an algorithm is. Every value is our choice; the paper's are not known."""
    alpha: float = 0.9  # weight of cloning; 1 - alpha is policy improvement's
    beta: float = 1.0  # weight of the critic; 0: there is none
    critic: str = "q"  # "q": improve on the target policy (L^Q); "v": on the data's (L^V)
    eta: float = 2.0  # divides Q, or the advantage, in units of its own spread; also where pi_imp acts
    focus: float = 5.0  # the policy learns as from data drawn by exp(focus * return), in its task's spread; 0: all alike
    pool: int = 8  # candidates for each place in a batch, where focus chooses
    samples: int = 8  # N, actions drawn from the target policy at a state
    n_step: int = 3  # rewards summed before the bootstrap
    mc_share: float = 0.5  # share of the observed return in the critic's target, after the warm-up
    warmup: float = 0.5  # share of the updates in which the policy clones and the critic learns observed returns
    top: float = 1.0  # share of the episodes, the best, that are learnt from
    target_rate: float = 0.01  # theta' moves by this share towards theta at each update
    learning_rate: float = 3e-3
    max_grad_norm: float = 1.0


ALGORITHMS = {
    "bc": dict(alpha=1.0, beta=0.0, n_step=1, focus=0.0),
    "fc": dict(alpha=1.0, beta=0.0, n_step=1, focus=0.0, top=0.1),  # filtered BC
    "bcq": dict(alpha=1.0, beta=1.0, focus=0.0),
    "pac": dict(),
    "pacv": dict(critic="v", alpha=0.2, eta=1.0),
}


def settings_for(algo, **changes):
    """The LossSettings of a named algorithm; ValueError with the list of names if there is no such one."""
    if algo not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algo!r}; there are: {', '.join(ALGORITHMS)}")
    return LossSettings(**{**ALGORITHMS[algo], **changes})


# ---------------------------------------------------------------- the loss terms

def cloning_loss(policy, action, action_mask, weight=1.0):
    """-E[w log pi(a|s)] of the data's actions (B, A); weight (B,) or 1."""
    log_probs = log_prob(policy, action[:, None], action_mask)[:, 0]  # (B,)
    return -(weight * log_probs).mean(), {"policy/clone_loss": -log_probs.mean()}


def improvement_loss(policy, actions, w, action_mask, weight=1.0):
    """KL(pi_imp || pi) up to a constant. actions (B, N, A) ~ pi_theta' and their weights in pi_imp w (B, N); weight (B,) or 1.

    weight has to follow cloning's: where a transition is hardly cloned, pi would be drawn to its own sharpened self alone.
    In one run of three, components collapsed to the action 0, which no behaviour takes, and HalfCheetah stood still.
    """
    cross_entropy = -(w * log_prob(policy, actions, action_mask)).sum(-1)  # (B,)
    return (weight * cross_entropy).mean(), {"policy/improve_loss": cross_entropy.mean(), "policy/ess": (1 / w.square().sum(-1)).mean()}


def improvement_weights(q, spread, eta):
    """w_j ∝ exp(Q(s, a_j) / eta), a_j ~ pi~: self-normalised weights of pi_imp. q (B, N), spread (B,) -> (B, N)

    eta is relative to Q's spread over a state's actions, which is tiny beside the range of the values: a fixed eta of
    2% of that range left the weights uniform. The spread is the task's average: where Q hardly depends on
    the action, as in most states of a pendulum that stands, its noise must not choose it.
    """
    return torch.softmax(q / (eta * spread[:, None] + 1e-8), dim=-1)


def critic_loss(value_logits, next_probs, shift, scale, observed, mc_share):
    """-E sum Gamma log p. value_logits, next_probs (B, M); shift, scale, observed (B,), scaled values."""
    loss = bellman_cross_entropy(value_logits, next_probs, shift, scale, observed, mc_share).mean()
    return loss, {"critic/loss": loss}


def mean_per_task(x, task, num_tasks):
    """x (B,) -> (B,), each the mean over the rows of its task, on all ranks; it carries no gradient"""
    total = torch.zeros(num_tasks, device=x.device).index_add_(0, task, x)
    count = torch.zeros(num_tasks, device=x.device).index_add_(0, task, torch.ones_like(x))
    if dist.is_initialized():
        dist.all_reduce(total), dist.all_reduce(count)
    return (total / count.clamp(min=1))[task]


def n_step_return(batch, discount):
    """The first action's n-step return: reward (B,) and the discount (B,) of what follows next_obs[:, -1].

    The bootstrap is cut by termination only; a window cut short by an episode's end has fewer steps.
    """
    powers = discount[:, None] ** torch.arange(batch.reward.shape[1], device=discount.device)  # (B, T)
    reward = (powers * batch.reward).sum(1)  # rows past an end carry no reward
    bootstrap = discount ** batch.valid.sum(1) * (~batch.terminated.any(1)).float()
    return reward, bootstrap


# ---------------------------------------------------------------- one update

class NonFinite(FloatingPointError):
    """The loss or its gradient is not finite; the weights are those of the last good update."""

    def __init__(self, message, metrics):
        super().__init__(message)
        self.metrics = {name: value.item() for name, value in metrics.items()}


class Learner:
    """A model, its target, its optimiser, and `update`. `tasks` are the metas of the data's tasks, in order.

    `accumulate`: a batch is worked off in so many parts, one after the other, for less memory.
    """

    def __init__(self, config, settings, tasks, total_updates, device="cpu", seed=0, accumulate=1):
        self.settings, self.total_updates, self.device = settings, total_updates, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Perceiver(config).to(self.device)
        self.target_model = copy.deepcopy(self.model).requires_grad_(False)
        self.forward = self.loss  # several ranks put DDP or FSDP around it
        self.make_optimizer()
        self.updates, self.accumulate = 0, accumulate
        self.pool = settings.pool if settings.focus else 1
        self.warmup_updates = round(settings.warmup * total_updates)
        low, high = (torch.tensor([t["return_to_go"][i] for t in tasks], dtype=torch.float32) for i in (0, 1))
        margin = VALUE_MARGIN * (high - low).clamp(min=1e-6)
        self.low, self.range = (low - margin).to(self.device), (high - low + 2 * margin).to(self.device)
        self.discount = torch.tensor([t["discount"] for t in tasks]).to(self.device)

    def make_optimizer(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.settings.learning_rate, weight_decay=1e-4,
                                           fused=True)
        # Kept, as to collect them takes 0.15 ms a time.
        self.weights, self.target_weights = list(self.model.parameters()), list(self.target_model.parameters())
        for p in self.weights:  # AdamW would make these at the first step; a checkpoint is read before it
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}

    def compile(self):
        """Compile the loss from now on: once for the warm-up and once for what follows."""
        torch._dynamo.config.capture_scalar_outputs = True  # linear_of_task reads how many rows a task has
        self.loss = self.forward = torch.compile(self.loss, dynamic=False)

    def start_at(self, batch):
        """Begin at the data: the scale of each task's observations, and the values' distribution.

        The value heads' bias is set to the log histogram of the data's returns, and their weights small: from a uniform
        start, thousands of updates pass before the values come down to the returns.
        """
        obs = batch.obs[:, 0].to(self.device)
        for model in (self.model, self.target_model):
            for task in batch.task.unique():
                std, mean = torch.std_mean(obs[batch.task == task], dim=0)
                model.obs_mean[task], model.obs_std[task] = mean, torch.where(std > 1e-6, std, 1)  # 1: a constant
        observed = self.scale(batch.return_to_go[:, 0].to(self.device), batch.task)
        histogram = point_mass(observed, self.model.config.atoms).mean(0)  # (M,)
        bias = torch.log(0.99 * histogram + 0.01 / len(histogram))
        with torch.no_grad():
            for model in (self.model, self.target_model):
                for head in (model.q_head[-1], model.v_head[-1]):
                    head.bias.copy_(bias)
                    head.weight.mul_(0.1)

    def scale(self, returns, task):
        """Returns (B,) as values, on [0, 1]."""
        return (returns - self.low[task]) / self.range[task]

    def noise(self, batch, generator):
        """What actions of the target policy are drawn by, at a batch's states and n steps on: uniform (2B, N, 1 + A)."""
        shape = 2 * len(batch.task), self.settings.samples, 1 + batch.action.shape[-1]
        return torch.rand(shape, generator=generator, device=self.device)

    def loss(self, batch, noise, warm):
        """The whole loss of a batch -> (loss, metrics). `noise`: see above; warm: whether the warm-up goes on."""
        s, model, target = self.settings, self.model, self.target_model
        obs, action, task = batch.obs[:, 0], batch.action[:, 0], batch.task  # (B, O), (B, A), (B,)
        action_mask = model.action_mask[task]  # (B, A)
        alpha = 1.0 if warm else s.alpha if batch.alpha is None else batch.alpha  # (B,) where the data's sources have their own
        latents = model.encode(obs, task)
        policy = model.policy(latents, task)
        metrics = {"policy/entropy": mean_entropy(policy, action_mask)}
        low, span = self.low[task], self.range[task]
        observed = self.scale(batch.return_to_go[:, 0], task)
        worth = 1.0 if batch.worth is None else batch.worth  # (B,), a transition's weight in the policy's terms
        weight = alpha * worth  # cloning's
        if s.beta == 0:
            loss, m = cloning_loss(policy, action, action_mask, weight)
            return loss, {**metrics, **m, "loss": loss}

        value_logits = model.v(latents) if s.critic == "v" else model.q(latents, action[:, None], task)[:, 0]  # (B, M)
        reward, bootstrap = n_step_return(batch, self.discount[task])
        shift, scale = (reward - (1 - bootstrap) * low) / span, bootstrap  # scaled value = shift + scale * next's

        if warm:  # the critic learns what the data's actions returned: no target model is needed
            next_probs, mc_share = torch.zeros_like(value_logits), 1.0
        else:
            with torch.no_grad():  # everything that the target model says
                both = torch.cat([obs, batch.next_obs[:, -1]]), torch.cat([task, task])
                target_latents = target.encode(*both)  # (2B, L, W): now, and n steps on
                if s.critic == "v":
                    now, after = target.v(target_latents).chunk(2)
                    next_probs = torch.softmax(after, dim=-1)
                    advantage = shift + scale * target.expectation(after) - target.expectation(now)
                    w = data_weights(advantage, task, len(self.low), 1 / s.eta)
                    weight = weight + (1 - alpha) * worth * w
                    metrics["policy/ess"] = (1 / mean_per_task(w.square(), task, len(self.low))).mean()  # a share of the rows
                else:
                    actions = sample_actions(sharpen(target.policy(target_latents, both[1])), noise)  # (2B, N, A)
                    value_probs = torch.softmax(target.q(target_latents, actions, both[1]), dim=-1)  # (2B, N, M)
                    q = target.mean_value(value_probs[:len(obs)])  # (B, N)
                    self.follow_spread(q, task)
                    w = improvement_weights(q, target.q_spread[task], s.eta)  # (B, N)
                    next_probs = value_probs[len(obs):].mean(1)  # q' ~ p(q|s', a'), a' ~ pi_theta'
            mc_share = s.mc_share

        loss, m = cloning_loss(policy, action, action_mask, weight)
        metrics.update(m)
        if s.critic == "q" and not warm and (s.alpha < 1 or batch.alpha is not None):
            improvement, m = improvement_loss(policy, actions[:len(obs)], w, action_mask, (1 - alpha) * worth)
            loss = loss + improvement
            metrics.update(m, **{"policy/q_spread": target.q_spread[task].mean()})
        value_loss, m = critic_loss(value_logits, next_probs, shift, scale, observed, mc_share)
        metrics.update(m)
        loss = loss + s.beta * value_loss
        value = model.expectation(value_logits.detach())
        metrics.update({"critic/value": value.mean(), "critic/observed": observed.mean(),
                        "critic/error": (value - observed).abs().mean(), "loss": loss})
        return loss, metrics

    def choose(self, candidates, generator):
        """A Batch of `pool` times too many transitions -> one of B, half of them by chance, half in proportion to their worth.

        Worth, exp(focus * return), lies on a tenth of the data: weights alone left most of a batch without a say in
        the policy's terms. What is over- or underrepresented is put right by the rest of the weight, 2 at the most;
        the critic learns from the rows as they come. Ranks choose together, as one process would, and take a share each.
        """
        candidates = candidates.to(self.device)
        if self.pool == 1:
            return candidates
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        place = torch.rand((), generator=generator, device=self.device)
        if ranks > 1:
            candidates = candidates.map(of_all_ranks)
            dist.broadcast(place, 0)
        task = candidates.task
        observed = self.scale(candidates.return_to_go[:, 0], task)
        worth = data_weights(observed, task, len(self.low), self.settings.focus)  # (pool * B,)
        odds = (1 + worth) / 2
        candidates.worth = worth / odds
        # Systematic sampling: places at equal distances along the summed odds, so that each task keeps its share.
        B, sums = len(task) // self.pool, odds.cumsum(0)
        places = (torch.arange(B, device=self.device) + place)[rank::ranks] / B
        return candidates.take(torch.searchsorted(sums, places * sums[-1]).clamp(max=len(task) - 1))

    def follow_spread(self, q, task):
        """Keep the target's running average, by task, of Q's spread over a state's actions; q (B, N), task (B,)."""
        spread, old = mean_per_task(q.std(1), task, len(self.low)), self.target_model.q_spread[task]
        self.target_model.q_spread[task] = torch.where(old == 1, spread, torch.lerp(old, spread, 0.01))  # 1: not met before

    def update(self, batch, generator):
        """One gradient step on a Batch -> metrics, 0-d tensors. Everything random is drawn from `generator`."""
        batch = batch.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        parts, warm = [], self.updates < self.warmup_updates
        for part in batch.split(self.accumulate):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss, metrics = self.forward(part, self.noise(part, generator), warm)
            (loss / self.accumulate).backward()
            parts.append({name: value.detach() for name, value in metrics.items()})
        metrics = {name: torch.stack([part[name] for part in parts]).mean(0) for name in metrics}
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm)
        metrics["grad_norm"] = norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all shards
        if not torch.isfinite(norm + metrics["loss"]):
            raise NonFinite(f"update {self.updates}: the loss is {metrics['loss'].item()} and its gradient's norm "
                            f"{norm.item()}; the weights were left as they were. {self.likely_cause(batch, metrics)}",
                            metrics)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * schedule(self.updates, self.total_updates)
        self.optimizer.step()
        self.updates += 1
        # A young average would remember the random start for long: its rate begins at 1 and falls to target_rate.
        rate = max(self.settings.target_rate, 1 / self.updates)
        with torch.no_grad():  # else theta' would carry the graph of all updates so far
            torch._foreach_lerp_(self.target_weights, self.weights, rate)
        return metrics

    def likely_cause(self, batch, metrics):
        """Why an update may have failed, and what to do."""
        finite = lambda x: (x.to_local() if hasattr(x, "to_local") else x).isfinite().all()
        fields = [name for name in ("obs", "action", "reward", "return_to_go", "next_obs") if not finite(getattr(batch, name))]
        if fields:
            return f"The batch's {', '.join(fields)} has a number that is not finite: `python data.py verify` names it"
        weights = [name for name, parameter in self.model.named_parameters() if not finite(parameter)]
        if weights:
            return f"{weights[0]} was not finite before: resume from an older checkpoint, with --at"
        if metrics["loss"].isfinite():
            return "Only the backward pass overflowed. Lower --learning-rate?"
        return "Data and weights are finite, so the weights have grown too large. Lower --learning-rate, or raise --eta?"


# ---------------------------------------------------------------- several ranks

def join(learner, shard):
    """Make `learner` one of several ranks, each with its part of every batch.

    DDP: all have all the weights. FSDP2: each keeps a share, and gathers a block's when the block is computed.
    """
    both = Both(learner)
    if shard:
        mesh = init_device_mesh(learner.device.type, (dist.get_world_size(),))
        for block in [module for module in both.modules() if isinstance(module, Attention)]:
            fully_shard(block, mesh=mesh)
        learner.forward = fully_shard(both, mesh=mesh)
        learner.make_optimizer()  # the parameters are others now: the shards
    else:
        # An algorithm may leave a decoder unused: BC both critics, PAC that of V.
        learner.forward = DistributedDataParallel(both, find_unused_parameters=True, broadcast_buffers=False,
                                                  gradient_as_bucket_view=True)  # without, each gradient is there twice


def of_all_ranks(x):
    """x (B, ...) of each rank -> (ranks * B, ...), in one process's order: rank r has every ranks-th row, from the r-th on."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


class Both(nn.Module):
    """The model and its target as one module whose forward is the loss: what DDP and FSDP wrap."""

    def __init__(self, learner):
        super().__init__()
        self.model, self.target_model, self.loss = learner.model, learner.target_model, learner.loss

    def forward(self, batch, noise, warm):
        return self.loss(batch, noise, warm)


def whole(model):
    """The model itself, or, of a sharded one, a copy with all the weights on rank 0; every rank has to take part."""
    state = model.state_dict()
    if not any(hasattr(value, "full_tensor") for value in state.values()):
        return model
    state = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    if dist.get_rank() == 0:
        copy = Perceiver(model.config).to(next(iter(state.values())).device)
        copy.load_state_dict(state)
        return copy


# ---------------------------------------------------------------- arithmetic

def data_weights(merit, task, num_tasks, focus):
    """w ∝ exp(focus * merit), mean 1 within each task: the data's actions as those of a better policy. merit (B,) -> (B,)

    merit is measured from its task's mean, in its mean absolute deviation, and clipped at two of them: a few outliers
    (falls) would rule raw weights, and what is good enough shall count alike. With the return for merit it is
    reward-weighted regression (Peters and Schaal 2007), which Hong et al. 2023 (arXiv 2306.13085) advise for mixed data of
    which the good part is small; with the advantage it is L^V.
    """
    deviation = merit - mean_per_task(merit, task, num_tasks)
    scaled = deviation / (mean_per_task(deviation.abs(), task, num_tasks) + 1e-8)
    w = torch.exp(focus * scaled.clamp(-2, 2))
    return w / mean_per_task(w, task, num_tasks)


def mean_entropy(policy, action_mask):
    """Entropy in nats of a dimension's bins (over all components), averaged over the dimensions there are. -> ()"""
    components, bins = policy
    probs = (components[:, :, None, None] + bins).detach().exp().sum(1)  # (B, A, K)
    entropy = -torch.xlogy(probs, probs).sum(-1)  # (B, A)
    return (entropy * action_mask).sum() / action_mask.sum()


def schedule(update, total):
    """The learning rate's factor: up over 200 updates, then down to 0.05 along a cosine."""
    fraction = min(update / max(total, 1), 1)
    return min(1, (update + 1) / 200) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * fraction)))


def flops_per_update(config, settings, batch_size):
    """Floating-point operations of one update after the warm-up: matrix products, counted on the meta device.

    A backward pass is taken for twice its forward pass.
    """
    with torch.device("meta"):
        model = Perceiver(config)
        obs = torch.empty(batch_size, model.obs_mean.shape[1])
        task = torch.zeros(batch_size, dtype=torch.long)
        latents = torch.empty(batch_size, config.latents, config.width)
        actions = torch.empty(batch_size, settings.samples, model.action_mask.shape[1])

    def forward(function, *args):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    encode, policy = forward(model.encode, obs, task), forward(model.policy, latents, task)
    if settings.beta == 0:
        return 3 * (encode + policy)
    value = forward(model.v, latents) if settings.critic == "v" else forward(model.q, latents, actions[:, :1], task)
    target = forward(model.v, latents) if settings.critic == "v" else policy + forward(model.q, latents, actions, task)
    return 3 * (encode + policy + value) + 2 * (encode + target)


def memory(config, settings, tasks, batch_size, recompute=False):
    """-> number of parameters, and bytes of weights (model and target), gradients, optimiser and activations.

    Found by running the loss on the meta device, where tensors have shapes but no memory. Activations are what
    the backward pass is left; the peak is above it by what one operation needs.
    """
    with torch.device("meta"):
        learner = Learner(config, settings, tasks, 0, "meta")
        obs_dim, action_dim = (max(task[name] for task in tasks) for name in ("obs_dim", "action_dim"))
        steps = (batch_size, settings.n_step)
        batch = SimpleNamespace(
            obs=torch.empty(*steps, obs_dim), next_obs=torch.empty(*steps, obs_dim), action=torch.empty(*steps, action_dim),
            reward=torch.empty(steps), return_to_go=torch.empty(steps), valid=torch.empty(steps, dtype=torch.bool),
            terminated=torch.empty(steps, dtype=torch.bool), task=torch.empty(batch_size, dtype=torch.long),
            alpha=None, worth=None)

    def saved(recompute):
        """Bytes that the forward pass keeps, weights apart; leaves the gradients."""
        known = {p.untyped_storage()._cdata for p in learner.model.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = storage  # holding it, so that its address stays its own
            return tensor

        learner.model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            learner.loss(batch, learner.noise(batch, None), False)[0].backward()
        return sum(storage.nbytes() for storage in kept.values())

    size = lambda tensors: sum(tensor.nbytes for tensor in tensors)
    activations = saved(False)
    parameters = list(learner.model.parameters())
    gradients = size(p.grad for p in parameters if p.grad is not None)
    if recompute:  # the blocks' inputs, and one block at a time
        outside = saved(True)
        inputs = config.blocks * batch_size * config.latents * config.width * 4
        activations = outside + inputs + (activations - outside) // max(1, config.blocks)
    return count_parameters(learner.model), {
        "weights": 2 * size(parameters), "gradients": gradients,
        "optimiser": sum(size(state.values()) for state in learner.optimizer.state.values()), "activations": activations}


def report(config, settings, tasks, batch_size, accumulate=1, recompute=False, shard=False):
    """What a run would take on 1 to 256 GPUs, as text: train.py's --dry-run."""
    flops = flops_per_update(config, settings, batch_size) * (4 / 3 if recompute else 1)
    count, need = memory(config, settings, tasks, max(1, batch_size // accumulate), recompute)
    with torch.device("meta"):
        block = sum(parameter.nbytes for parameter in Attention(config.width, config.heads, config.widening).parameters())
    lines = [f"{count:,} parameters; {flops / 1e12:.3g} TFLOP an update of {batch_size} transitions"
             + (", a quarter of it to recompute activations" if recompute else ""),
             f"Sharded (FSDP): beside its share, a GPU gathers a block or two at a time, of {block / 1e9:.3f} GB."
             if shard else "Whole on each GPU (DDP).",
             f"GB of each GPU in float32, and seconds an update at {SPEED:.0%} of the peak in bf16,",
             "with communication hidden behind it; -: it would not fit.",
             f"{'GPUs':>4}{'batch':>6}" + "".join(f"{name:>12}" for name in (*need, "sum", *GPUS))]
    for gpus in (2**k for k in range(9)):
        if batch_size % (gpus * accumulate):
            return "\n".join([*lines, f"{gpus:>4}  GPUs or more: a batch of {batch_size} has no equal parts for them; "
                              "choose another --batch-size"])
        share = [size / gpus if shard or name == "activations" else size for name, size in need.items()]
        seconds = [f"{flops / (gpus * SPEED * peak):.4f}" if sum(share) < size else "-" for peak, size in GPUS.values()]
        lines.append(f"{gpus:>4}{batch_size // gpus:>6}" + "".join(f"{x / 1e9:>12.3f}" for x in (*share, sum(share)))
                     + "".join(f"{text:>12}" for text in seconds))
    return "\n".join(lines)
