"""The losses against hand-computed numbers, and small problems whose answer is known."""

import copy
import math
import shutil

import pytest
import torch

import learner as learner_module
from data import FINAL_OBS, FLAG, TRUNCATED, Batch
from learner import (ALGORITHMS, POOL, Learner, cloning_loss, data_weights, improvement_loss,
                     improvement_weights, n_step_return, observed_share, schedule, settings_for)
from model import Policy, config_for
from parallel import flops_per_update
from studies.ablations import ABLATIONS
from studies.step import plainly
from tests.conftest import batch, meta, tiny
from tests.test_checkpoint import in_child
from tests.test_model import mixture


def make(metas, algo="pac", updates=400, **changes):
    return Learner(tiny(metas), settings_for(algo, **changes), metas, updates, seed=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weighed(learner, made):
    """A Batch whose rows are worth what their returns are, as a Sampler would give it."""
    made.worth = data_weights(made.return_to_go[:, 0], made.task, learner.num_tasks,
                              learner.settings.focus)
    return made


def train(learner, sample, updates):
    for step in range(updates):
        generator = seeded(step)
        learner.update(learner.choose(weighed(learner, sample(generator)), generator), generator)


def loss_of(learner, made):
    """The loss after the warm-up, by fixed draws."""
    return learner.loss(made, learner.noise(made, seeded()), 0.5)[0]


def states(*obs):
    """Observations of one scalar each, and their task's index, 0."""
    return torch.tensor(obs)[:, None], torch.zeros(len(obs), dtype=torch.long)


# ---------------------------------------------------------------- settings

def test_unknown_algorithm_lists_the_known():
    known = "bc, filtered_bc, rwr, bc_q, one_step, pac_paper, pacv, pac"
    with pytest.raises(ValueError, match=f"unknown algorithm 'dqn'; there are: {known}"):
        settings_for("dqn")


@pytest.mark.parametrize("old, new", [("fc", "filtered_bc"), ("bcq", "bc_q")])
def test_an_old_name_is_refused_with_the_new_one(old, new):
    with pytest.raises(ValueError, match=f"'{old}' is called '{new}' now"):
        settings_for(old)


def test_observed_returns_leave_the_target_in_two_steps():
    shares = [observed_share(update, 50, 100) for update in (0, 49, 50, 74, 75, 100)]
    assert shares == [1, 1, 0.5, 0.5, 0, 0]


def test_the_schedule_rises_and_falls():
    assert schedule(0, 1000) < 0.01
    assert schedule(200, 100_000) == pytest.approx(1, abs=1e-3)
    assert schedule(1000, 1000) == pytest.approx(0.05)


# ---------------------------------------------------------------- n-step returns

def window(reward, terminated, valid):
    """A Batch of one window of several steps."""
    zeros = [0.0] * len(reward)
    steps = batch(zeros, zeros, reward, terminated=terminated)
    steps.rows[~torch.tensor(valid), 0, FLAG] = FINAL_OBS
    rows = torch.cat([steps.rows[:, 0], steps.rows[-1:, 1]])  # (T + 1, width)
    return Batch(rows[None], steps.obs_dim, steps.task[:1])


@pytest.mark.parametrize("valid, terminated, reward, bootstrap", [
    ([1, 1, 1], [0, 0, 0], 1 + 0.5 + 0.25, 0.125),  # inside an episode
    ([1, 1, 0], [0, 0, 0], 1 + 0.5, 0.25),  # truncated after two steps: bootstraps
    ([1, 1, 0], [0, 1, 0], 1 + 0.5, 0.0),  # terminated after two steps: does not
])
def test_termination_cuts_the_bootstrap_and_truncation_does_not(valid, terminated, reward,
                                                                bootstrap):
    made = window(valid, terminated, [bool(v) for v in valid])
    if not all(valid) and not any(terminated):  # as on the disk: the last step says why it was
        made.rows[0, sum(valid) - 1, FLAG] = TRUNCATED
        assert made.truncated.any()
    got = n_step_return(made, torch.tensor([0.5]))
    assert [x.item() for x in got] == pytest.approx([reward, bootstrap])


# ---------------------------------------------------------------- loss terms

def test_cloning_loss_by_hand():
    loss = cloning_loss(mixture((1.0, [[0.25, 0.75]])), torch.tensor([[0.5]]))
    assert loss.tolist() == pytest.approx([-math.log(0.75)])


def test_improvement_weights_by_hand():
    q, spread = torch.tensor([[0.0, math.log(3) * 0.02]]), torch.tensor([0.1])
    w = improvement_weights(q, spread, eta=0.2)
    assert w[0].tolist() == pytest.approx([0.25, 0.75], abs=1e-4)


def test_improvement_moves_the_policy_towards_the_better_action():
    logits = torch.zeros(1, 1, 1, 2, requires_grad=True)
    policy = Policy(torch.zeros(1, 1), torch.log_softmax(logits, -1), torch.tensor([[True]]))
    actions = torch.tensor([[[-0.5], [0.5]]])  # one in each bin
    w = improvement_weights(torch.tensor([[0.0, 1.0]]), torch.ones(1), eta=0.5)
    better = 1 / (1 + math.exp(-2))
    assert w[0].tolist() == pytest.approx([1 - better, better], abs=1e-5)
    improvement_loss(policy, actions, w).sum().backward()
    # d/dlogit of -sum w log softmax: softmax - w
    by_hand = [0.5 - (1 - better), 0.5 - better]
    assert logits.grad.flatten().tolist() == pytest.approx(by_hand, abs=1e-5)


def test_ess_is_the_effective_number_of_the_weighed_actions(monkeypatch):
    learner = make([meta()], warmup=0.0, samples=2)
    made = batch([0.1, -0.4], [0.3, -0.3], [0.0, 1.0])
    w = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    monkeypatch.setattr("learner.improvement_weights", lambda q, spread, eta: w)
    _, metrics = learner.loss(made, learner.noise(made, seeded()), 0.5)
    assert metrics["policy/ess"].item() == pytest.approx((1.6 + 2) / 2)  # 1 / (1/16 + 9/16) = 1.6


@pytest.mark.parametrize("algo", ["pac", "pacv"])
def test_worth_weighs_the_policys_terms_alone(algo):
    learner = make([meta()], algo, warmup=0.0)
    made = batch([0.1, -0.4], [0.3, -0.3], [0.0, 1.0])

    def loss(*worth):
        made.worth = torch.tensor(worth)
        return loss_of(learner, made).item()

    critic = learner.loss(made, learner.noise(made, seeded()), 0.5)[1]["critic/loss"].item()
    assert loss(0.0, 0.0) == pytest.approx(critic)
    assert loss(2.0, 0.0) - critic == pytest.approx(2 * (loss(1.0, 0.0) - critic))
    assert loss(1.0, 1.0) - critic == pytest.approx(loss(1.0, 0.0) + loss(0.0, 1.0) - 2 * critic)


@pytest.mark.parametrize("algo", ["pac", "pacv"])
def test_alpha_by_source_weighs_each_sample(algo):
    learner = make([meta()], algo, warmup=0.0, alpha=0.5)
    cloning = make([meta()], algo, warmup=0.0, alpha=1.0)
    made = batch([0.1, -0.4], [0.3, -0.3], [0.0, 1.0])
    plain, cloned = loss_of(learner, made).item(), loss_of(cloning, made).item()

    def loss(*alpha):
        made.alpha = torch.tensor(alpha)
        return loss_of(learner, made).item()

    assert loss(0.5, 0.5) == pytest.approx(plain)
    assert loss(1.0, 1.0) == pytest.approx(cloned)
    # The loss is linear in each sample's alpha, and the samples differ.
    first, second = loss(1.0, 0.0), loss(0.0, 1.0)
    assert first + second == pytest.approx(loss(1.0, 1.0) + loss(0.0, 0.0))
    assert first != pytest.approx(second, rel=1e-3)


# ---------------------------------------------------------------- weights of the data

def test_data_weights_by_hand():
    merit, task = torch.tensor([0.2, 0.4, 100.0]), torch.tensor([0, 0, 1])
    w = data_weights(merit, task, 2, focus=math.log(3) / 2)
    # From their tasks' means, in mean deviations: -1, 1, and 0.
    assert w.tolist() == pytest.approx([0.5, 1.5, 1.0], abs=1e-4)
    assert data_weights(merit, task, 2, focus=0.0).tolist() == [1.0, 1.0, 1.0]


def test_an_outlier_counts_as_two_mean_deviations():
    merit, task = torch.tensor([0.0] * 9 + [100.0]), torch.zeros(10, dtype=torch.long)
    w = data_weights(merit, task, 1, focus=math.log(3))  # it is at 5 of them, the others at -5/9
    assert (w[9] / w[0]).item() == pytest.approx(3 ** (2 + 5 / 9), rel=1e-4)


def test_the_chosen_rows_and_their_weights_stand_for_the_data_by_worth():
    learner = make([meta("a"), meta("b")], focus=2.0)
    count, generator = 8 * 4096, seeded()
    observed = torch.rand(count, generator=generator)
    task = torch.arange(count) // (6 * 4096)  # the first task has three quarters
    zeros = [0.0] * count
    candidates = batch(zeros, zeros, observed.tolist(), task=task.tolist())
    chosen = learner.choose(weighed(learner, candidates), generator)
    assert len(chosen.task) == 4096 and 0 < chosen.worth.min() and chosen.worth.max() <= 2
    weighted = data_weights(observed, task, 2, focus=2.0) * observed
    for t, share in ((0, 0.75), (1, 0.25)):
        here = chosen.task == t
        assert here.float().mean().item() == pytest.approx(share, abs=0.01)
        kept = chosen.return_to_go[here, 0]
        mean, expected = (chosen.worth[here] * kept).mean(), weighted[task == t].mean()
        assert mean.item() == pytest.approx(expected.item(), rel=0.03)
        assert kept.mean() > 0.6  # half of the rows are of the better kind already


@pytest.mark.parametrize("tasks", [1, 8, 128])
def test_many_tasks_leave_the_weights_as_they_are(tasks):
    """With a few candidates of each task, the best of them are not good for that. A fiftieth of the
    rows are worth 20 times the others here."""
    learner, generator = make([meta()]), seeded()
    learner.num_tasks, weight, total = tasks, 0.0, 0.0
    for _ in range(50):
        good = torch.rand(POOL * 128, generator=generator) < 0.02
        candidates = batch([0.0] * len(good), [0.0] * len(good), good.float().tolist(),
                           task=(torch.arange(len(good)) % tasks).tolist())
        candidates.worth = torch.where(good, 20.0, 1.0) / (0.02 * 20 + 0.98)
        chosen = learner.choose(candidates, generator)
        weight += chosen.worth[chosen.return_to_go[:, 0] == 1].sum().item()
        total += chosen.worth.sum().item()
    assert weight / total == pytest.approx(0.4 / 1.38, rel=0.1)


def test_rows_without_worth_are_not_chosen_from():
    with pytest.raises(ValueError, match="a Sampler with a focus gives it"):
        make([meta()]).choose(batch([0.1] * 8, [0.3] * 8, [0.0] * 8), seeded())


def test_without_focus_a_batch_is_left_as_it_is():
    learner = make([meta()], "bc")
    made = batch([0.1, 0.2], [0.3, -0.3], [0.0, 1.0])
    assert learner.pool == 1 and learner.choose(made, None).worth is None


def test_the_spread_of_q_is_each_tasks_running_average():
    learner = make([meta("a"), meta("b"), meta("c")], warmup=0.0)
    learner.averages, task, root = True, torch.tensor([0, 0, 1]), 2**0.5
    q = torch.tensor([[0.0, 0.2], [0.0, 0.4], [0.5, 0.5]])  # std: 0.2 / root, 0.4 / root, 0
    learner.follow_spread(q, task)
    first = 0.3 / root
    # The third task was not met yet: 1, which makes uniform weights.
    assert learner.target_model.q_spread.tolist() == pytest.approx([first, 0.0, 1.0])
    learner.follow_spread(2 * q, task)
    assert learner.target_model.q_spread.tolist() == pytest.approx([1.01 * first, 0.0, 1.0])


def test_what_was_measured_in_the_warm_up_leaves_no_trace_in_what_follows():
    """Else a run that was stopped, and measured there, would not go on to the bit."""
    def spread(measures):
        learner = make([meta("a"), meta("b")], updates=8, warmup=0.5)
        for step in range(5):
            if measures and step == 2:
                both = pull_many(seeded())
                both.task = torch.arange(len(both.task)) % 2
                learner.measure_spread(both)
                assert (learner.target_model.q_spread < 1).all()
            learner.update(learner.choose(weighed(learner, pull_many(seeded())), seeded()), seeded())
        return learner.target_model.q_spread.tolist()

    assert spread(True) == spread(False) and spread(True)[1] == 1


def test_the_spread_of_q_is_of_all_ranks(monkeypatch):
    """A task that has rows on another rank alone is met, too."""
    learner = make([meta("a"), meta("b")], warmup=0.0)
    others = torch.tensor([[0.0, 0.5], [0.0, 1.0]])  # the sums and counts of another rank
    monkeypatch.setattr("parallel.add_over_ranks", lambda sums: sums.add_(others))
    learner.follow_spread(torch.tensor([[0.0, 0.2]]), torch.tensor([0]))
    assert learner.target_model.q_spread.tolist() == pytest.approx([0.2 / 2**0.5, 0.5])


def test_after_the_warm_up_the_spread_of_q_is_averaged_but_for_the_first_time():
    learner = make([meta()], updates=8, warmup=0.5)
    seen = []
    follow = learner.follow_spread
    learner.follow_spread = lambda q, task: (seen.append((learner.updates, learner.averages)),
                                             follow(q, task))
    train(learner, pull_many, 8)
    assert seen == [(4, False), (5, True), (6, True), (7, True)]


def test_the_spread_of_q_is_measured_before_pi_imp_acts_in_the_warm_up():
    learner = make([meta()], "one_step")
    train(learner, pull_many, 50)
    assert learner.target_model.q_spread.tolist() == [1.0]  # the warm-up draws no actions
    learner.measure_spread(pull_many(seeded()))
    measured = learner.target_model.q_spread.item()
    assert 0 < measured < 0.5
    learner.follow_spread(torch.tensor([[0.0, 2.0]]), torch.tensor([0]))
    assert learner.target_model.q_spread.item() == pytest.approx(2**0.5)  # not averaged with it


# ---------------------------------------------------------------- problems with a known answer

@pytest.mark.parametrize("algo", ["bc_q", "pac", "pacv"])
def test_two_state_chain_reaches_its_exact_values(algo):
    """State -1 pays 0 and leads to +1, which pays 1 and leads to itself; discount 0.5: 1 and 2."""
    metas = [meta(discount=0.5, low=0.0, high=2.5)]
    learner = make(metas, algo, updates=700, warmup=0.0, n_step=1, target_rate=0.05)

    def sample(generator):
        obs = torch.randint(0, 2, (64,), generator=generator) * 2.0 - 1
        action = torch.rand(64, generator=generator) * 2 - 1
        reward, next_obs = (obs > 0).float().tolist(), [1.0] * 64
        # The observed returns are wrong on purpose: only the bootstrap can find the values.
        return batch(obs.tolist(), action.tolist(), reward, next_obs, False, [0.3] * 64)

    train(learner, sample, 700)
    model, (obs, task) = learner.target_model, states(-1.0, 1.0)
    latents = model.encode(obs, task)
    if algo == "pacv":
        logits = model.v(latents)
    else:
        logits = model.q(latents, torch.zeros(2, 1, 1), task)[:, 0]
    value = learner.low + learner.range * model.expectation(logits)
    assert value.tolist() == pytest.approx([1.0, 2.0], abs=0.05)


def pull(generator, count=64):
    """Three pulls in ten are of the arm at +0.5, for a reward of 1; the others of that at -0.5."""
    good = torch.rand(count, generator=generator) < 0.3
    return batch([0.0] * count, torch.where(good, 0.5, -0.5).tolist(), good.float().tolist())


def pull_many(generator):
    """Candidates for a batch of 64."""
    return pull(generator, POOL * 64)


def share_of_the_better_arm(learner):
    model, (obs, task) = learner.target_model, states(0.0)
    policy = model.policy(model.encode(obs, task), task)
    actions = policy.sample(torch.rand(1, 1000, 2, generator=seeded()))
    return (actions > 0).float().mean().item()


@pytest.mark.parametrize("algo, settings, finds", [
    ("bc", dict(alpha=1.0), False),
    ("pac", dict(alpha=0.2, eta=0.2), True),
    ("pacv", dict(alpha=0.2, eta=0.3), True),
])
def test_bandit_pac_finds_the_better_arm_and_bc_does_not(algo, settings, finds):
    learner = make([meta()], algo, updates=400, warmup=0.25, **settings)
    train(learner, pull, 400)
    better = share_of_the_better_arm(learner)
    assert better > 0.7 if finds else abs(better - 0.3) < 0.1


def test_focus_clones_what_went_well():
    """The same bandit without a critic, by the choice of the data alone."""
    learner = make([meta()], "bc", updates=300, focus=2.0)
    train(learner, lambda generator: pull(generator, learner.pool * 64), 300)
    assert share_of_the_better_arm(learner) > 0.7


# ---------------------------------------------------------------- the same loss, made otherwise

def two_tasks(algo, size="tiny"):
    """A learner of two tasks that differ in all their widths, a batch of both, and the same noise
    for every row of it."""
    metas = [meta("a", 3, 2), meta("b", 2, 3), meta("absent", 4, 1)]
    metas[0]["instruction"], metas[1]["instruction"] = "go", "stand still"
    learner = Learner(config_for(size, metas), settings_for(algo, warmup=0.0), metas, 400)
    numbers = seeded()
    obs, next_obs, action, reward = (torch.rand(24, width, generator=numbers).tolist()
                                     for width in (4, 4, 3, 1))
    made = batch(obs, action, reward, next_obs, terminated=False, task=[0, 1, 1] * 8)
    with torch.no_grad():
        learner.target_model.policy_head[-1].weight.mul_(3)
    return learner, made, learner.noise(made, numbers)[:1].expand(48, -1, -1)


def assert_same_gradient(one, other, made, noise):
    losses = [learner.loss(made, noise, 0.5)[0] for learner in (one, other)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, parameter), same in zip(one.model.named_parameters(), other.model.parameters(),
                                       strict=True):
        zero = torch.zeros_like(parameter)
        grads = [zero if p.grad is None else p.grad for p in (parameter, same)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3, msg=lambda text: f"{name}: {text}")


# Named, so that an algorithm can be added before its plain version is written.
@pytest.mark.parametrize("algo", ["bc", "filtered_bc", "bc_q", "pac", "pacv"])
def test_the_plain_reference_has_the_same_loss_and_gradient(algo):
    """There each sample has its own copy of what is shared, and every term passes by itself."""
    learner, made, noise = two_tasks(algo)
    made.worth = torch.linspace(0.5, 2, len(made.task))
    plain = plainly(copy.deepcopy(learner))
    plain.draw = lambda policy, *_: policy.sample(noise[:24])
    assert_same_gradient(learner, plain, made, noise)


@pytest.mark.parametrize("name", [name for name in ABLATIONS if ABLATIONS[name].changes])
def test_each_ablation_changes_the_loss_and_trains(name):
    def start():
        learner, made, noise = two_tasks("pac", "small")
        learner.start_at(made)
        share = learner_module.observed_share(0, 0, 4)
        return learner, made, learner.loss(made, noise, share)[0].item()

    def changed():
        for change in ABLATIONS[name].changes:
            change()
        learner, made, loss = start()
        assert abs(loss - before) > 1e-3
        assert learner.update(made, seeded())["loss"].isfinite()

    *_, before = start()
    assert in_child(changed) == 0


def test_a_loss_is_compiled_once_for_each_share_and_once_to_begin_its_average(monkeypatch):
    """Not anew in each update, until torch gives up. The backend here compiles nothing."""
    programs, compile = [], torch.compile

    def counted(graph, _):
        programs.append(learner.updates)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend=counted, **how))
    torch._dynamo.reset()
    learner = make([meta()], updates=16, warmup=0.25)
    learner.compile()
    train(learner, pull_many, 16)
    assert set(programs) == {0, 4, 5, 10}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_loss_is_the_same():
    learner, made, noise = two_tasks("pac")
    compiled = copy.deepcopy(learner)
    compiled.compile()
    assert_same_gradient(learner, compiled, made, noise)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_bf16_autocast_gives_the_loss_and_values_in_full_precision(algo):
    """As on a GPU, where training is in bf16: it runs, its loss is close, and values differ by less
    than bf16 resolves."""
    learner = make([meta()], algo, warmup=0.0)
    made = batch([0.1, -0.4, 0.3, 0.2], [0.3, -0.3, 0.1, 0.0], [0.0, 1.0, 0.5, 0.2])
    exact = loss_of(learner, made)
    slightly_tilted = torch.stack([torch.zeros(101), 1e-3 * torch.arange(101)])
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(learner, made)
        low, high = learner.model.mean_value(torch.softmax(slightly_tilted, dim=-1))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert 0.005 < high - low < 0.012  # of 0.5, where bf16's step is 0.004: 0.0085 exactly


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_flops_grow_with_the_batch_and_cloning_takes_the_fewest(algo):
    metas = [meta("a", 5, 2)]

    def flops(algo, rows):
        learner = Learner(tiny(metas), settings_for(algo), metas, 0, "meta")
        return flops_per_update(learner, rows)

    assert 1.9 < flops(algo, 64) / flops(algo, 32) <= 2.01
    assert flops("bc", 32) <= flops(algo, 32)


