"""The losses against hand-computed numbers, and small problems whose answer is known."""

import copy
import math
import shutil

import pytest
import torch

from data import FINAL_OBS, Batch
from learner import (ALGORITHMS, Learner, cloning_loss, data_weights, flops_per_update, improvement_loss,
                     improvement_weights, n_step_return, schedule, settings_for)
from model import TaskSpec, config_for, sample_actions
from tests.ablations import ABLATIONS
from tests.bench_step import plainly
from tests.conftest import batch, meta, spec, tiny
from tests.test_durable import in_child


def make(metas, algo="pac", updates=400, **changes):
    return Learner(tiny(metas), settings_for(algo, **changes), metas, updates, seed=0)


def train(learner, sample, updates):
    for step in range(updates):
        generator = torch.Generator().manual_seed(step)
        metrics = learner.update(learner.choose(sample(generator), generator), generator)
    return metrics


def loss_of(learner, made):
    """The loss after the warm-up, by fixed draws."""
    return learner.loss(made, learner.noise(made, torch.Generator().manual_seed(0)), False)[0]


# ---------------------------------------------------------------- n-step returns

def windows(reward, terminated, valid):
    """A Batch of one window of several steps."""
    steps = batch([0.0] * len(reward), [0.0] * len(reward), reward, terminated=terminated)
    steps.rows[~torch.tensor(valid), 0, -1] = FINAL_OBS
    return Batch(torch.cat([steps.rows[:, 0], steps.rows[-1:, 1]])[None], steps.obs_dim, steps.task[:1])


@pytest.mark.parametrize("terminated, valid, reward, bootstrap", [
    ([False, False, False], [True, True, True], 1 + 0.5 + 0.25, 0.125),  # inside an episode
    ([False, False, False], [True, True, False], 1 + 0.5, 0.25),         # truncated after two steps: bootstraps
    ([False, True, False], [True, True, False], 1 + 0.5, 0.0),           # terminated after two steps: does not
])
def test_termination_cuts_the_bootstrap_and_truncation_does_not(terminated, valid, reward, bootstrap):
    window = windows([float(v) for v in valid], terminated, valid)
    got = n_step_return(window, torch.tensor([0.5]))
    assert [x.item() for x in got] == pytest.approx([reward, bootstrap])


# ---------------------------------------------------------------- loss terms

def test_cloning_loss_by_hand():
    policy = torch.zeros(1, 1), torch.log(torch.tensor([[[[0.25, 0.75]]]]))
    loss, _ = cloning_loss(policy, torch.tensor([[0.5]]), torch.tensor([[True]]))
    assert loss.item() == pytest.approx(-math.log(0.75))


def test_improvement_weights_by_hand():
    w = improvement_weights(torch.tensor([[0.0, math.log(3) * 0.02]]), torch.tensor([0.1]), eta=0.2)
    assert w[0].tolist() == pytest.approx([0.25, 0.75], abs=1e-4)


def test_data_weights_by_hand():
    merit, task = torch.tensor([0.2, 0.4, 100.0]), torch.tensor([0, 0, 1])  # from their means, in mean deviations: -1, 1; 0
    assert data_weights(merit, task, 2, focus=math.log(3) / 2).tolist() == pytest.approx([0.5, 1.5, 1.0], abs=1e-4)
    assert data_weights(merit, task, 2, focus=0.0).tolist() == [1.0, 1.0, 1.0]


def test_the_chosen_rows_and_their_weights_stand_for_the_data_by_worth():
    learner = make([meta("a"), meta("b")], focus=2.0, pool=8)
    generator = torch.Generator().manual_seed(0)
    observed, task = torch.rand(8 * 4096, generator=generator), torch.arange(8 * 4096) // (6 * 4096)  # the first has 3/4
    chosen = learner.choose(batch([0.0] * len(task), [0.0] * len(task), observed.tolist(), task=task.tolist()), generator)
    assert len(chosen.task) == 4096 and 0 < chosen.worth.min() and chosen.worth.max() <= 2
    worth = data_weights(observed, task, 2, focus=2.0)
    for t in (0, 1):
        here = chosen.task == t
        assert here.float().mean().item() == pytest.approx((0.75, 0.25)[t], abs=0.01)
        kept = chosen.return_to_go[here, 0]
        assert (chosen.worth[here] * kept).mean().item() == pytest.approx((worth * observed)[task == t].mean().item(), rel=0.03)
        assert kept.mean() > 0.6  # half of the rows are of the better kind already


