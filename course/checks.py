"""What each exercise's function must do, tried on small cases whose answer is known.

A check takes the function, so that the tests can give it wrong ones too. It raises Wrong with a
sentence that names what is wrong, and does not tell how to do it.
"""

import math

import numpy as np
import torch

from course import Wrong
from data import FINAL_OBS, FLAG, REWARD, TERMINATED, TRUNCATED, Batch
from kernels import attention as attending
from learner import Learner, data_weights, n_step_return, settings_for
from model import Policy, config_for

LARGEST_ERROR = 1e-4  # relative to 1, or to the value where that is larger


def expect(got, want, case, kind="a value"):
    """Wrong says how `got` differs from `want`. case: what was tried; kind: what is wrong then."""
    want = torch.as_tensor(want, dtype=torch.float64)
    if got is None:
        raise Wrong(f"nothing is returned: {case}")
    if isinstance(got, np.ndarray):
        got = got.copy()  # torch takes none that is reversed, as by [::-1]
    try:
        got = torch.as_tensor(got).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"a type: {type(got).__name__} is no tensor of numbers: {case}") from None
    if got.shape != want.shape:
        shapes = f"{tuple(got.shape)} where {tuple(want.shape)} is right"
        raise Wrong(f"a shape: {shapes}: {case}")
    error = (got - want).abs() / want.abs().clamp(min=1)
    if (error < LARGEST_ERROR).all():
        return
    worst = error.nan_to_num(nan=math.inf).flatten().argmax()
    numbers = f"{got.flatten()[worst]:.4g} where {want.flatten()[worst]:.4g} is right"
    if not got.isfinite().all():
        kind = "not finite"
    elif torch.allclose(-got, want, atol=LARGEST_ERROR):
        kind = "a sign"
    raise Wrong(f"{kind}: {case} ({numbers})")


def expect_gradient(got, leaf, want, case):
    """What reaches a leaf from the sum of a result; code that leaves torch loses it."""
    grad = None
    if getattr(got, "requires_grad", False):
        grad = torch.autograd.grad(got.sum(), leaf, allow_unused=True)[0]
    if grad is None:
        raise Wrong(f"a gradient: none reaches {case}")
    expect(grad, want, f"what reaches {case}", "a gradient")


