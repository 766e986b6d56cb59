"""The losses, the target network, and one update (arXiv 2402.05546).

    L^Q = (1 - alpha) KL(pi_imp || pi)  +  alpha KL(b || pi)  +  beta KL(Gamma || p)

    improve   -sum_j w_j log pi(a'_j|s),   a'_j ~ pi_theta',  w = softmax_j(Q_theta'(s, a'_j) / eta)
    clone     -log pi(a|s)
    td        -sum_q Gamma(q) log p(q|s, a),      Gamma: the projected Bellman target

The first two count a transition by its `worth`, as if a better policy had drawn the data [ours].
theta' is the target model, a lagged average of theta. Gamma also holds a share of the observed
return, which falls from all to nothing as training goes on [ours]. Values are scaled task by task
to [0, 1], so that one set of atoms serves returns of any size: q = (return - low) / (high - low).
"""

import copy
import math
from dataclasses import dataclass, replace

import torch

import parallel
from kernels.categorical_projection import bellman_cross_entropy, point_mass
from kernels.graph import Draws
from model import Perceiver, in_bf16

POOL = 8  # candidates for each place in a batch, where focus chooses
VALUE_MARGIN = 0.2  # atoms reach past the data's returns by this share of their range, either side
SHIFT = 4  # pixels, of pictures of 64 x 64
CONSTANT = 1e-6  # an observation that deviates by no more is a constant
RISE, FINAL_RATE = 200, 0.05  # of the learning rate: updates of its rise, the share left at the end


@dataclass
class LossSettings:
    """What an algorithm is. Every value is our choice; the paper's are not known."""
    alpha: float = 0.9  # weight of cloning; 1 - alpha is policy improvement's
    beta: float = 1.0  # weight of the critic; 0: there is none
    critic: str = "q"  # "q": improve on the target policy (L^Q); "v": on the data's (L^V)
    act: str = "improved"  # how the policy acts when it is evaluated, see ACTS in eval.py
    eta: float = 2.0  # divides Q, or the advantage, in units of its spread; also where pi_imp acts
    focus: float = 5.0  # the policy learns as from data drawn by exp(focus * merit); 0: all alike
    merit: str = "step"  # compares a return with those at its step; "return": with all of its task
    samples: int = 8  # N, actions drawn from the target policy at a state
    n_step: int = 3  # rewards summed before the bootstrap
    warmup: float = 0.5  # share of the updates that clone, and fit the critic to observed returns
    top: float = 1.0  # share of the episodes, the best, that are learnt from
    target_rate: float = 0.01  # theta' moves by this share towards theta at each update
    learning_rate: float = 3e-3  # the highest, see `schedule`
    max_grad_norm: float = 1.0  # a longer gradient is cut to this length; 0: none is


CLONING = dict(alpha=1.0, beta=0.0, act="mean", n_step=1, focus=0.0)
ALGORITHMS = {
    "bc": CLONING,
    "filtered_bc": dict(CLONING, top=0.1),
    "rwr": dict(CLONING, focus=5.0),
    "bc_q": dict(alpha=1.0, focus=0.0, act="mean"),
    "one_step": dict(warmup=1.0),
    "pac_paper": dict(focus=0.0, alpha=0.5),
    "pacv": dict(critic="v", alpha=0.2, eta=1.0, act="mean"),
    "pac": dict(),
}
CRITICS = ("q", "v")  # what `improve` knows
RENAMED = {"fc": "filtered_bc", "bcq": "bc_q"}  # bcq is Batch-Constrained Q-learning to this field


def settings_for(algo, **changes):
    """The LossSettings of a named algorithm; ValueError with the list of names for any other."""
    if algo in RENAMED:
        raise ValueError(f"{algo!r} is called {RENAMED[algo]!r} now")
    if algo not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algo!r}; there are: {', '.join(ALGORITHMS)}")
    return LossSettings(**{**ALGORITHMS[algo], **changes})


# ---------------------------------------------------------------- the loss terms, each (B,)

def cloning_loss(policy, action):
    """-log pi(a|s) of the data's actions (B, A)."""
    return -policy.log_prob(action[:, None])[:, 0]


