"""Shapes, masks, sizes, and the policy's distribution."""

import math

import pytest
import torch

from model import (SIZES, Attention, Perceiver, Policy, Scalars, Shared, config_for,
                   count_parameters, for_each_sample, to_bins)
from tests.conftest import meta, tiny


def outputs(model, obs, action, task):
    latents = model.encode(obs, task)
    policy = model.policy(latents, task)
    q, v = model.q(latents, action, task), model.v(latents)
    return policy.log_components, policy.log_bins, q, v


def seeded(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- the model

def test_padding_changes_nothing(model):
    obs, action, task = torch.randn(4, 5), torch.rand(4, 3, 2) * 2 - 1, torch.tensor([0, 0, 1, 1])
    junk_obs, junk_action = obs.clone(), action.clone()
    junk_obs[:2, 3:] = 1e3  # task 0 has 3 scalars and 2 actions, task 1 has 5 and 1
    junk_action[2:, :, 1:] = 1e3
    junk = outputs(model, junk_obs, junk_action, task)
    for one, two in zip(outputs(model, obs, action, task), junk):
        torch.testing.assert_close(one, two)


def test_a_tasks_map_is_as_high_as_its_features_and_starts_at_their_scale():
    """So that its tokens are as large as those of a task with more scalars."""
    torch.manual_seed(0)
    encoder = Scalars((3, 30), tokens=8, width=64)
    assert encoder.weight.shape == (4 * (3 + 30), 8 * 64)
    narrow, wide = encoder.weight.split(encoder.heights)
    assert narrow.std().item() == pytest.approx(12**-0.5, rel=0.05)
    assert wide.std().item() == pytest.approx(120**-0.5, rel=0.05)


@pytest.mark.parametrize("tasks", [1, 3])
def test_shared_rows_are_projected_once_and_looked_up(tasks):
    table, index, seen = torch.randn(tasks, 2, 4), torch.tensor([0, tasks - 1, 0]), []

    def double(x):
        seen.append(x.shape)
        return 2 * x

    torch.testing.assert_close(for_each_sample(double, Shared(table, index)), 2 * table[index])
    assert seen == [table.shape]


def test_attention_to_shared_rows_is_attention_to_copies_of_them():
    block, index = Attention(8, 2, 2, cross=True), torch.tensor([1, 0, 1])
    x, words, own = torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.randn(3, 5, 8)
    mask = torch.rand(3, 9) < 0.7
    shared = block(Shared(x, index), own, Shared(words, index), mask=mask)
    copies = block(x[index], torch.cat([own, words[index]], dim=1), mask=mask)
    torch.testing.assert_close(shared, copies)


def test_the_input_and_the_task_do_matter(model):
    obs, action = torch.randn(1, 5), torch.rand(1, 3, 2) * 2 - 1
    first, second = torch.tensor([0]), torch.tensor([1])
    base = outputs(model, obs, action, first)
    for other in (outputs(model, obs + 0.5, action, first), outputs(model, obs, action, second)):
        for one, two in zip(base, other):
            assert (one - two).abs().max() > 1e-3
    q = base[2]
    assert (q[0, 0] - q[0, 1]).abs().max() > 1e-3  # two actions, two values


def test_rows_of_a_batch_do_not_touch(model):
    obs, action, task = torch.randn(4, 5), torch.rand(4, 3, 2), torch.tensor([0, 1, 0, 1])
    together = outputs(model, obs, action, task)
    for row in range(4):
        own = slice(row, row + 1)
        alone = outputs(model, obs[own], action[own], task[own])
        for one, two in zip(alone, together):
            torch.testing.assert_close(one[0], two[row], atol=1e-5, rtol=1e-4)


def test_sampled_actions_are_scored_independently(model):
    obs, task = torch.randn(2, 5), torch.tensor([0, 1])
    action = torch.rand(2, 6, 2) * 2 - 1
    latents = model.encode(obs, task)
    one_by_one = torch.cat([model.q(latents, action[:, n:n + 1], task) for n in range(6)], 1)
    torch.testing.assert_close(model.q(latents, action, task), one_by_one, atol=1e-5, rtol=1e-4)


def test_attention_entropy_is_that_of_uniform_attention_at_first():
    model = Perceiver(tiny([meta("a", 4, 1)]))
    with torch.no_grad():
        model.encoder.to_q.weight.zero_()
    entropy = model.attention_entropy(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(entropy, torch.log(torch.tensor(11.0)))  # 8 tokens, and 3 words


# ---------------------------------------------------------------- sizes

def of_size(size):
    return Perceiver(config_for(size, [meta("a", 23, 7)] * 7))


@pytest.mark.parametrize("size, millions", [("xxs", 32), ("xs", 73), ("s", 164), ("m", 400),
                                            ("l", 988)])
def test_the_papers_sizes_within_five_per_cent(size, millions):
    with torch.device("meta"):
        model = of_size(size)
    assert abs(count_parameters(model) / 1e6 / millions - 1) < 0.05


def test_small_is_at_most_a_million():
    assert count_parameters(of_size("small")) <= 1e6


def test_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match="unknown size 'huge'; there are: tiny, small"):
        config_for("huge", [])
    assert len(SIZES) == 9


# ---------------------------------------------------------------- the policy's distribution

def mixture(*components, mask=None):
    """A Policy of one state from (probability, bins of each dimension) pairs."""
    shares = torch.tensor([[share for share, _ in components]])  # (1, C)
    bins = torch.tensor([[bins for _, bins in components]])  # (1, C, A, K)
    mask = torch.ones(1, bins.shape[2], dtype=torch.bool) if mask is None else torch.tensor([mask])
    return Policy(shares.log(), bins.log(), mask)


def test_log_prob_sums_over_components_and_multiplies_over_dimensions():
    policy = mixture((0.25, [[0.5, 0.5], [0.2, 0.8]]), (0.75, [[0.1, 0.9], [0.6, 0.4]]))
    actions = torch.tensor([[[-0.5, 0.5], [0.5, -0.5]]])  # bins (0, 1) and (1, 0)
    by_hand = [0.25 * 0.5 * 0.8 + 0.75 * 0.1 * 0.4, 0.25 * 0.5 * 0.2 + 0.75 * 0.9 * 0.6]
    assert policy.log_prob(actions)[0].exp().tolist() == pytest.approx(by_hand)


def test_log_prob_leaves_out_absent_dimensions():
    bins = [[0.7, 0.3], [0.9, 0.1]]
    first = mixture((1.0, bins), mask=[True, False])
    assert first.log_prob(torch.tensor([[[0.3, 0.9]]])).exp().item() == pytest.approx(0.3)


def test_samples_follow_the_policy():
    policy = mixture((1.0, [[0.7, 0.2, 0.1]]))  # three bins: centres -2/3, 0, 2/3
    actions = policy.sample(seeded(1, 100_000, 2))[0, :, 0]
    for centre, share in ((-2 / 3, 0.7), (0.0, 0.2), (2 / 3, 0.1)):
        assert abs(((actions - centre).abs() < 1e-5).float().mean() - share) < 0.01


def test_a_policy_that_is_not_normalised_is_sampled_as_if_it_were():
    policy = mixture((3.0, [[1.4, 0.4, 0.2]]), (1.0, [[0.0, 0.0, 5.0]]))
    actions = policy.sample(seeded(1, 100_000, 2))[0, :, 0]
    assert (actions > 0.5).float().mean().item() == pytest.approx(0.75 * 0.1 + 0.25, abs=0.01)


def test_mean_and_mode_by_hand():
    # Bins' centres: -2/3, 0, 2/3. The mode is of the likeliest component, not of the whole mixture.
    policy = mixture((0.4, [[0.0, 0.0, 1.0]]), (0.6, [[0.4, 0.3, 0.3]]))
    mean = 0.6 * (-2 / 3 * 0.4 + 2 / 3 * 0.3) + 0.4 * 2 / 3
    assert policy.mean().item() == pytest.approx(mean)
    assert policy.mode().item() == pytest.approx(-2 / 3)


def test_entropy_is_of_the_whole_mixture_a_dimension_there_is():
    even = [0.5, 0.5]
    policy = mixture((0.5, [[1.0, 0.0], even, even]), (0.5, [[0.0, 1.0], [1.0, 0.0], even]),
                     mask=[True, True, False])
    of_second = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert policy.entropy().item() == pytest.approx((math.log(2) + of_second) / 2)


def test_sharpen_squares():
    sharp = mixture((0.75, [[0.6, 0.4]]), (0.25, [[0.5, 0.5]])).sharpen()
    components = torch.softmax(sharp.log_components, dim=-1)
    bins = torch.softmax(sharp.log_bins, dim=-1)[0, :, 0]
    torch.testing.assert_close(components, torch.tensor([[0.9, 0.1]]))  # 9 : 1
    torch.testing.assert_close(bins, torch.tensor([[0.36 / 0.52, 0.16 / 0.52], [0.5, 0.5]]))


def test_dimensions_of_a_sample_come_from_one_component():
    """A quarter pulls both joints low, the rest high; independent dimensions would mix the two."""
    policy = mixture((0.25, [[1.0, 0.0], [1.0, 0.0]]), (0.75, [[0.0, 1.0], [0.0, 1.0]]))
    actions = policy.sample(seeded(1, 10_000, 3))[0]  # (N, A)
    assert (actions[:, 0] == actions[:, 1]).all()
    assert abs((actions[:, 0] > 0).float().mean() - 0.75) < 0.02
    assert policy.mean()[0].tolist() == pytest.approx([0.25, 0.25])
    both, mixed = policy.log_prob(torch.tensor([[[0.5, 0.5], [-0.5, 0.5]]]))[0].exp().tolist()
    assert both == pytest.approx(0.75) and mixed == 0


def test_within_a_component_dimensions_are_independent_of_it_and_of_each_other():
    policy = mixture(*[(0.5, [[0.5, 0.5], [0.5, 0.5]])] * 2)
    noise = seeded(1, 40_000, 3)
    high = policy.sample(noise)[0] > 0  # (N, 2)
    quadrant = 2 * high[:, 0] + high[:, 1]
    for choice in (noise[0, :, 0] < 0.5, noise[0, :, 0] >= 0.5):  # the component
        shares = torch.bincount(quadrant[choice], minlength=4) / choice.sum()
        torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_bins_hold_their_own_centres_and_the_box_ends():
    centres = (2 * torch.arange(51) + 1) / 51 - 1
    assert (to_bins(centres, 51) == torch.arange(51)).all()
    assert to_bins(torch.tensor([-1.0, 1.0]), 51).tolist() == [0, 50]
