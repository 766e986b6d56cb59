"""Shapes, masks, sizes, and the policy's distribution."""

import pytest
import torch

from model import (SIZES, Perceiver, TaskSpec, config_for, count_parameters, linear_of_task, log_prob, mean_action,
                   sample_actions, sharpen, to_bins)
from tests.conftest import meta, tiny


def outputs(model, obs, action, task):
    latents = model.encode(obs, task)
    return *model.policy(latents, task), model.q(latents, action, task), model.v(latents)


def test_padding_changes_nothing(model):
    obs, action, task = torch.randn(4, 5), torch.rand(4, 3, 2) * 2 - 1, torch.tensor([0, 0, 1, 1])
    junk_obs, junk_action = obs.clone(), action.clone()
    junk_obs[:2, 3:] = 1e3  # task 0 has 3 scalars and 2 actions, task 1 has 5 and 1
    junk_action[2:, :, 1:] = 1e3
    for one, two in zip(outputs(model, obs, action, task), outputs(model, junk_obs, junk_action, task)):
        torch.testing.assert_close(one, two)


def test_each_sample_goes_through_its_own_tasks_matrix():
    x, weight, bias, task = torch.randn(5, 3, 4), torch.randn(3, 4, 2), torch.randn(3, 2), torch.tensor([2, 0, 2, 0, 0])
    by_hand = torch.stack([x[i] @ weight[t] + bias[t] for i, t in enumerate(task)])
    torch.testing.assert_close(linear_of_task(x, weight, bias, task), by_hand)


def test_the_input_and_the_task_do_matter(model):
    obs, action = torch.randn(1, 5), torch.rand(1, 3, 2) * 2 - 1
    base = outputs(model, obs, action, torch.tensor([0]))
    for other in (outputs(model, obs + 0.5, action, torch.tensor([0])), outputs(model, obs, action, torch.tensor([1]))):
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(base, other))
    q = base[2]
    assert (q[0, 0] - q[0, 1]).abs().max() > 1e-3  # two actions, two values


def test_rows_of_a_batch_do_not_touch(model):
    obs, action, task = torch.randn(4, 5), torch.rand(4, 3, 2), torch.tensor([0, 1, 0, 1])
    together = outputs(model, obs, action, task)
    for row in range(4):
        alone = outputs(model, obs[row:row + 1], action[row:row + 1], task[row:row + 1])
        for one, two in zip(alone, together):
            torch.testing.assert_close(one[0], two[row], atol=1e-5, rtol=1e-4)


def test_sampled_actions_are_scored_independently(model):
    obs, task = torch.randn(2, 5), torch.tensor([0, 1])
    action = torch.rand(2, 6, 2) * 2 - 1
    latents = model.encode(obs, task)
    one_by_one = torch.cat([model.q(latents, action[:, n:n + 1], task) for n in range(6)], 1)
    torch.testing.assert_close(model.q(latents, action, task), one_by_one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size, millions", [("xxs", 32), ("xs", 73), ("s", 164), ("m", 400), ("l", 988)])
def test_the_papers_sizes_within_five_per_cent(size, millions):
    with torch.device("meta"):
        model = Perceiver(config_for(size, [TaskSpec("a", "go", 23, 7)] * 7))
    assert abs(count_parameters(model) / 1e6 / millions - 1) < 0.05


def test_small_is_at_most_a_million():
    assert count_parameters(Perceiver(config_for("small", [TaskSpec("a", "go", 23, 7)] * 7))) <= 1e6


def test_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match="unknown size 'huge'; there are: tiny, small"):
        config_for("huge", [])
    assert len(SIZES) == 9


def mixture(*components):
    """A policy of one state from (probability, bins of each dimension) pairs, as log-probabilities."""
    return torch.log(torch.tensor([[share for share, _ in components]])), torch.log(torch.tensor([[p for _, p in components]]))