def improvement_loss(policy, actions, w):
    """KL(pi_imp || pi) up to a constant. actions (B, N, A) ~ pi_theta', w (B, N) their weights"""
    return -(w * policy.log_prob(actions)).sum(-1)


def improvement_weights(q, spread, eta):
    """w_j ∝ exp(Q(s, a_j) / (eta * spread)): the weights of pi_imp, whose actions a_j are drawn
    from pi_theta', or squared where it acts. q (B, N), spread (B,) -> (B, N)

    eta is relative to Q's spread over a state's actions, which is tiny beside the range of the
    values: a fixed eta of 2% of that range left the weights uniform. The spread is the task's
    average: where Q hardly depends on the action, as in most states of a pendulum that stands, its
    noise must not choose.
    """
    return torch.softmax(q / (eta * spread[:, None] + 1e-8), dim=-1)


def n_step_return(batch, discount):
    """The first action's n-step return: reward (B,), and the discount (B,) of next_obs[:, -1].

    Only termination cuts the bootstrap; a window that an episode's end cut short has fewer steps.
    """
    steps = torch.arange(batch.reward.shape[1], device=discount.device)
    powers = discount[:, None] ** steps  # (B, T)
    reward = (powers * batch.reward).sum(1)  # rows past an end carry no reward
    bootstrap = discount ** batch.valid.sum(1) * (~batch.terminated.any(1)).float()
    return reward, bootstrap


# ---------------------------------------------------------------- weights of the data

def means_of_tasks(x, task, num_tasks):
    """x (B,) -> (tasks,), each the mean over a task's rows, on all ranks, and nan of one that has
    none; without gradient"""
    sums = x.new_zeros(2, num_tasks).index_add_(1, task, torch.stack([x, torch.ones_like(x)]))
    parallel.add_over_ranks(sums)
    return sums[0] / sums[1]


def mean_per_task(x, task, num_tasks):
    """x (B,) -> (B,), each the mean over the rows of its task"""
    return means_of_tasks(x, task, num_tasks)[task]


def data_weights(merit, task, num_tasks, focus):
    """w ∝ exp(focus * merit), of mean 1 in each task: as of a better policy. merit (B,) -> (B,)

    merit is measured as in data.Worth, but within the batch: from its task's mean, in its mean
    absolute deviation, and clipped at two of them. With the one-step advantage it is L^V.
    """
    deviation = merit - mean_per_task(merit, task, num_tasks)
    scaled = deviation / (mean_per_task(deviation.abs(), task, num_tasks) + 1e-8)
    w = torch.exp(focus * scaled.clamp(-2, 2))
    return w / mean_per_task(w, task, num_tasks)


def value_range(metas):
    """Of each task the return that is value 0, and how much more is value 1: both (tasks,)"""
    low, high = torch.tensor([meta["return_to_go"] for meta in metas], dtype=torch.float32).T
    # Returns that are all alike still need a range, which float32 can tell from nothing.
    least = 1e-6 + 1e-4 * torch.maximum(low.abs(), high.abs())
    margin = torch.maximum(VALUE_MARGIN * (high - low), least)
    return low - margin, high - low + 2 * margin


def observed_share(update, warmup_updates, total):
    """The share of the observed return in the critic's target: 1, then 1/2, then 0 [ours].

    The behaviour's own returns teach the critic first: from temporal differences alone falls travel
    back slowly. In the end they must go, for they say what the behaviour gets, not the policy.
    """
    if update < warmup_updates:
        return 1.0
    return 0.5 if update < (warmup_updates + total) / 2 else 0.0


def schedule(update, total):
    """The learning rate's factor: up over some updates, then down along a cosine."""
    fraction = min(update / max(total, 1), 1)
    cosine = 0.5 * (1 + math.cos(math.pi * fraction))
    return min(1, (update + 1) / RISE) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def shifted(frames, noise):
    """Pictures (B, ..., H, W, C), moved by up to SHIFT pixels either way; the last row or column is
    repeated at the edge. noise (B, 2): uniform on [0, 1)"""
    H, W = frames.shape[-3:-1]
    by = (noise * (2 * SHIFT + 1)).long() - SHIFT  # (B, 2)
    rows = (torch.arange(H, device=by.device) + by[:, :1]).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W, device=by.device) + by[:, 1:]).clamp(0, W - 1)
    numbers = torch.arange(len(frames), device=by.device)[:, None, None]
    flat = frames.flatten(1, -4)  # (B, N, H, W, C)
    moved = flat[numbers, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, N, C)
    return moved.permute(0, 3, 1, 2, 4).reshape(frames.shape)


