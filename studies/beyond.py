"""What does it take to pass the best behaviour in the data? TD3+BC and PAC, part by part.

    python -m studies.beyond             the runs that are missing, then the table
    python -m studies.beyond --table     no runs: the table from results/beyond.csv

On HalfCheetah's `beyond` TD3+BC (Fujimoto and Gu 2021) passes the level that is the data's best,
and no row of study 1 does. Here both are made of the same parts: an actor and a critic of one task,
each an MLP of two hidden layers, and in the last rows the Perceiver. A row of WAYS changes a thing
or two of the first, and so says what the difference is made of.
"""

import copy
import os
import time
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

import data
from kernels.categorical_projection import bellman_cross_entropy, point_mass
from learner import LossSettings, improvement_loss, improvement_weights, schedule, value_range
from model import Perceiver, Policy, Shared, config_for, head
from studies import print_table
from studies.peers import LONG, play
from studies.runs import SEEDS, Table, in_processes, need_data, new_parser

UPDATES, BATCH, HIDDEN, RATE = 5000, 256, 256, 3e-4
TARGET_RATE = 0.005
ATOMS, BINS, SAMPLES, ACT_SAMPLES, ETA = 101, 51, 8, 64, 1.0
SIZE = "small"  # of the Perceivers
SCALE_ROWS = 20_000  # transitions that tell how observations, rewards and returns lie


@dataclass
class Way:
    """A way to improve on cloning. As it stands here it is TD3+BC's, with these differences: one
    critic instead of two, a distribution of values, no noise in the next actions, and Q in units of
    the reward's deviation instead of Q's size."""
    words: str
    improve: str = "gradient"  # up Q's gradient; "draws": to draws weighed by Q; "": clones alone
    strength: float = 0.1  # of improvement, where cloning has 1
    actor: str = "point"  # an action for a state, or "bins": a distribution, as PAC has it
    target: str = "policy"  # next values: the policy's; "data": the data's; "observed": returns
    scalar: bool = False  # the critic is a number, by squared error, and no distribution
    focus: float = 0.0  # of data.Worth: weighs the actor's loss; PAC also chooses rows by it
    # In the place of MLPs: "own", a Perceiver for the actor and one for the critic; "shared", one
    # for both; "detached", one, whose latents the actor reads and does not train.
    perceiver: str = ""


# Each strength is the better of 0.1 and 0.3 for a point, of 1 and 3 for bins, of 1 and 4 for draws,
# by seed 100 on HalfCheetah. The Perceivers have those of `gradient` and `bins`.
WAYS = {
    "gradient": Way("Q's gradient moves an actor of one action", strength=0.3),
    "clone": Way("no improvement", improve=""),
    "scalar": Way("the critic is a number, by squared error", scalar=True),
    "data": Way("next values are of the data's own actions", target="data"),
    "observed": Way("observed returns stand in the place of next values", target="observed"),
    "weighted": Way("the data is weighed, as PAC weighs it", strength=0.3, focus=5.0),
    "bins": Way("the actor has bins, and their mean is moved", actor="bins", strength=3.0),
    "draws": Way("bins, moved to their own draws that Q weighs: PAC's way", actor="bins",
                 improve="draws", strength=4.0),
    "draws-weighted": Way("the same, and the data is weighed", actor="bins", improve="draws",
                          strength=4.0, focus=5.0),
    "own": Way("two Perceivers, one for the actor and one for the critic", strength=0.3,
               perceiver="own"),
    "shared": Way("one Perceiver, as PAC has it: both losses train its latents", strength=0.3,
                  perceiver="shared"),
    "detached": Way("one Perceiver, whose latents the actor's loss does not train", strength=0.3,
                    perceiver="detached"),
    "detached-bins": Way("the same, and the actor has bins, whose mean is moved", strength=3.0,
                         actor="bins", perceiver="detached"),
}


# ---------------------------------------------------------------- the two networks

def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                         nn.Linear(HIDDEN, outputs))


class Critic(nn.Module):
    """An MLP of a state and an action."""

    def __init__(self, O, A, outputs):
        super().__init__()
        self.layers = mlp(O + A, outputs)

    def forward(self, obs, actions):
        """obs (B, O), actions (B, N, A) -> (B, N, outputs)"""
        obs = obs[:, None].expand(-1, actions.shape[1], -1)
        return self.layers(torch.cat([obs, actions], dim=-1))

    @property
    def last(self):
        return self.layers[-1]


class PerceiverActor(nn.Module):
    """So many outputs for each dimension of the action, read from a Perceiver's latents by its
    policy decoder."""

    def __init__(self, perceiver, outputs, detached):
        super().__init__()
        self.perceiver, self.detached = perceiver, detached
        self.head = head(perceiver.config.width, outputs)

    def forward(self, obs):
        """obs (B, O) -> (B, A outputs)"""
        task = torch.zeros(len(obs), dtype=torch.int64)
        latents = self.perceiver.encode(obs, task)
        if self.detached:
            latents = latents.detach()
        query = Shared(self.perceiver.policy_query, task)
        return self.head(self.perceiver.policy_decoder(query, latents)[:, 1:]).flatten(1)