def seeded(*shape, seed=0):
    """Uniform numbers on [0, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tensors_in(given):
    """The tensors among arguments, arrays as well; they share their memory."""
    if isinstance(given, (Batch, Policy)):
        given = list(vars(given).values())
    if isinstance(given, (list, tuple)):
        return [tensor for part in given for tensor in tensors_in(part)]
    known = isinstance(given, (torch.Tensor, np.ndarray))
    return [torch.as_tensor(given).detach()] if known else []


def watched(check):
    """The check, which then also refuses a function that changes what it is given."""
    def check_and_watch(function):
        def call(*given):
            tensors = tensors_in(given)
            before = [tensor.clone() for tensor in tensors]
            got = function(*given)
            if not all(map(torch.equal, tensors, before)):
                raise Wrong("an input: the function changes what it is given")
            return got
        check(call)
    return check_and_watch


# ---------------------------------------------------------------- returns

@watched
def return_to_go(function):
    expect(function(np.array([1.0, 2.0, 4.0]), True, 0.5), [3, 4, 4],
           "the returns of three steps, after which the episode is over for good")
    expect(function(np.ones(4), False, 0.5), [2, 2, 2, 2],
           "a reward of 1 at each step, cut off by a time limit, which is not an end")
    expect(function(np.array([2.0]), False, 0.9), [20],
           "an episode of one step, cut off: shorter than the average that stands for its future")
    expect(function(np.array([8.0, 0.0, 1.0, 3.0]), False, 0.5), [8.875, 1.75, 3.5, 5],
           "which steps stand for the unseen future of an episode that was cut off")
    expect(function(np.eye(1, 100)[0], False, 0.99)[0], 1 + 0.99**100,
           "a reward of 1 a hundred steps before the cut: how many steps stand for the future")


def window(reward, terminated, length):
    """A Batch of one window of T steps, of which the first `length` are of the episode."""
    T = len(reward)
    rows = torch.zeros(1, T + 1, 5)  # obs, action, reward, return to go, flag
    rows[0, :length, REWARD] = torch.tensor(reward[:length])
    rows[0, length:, FLAG] = FINAL_OBS
    if terminated or length < T:
        rows[0, length - 1, FLAG] = TERMINATED if terminated else TRUNCATED
    return Batch(rows, 1, torch.tensor([0]))


@watched
def n_step_returns(function):
    half = torch.tensor([0.5])
    cases = [
        (window([1.0, 2.0, 4.0], False, 3), 3.0, 0.125, "three steps inside an episode"),
        (window([1.0, 2.0, 4.0], True, 2), 2.0, 0.0, "an episode that ends for good in the window"),
        (window([1.0, 2.0, 4.0], False, 2), 2.0, 0.25,
         "a time limit within the window: fewer steps, and the future still counts"),
        (window([3.0], False, 1), 3.0, 0.5, "a window of one step"),
        (window([1.0, 2.0, 4.0], True, 3), 3.0, 0.0,
         "an episode that ends for good at the last step of the window"),
    ]
    for batch, reward, bootstrap, case in cases:
        got = pair(function(batch, half))
        expect(got[0], [reward], f"the rewards of {case}")
        expect(got[1], [bootstrap], f"the discount of what follows {case}")
    two = Batch(torch.cat([cases[0][0].rows, cases[1][0].rows]), 1, torch.tensor([0, 1]))
    got = pair(function(two, torch.tensor([0.5, 0.1])))
    expect(got[0], [3.0, 1.2], "the rewards of two tasks, each with its own discount")
    expect(got[1], [0.125, 0.0], "what follows, of two tasks with discounts of their own")


def pair(got):
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Wrong("a type: two tensors are returned, the reward and the discount")
    return got


# ---------------------------------------------------------------- the distributional critic

def at(*atoms, of=5):
    """Distributions (B, M), each with all of its mass at one atom."""
    return torch.eye(of)[list(atoms)]


@watched
def project(function):
    def moved(probs, shift, scale):
        shift, scale = torch.tensor(shift), torch.tensor(scale)
        return function(probs.clone(), shift, scale)

    uniform = torch.full((1, 5), 0.2)
    expect(moved(uniform, [0.0], [1.0]), uniform, "a distribution that is not moved at all")
    expect(moved(at(0, 2), [0.25, 0.25], [1.0, 1.0]), at(1, 3), "a move by exactly one atom")
    expect(moved(at(0), [0.1], [1.0]), [[0.6, 0.4, 0, 0, 0]], "a move that ends between two atoms")
    expect(moved(at(0, 4), [-0.5, 0.5], [1.0, 1.0]), at(0, 4),
           "what is moved past the first or the last atom")
    expect(moved(at(4), [0.25], [0.5]), at(3), "a shift of 1/4 and a scale of 1/2")
    expect(moved(uniform, [0.5], [0.0]), at(2), "a scale of 0, which gathers all mass in one place")
    probs = torch.softmax(4 * seeded(6, 11), -1)
    shift, scale = 0.2 * seeded(6, seed=1), 0.7 * seeded(6, seed=2)
    got, atoms = function(probs.clone(), shift, scale), torch.linspace(0, 1, 11)
    expect(got.sum(-1), torch.ones(6), "the sum of a distribution after it was moved", "lost mass")
    got = torch.as_tensor(got).double()
    expect(got @ atoms.double(), shift + scale * (probs @ atoms),
           "the mean of a distribution after it was moved, of which nothing was cut off")


@watched
def bellman(function):
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0]] * 2, requires_grad=True)
    probs = torch.cat([at(0), at(4)]).requires_grad_()
    shift, scale = torch.tensor([0.25, 0.1]), torch.tensor([1.0, 0.5])
    returns = torch.tensor([1.2, 0.1])  # past the last atom, and between two
    of_next = torch.stack([at(1)[0], torch.tensor([0, 0, 0.6, 0.4, 0])])
    of_return = torch.stack([at(4)[0], torch.tensor([0.6, 0.4, 0, 0, 0])])
    log_probs = torch.log_softmax(logits.detach(), -1)
    for share, case in ((0.0, "a target made of the next state's value alone"),
                        (1.0, "a target made of the observed return alone"),
                        (0.25, "a target of which a quarter is the observed return")):
        gamma = (1 - share) * of_next + share * of_return
        got = function(logits, probs, shift, scale, returns, share)
        expect(got, -(gamma * log_probs).sum(-1), f"the loss of {case}")
        logits.grad = probs.grad = None
        got.sum().backward()
        expect(logits.grad, log_probs.exp() - gamma, f"the gradient of {case}", "a gradient")
        if probs.grad is not None and probs.grad.any():
            raise Wrong("a gradient: the target is learnt from, and must not learn itself")


# ---------------------------------------------------------------- the policy's distribution

def mixture(*components, mask=None):
    """A Policy of one state, of pairs: a component's probability, the bins of each dimension."""
    shares = torch.tensor([[share for share, _ in components]])  # (1, C)
    bins = torch.tensor([[bins for _, bins in components]])  # (1, C, A, K)
    mask = torch.ones(1, bins.shape[2], dtype=torch.bool) if mask is None else torch.tensor([mask])
    return Policy(shares.log(), bins.log(), mask)