def test_without_focus_a_batch_is_left_as_it_is():
    learner = make([meta()], "bc")
    made = batch([0.1, 0.2], [0.3, -0.3], [0.0, 1.0])
    assert learner.pool == 1 and learner.choose(made, None).worth is None


def test_focus_clones_what_went_well():
    """As in the bandit below, without a critic: the better arm's share of the weights grows from 0.3 to over 0.7."""
    learner = make([meta()], "bc", updates=300, focus=2.0)

    def sample(generator):
        good = torch.rand(8 * 64, generator=generator) < 0.3
        return batch([0.0] * len(good), torch.where(good, 0.5, -0.5).tolist(), good.float().tolist())

    train(learner, sample, 300)
    task = torch.zeros(1, dtype=torch.long)
    policy = learner.target_model.policy(learner.target_model.encode(torch.zeros(1, 1), task), task)
    assert (sample_actions(policy, torch.rand(1, 1000, 2)) > 0).float().mean() > 0.7


def test_the_spread_of_q_is_each_tasks_running_average():
    learner = make([meta("a"), meta("b"), meta("c")])
    task = torch.tensor([0, 0, 1])
    q = torch.tensor([[0.0, 0.2], [0.0, 0.4], [0.5, 0.5]])  # standard deviations: 0.2 and 0.4 over the root of 2; 0
    learner.follow_spread(q, task)
    first = 0.3 / 2**0.5
    assert learner.target_model.q_spread.tolist() == pytest.approx([first, 0.0, 1.0])  # 1: not met yet, uniform weights
    learner.follow_spread(2 * q, task)
    assert learner.target_model.q_spread.tolist() == pytest.approx([1.01 * first, 0.0, 1.0])


def test_improvement_moves_the_policy_towards_the_better_action():
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    actions = torch.tensor([[[-0.5], [0.5]]])  # one in each bin
    policy = torch.zeros(1, 1), torch.log_softmax(logits, -1)[None]
    loss, metrics = improvement_loss(policy, actions, improvement_weights(torch.tensor([[0.0, 1.0]]), torch.ones(1), 0.5),
                                     torch.tensor([[True]]))
    loss.backward()
    w = 1 / (1 + math.exp(-2))
    # d/dlogit of -sum w log softmax: softmax - w
    assert logits.grad[0, 0].tolist() == pytest.approx([0.5 - (1 - w), 0.5 - w], abs=1e-5)
    assert metrics["policy/ess"].item() == pytest.approx(1 / (w**2 + (1 - w) ** 2), abs=1e-4)


def test_the_schedule_rises_and_falls():
    assert schedule(0, 1000) < 0.01 and schedule(200, 100_000) == pytest.approx(1, abs=1e-3)
    assert schedule(1000, 1000) == pytest.approx(0.05)


def test_unknown_algorithm_lists_the_known():
    with pytest.raises(ValueError, match="unknown algorithm 'dqn'; there are: bc, fc, bcq, pac, pacv"):
        settings_for("dqn")


# ---------------------------------------------------------------- problems with a known answer

@pytest.mark.parametrize("algo", ["bcq", "pac", "pacv"])
def test_two_state_chain_reaches_its_exact_values(algo):
    """State -1 pays 0 and leads to state +1, which pays 1 and leads to itself; discount 0.5: values 1 and 2."""
    metas = [meta(discount=0.5, low=0.0, high=2.5)]
    learner = make(metas, algo, updates=700, warmup=0.0, mc_share=0.0, n_step=1, target_rate=0.05, learning_rate=3e-3)

    def sample(generator):
        obs = torch.randint(0, 2, (64,), generator=generator) * 2.0 - 1
        action = torch.rand(64, generator=generator) * 2 - 1
        # The observed returns are wrong on purpose: only the bootstrap can find the values.
        return batch(obs.tolist(), action.tolist(), (obs > 0).float().tolist(), torch.ones(64).tolist(), False, [0.3] * 64)

    train(learner, sample, 700)
    model, task = learner.target_model, torch.zeros(2, dtype=torch.long)
    latents = model.encode(torch.tensor([[-1.0], [1.0]]), task)
    logits = model.v(latents) if algo == "pacv" else model.q(latents, torch.zeros(2, 1, 1), task)[:, 0]
    value = learner.low + learner.range * model.expectation(logits)
    assert value.tolist() == pytest.approx([1.0, 2.0], abs=0.05)