# ---------------------------------------------------------------- the start, the target, the end

def test_values_start_at_the_data():
    learner = make([meta(low=0.0, high=1.0)])
    learner.start_at(batch([0.0] * 100, [0.0] * 100, [0.2] * 50 + [0.6] * 50))
    logits = learner.model.v(learner.model.encode(*states(0.0)))
    value = learner.low + learner.range * learner.model.expectation(logits)
    assert value.item() == pytest.approx(0.4, abs=0.05)


def test_observations_in_other_units_are_the_same_to_the_model():
    """Hopper's height, 1.25 ± 0.14, in metres or in millimetres; the second scalar is constant."""
    height, constant = torch.tensor([1.1, 1.2, 1.4, 1.5]), torch.full((4,), 3.0)
    latents = []
    for unit in (1, 1000):
        learner = make([meta(obs_dim=2)])
        obs = torch.stack([unit * height, constant], 1)
        learner.start_at(batch(obs.tolist(), [0.0] * 4, [0.0, 1.0, 0.0, 1.0]))
        latents.append(learner.target_model.encode(obs, torch.zeros(4, dtype=torch.long)))
    torch.testing.assert_close(*latents, atol=1e-4, rtol=1e-4)
    assert latents[0].isfinite().all()
    assert (latents[0][0] - latents[0][3]).abs().max() > 0.1