def states(*policies):
    """The Policy of several states."""
    return Policy(*(torch.cat(parts) for parts in zip(*(vars(p).values() for p in policies))))


@watched
def log_prob(function):
    bins = [[0.5, 0.5], [0.2, 0.8]]
    one = mixture((1.0, bins))
    actions = torch.tensor([[[-0.5, 0.5], [0.5, -0.5], [1.0, 1.0]]])  # (1, 3, 2)
    expect(function(one, actions), np.log([[0.4, 0.1, 0.4]]),
           "the log-probability of three actions of two dimensions, with one component")
    two = mixture((0.25, bins), (0.75, [[0.1, 0.9], [0.6, 0.4]]))
    expect(function(two, actions[:, :2]), np.log([[0.25 * 0.4 + 0.75 * 0.04,
                                                   0.25 * 0.1 + 0.75 * 0.54]]),
           "the log-probability under a mixture of two components of unlike weight")
    absent = mixture((1.0, [[0.7, 0.3], [0.9, 0.1]]), mask=[True, False])
    expect(function(absent, torch.tensor([[[0.3, 0.9]]])), np.log([[0.3]]),
           "a dimension that this task does not have has a say in the probability", "a mask")
    expect(function(states(one, absent), torch.tensor([[[-0.5, 0.5]], [[0.3, 0.9]]])),
           np.log([[0.4], [0.3]]), "two states, each with a policy of its own")
    one.log_bins.requires_grad_()
    four = mixture((1.0, [[0.1, 0.2, 0.3, 0.4]]))
    expect(function(four, torch.tensor([[[-0.6], [-0.4], [0.6]]])), np.log([[0.1, 0.2, 0.4]]),
           "four bins of a width of 0.5, and actions that are not at their centres")
    rare = mixture((1.0, [[1.0, 1e-27], [1.0, 1e-27]]))
    expect(function(rare, torch.tensor([[[0.5, 0.5]]])), [[2 * math.log(1e-27)]],
           "an action so rare that its probability is 0 in float32")
    expect_gradient(function(one, actions[:, :1]), one.log_bins, [[[[1, 0], [0, 1]]]],
                    "the policy from an action's log-probability")