class PerceiverCritic(nn.Module):
    """A Perceiver, and its Q decoder."""

    def __init__(self, perceiver):
        super().__init__()
        self.perceiver = perceiver

    def forward(self, obs, actions):
        """obs (B, O), actions (B, N, A) -> (B, N, M)"""
        task = torch.zeros(len(obs), dtype=torch.int64)
        return self.perceiver.q(self.perceiver.encode(obs, task), actions, task)

    @property
    def last(self):
        return self.perceiver.q_head[-1]


def networks(way, meta):
    """-> an actor and a critic"""
    O, A = meta["obs_dim"], meta["action_dim"]
    outputs = BINS if way.actor == "bins" else 1
    if not way.perceiver:
        return mlp(O, A * outputs), Critic(O, A, 1 if way.scalar else ATOMS)
    if way.scalar:
        raise ValueError("a Perceiver's critic is a distribution here, and no number")
    perceiver = Perceiver(config_for(SIZE, [meta]))
    other = Perceiver(perceiver.config) if way.perceiver == "own" else perceiver
    actor = PerceiverActor(other, outputs, detached=way.perceiver == "detached")
    return actor, PerceiverCritic(perceiver)


class Specialist:
    """An actor and a critic of one task, their running averages, and `update`."""

    def __init__(self, way, task, seed):
        torch.manual_seed(seed)
        self.way, self.discount = way, task.meta["discount"]
        # Of two steps, for the data's next action.
        self.sampler = data.Sampler([task], BATCH, steps=2, focus=way.focus)
        rows = data.Sampler([task], SCALE_ROWS).sample(np.random.default_rng(seed))
        self.obs_std, self.obs_mean = torch.std_mean(rows.obs[:, 0], dim=0)
        self.low, self.range = (number.item() for number in value_range([task.meta]))
        # Q is on [0, 1], as in learner.py. So much of it is a deviation of the reward.
        self.unit = (rows.reward.std() / self.range).item()
        self.actor, self.critic = networks(way, {"name": task.name, **task.meta})
        self.atoms = torch.linspace(0, 1, ATOMS)
        self.start_at(self.scale(rows.return_to_go[:, 0]))
        self.spread = None  # Q's deviation over a state's actions: a running average
        self.live = nn.ModuleList([self.actor, self.critic])
        self.target = copy.deepcopy(self.live).requires_grad_(False)
        self.weights = list(self.live.parameters())  # shared ones once
        self.optimizer = torch.optim.Adam(self.weights, RATE)
        self.updates = 0

    def start_at(self, returns):
        """Begin at the data's returns (B,), as Learner.start_at does."""
        last = self.critic.last
        last.weight.data.mul_(0.1)
        if self.way.scalar:
            last.bias.data.fill_(returns.mean())
        else:
            histogram = point_mass(returns, ATOMS).mean(0)
            last.bias.data.copy_(torch.log(0.99 * histogram + 0.01 / ATOMS))

    def scale(self, returns):
        return (returns - self.low) / self.range

    def normalised(self, obs):
        return (obs - self.obs_mean) / self.obs_std.clamp(min=1e-3)

    # -------------------------------------------------------- what the two say

    def expected(self, outputs):
        """-> Q (...)"""
        if self.way.scalar:
            return outputs.squeeze(-1)
        return (torch.softmax(outputs, dim=-1) * self.atoms).sum(-1)

    def policy(self, actor, obs):
        """obs (B, O) -> an action (B, A), or a model.Policy of one component"""
        outputs = actor(obs)
        if self.way.actor == "point":
            return torch.tanh(outputs)
        log_bins = torch.log_softmax(outputs.unflatten(-1, (1, -1, BINS)), dim=-1)
        B, _, A, _ = log_bins.shape
        return Policy(torch.zeros(B, 1), log_bins, torch.ones(B, A, dtype=torch.bool))

    def draw(self, policy, count):
        """Actions (B, count, A); a point is its own draw."""
        if isinstance(policy, torch.Tensor):
            return policy[:, None].expand(-1, count, -1)
        B, _, A, _ = policy.log_bins.shape
        return policy.sample(torch.rand(B, count, 1 + A))

    # -------------------------------------------------------- one update

    def update(self, batch):
        obs, next_obs = self.normalised(batch.obs[:, 0]), self.normalised(batch.next_obs[:, 0])
        worth = 1.0 if batch.worth is None else batch.worth  # (B,)
        critic = self.critic_loss(batch, obs, next_obs)
        actor = (worth * self.actor_loss(obs, batch.action[:, 0])).mean()
        self.optimizer.zero_grad()
        (critic + actor).backward()
        if self.way.perceiver:
            self.as_pac_trains()
        self.optimizer.step()
        self.updates += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.live.parameters()),
                                 TARGET_RATE)

    def as_pac_trains(self):
        """Set the learning rate, and cut the gradient, as learner.py does."""
        torch.nn.utils.clip_grad_norm_(self.weights, LossSettings.max_grad_norm)
        rate = LossSettings.learning_rate * schedule(self.updates, UPDATES)
        self.optimizer.param_groups[0]["lr"] = rate

    def critic_loss(self, batch, obs, next_obs):
        target_actor, target_critic = self.target
        bootstrap = self.discount * (~batch.terminated[:, 0]).float()  # (B,)
        shift = (batch.reward[:, 0] - (1 - bootstrap) * self.low) / self.range
        observed = self.scale(batch.return_to_go[:, 0])
        with torch.no_grad():
            if self.way.target == "policy":
                # A point's draws are alike, so one does; the MLPs' rows were made with all.
                count = 1 if self.way.perceiver and self.way.actor == "point" else SAMPLES
                actions = self.draw(self.policy(target_actor, next_obs), count)
            else:  # where an episode was cut off there is none, and this is the action 0
                actions = batch.action[:, 1:]
            after = target_critic(next_obs, actions)  # (B, N, M)
        outputs = self.critic(obs, batch.action[:, :1])[:, 0]
        share = float(self.way.target == "observed")
        if self.way.scalar:
            bellman = shift + bootstrap * self.expected(after).mean(1)
            # In rewards' deviations: a number is fitted as slowly as its scale is small.
            return (((self.expected(outputs) - bellman) / self.unit) ** 2).mean()
        next_probs = torch.softmax(after, dim=-1).mean(1)
        return bellman_cross_entropy(outputs, next_probs, shift, bootstrap, observed, share).mean()

    def actor_loss(self, obs, action):
        """-> (B,)"""
        way, policy = self.way, self.policy(self.actor, obs)
        if way.actor == "point":
            clone, mean = ((policy - action) ** 2).mean(-1), policy
        else:
            clone, mean = -policy.log_prob(action[:, None])[:, 0], policy.mean()
        if way.improve == "gradient":
            target_critic = self.target[1]  # its weights learn nothing, and the action's do
            q = self.expected(target_critic(obs, mean[:, None]))[:, 0]
            return clone - way.strength * q / self.unit
        if way.improve == "draws":
            return clone + way.strength * self.to_draws(policy, obs)
        return clone

    def to_draws(self, policy, obs):
        """PAC's term: the cross-entropy to the target policy's draws, weighed by exp(Q / eta)."""
        target_actor, target_critic = self.target
        with torch.no_grad():
            actions = self.draw(self.policy(target_actor, obs), SAMPLES)
            q = self.expected(target_critic(obs, actions))  # (B, N)
            spread = q.std(1).mean()
            self.spread = spread if self.spread is None else torch.lerp(self.spread, spread, 0.01)
            w = improvement_weights(q, self.spread.expand(len(q)), ETA)
        return improvement_loss(policy, actions, w)

    # -------------------------------------------------------- acting

    @torch.no_grad()
    def predict(self, obs):
        """obs (B, O) -> actions (B, A), both numpy's. Draws act by the mean of pi_imp, as PAC."""
        obs = self.normalised(torch.from_numpy(obs))
        actor, critic = self.target
        policy = self.policy(actor, obs)
        if self.way.actor == "point":
            return policy.numpy()
        if self.way.improve != "draws":
            return policy.mean().numpy()
        actions = self.draw(policy.sharpen(), ACT_SAMPLES)
        q = self.expected(critic(obs, actions))
        w = improvement_weights(q, self.spread.expand(len(q)), ETA)
        return (w[..., None] * actions).sum(1).numpy()