@pytest.mark.parametrize("low, high", [(100.0, 100.0), (0.0, 0.0), (-1e6, -1e6), (0.0, 1.0)])
def test_returns_that_are_all_alike_lie_in_the_middle_of_the_values(low, high):
    """At 100 a millionth is nothing to float32: they came to lie at the lower end."""
    learner = make([meta(low=low, high=high)])
    middle = learner.scale(torch.tensor([(low + high) / 2]), torch.tensor([0]))
    assert middle.item() == pytest.approx(0.5, abs=0.02)
    ends = learner.scale(torch.tensor([low, high]), torch.tensor([0, 0]))
    assert 0 < ends[0] <= ends[1] < 1


@pytest.mark.parametrize("longest, cut", [(1e-3, True), (1e9, False), (0.0, False)])
def test_a_long_gradient_is_cut(longest, cut):
    learner = make([meta()], max_grad_norm=longest)
    norm = learner.update(batch([0.1, 0.2], [0.3, -0.3], [0.0, 1.0]), seeded())["grad_norm"].item()
    left = torch.stack([p.grad.norm() for p in learner.weights if p.grad is not None]).norm()
    assert norm > 0.1  # what it was before
    assert left.item() == pytest.approx(longest if cut else norm, rel=1e-3)


@pytest.mark.parametrize("algo", ["pac", "pacv", "bc"])
def test_an_update_without_metrics_is_the_same_to_the_bit(algo):
    """All that is left out is in the lines of metrics.jsonl alone."""
    kept = {}
    for with_metrics in (True, False):
        learner = make([meta()], algo, warmup=0.0)
        learner.with_metrics = with_metrics
        made = batch([0.1, 0.2], [0.3, -0.3], [0.0, 1.0])
        metrics = learner.update(made, seeded())
        kept[with_metrics] = learner.weights + learner.target_weights
    assert metrics.keys() == {"loss", "grad_norm"}
    assert all(map(torch.equal, kept[True], kept[False]))