@watched
def sample(function):
    policy = mixture((1.0, [[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]))
    count = 20_000
    noise = seeded(1, count, 3)
    actions = function(policy, noise)
    if not isinstance(actions, torch.Tensor):
        raise Wrong("a type: a tensor of actions is returned")
    expect(actions.shape, (1, count, 2), "the shape of the actions, (B, N, A)", "a shape")
    expect(function(policy, noise), actions, "the same noise gives other actions")
    nearest = ((1.5 * actions).round() / 1.5 - actions).abs().max()  # -2/3, 0, 2/3
    if nearest > 1e-4:
        raise Wrong(f"a value: an action lies {nearest:.2g} beside the centre of its bin")
    for dimension, want in ((0, [0.7, 0.2, 0.1]), (1, [0.2, 0.2, 0.6])):
        got = shares_of(actions[0, :, dimension])
        about(got, want, f"how often each bin of dimension {dimension} is drawn")
    together = ((actions[0, :, 0] > 0.5) & (actions[0, :, 1] > 0.5)).double().mean()
    about(together, 0.06, "dimensions of one component are to be drawn independently")
    low, high = [[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]
    both = mixture((0.25, low), (0.75, high))
    expect(function(both, noise[:, :50]), function(both, noise[:, :50]),
           "two components: the same noise gives other actions")
    actions = function(both, seeded(1, count, 3))[0] > 0
    about((actions[:, 0] != actions[:, 1]).double().mean(), 0.0,
          "actions that no component would ever make")
    about(actions[:, 0].double().mean(), 0.75, "how often the heavier component is drawn")
    left, right = [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]
    actions = function(mixture((0.5, [left, left]), (0.5, [right, right])), noise)[0]
    for dimension in (0, 1):
        drawn = actions[actions[:, 0] < 0, dimension]  # one component's
        about((drawn < -0.5).double().mean(), 0.5, "the bin depends on the number that chose the "
              "component")
    two = states(mixture((1.0, low)), mixture((1.0, high)))
    drawn = function(two, seeded(2, 4, 3))
    expect(drawn.sign(), torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 4, 2),
           "two states, each with a policy of its own")
    unlike = states(mixture((1.0, low), (0.0, high)), mixture((0.0, low), (1.0, high)))
    drawn = function(unlike, seeded(2, 4, 3))
    expect(drawn.sign(), torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 4, 2),
           "two states, each with components of its own weight")
    sharp = mixture((0.5, [[0.1, 0.3]]), (1.5, [[0.3, 0.1]]))
    drawn = function(sharp, noise[..., :2])[0, :, 0] > 0
    about(drawn.double().mean(), 0.25 * 0.75 + 0.75 * 0.25,
          "a policy that is not normalised: how often the upper bin is drawn")


def shares_of(values):
    """How often each of three bins was drawn."""
    return torch.bincount((1.5 * (values + 1)).long().clamp(0, 2), minlength=3) / len(values)


def about(got, want, case):
    """As `expect`, of what is only known up to chance."""
    want = torch.as_tensor(want, dtype=torch.float64)
    if not (got - want).abs().max() <= 0.02:  # nor is NaN
        numbers = f"{got.tolist()} where about {want.tolist()} is right"
        raise Wrong(f"a share of the draws: {case} ({numbers})")


@watched
def entropy(function):
    even, certain = [0.5, 0.5], [1.0, 0.0]
    expect(function(mixture((1.0, [even]))), math.log(2), "one dimension of two even bins, in nats")
    expect(function(mixture((1.0, [even, certain]))), math.log(2) / 2,
           "two dimensions, the second of which is certain")
    expect(function(mixture((0.5, [certain]), (0.5, [[0.0, 1.0]]))), math.log(2),
           "two components, each certain, of different bins")
    of_mixture = -0.875 * math.log(0.875) - 0.125 * math.log(0.125)
    expect(function(mixture((0.25, [even]), (0.75, [certain]))), of_mixture,
           "two components of unlike weight")
    expect(function(mixture((1.0, [certain, even]), mask=[True, False])), 0.0,
           "a dimension that this task does not have is counted", "a mask")
    two = states(mixture((1.0, [even])), mixture((1.0, [certain])))
    expect(function(two), math.log(2) / 2, "two states, of which one is certain")
    unlike = states(mixture((1.0, [even, even])),
                    mixture((1.0, [certain, even]), mask=[True, False]))
    expect(function(unlike), math.log(2) * 2 / 3, "a state of two dimensions and one of one")