@pytest.mark.parametrize("algo, finds", [("bc", False), ("pac", True), ("pacv", True)])
def test_bandit_pac_finds_the_better_arm_and_bc_does_not(algo, finds):
    """The data pulls the arm at -0.5 seven times in ten, for nothing, and the arm at +0.5 for a reward of 1."""
    learner = make([meta()], algo, updates=400, warmup=0.25, eta=0.3 if algo == "pacv" else 0.2, alpha=1.0 if algo == "bc" else 0.2)

    def sample(generator):
        good = torch.rand(64, generator=generator) < 0.3
        return batch([0.0] * 64, torch.where(good, 0.5, -0.5).tolist(), good.float().tolist())

    train(learner, sample, 400)
    model, task = learner.target_model, torch.zeros(1, dtype=torch.long)
    actions = sample_actions(model.policy(model.encode(torch.zeros(1, 1), task), task), torch.rand(1, 1000, 2))
    better = (actions > 0).float().mean().item()
    assert (better > 0.7) if finds else (abs(better - 0.3) < 0.1)


def two_tasks(algo, size="tiny"):
    """A learner of two tasks that differ in all their widths, a batch of both, and the same noise for every row of it."""
    metas = [{**meta("a", 3, 2), "instruction": "go"}, {**meta("b", 2, 3), "instruction": "stand still"}, meta("absent", 4, 1)]
    learner = Learner(config_for(size, list(map(spec, metas))), settings_for(algo, warmup=0.0), metas, 400)
    numbers = torch.Generator().manual_seed(0)
    made = batch(*(torch.rand(24, width, generator=numbers).tolist() for width in (4, 3, 1)), terminated=False, task=[0, 1, 1] * 8)
    with torch.no_grad():
        learner.target_model.policy_head[-1].weight.mul_(3)
    return learner, made, learner.noise(made, numbers)[:1].expand(48, -1, -1)