def test_sharpen_squares():
    components, bins = (torch.log_softmax(x, -1) for x in sharpen(mixture((0.75, [[0.6, 0.4]]), (0.25, [[0.5, 0.5]]))))
    torch.testing.assert_close(components.exp(), torch.tensor([[0.9, 0.1]]))  # 9 : 1
    torch.testing.assert_close(bins.exp()[0, :, 0], torch.tensor([[0.36 / 0.52, 0.16 / 0.52], [0.5, 0.5]]))


def test_samples_follow_the_policy():
    policy = mixture((1.0, [[0.7, 0.2, 0.1]]))  # one dimension of three bins: centres -2/3, 0, 2/3
    actions = sample_actions(policy, torch.rand(1, 100_000, 2, generator=torch.Generator().manual_seed(0)))[0, :, 0]
    for centre, share in ((-2 / 3, 0.7), (0.0, 0.2), (2 / 3, 0.1)):
        assert abs(((actions - centre).abs() < 1e-5).float().mean() - share) < 0.01
    torch.testing.assert_close(mean_action(policy)[0, 0], torch.tensor(-2 / 3 * 0.6))
    torch.testing.assert_close(log_prob(policy, torch.tensor([[[-0.9], [0.1]]]), torch.ones(1, 1, dtype=torch.bool)),
                               torch.log(torch.tensor([[0.7, 0.2]])))


def test_dimensions_of_a_sample_come_from_one_component():
    """A quarter pulls both joints low, three quarters both high; independent dimensions would mix the two."""
    policy = mixture((0.25, [[1.0, 0.0], [1.0, 0.0]]), (0.75, [[0.0, 1.0], [0.0, 1.0]]))
    actions = sample_actions(policy, torch.rand(1, 10_000, 3, generator=torch.Generator().manual_seed(0)))[0]  # (N, A)
    assert (actions[:, 0] == actions[:, 1]).all() and abs((actions[:, 0] > 0).float().mean() - 0.75) < 0.02
    assert mean_action(policy)[0].tolist() == pytest.approx([0.25, 0.25])
    both, mixed = log_prob(policy, torch.tensor([[[0.5, 0.5], [-0.5, 0.5]]]), torch.ones(1, 2, dtype=torch.bool))[0].exp()
    assert both.item() == pytest.approx(0.75) and mixed.item() == 0


def test_within_a_component_dimensions_are_independent_of_it_and_of_each_other():
    policy = mixture(*[(0.5, [[0.5, 0.5], [0.5, 0.5]])] * 2)
    noise = torch.rand(1, 40_000, 3, generator=torch.Generator().manual_seed(0))
    high = sample_actions(policy, noise)[0] > 0  # (N, 2)
    for choice in (noise[0, :, 0] < 0.5, noise[0, :, 0] >= 0.5):  # the component
        shares = torch.stack([(high[choice] == torch.tensor(pair)).all(1).float().mean() for pair in
                              ([False, False], [False, True], [True, False], [True, True])])
        torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_bins_hold_their_own_centres_and_the_box_ends():
    centres = (2 * torch.arange(51) + 1) / 51 - 1
    assert (to_bins(centres, 51) == torch.arange(51)).all()
    assert to_bins(torch.tensor([-1.0, 1.0]), 51).tolist() == [0, 50]


def test_log_prob_leaves_out_absent_dimensions():
    components, bins = torch.log_softmax(torch.randn(1, 3), -1), torch.log_softmax(torch.randn(1, 3, 2, 5), -1)
    action = torch.tensor([[[0.3, 0.9]]])
    one = log_prob((components, bins), action, torch.tensor([[True, False]]))
    torch.testing.assert_close(one, log_prob((components, bins[:, :, :1]), action[..., :1], torch.tensor([[True]])))


def test_attention_entropy_is_that_of_uniform_attention_at_first():
    metas = [meta("a", 4, 1)]
    model = Perceiver(tiny(metas))
    with torch.no_grad():
        model.encoder.to_q.weight.zero_()
    entropy = model.attention_entropy(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(entropy, torch.log(torch.tensor(11.0)))  # 8 tokens of scalars and 3 words