def run(job):
    """A specialist, trained and played -> its row of the table"""
    name, way, seed = job
    torch.set_num_threads(1)
    task = data.Task(f"datasets/beyond/{name}")
    learner = Specialist(WAYS[way], task, seed)
    rng = np.random.default_rng(seed)
    began = time.monotonic()
    for batch in learner.sampler.batches(repeat(rng, UPDATES)):
        learner.update(batch)
    seconds = time.monotonic() - began
    score = play(learner, {"name": name, **task.meta}, seed + 1)
    return {"task": name, "way": way, "seed": seed, "score": round(score, 4),
            "seconds": round(seconds)}


def shown(scores):
    """Of a task and way, over seeds: (seeds, 1) -> a cell of the table"""
    if len(scores) == 0:
        return ""
    spread = f" ± {scores.std():.2f}" if len(scores) > 1 else ""
    return f"{scores.mean():.2f}{spread}"


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=LONG, default=LONG)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    key = ("task", "way", "seed")
    table = Table("beyond", (*key, "score", "seconds"), key, args.folder)
    if not args.table:
        wanted = [(task, way, seed)
                  for seed in args.seeds for task in args.tasks for way in args.ways]
        if jobs := table.missing(wanted):
            need_data(Path("datasets/beyond"), args.tasks)
        for row in in_processes(args.workers, run, jobs):
            table.append([row])
            print(time.strftime("%H:%M"), *row.values(), flush=True)
    table.need_rows()
    lines = []
    for name, way in WAYS.items():
        scores = [table.scores((task,), task=task, way=name) for task in LONG]
        lines.append([f"`{name}`", way.words, *map(shown, scores)])
    print_table(["way", "what is other than in `gradient`", *LONG], lines)


if __name__ == "__main__":
    main()