@watched
def cloning_loss(function):
    policy = mixture((1.0, [[0.25, 0.75]]))
    two = states(policy, policy)
    expect(function(policy, torch.tensor([[0.5]])), [-math.log(0.75)],
           "the loss of the likelier of two actions")
    expect(function(two, torch.tensor([[0.5], [-0.5]])), [-math.log(0.75), -math.log(0.25)],
           "the losses of two states, one number each")
    policy.log_bins.requires_grad_()
    expect_gradient(function(policy, torch.tensor([[0.5]])), policy.log_bins, [[[[0, -1]]]],
                    "the policy from the loss")


# ---------------------------------------------------------------- weights

@watched
def weights_of_data(function):
    zero, third = torch.zeros(2, dtype=torch.long), math.log(3) / 2
    expect(function(torch.tensor([0.2, 0.4]), zero, 1, third), [0.5, 1.5],
           "the weights of two rows, one mean deviation below the mean and one above it")
    expect(function(torch.tensor([1.0, 7.0]), zero, 1, 0.0), [1, 1], "a focus of 0")
    strong = torch.tensor([-3.0, 3.0]).exp()
    expect(function(torch.tensor([0.2, 0.4]), zero, 1, 3.0), strong / strong.mean(),
           "a focus of 3, and rows that are one mean deviation from the mean")
    tasks = torch.tensor([0, 1, 0, 1])
    expect(function(torch.tensor([0.2, 90.0, 0.4, 110.0]), tasks, 2, third), [0.5, 0.5, 1.5, 1.5],
           "two tasks whose returns are of unlike size")
    expect(function(torch.tensor([0.2, 5.0, 0.4]), torch.tensor([0, 1, 0]), 2, third),
           [0.5, 1, 1.5], "a task of which there is one row")
    for sign, case in ((-1, "an outlier far below its task rules the weights"),
                       (1, "an outlier far above its task rules the weights")):
        merit = sign * torch.tensor([0.0] * 9 + [90.0])  # the mean is 9, the mean deviation 16.2
        deviation = sign * torch.tensor([-9 / 16.2] * 9 + [2.0])  # the outlier's 5 are cut
        raw = deviation.exp()
        expect(function(merit, torch.zeros(10, dtype=torch.long), 1, 1.0), raw / raw.mean(), case)


@watched
def improvement(function):
    log_3 = math.log(3)
    one = torch.ones(1)
    expect(function(torch.tensor([[0.0, log_3]]), one, 1.0), [[0.25, 0.75]],
           "the weights of two actions whose values differ by log 3")
    expect(function(torch.tensor([[0.0, 0.2 * log_3]]), one, 0.2), [[0.25, 0.75]],
           "the weights at an eta of 0.2")
    expect(function(torch.tensor([[0.0, 0.1 * log_3]]), 0.1 * one, 1.0), [[0.25, 0.75]],
           "the weights where Q's spread is a tenth")
    expect(function(torch.tensor([[0.0, 3 * log_3], [log_3, 0.0]]), torch.tensor([3.0, 1.0]), 1.0),
           [[0.25, 0.75], [0.75, 0.25]], "two states, each with the spread of its own task")
    expect(function(torch.tensor([[0.0, 500.0]]), one, 1.0), [[0, 1]], "values far apart")
    expect(function(torch.zeros(1, 2), 0 * one, 1.0), [[0.5, 0.5]], "a spread of 0")