def assert_same_gradient(one, other, made, noise):
    losses = [learner.loss(made, noise, False)[0] for learner in (one, other)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, parameter), same in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        absent = [torch.zeros_like(parameter) if p.grad is None else p.grad for p in (parameter, same)]
        torch.testing.assert_close(*absent, atol=1e-5, rtol=1e-3, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_what_is_shared_between_samples_changes_nothing(algo):
    """The benchmark's plain version of the loss gives each sample its own copies, and takes every term by itself."""
    learner, made, noise = two_tasks(algo)
    plain = plainly(copy.deepcopy(learner))
    plain.draw = lambda policy, *_: sample_actions(policy, noise[:24])
    assert_same_gradient(learner, plain, made, noise)


@pytest.mark.parametrize("name", [name for name, (_, changes, _) in ABLATIONS.items() if changes])
def test_each_ablation_changes_the_loss_and_trains(name):
    def started():
        learner, made, noise = two_tasks("pac", "small")
        learner.start_at(made)
        return learner, made, learner.loss(made, noise, False)[0].item()

    def changed():
        for change in ABLATIONS[name][1]:
            change()
        learner, made, loss = started()
        assert abs(loss - before) > 1e-3
        assert learner.update(made, torch.Generator().manual_seed(0))["loss"].isfinite()

    before = started()[2]
    assert in_child(changed) == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_loss_is_the_same():
    learner, made, noise = two_tasks("pac")
    compiled = copy.deepcopy(learner)
    compiled.compile()
    assert_same_gradient(learner, compiled, made, noise)


@pytest.mark.parametrize("algo", ["pac", "pacv"])
def test_alpha_by_source_weighs_each_sample(algo):
    learner = make([meta()], algo, warmup=0.0, alpha=0.5)
    made = batch([0.1, -0.4], [0.3, -0.3], [0.0, 1.0])

    def loss(alpha):
        made.alpha = alpha if alpha is None else torch.tensor(alpha)
        return loss_of(learner, made).item()

    assert loss([0.5, 0.5]) == pytest.approx(loss(None))
    assert loss([1.0, 1.0]) == pytest.approx(loss_of(make([meta()], algo, warmup=0.0, alpha=1.0), made).item())
    # The loss is linear in each sample's alpha, and the samples differ.
    assert loss([1.0, 0.0]) + loss([0.0, 1.0]) == pytest.approx(loss([1.0, 1.0]) + loss([0.0, 0.0]))
    assert loss([1.0, 0.0]) != pytest.approx(loss([0.0, 1.0]), rel=1e-3)


def test_values_start_at_the_data():
    learner = make([meta(low=0.0, high=1.0)])
    made = batch([0.0] * 100, [0.0] * 100, [0.2] * 50 + [0.6] * 50)
    learner.start_at(made)
    latents = learner.model.encode(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    value = learner.low + learner.range * learner.model.expectation(learner.model.v(latents))
    assert value.item() == pytest.approx(0.4, abs=0.05)


def test_observations_in_other_units_are_the_same_to_the_model():
    """Hopper's height, 1.25 ± 0.14, in metres or in millimetres; the second scalar is constant, and stays finite."""
    height = torch.tensor([1.1, 1.2, 1.4, 1.5])
    latents = []
    for unit in (1, 1000):
        learner = make([meta(obs_dim=2)])
        obs = torch.stack([unit * height, torch.full((4,), 3.0)], 1)
        learner.start_at(batch(obs.tolist(), [0.0] * 4, [0.0, 1.0, 0.0, 1.0]))
        latents.append(learner.target_model.encode(obs, torch.zeros(4, dtype=torch.long)))
    torch.testing.assert_close(*latents, atol=1e-4, rtol=1e-4)
    assert latents[0].isfinite().all() and (latents[0][0] - latents[0][3]).abs().max() > 0.1


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_bf16_autocast_gives_the_loss_and_values_in_full_precision(algo):
    """As on a GPU, where training is in bf16: it runs, its loss is close, and values differ by less than bf16 resolves."""
    learner = make([meta()], algo, warmup=0.0)
    made = batch([0.1, -0.4, 0.3, 0.2], [0.3, -0.3, 0.1, 0.0], [0.0, 1.0, 0.5, 0.2])
    exact = loss_of(learner, made)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(learner, made)
        probs = torch.softmax(torch.stack([torch.zeros(101), 1e-3 * torch.arange(101)]), dim=-1)
        low, high = learner.model.mean_value(probs)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert 0.005 < high - low < 0.012  # of 0.5, where bf16's step is 0.004: 0.0085 exactly


def test_the_target_lags_and_gets_no_gradient():
    learner = make([meta()], "pac", warmup=0.0, target_rate=0.25)
    made = batch([0.1, 0.2], [0.3, -0.3], [0.0, 1.0], terminated=False)
    for _ in range(4):
        learner.update(made, torch.Generator().manual_seed(0))
    before = [p.clone() for p in learner.target_model.parameters()]
    learner.update(made, torch.Generator().manual_seed(0))
    for old, target, online in zip(before, learner.target_model.parameters(), learner.model.parameters()):
        torch.testing.assert_close(target, old + 0.25 * (online - old))
        assert not target.requires_grad


def test_a_non_finite_loss_stops_before_the_weights_change():
    learner = make([meta()], "bcq", warmup=0.0)
    before = [p.clone() for p in learner.model.parameters()]
    with pytest.raises(FloatingPointError, match="update 0"):
        learner.update(batch([float("nan")], [0.0], [0.0]), torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters()))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_flops_grow_with_the_batch_and_the_work(algo):
    config, settings = config_for("tiny", [TaskSpec("a", "go", 5, 2)]), settings_for(algo)
    one, two = (flops_per_update(config, settings, b) for b in (32, 64))
    assert 1.9 < two / one <= 2.01
    assert flops_per_update(config, settings_for("bc"), 32) <= one <= flops_per_update(config, settings_for("pac"), 32)