# ---------------------------------------------------------------- one update

class NonFinite(FloatingPointError):
    """The loss or its gradient is not finite; the weights are those of the last good update."""

    def __init__(self, message, update, metrics):
        super().__init__(f"update {update}: {message}")
        self.update = update
        self.metrics = {name: value.item() for name, value in metrics.items()}


class Learner:
    """A model, its target, its optimiser, and `update`. metas: of the data's tasks, in order.

    accumulate: a batch is worked off in so many parts, one after the other, for less memory.
    """

    def __init__(self, config, settings, metas, total_updates, device="cpu", seed=0, accumulate=1):
        if settings.critic not in CRITICS:  # a typing error, or what another version had
            raise ValueError(f"no critic {settings.critic!r}: there are {', '.join(CRITICS)}")
        self.settings, self.total_updates = settings, total_updates
        self.device, self.accumulate, self.updates = torch.device(device), accumulate, 0
        self.waits = self.device.type != "cuda"  # may the host read a result in every update?
        self.averages = False  # Q's spread, in this update; see follow_spread
        self.with_metrics = True  # beside the loss and its gradient's norm, which are always there
        self.skipped = torch.zeros((), device=self.device)  # updates since the first that failed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Perceiver(config).to(self.device)
        self.target_model = copy.deepcopy(self.model).requires_grad_(False)
        self.forward = self.loss  # several ranks put DDP or FSDP around it
        self.make_optimizer()
        self.pool = POOL if settings.focus else 1
        self.warmup_updates = round(settings.warmup * total_updates)
        self.num_tasks = len(metas)
        low, range_ = value_range(metas)
        self.low, self.range = low.to(self.device), range_.to(self.device)
        self.discount = torch.tensor([meta["discount"] for meta in metas]).to(self.device)

    def make_optimizer(self):
        # Lists that are kept: to collect the parameters takes 0.15 ms a time.
        self.weights = list(self.model.parameters())
        self.target_weights = list(self.target_model.parameters())
        rate, on_gpu = self.settings.learning_rate, self.device.type == "cuda"
        if on_gpu:  # a tensor, which a CUDA graph reads anew
            rate = torch.tensor(rate, device=self.device)
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, weight_decay=1e-4, fused=True,
                                           capturable=on_gpu)
        for p in self.weights:  # AdamW makes these at its first step; a checkpoint is read before
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                       "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}

    def compile(self):
        """Compile the loss from now on, once for each value of `observed_share`."""
        # On a CPU, linear_by_turns reads how many rows a task has.
        torch._dynamo.config.capture_scalar_outputs = True
        self.loss = self.forward = torch.compile(self.loss, dynamic=False)

    def start_at(self, batch):
        """Begin at the data: the scale of each embodiment's observations, and how values lie.

        The value heads' bias is set to the log histogram of the data's returns, and their weights
        small: from a uniform start, values take thousands of updates to come down to the returns.
        """
        obs, task = batch.obs[:, 0].to(self.device), batch.task.to(self.device)
        observed = self.scale(batch.return_to_go[:, 0].to(self.device), task)
        histogram = point_mass(observed, self.model.config.atoms).mean(0)  # (M,)
        bias = torch.log(0.99 * histogram + 0.01 / len(histogram))
        for model in (self.model, self.target_model):
            body = model.body_of(task)
            for number in body.unique():
                std, mean = torch.std_mean(obs[body == number], dim=0)
                model.obs_mean[number] = mean
                model.obs_std[number] = torch.where(std > CONSTANT, std, 1)
            for head in (model.q_head[-1], model.v_head[-1]):
                head.bias.data.copy_(bias)
                head.weight.data.mul_(0.1)

    def scale(self, returns, task):
        """Returns (B,) as values, on [0, 1]."""
        return (returns - self.low[task]) / self.range[task]

    def noise(self, batch, generator):
        """Uniform (2B, N, 1 + A), to draw the target policy's actions by, now and n steps on."""
        shape = 2 * len(batch.task), self.settings.samples, 1 + batch.action.shape[-1]
        return self.rand(shape, generator)

    def rand(self, shape, generator):
        """Uniform numbers; a graph reads them from places of its own, `Draws`."""
        if isinstance(generator, Draws):
            return generator.rand(shape, self.device)
        return torch.rand(shape, generator=generator, device=self.device)

    def loss(self, batch, noise, share):
        """The whole loss of a batch -> (loss, metrics). noise: see above; share: observed_share"""
        s, task = self.settings, batch.task
        obs, action = batch.obs[:, 0], batch.action[:, 0]  # (B, O), (B, A)
        worth = 1.0 if batch.worth is None else batch.worth  # (B,)
        alpha = s.alpha if batch.alpha is None else batch.alpha  # (B,) where sources have their own
        frames = None if batch.frames is None else batch.frames[:, 0]
        latents = self.model.encode(obs, task, frames)  # (B, L, W)
        policy = self.model.policy(latents, task)
        clone, improve, td, metrics = cloning_loss(policy, action), 0.0, 0.0, {}
        observed = self.scale(batch.return_to_go[:, 0], task)

        if s.beta > 0:
            logits = self.value_logits(latents, action, task)  # (B, M)
            reward, bootstrap = n_step_return(batch, self.discount[task])
            # In values on [0, 1], the n-step target is shift + bootstrap * the next value.
            shift = (reward - (1 - bootstrap) * self.low[task]) / self.range[task]
            if share == 1:  # the warm-up: the policy clones, the critic needs no next value
                alpha, next_probs = 1.0, torch.zeros_like(logits)
            else:
                improve, next_probs, metrics = self.improve(batch, noise, policy, clone, shift,
                                                            bootstrap)
            td = bellman_cross_entropy(logits, next_probs, shift, bootstrap, observed, share)
            if self.with_metrics:
                metrics |= self.critic_metrics(td, logits.detach(), observed)

        # L^Q, the paper's equation; the algorithms differ in its terms and weights.
        loss = (worth * ((1 - alpha) * improve + alpha * clone) + s.beta * td).mean()
        if self.with_metrics:
            metrics |= {"policy/clone_loss": clone.mean(), "policy/entropy": policy.entropy()}
        return loss, {**metrics, "loss": loss}

    def critic_metrics(self, td, logits, observed):
        value = self.model.expectation(logits)
        return {"critic/loss": td.mean(), "critic/value": value.mean(),
                "critic/observed": observed.mean(), "critic/error": (value - observed).abs().mean()}

    def value_logits(self, latents, action, task):
        """Logits (B, M) of the value of the data's actions, or with L^V of the states."""
        if self.settings.critic == "v":
            return self.model.v(latents)
        return self.model.q(latents, action[:, None], task)[:, 0]

    def improve(self, batch, noise, policy, clone, shift, bootstrap):
        """-> the improvement term (B,), the next value's distribution (B, M), and metrics"""
        if self.settings.critic == "v":
            return self.improve_on_data(batch, clone, shift, bootstrap)
        return self.improve_on_target(batch, noise, policy)

    def now_and_after(self, batch):
        """What the model is given, obs (2B, O), task (2B,) and pictures, if there are any: of the
        batch's states, and of those n steps on"""
        obs = torch.cat([batch.obs[:, 0], batch.next_obs[:, -1]])
        frames = None if batch.frames is None else batch.frames.transpose(0, 1).flatten(0, 1)
        return obs, torch.cat([batch.task, batch.task]), frames

    def improve_on_target(self, batch, noise, policy):
        """L^Q: pi_imp ∝ pi_theta' exp(Q / eta), and q' ~ p(q|s', a'), a' ~ pi_theta'."""
        s, target, task = self.settings, self.target_model, batch.task
        with torch.no_grad():  # everything that the target model says
            obs, tasks, frames = self.now_and_after(batch)
            latents = target.encode(obs, tasks, frames)  # (2B, L, W)
            actions = target.policy(latents, tasks).sample(noise)  # (2B, N, A)
            probs = torch.softmax(target.q(latents, actions, tasks), dim=-1)  # (2B, N, M)
            probs_now, probs_after = probs.chunk(2)
            q = target.mean_value(probs_now)  # (B, N)
            self.follow_spread(q, task)
            w = improvement_weights(q, target.q_spread[task], s.eta)  # (B, N)
            next_probs = probs_after.mean(1)  # (B, M)
        if s.alpha == 1 and batch.alpha is None:
            return 0.0, next_probs, {}
        improve = improvement_loss(policy, actions[:len(task)], w)
        if not self.with_metrics:
            return improve, next_probs, {}
        return improve, next_probs, {
            "policy/improve_loss": improve.mean(), "policy/ess": (1 / w.square().sum(-1)).mean(),
            "policy/q_spread": target.q_spread[task].mean()}

    def improve_on_data(self, batch, clone, shift, bootstrap):
        """L^V: pi_imp ∝ b exp(A / eta), A = r + discount V(s') - V(s): the data's actions count. ->
        the improvement term (B,), the next value's distribution (B, M), and metrics"""
        target, task = self.target_model, batch.task
        with torch.no_grad():  # everything that the target model says
            now, after = target.v(target.encode(*self.now_and_after(batch))).chunk(2)  # (B, M) each
            next_probs = torch.softmax(after, dim=-1)
            advantage = shift + bootstrap * target.expectation(after) - target.expectation(now)
            w = data_weights(advantage, task, self.num_tasks, 1 / self.settings.eta)  # (B,)
        if not self.with_metrics:
            return w * clone, next_probs, {}
        ess = (1 / mean_per_task(w.square(), task, self.num_tasks)).mean()  # a share of the rows
        return w * clone, next_probs, {"policy/ess": ess}

    def follow_spread(self, q, task):
        """Keep the running average, by task, of Q's spread over a state's actions. q (B, N)"""
        old = self.target_model.q_spread  # (tasks,)
        spread = means_of_tasks(q.std(1), task, self.num_tasks)
        met = ~spread.isnan()
        if self.averages:
            average = torch.lerp(old, spread, 0.01)
            spread = torch.where(old == 1, spread, average)  # 1: not met before
        old.copy_(torch.where(met, spread, old))

    @torch.no_grad()
    def measure_spread(self, batch):
        """Measure Q's spread, before pi_imp is to act in the warm-up, which draws no actions.
        Without it pi_imp had equal weights, and one step of improvement was none.
        """
        if self.updates <= self.warmup_updates and self.settings.beta > 0:
            generator = torch.Generator(self.device).manual_seed(0)
            batch = self.with_frames(batch)
            self.forward(batch, self.noise(batch, generator), 0.5)

    def choose(self, candidates, generator):
        """POOL B candidates, a Batch -> a Batch of B of them, half by chance, half by their worth.

        Most of the worth lies on a tenth of the data (data.Worth): weights alone left most of a
        batch without a say in the policy's terms. A row is drawn with odds (1 + w) / 2, and then
        counts w / odds, which is below 2; the critic learns from the rows as they come. Ranks
        choose together, as one process would, and take a share each.
        """
        candidates = candidates.to(self.device)
        if self.pool == 1:
            return candidates
        if candidates.worth is None:
            raise ValueError("the rows have no worth; a Sampler with a focus gives it")
        offset = self.rand((), generator)
        if parallel.RANKS > 1:
            candidates = candidates.map(parallel.of_all_ranks)
            torch.distributed.broadcast(offset, 0)
        # Each task's worth has mean 1 over its data, and in a batch what its rows have: to divide
        # by their mean would let the best of a few count as if it were good.
        worth = candidates.worth / candidates.worth.mean()
        odds = (1 + worth) / 2
        candidates.worth = worth / odds
        # Systematic sampling, at equal distances along the summed odds.
        B, sums = len(worth) // self.pool, odds.cumsum(0)
        marks = (torch.arange(B, device=self.device) + offset)[parallel.RANK::parallel.RANKS] / B
        rows = torch.searchsorted(sums, marks * sums[-1])
        return candidates.take(rows.clamp(max=len(worth) - 1))

    def with_frames(self, batch, generator=None):
        """The Batch with its pictures, if its tasks have any; all of a row's are shifted by chance
        alike (random shifts: Yarats et al. 2021), without a generator not at all."""
        if batch.pictures is None:
            return batch
        frames = batch.pictures.read(batch.place).to(self.device)
        if generator is not None:
            frames = shifted(frames, self.rand((len(frames), 2), generator))
        return replace(batch, frames=frames)

    def share(self):
        """The share of the observed return in this update's target."""
        return observed_share(self.updates, self.warmup_updates, self.total_updates)

    def gradient(self, batch, generator):
        """Leave the gradient of the loss, of all parts of the batch -> metrics"""
        self.optimizer.zero_grad(set_to_none=True)
        share, parts = self.share(), []
        for first in range(self.accumulate):
            part = batch.take(slice(first, None, self.accumulate))  # with every task's share
            part = self.with_frames(part, generator)
            with in_bf16(self.model.config, self.device):
                loss, metrics = self.forward(part, self.noise(part, generator), share)
            (loss / self.accumulate).backward()
            parts.append({name: value.detach() for name, value in metrics.items()})
        if len(parts) == 1:
            return parts[0]
        return {name: torch.stack([part[name] for part in parts]).mean(0) for name in metrics}

    def update_from(self, candidates, generator):
        """An update by a batch that is chosen among the candidates -> metrics"""
        return self.update(self.choose(candidates, generator), generator)

    def update(self, batch, generator):
        """One gradient step on a Batch -> metrics, 0-d tensors. `generator`: of all that is random

        On a GPU the host does not wait for it, and `check` tells later whether it failed.
        """
        self.begin_update()
        metrics = self.step(batch.to(self.device), generator)
        self.updates += 1
        return metrics

    def learning_rate(self):
        """Of the next update."""
        return self.settings.learning_rate * schedule(self.updates, self.total_updates)

    def begin_update(self):
        """Set the learning rate, and take turns among the instructions' wordings."""
        self.averages = self.updates > self.warmup_updates  # before, there is nothing to average
        if self.updates == self.warmup_updates:  # what was measured, and when, leaves no trace
            self.target_model.q_spread.fill_(1)
        for model in (self.model, self.target_model):
            model.use_wording(self.updates)
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self, batch, generator):
        """What an update computes, on the device."""
        metrics = self.gradient(batch, generator)
        longest = self.settings.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.weights, longest)
        metrics["grad_norm"] = norm = parallel.full(norm)
        finite = (norm + metrics["loss"]).abs() < math.inf  # a NaN is not less
        if not self.waits:
            self.skipped += ~finite | (self.skipped > 0)
            self.optimizer.found_inf = self.skipped.clamp(max=1)  # AdamW then changes nothing
        elif not finite:
            raise NonFinite(f"the loss is {metrics['loss'].item()} and its gradient's norm "
                            f"{norm.item()}; the weights were left as they were. "
                            f"{self.likely_cause(batch, metrics)}", self.updates, metrics)
        self.optimizer.step()
        with torch.no_grad():  # else theta' would carry the graph of all updates so far
            torch._foreach_lerp_(self.target_weights, self.weights, self.target_rate())
        return metrics

    def target_rate(self):
        """A young average would remember the random start for long: its rate begins at 1."""
        return max(self.settings.target_rate, 1 / (self.updates + 1))

    def check(self, metrics):
        """NonFinite if an update on a GPU has failed. metrics: of the last one"""
        if self.skipped > 0:
            raise NonFinite("the loss or its gradient was not finite; the weights are those of "
                            "before it. --resume with --device cpu makes it again, and names the "
                            "likely cause", self.updates - int(self.skipped), metrics)

    def likely_cause(self, batch, metrics):
        """Why an update may have failed, and what to do."""
        for name in ("obs", "action", "reward", "return_to_go", "next_obs"):
            if not getattr(batch, name).isfinite().all():
                return (f"The batch's {name} has a number that is not finite: "
                        "`python prepare.py verify` names it")
        for name, parameter in self.model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not local.isfinite().all():
                return f"{name} was not finite before: resume from an older checkpoint, with --at"
        if metrics["loss"].isfinite():
            return "Only the backward pass overflowed. Lower --learning-rate?"
        return ("Data and weights are finite, so the weights have grown too large. "
                "Lower --learning-rate, or raise --eta?")