@watched
def improve_on_data(function):
    """Against w * clone, with the advantage worked out here."""
    metas = [dict(name=name, instruction="go", obs_dim=2, action_dim=1, discount=0.5,
                  return_to_go=[0.0, 1.0]) for name in "ab"]
    settings = settings_for("pacv", eta=0.5, n_step=2)
    learner = Learner(config_for("tiny", metas), settings, metas, 10)
    with torch.no_grad():  # a trained critic tells states apart, and theta' lags behind theta
        learner.target_model.v_head[-1].weight.mul_(20)
        learner.model.v_head[-1].weight.mul_(-20)
    rows = seeded(8, 3, 6)
    rows[..., FLAG] = 0
    rows[:, 2, FLAG] = FINAL_OBS
    rows[3, 0, FLAG], rows[3, 1:, FLAG] = TERMINATED, FINAL_OBS
    rows[3, 1, REWARD] = 0
    batch = Batch(rows, 2, torch.tensor([0, 1] * 4))
    reward, bootstrap = n_step_return(batch, learner.discount[batch.task])
    shift = (reward - (1 - bootstrap) * learner.low[batch.task]) / learner.range[batch.task]
    clone = (1 + seeded(8, seed=1)).requires_grad_()
    got = function(learner, batch, clone, shift, bootstrap)
    if not isinstance(got, (tuple, list)) or len(got) != 3 or not isinstance(got[2], dict):
        raise Wrong("a type: the term, the next value's distribution and metrics are returned")
    target = learner.target_model
    with torch.no_grad():
        v_now, v_after = (target.v(target.encode(obs, batch.task))
                          for obs in (batch.obs[:, 0], batch.next_obs[:, -1]))
    now, after = target.expectation(v_now), target.expectation(v_after)
    advantage = shift + bootstrap * after - now
    w = data_weights(advantage, batch.task, 2, 1 / settings.eta)
    expect(got[1], torch.softmax(v_after, -1), "the distribution of values n steps on")
    expect(got[0], w * clone.detach(), "the cloning of each row, weighted by how good it was")
    grads = torch.autograd.grad(got[0].sum(), clone)[0]
    expect(grads, w, "what reaches the policy of each row", "a gradient")


# ---------------------------------------------------------------- statistics

@watched
def interquartile_mean(function):
    expect(function([0, 1, 2, 3, 4, 5, 6, 100]), 3.5, "eight scores, of which one is an outlier")
    expect(function([100, 4, 1, 0, 2, 9, 3]), 19 / 5, "seven scores, which do not come in order")
    expect(function([0, 0, 1, 2, 6, 9]), 9 / 4, "six scores: a quarter of six is no whole number")
    expect(function([1.0, 4.0]), 2.5, "two scores, of which none is cut off")
    expect(function(np.array([[0.0, 9.0, 1.0], [2.0, 7.0, -50.0]])), 10 / 4,
           "scores of two seeds and three tasks")


@watched
def bootstrap_interval(function):
    def mean(samples):
        return samples[0].mean()

    rng = np.random.default_rng(0)
    got = function([np.full(10, 7.0)], mean)
    expect(got, [7, 7], "the interval of ten equal numbers")
    if not isinstance(got, (list, tuple)):
        raise Wrong(f"a type: {type(got).__name__}, and JSON writes lists of numbers alone")
    sample = rng.normal(3, 1, 400)
    low, high = function([sample], mean)
    expect(function([sample], mean), [low, high], "the same interval, asked for twice")
    if low > high:
        raise Wrong("an order: the lower end lies above the upper one")
    width = (high - low) / (2 * 1.96 * sample.std() / len(sample) ** 0.5)
    if not 0.9 < width < 1.1:
        raise Wrong(f"a width: of 400 normal numbers' mean it is {width:.2f} times the 95% "
                    "interval of theory")
    skewed = [np.concatenate([np.zeros(19), [100.0]])]
    low, high = function(skewed, mean)
    if low < 0 or high < 12:
        raise Wrong("an end: the mean of nineteen zeros and a hundred cannot be below 0, and can "
                    "well be above 12")
    low, high = function([sample, sample], lambda both: both[1].mean() - both[0].mean())
    if not low < 0 < high:
        raise Wrong("a width: two groups of the same numbers, each drawn again by itself, differ")
    low, high = function([sample], mean, 1)
    if low != high:
        raise Wrong("a width: one resample has one mean, so both ends are that")
    apart = [np.zeros(50), np.full(50, 10.0)]
    low, high = function(apart, lambda samples: samples[1].mean() - samples[0].mean())
    expect([low, high], [10, 10], "two groups, within each of which all numbers are equal: drawn "
           "again, each is what it was")
    low, high = function([np.zeros(10), sample], lambda samples: samples[1].mean())
    if not 0.9 < (high - low) / (2 * 1.96 * sample.std() / len(sample) ** 0.5) < 1.1:
        raise Wrong("a width: of two groups of 10 and 400 numbers, each keeps its own length")