def test_the_learning_rate_follows_the_schedule():
    learner, rates = make([meta()], updates=4, learning_rate=0.01), []
    for _ in range(4):
        learner.update(batch([0.1, 0.2], [0.3, -0.3], [0.0, 1.0]), seeded())
        rates.append(float(learner.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.01 * schedule(update, 4) for update in range(4)])
    assert rates[3] < 4 * rates[0]  # the cosine has set in


def test_a_young_target_forgets_the_random_start():
    """After one update it is the model, after two their mean: its rate is 1 / updates at first."""
    learner = make([meta()], target_rate=0.01)
    made = batch([0.1, 0.2], [0.3, -0.3], [0.0, 1.0])
    learner.update(made, seeded())
    first = [p.clone() for p in learner.weights]
    for target, online in zip(learner.target_weights, first, strict=True):
        torch.testing.assert_close(target, online)
    learner.update(made, seeded())
    for target, one, two in zip(learner.target_weights, first, learner.weights, strict=True):
        torch.testing.assert_close(target, (one + two) / 2)


def test_the_target_lags_and_gets_no_gradient():
    learner = make([meta()], "pac", warmup=0.0, target_rate=0.25)
    made = batch([0.1, 0.2], [0.3, -0.3], [0.0, 1.0], terminated=False)
    for _ in range(4):
        learner.update(made, seeded())
    before = [p.clone() for p in learner.target_weights]
    learner.update(made, seeded())
    for old, target, online in zip(before, learner.target_weights, learner.weights, strict=True):
        torch.testing.assert_close(target, old + 0.25 * (online - old))
        assert not target.requires_grad


def test_a_non_finite_loss_stops_before_the_weights_change():
    learner = make([meta()], "bc_q", warmup=0.0)
    before = [p.clone() for p in learner.weights]
    with pytest.raises(FloatingPointError, match="update 0"):
        learner.update(batch([float("nan")], [0.0], [0.0]), torch.Generator())
    for old, new in zip(before, learner.weights, strict=True):
        assert torch.equal(old, new)