# ---------------------------------------------------------------- attention

def by_hand(q, k, v, mask=None):
    """Attention in float64, a query at a time."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    B, H, Lq, D = q.shape
    for b, h, i in np.ndindex(B, H, Lq):
        attend = torch.ones(k.shape[2], dtype=torch.bool) if mask is None else mask[b]
        if attend.any():
            scores = k[b, h, attend].double() @ q[b, h, i].double() / D**0.5
            out[b, h, i] = torch.softmax(scores, 0) @ v[b, h, attend].double()
    return out


def inputs(batch, heads, len_q, len_k, width):
    """q, k, v, with the model's strides, and a mask whose last sample has no key at all."""
    q, k, v = (4 * seeded(batch, length, heads, width, seed=seed).transpose(1, 2) - 2
               for seed, length in enumerate((len_q, len_k, len_k)))
    mask = seeded(batch, len_k, seed=3) < 0.7
    mask[0], mask[-1] = True, False
    return q, k, v, mask


@watched
def attention(function):
    q, k, v, mask = inputs(3, 2, 4, 7, 16)
    expect(function(q, k, v), by_hand(q, k, v), "attention of four queries to seven keys")
    expect(function(q[:2], k[:2], v[:2], mask[:2]), by_hand(q[:2], k[:2], v[:2], mask[:2]),
           "padding has a say in what is read, or keys that are none have not", "a mask")
    expect(function(q, k, v, mask), by_hand(q, k, v, mask),
           "a sample all of whose keys are padding is to give zeros", "a mask")
    expect(function(30 * q, k, v), by_hand(30 * q, k, v),
           "scores in the hundreds, whose exponential no float holds")
    for name, leaf in (("queries", q), ("keys", k), ("values", v)):
        leaf.requires_grad_()
        want = torch.autograd.grad(by_hand(q, k, v).sum(), leaf)[0]
        expect_gradient(function(q, k, v), leaf, want, f"the {name} from the result")


def forward_kernel(function):
    before = attending.KERNELS["forward"]
    attending.KERNELS["forward"] = function
    try:
        cases = [
            ((2, 2, 5, 9, 16), "few queries and keys, which fit one tile"),
            ((2, 1, 3, 70, 16), "more keys than one tile holds"),
            ((2, 1, 70, 5, 16), "more queries than one tile holds"),
        ]
        for shape, case in cases:
            q, k, v, mask = inputs(*shape)
            out, lse = attending.attention_forward(q, k, v, None)
            expect(out, by_hand(q, k, v), case)
            scores = q.double() @ k.double().transpose(-2, -1) / shape[-1] ** 0.5
            expect(lse, torch.logsumexp(scores, -1) / math.log(2),
                   f"what is left for the backward pass, of {case}", "the second output")
            out, _ = attending.attention_forward(q, k, v, mask)
            expect(out, by_hand(q, k, v, mask), case, "a mask")
        q, k, v, _ = inputs(1, 1, 4, 40, 16)
        expect(attending.attention_forward(30 * q, k, v, None)[0], by_hand(30 * q, k, v),
               "scores in the hundreds, whose exponential no float holds")
    finally:
        attending.KERNELS["forward"] = before


CHECKS = {
    "return_to_go": return_to_go,
    "n_step_return": n_step_returns,
    "project": project,
    "bellman": bellman,
    "log_prob": log_prob,
    "sample": sample,
    "entropy": entropy,
    "cloning_loss": cloning_loss,
    "data_weights": weights_of_data,
    "improvement_weights": improvement,
    "improve_on_data": improve_on_data,
    "iqm": interquartile_mean,
    "interval": bootstrap_interval,
    "attention": attention,
    "forward_kernel": forward_kernel,
}
