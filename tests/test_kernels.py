"""The kernels: plain references, arithmetic (interpreted), and machine code (compiled).

The interpreter needs TRITON_INTERPRET=1 before Triton is imported; the compiler must not see it.
So each has a process of its own: `test_interpreted` runs this file's TestInterpreted, and
`test_compiled` runs tests/compile_kernels.py. Neither needs a GPU.
"""

import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import attention as attending
from kernels import categorical_projection as projection
from kernels import triton_support
from kernels.attention import attention, attention_forward, attention_plain, attention_reference
from kernels.categorical_projection import (
    bellman_cross_entropy,
    bellman_target,
    fused_cross_entropy,
    point_mass,
    project,
)
from kernels.task_linear import (
    linear_at_once,
    linear_by_turns,
    task_linear,
    task_linear_forward,
    task_linear_reference,
)

ROOT = Path(__file__).parent.parent
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64

without_triton = triton_support.triton is None
needs_triton = pytest.mark.skipif(without_triton, reason="triton is not installed (Linux only)")


# ---------------------------------------------------------------- inputs


def attention_inputs(len_q, len_k, width, dtype=FP32, batch=3, heads=2):
    """q, k, v as a model makes them, views of (B, L, H, D), of keys beside values; and a mask."""
    generator = torch.Generator().manual_seed(len_q * 1000 + len_k)
    q = torch.randn(batch, len_q, heads, width, generator=generator).to(dtype).transpose(1, 2)
    kv = torch.randn(batch, len_k, 2, heads, width, generator=generator).to(dtype)
    k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, Lk, D) each
    # A view whose memory goes on with True, so that a key read past the end would be attended to.
    mask = torch.ones(batch, len_k + 3, dtype=torch.bool)[:, :len_k]
    mask.copy_(torch.rand(batch, len_k, generator=generator) < 0.7)
    mask[0] = True
    mask[-1] = False  # a sample without a single key
    return (q, k, v), mask


def bellman_inputs(batch, atoms, dtype=FP32):
    """q_logits, next_probs, shift, scale, returns; some targets are clipped at either end."""
    generator = torch.Generator().manual_seed(batch * 1000 + atoms)
    draw = lambda *shape: torch.rand(*shape, generator=generator)
    q_logits = (6 * draw(batch, atoms) - 3).to(dtype)
    next_probs = torch.softmax(4 * draw(batch, atoms), -1)
    return q_logits, next_probs, draw(batch) * 0.6 - 0.3, draw(batch) * 1.2, draw(batch) * 1.4 - 0.2


def task_inputs(rows, width, statistics):
    """x, task, weight, bias, heights, scales, mean, std, of three tasks of 5, 2 and 3 scalars."""
    generator = torch.Generator().manual_seed(len(rows) * 1000 + width)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    x = 8 * draw(*rows, 5)  # some are past the clip at 10
    task = torch.randint(3, rows[:1], generator=generator)
    heights = (20, 8, 12)
    about = (draw(3, 5), draw(3, 5).exp()) if statistics else (None, None)
    scales = torch.tensor([0.25, 1.0, 4.0])
    return x, task, draw(40, width), draw(3, width), heights, scales, *about


def compare(function, reference, inputs, absolute=None, relative=None):
    """The function's values and gradients against the reference's in float64.

    absolute: the largest error of an element (times the largest gradient, where that passes 1).
    relative: the largest norm of the error, over the value's.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    exact_inputs = [tensor.detach().to(FP64).requires_grad_() for tensor in inputs]
    out, exact = function(*inputs), reference(*exact_inputs)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    results = [out, *torch.autograd.grad(out, inputs, grad)]
    exacts = [exact, *torch.autograd.grad(exact, exact_inputs, grad.to(FP64))]
    for result, exact in zip(results, exacts, strict=True):
        error = result.to(FP64) - exact
        assert torch.isfinite(error).all()
        if absolute:
            assert error.abs().max() <= absolute * max(1.0, exact.abs().max())
        if relative:
            assert error.norm() <= relative * exact.norm() + 1e-30


# ---------------------------------------------------------------- interpreted


class TestInterpreted:
    """Each kernel, line by line in NumPy, on launches as on a GPU. Every output starts as NaN."""

    __test__ = triton_support.INTERPRETED

    @pytest.fixture(autouse=True)
    def poisoned_outputs(self, monkeypatch):
        new_empty = torch.Tensor.new_empty

        def poisoned(*args, **kwargs):
            tensor = new_empty(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)

    @pytest.mark.parametrize("len_q", [1, 5, 32, 100])
    @pytest.mark.parametrize("len_k", [1, 3, 50, 129])
    def test_attention_of_any_length(self, len_q, len_k):
        (q, k, v), mask = attention_inputs(len_q, len_k, 16, heads=1)
        compare(
            lambda *inputs: attention(*inputs, mask, backend="triton"),
            lambda *inputs: attention_reference(*inputs, mask),
            (q, k, v),
            absolute=5e-6,
        )

    @pytest.mark.parametrize("dtype", [FP32, BF16])
    @pytest.mark.parametrize("width", [16, 32, 64])
    @pytest.mark.parametrize("len_q, len_k", [(7, 40), (70, 9)])  # both one-pass orientations
    def test_attention_of_any_width(self, dtype, width, len_q, len_k):
        inputs, _ = attention_inputs(len_q, len_k, width, dtype, batch=1)
        tolerance = {"absolute": 5e-6} if dtype == FP32 else {"relative": 1.5e-2}
        kernel = lambda *inputs: attention(*inputs, backend="triton")
        compare(kernel, attention_reference, inputs, **tolerance)

    def test_attention_in_bf16_where_no_side_fits_a_tile(self):
        inputs, mask = attention_inputs(100, 129, 32, BF16, heads=1)
        compare(
            lambda *inputs: attention(*inputs, mask, backend="triton"),
            lambda *inputs: attention_reference(*inputs, mask),
            inputs,
            relative=1.5e-2,
        )

    def test_attention_in_bf16_errs_at_most_twice_as_much_as_pytorch(self):
        inputs, _ = attention_inputs(33, 50, 64, BF16, batch=1)
        exact = attention_reference(*(tensor.to(FP64) for tensor in inputs))
        error = (attention(*inputs, backend="triton").to(FP64) - exact).norm()
        sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs)
        assert error <= 2 * (sdpa.to(FP64) - exact).norm()

    def test_a_sample_without_keys_gives_zeros(self):
        inputs, mask = attention_inputs(5, 9, 16)
        inputs = [tensor.requires_grad_() for tensor in map(torch.clone, inputs)]
        out = attention(*inputs, mask, backend="triton")
        gradients = torch.autograd.grad(out.square().sum() + out.sum(), inputs)
        assert (out[-1] == 0).all() and all((gradient[-1] == 0).all() for gradient in gradients)

    def test_attention_of_columns_and_of_shared_queries(self):
        """k strided in its last dimension; q one for all samples, as projected latents are."""
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, 2, 5, 16, generator=generator)
        k = torch.randn(3, 2, 16, 9, generator=generator)
        v = torch.randn(3, 2, 9, 32, generator=generator)

        def ours(q, k, v):
            views = q.expand(3, -1, -1, -1), k.transpose(2, 3), v[..., ::2]
            return attention(*views, backend="triton")

        def plain(q, k, v):
            views = q.expand(3, -1, -1, -1), k.transpose(2, 3), v[..., ::2]
            return attention_reference(*views)

        compare(ours, plain, (q, k, v), absolute=5e-6)

    def test_attention_passes_gradcheck(self):
        inputs, mask = attention_inputs(2, 3, 16, batch=2, heads=1)
        inputs = [tensor.contiguous().requires_grad_() for tensor in inputs]
        kernel = lambda *inputs: attention(*inputs, mask, backend="triton")
        tolerances = dict(eps=1e-2, atol=1e-3, rtol=1e-2)
        with warnings.catch_warnings():  # gradcheck would like float64, which the kernels refuse
            warnings.simplefilter("ignore", UserWarning)
            assert torch.autograd.gradcheck(kernel, inputs, **tolerances, fast_mode=True)

    @pytest.mark.parametrize("batch, atoms", [(1, 2), (7, 51), (5, 101), (2, 128), (2, 256)])
    @pytest.mark.parametrize("dtype", [FP32, BF16])
    def test_bellman_cross_entropy(self, batch, atoms, dtype):
        q_logits, *target = bellman_inputs(batch, atoms, dtype)
        compare(
            lambda q_logits: bellman_cross_entropy(q_logits, *target, 0.3, backend="triton"),
            lambda q_logits: bellman_cross_entropy(q_logits, *[x.to(FP64) for x in target], 0.3),
            [q_logits],
            **({"absolute": 5e-6} if dtype == FP32 else {"relative": 1.5e-2}),
        )

    @pytest.mark.parametrize("rows, width", [((1,), 3), ((40,), 40), ((7, 9), 33)])
    @pytest.mark.parametrize("statistics", [True, False])
    def test_task_linear(self, rows, width, statistics):
        x, task, weight, bias, *tables = task_inputs(rows, width, statistics)

        def ours(weight, bias):
            return task_linear(x, task, weight, bias, *tables, backend="triton")

        def exact(weight, bias):
            precise = [t.double() if torch.is_tensor(t) else t for t in tables]
            return task_linear_reference(x.double(), task, weight, bias, *precise)

        compare(ours, exact, (weight, bias), absolute=5e-6)

    def test_task_linear_keeps_a_nan_and_ignores_padding(self):
        x, task, weight, bias, *tables = task_inputs((9,), 4, True)
        task[:3] = torch.tensor([0, 1, 1])
        x[0, 4] = x[1, 4] = float("nan")  # task 0 has five scalars, task 1 has two
        weight = weight.requires_grad_()
        out = task_linear(x, task, weight, bias, *tables, backend="triton")
        assert out.isnan().any(1).tolist() == [True] + [False] * 8
        out.sum().backward()
        assert weight.grad.isnan().any(1).nonzero().ravel().tolist() == [16, 17, 18, 19]

    def test_task_linear_refuses_to_give_its_input_a_gradient(self):
        x, *others = task_inputs((4,), 4, True)
        with pytest.raises(ValueError, match="no gradient to its input"):
            task_linear(x.requires_grad_(), *others, backend="triton")

    @pytest.mark.parametrize("what", range(5))
    def test_a_nan_reaches_the_loss_and_the_gradient(self, what):
        inputs = bellman_inputs(4, 11)
        inputs[what][1] = float("nan")
        q_logits, *target = inputs
        q_logits = q_logits.requires_grad_()
        for backend in ("triton", "plain"):
            losses = bellman_cross_entropy(q_logits, *target, 0.3, backend=backend)
            (gradient,) = torch.autograd.grad(losses.sum(), q_logits)
            assert losses.isnan().tolist() == [False, True, False, False]
            assert gradient[1].isnan().any() and gradient[[0, 2, 3]].isfinite().all()

    def test_the_backward_pass_takes_an_output_of_any_layout(self):
        (q, k, v), mask = attention_inputs(5, 7, 16)
        out, lse = attention_forward(q, k, v, mask)
        dout = torch.randn(out.shape)
        usual = attending.attention_backward(dout, q, k, v, mask, out, lse)
        other = attending.attention_backward(dout, q, k, v, mask, out.contiguous(), lse)
        assert all(map(torch.equal, usual, other))

    def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(self, monkeypatch):
        """Not on the current one, which is cuda:0 while a model is on cuda:1."""
        chosen = []
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: chosen.append(x) or nullcontext())
        (q, k, v), _ = attention_inputs(5, 7, 16)
        attention(q, k, v, backend="triton")
        q_logits, *target = bellman_inputs(3, 11)
        bellman_cross_entropy(q_logits, *target, 0.3, backend="triton")
        x, *others = task_inputs((4,), 4, True)
        task_linear(x, *others, backend="triton")
        assert [id(tensor) for tensor in chosen] == [id(q), id(q_logits), id(x)]

    @pytest.mark.parametrize(
        "operator, inputs",
        [
            (attention_forward, (*attention_inputs(5, 7, 16)[0], attention_inputs(5, 7, 16)[1])),
            (fused_cross_entropy, (*bellman_inputs(3, 11), 0.3)),
            (task_linear_forward, task_inputs((4, 2), 8, True)),
        ],
        ids=["attention", "bellman_cross_entropy", "task_linear"],
    )
    def test_operators_are_what_they_declare(self, operator, inputs, monkeypatch):
        """Their schemas, and the shapes, types and strides that torch.compile is told."""
        monkeypatch.undo()  # opcheck runs the operator twice and compares unwritten memory too
        given = []
        for x in inputs:
            learnt = torch.is_tensor(x) and x.is_floating_point()
            given.append(x.detach().requires_grad_() if learnt else x)
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))

    def test_a_second_derivative_is_refused(self):
        """It would lack whatever passes through the kernel: PyTorch cannot look inside."""
        (q, k, v), _ = attention_inputs(5, 7, 16)
        q_logits, *target = bellman_inputs(3, 11)
        kernels = {
            q.requires_grad_(): lambda: attention(q, k, v, backend="triton"),
            q_logits.requires_grad_(): lambda: bellman_cross_entropy(
                q_logits, *target, 0.3, backend="triton"
            ),
        }
        for learnt, kernel in kernels.items():
            (gradient,) = torch.autograd.grad(kernel().sin().sum(), learnt, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                gradient.square().sum().backward()

    def test_torch_compile_takes_the_kernels_without_a_break(self):
        def step(q, k, v, mask, q_logits, *target):
            out = attention(q, k, v, mask, backend="triton")
            out = out.transpose(1, 2).flatten(2)  # (B, Lq, H * D)
            losses = bellman_cross_entropy(q_logits, *target, 0.3, backend="triton")
            return out.sum() + losses.sum()

        inputs, mask = attention_inputs(5, 7, 16)
        q_logits, *target = bellman_inputs(3, 11)
        learnt = [x.requires_grad_() for x in map(torch.clone, (*inputs, q_logits))]
        *inputs, q_logits = learnt
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        ours = torch.autograd.grad(compiled(*inputs, mask, q_logits, *target), learnt)
        eager = torch.autograd.grad(step(*inputs, mask, q_logits, *target), learnt)
        for one, other in zip(ours, eager, strict=True):
            torch.testing.assert_close(one, other)

    def test_no_plain_path_ran_instead(self, monkeypatch):
        """backend="triton" means it: with the launchers broken, nothing must come back."""
        monkeypatch.setattr(projection, "cross_entropy_kernel", None)
        monkeypatch.setattr(attending, "KERNELS", {})
        with pytest.raises(TypeError):
            bellman_cross_entropy(*bellman_inputs(1, 5), 0.0, backend="triton")
        with pytest.raises(KeyError):
            attention(*attention_inputs(5, 7, 16)[0], backend="triton")

    @pytest.mark.parametrize("width, dtype, message", [(24, FP32, "not 24"), (16, FP64, "float64")])
    def test_a_limit_is_named(self, width, dtype, message):
        inputs, _ = attention_inputs(3, 4, width, dtype)
        with pytest.raises(ValueError, match=message):
            attention(*inputs, backend="triton")


@needs_triton
def test_interpreted():
    flags = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-k", "TestInterpreted"]
    command = [sys.executable, "-m", "pytest", *flags, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


# ---------------------------------------------------------------- compiled

SHARED_KB = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # sm_80: what 8.6 and 8.9 have
TENSOR_CORES = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}


@pytest.fixture(scope="module")
def builds():
    """Every launch of every table, compiled by one process a target: {target: rows}."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes, rows = {}, {}
    for target in SHARED_KB:
        command = [sys.executable, "-m", "tests.compile_kernels", target]
        processes[target] = subprocess.Popen(command, **pipes, cwd=ROOT, env=environment)
    for target, process in processes.items():
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr[-3000:]
        rows[target] = [json.loads(line) for line in stdout.splitlines()]
    return rows


@needs_triton
@pytest.mark.parametrize("target", SHARED_KB)
def test_compiled(builds, target):
    rows = builds[target]
    # Attention forward, and backward in one pass and in two, per width, with a mask and without
    # one; six of the Bellman target; the task's map forward and backward, with statistics or not.
    assert len(rows) == (30 if target == "gfx942" else 60) + 6 + 4
    for row in rows:
        assert row["spills"] == 0 and row["stack"] == 0 and not row["loses_nan"], row
        assert row["shared"] <= SHARED_KB[target] * 1024, row
        multiplies = row["kernel"].startswith("attention")
        tile = [row[side] for side in ("BLOCK_Q", "BLOCK_K") if side in row]
        if row["dtype"] == "torch.float32":
            # Neither TF32 nor any other tensor core; AMD's multiply fp32 too, exactly.
            assert row["instructions"] in ([], ["v_mfma"][:target == "gfx942"]), row
        elif multiplies and (min(tile) >= 64 or target in ("sm_80", "gfx942")):
            assert TENSOR_CORES[target] in row["instructions"], row


# ---------------------------------------------------------------- the plain references


@pytest.mark.parametrize("dtype, tolerance", [(FP32, 1e-6), (BF16, 2e-2)])
def test_plain_attention_is_the_written_out_softmax(dtype, tolerance):
    (q, k, v), mask = attention_inputs(4, 6, 8, dtype)
    out = attention(q, k, v, mask)
    for b in range(3):
        for h in range(2):
            for i in range(4):
                scores = (k[b, h].double() @ q[b, h, i].double() / 8**0.5).exp() * mask[b]
                expected = scores @ v[b, h].double() / scores.sum().clamp(min=1e-300)
                torch.testing.assert_close(out[b, h, i].double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("len_q, len_k", [(1, 8), (3, 24), (4, 1), (8, 19), (8, 25)])
def test_plain_attention_is_the_reference(len_q, len_k):
    """On either side of the sizes that attention_short takes."""
    inputs, mask = attention_inputs(len_q, len_k, 16)
    for padding in (None, mask):
        results = []
        for function in (attention_plain, attention_reference):
            copies = [tensor.double().requires_grad_() for tensor in inputs]
            out = function(*copies, padding)
            results.append([out, *torch.autograd.grad(out.sin().sum(), copies)])
        for one, other in zip(*results):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("function", [attention_plain, attention_reference])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_sample_without_keys_gives_zeros_in_plain_pytorch(function, dtype):
    inputs, mask = attention_inputs(4, 6, 16, dtype)
    inputs = [tensor.requires_grad_() for tensor in map(torch.clone, inputs)]
    out = function(*inputs, mask)
    gradients = torch.autograd.grad((out + 1).square().sum(), inputs)
    assert (out[-1] == 0).all() and all((gradient[-1] == 0).all() for gradient in gradients)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("linear", [linear_by_turns, linear_at_once])
def test_each_sample_goes_through_its_own_tasks_matrix(linear):
    x, task = torch.randn(5, 3, 4), torch.tensor([2, 0, 2, 0, 0])
    weight, bias, heights = torch.randn(9, 2), torch.randn(3, 2), (4, 2, 3)
    maps = weight[:4], weight[4:6], weight[6:]
    by_hand = torch.stack(
        [x[i, :, : heights[t]] @ maps[t] + bias[t] for i, t in enumerate(task.tolist())]
    )
    torch.testing.assert_close(linear(x, task, weight, bias, heights), by_hand)


def test_a_dry_run_counts_the_work_of_maps_of_several_heights():
    """Eight rows of each of two tasks: 12 features and 120, times 2 operations and 5 outputs."""

    def operations(device):
        task = torch.arange(16, device=device) // 8
        x, scales = torch.zeros(16, 30, device=device), torch.ones(3, device=device)
        weight, bias = torch.zeros(132, 5, device=device), torch.zeros(2, 5, device=device)
        with FlopCounterMode(display=False) as counter:
            task_linear(x, task, weight, bias, (12, 120), scales)
        return counter.get_total_flops()

    assert operations("cpu") == operations("meta") == 2 * 5 * 8 * (12 + 120)


@pytest.mark.parametrize("heights", [(20, 8), (20, 8, 13), (24, 8, 8)])
def test_maps_that_do_not_fit_are_refused(heights):
    x, task, weight, bias, _, *tables = task_inputs((4,), 4, True)
    with pytest.raises(ValueError, match="shapes of x, weight, bias and scales do not match"):
        task_linear(x, task, weight, bias, heights, *tables)


def test_project_by_hand():
    """Atoms 0, 1/4, .., 1. First row: the mass at 1/2 moves to 0.1 + 0.5 * 0.5 = 0.35, between two
    atoms, of which 1/4 has 0.6 of it and 1/2 has 0.4.
    """
    probs = torch.tensor([
        [0.0, 0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
        [0.5, 0.0, 0.0, 0.0, 0.5],
    ])
    expected = torch.tensor([
        [0.0, 0.6, 0.4, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
        [0.5, 0.0, 0.0, 0.5, 0.0],
    ])
    shift, scale = torch.tensor([0.1, 5.0, -0.25]), torch.tensor([0.5, 1.0, 1.0])
    torch.testing.assert_close(project(probs, shift, scale), expected)


def test_project_keeps_the_mass_and_moves_the_mean():
    _, probs, *_ = (x.double() for x in bellman_inputs(64, 101))
    atoms = torch.linspace(0, 1, 101, dtype=FP64)
    shift = torch.linspace(0, 0.2, 64, dtype=FP64)
    scale = torch.linspace(0, 0.8, 64, dtype=FP64)  # nothing is clipped
    moved = project(probs, shift, scale)
    torch.testing.assert_close(moved.sum(-1), torch.ones(64, dtype=FP64))
    torch.testing.assert_close(moved @ atoms, shift + scale * (probs @ atoms))
    clipped = project(probs, shift - 3, scale + 5)
    torch.testing.assert_close(clipped.sum(-1), torch.ones(64, dtype=FP64))


@pytest.mark.parametrize("what", range(3))
def test_project_keeps_a_nan(what):
    _, *inputs, _ = bellman_inputs(4, 11)
    inputs[what][1] = float("nan")
    assert project(*inputs).isnan().any(1).tolist() == [False, True, False, False]


def test_project_is_the_sum_over_hats():
    _, probs, shift, scale, _ = (x.double() for x in bellman_inputs(16, 21))
    atoms = torch.linspace(0, 1, 21, dtype=FP64)
    moved = (shift[:, None] + scale[:, None] * atoms).clamp(0, 1)  # (B, M)
    hats = (1 - 20 * (moved[:, None, :] - atoms[:, None]).abs()).clamp(min=0)  # (B, i, j)
    torch.testing.assert_close(project(probs, shift, scale), (hats @ probs[:, :, None])[:, :, 0])


def test_point_mass_has_its_value_as_its_mean():
    value = torch.tensor([-1.0, 0.0, 0.333, 1.0, 2.0])
    mass = point_mass(value, 11)
    torch.testing.assert_close(mass.sum(-1), torch.ones(5))
    torch.testing.assert_close(mass @ torch.linspace(0, 1, 11), value.clamp(0, 1))
    assert ((mass > 0).sum(-1) <= 2).all()


def test_the_gradient_of_the_cross_entropy_is_softmax_minus_target():
    q_logits, next_probs, shift, scale, returns = (x.double() for x in bellman_inputs(9, 31))
    q_logits, next_probs = q_logits.requires_grad_(), next_probs.requires_grad_()
    loss = bellman_cross_entropy(q_logits, next_probs, shift, scale, returns, 0.25)
    loss.sum().backward()
    gamma = bellman_target(next_probs, shift, scale, returns, 0.25).detach()
    torch.testing.assert_close(q_logits.grad, torch.softmax(q_logits, -1).detach() - gamma)
    assert next_probs.grad is None  # a target teaches, and is not taught


def test_the_cross_entropy_is_least_at_the_target():
    _, *target = (x.double() for x in bellman_inputs(9, 31))
    gamma = bellman_target(*target, 0.5).clamp(min=1e-12)
    least = bellman_cross_entropy(gamma.log(), *target, 0.5)
    torch.testing.assert_close(least, -(gamma * gamma.log()).sum(-1))
    assert (bellman_cross_entropy(gamma.log() + torch.randn(9, 31), *target, 0.5) > least).all()


# ---------------------------------------------------------------- dispatch


def test_mistakes_are_named():
    (q, k, v), mask = attention_inputs(4, 6, 16)
    with pytest.raises(ValueError, match="mask must be bool"):
        attention(q, k, v, mask.float())
    with pytest.raises(ValueError, match="do not match"):
        attention(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match="'flash' is unknown"):
        attention(q, k, v, backend="flash")
    with pytest.raises(ValueError, match="must be"):
        bellman_cross_entropy(*bellman_inputs(3, 11)[:4], torch.zeros(2), 0.0)


@pytest.mark.skipif(triton_support.INTERPRETED, reason="the interpreter takes CPU tensors")
def test_a_kernel_asked_for_on_a_cpu_is_refused():
    reason = "needs the package triton" if without_triton else "is built for sm_80, sm_90"
    with pytest.raises(ValueError, match=reason):
        attention(*attention_inputs(4, 6, 16)[0], backend="triton")


@needs_triton
@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5), (12, 0)])
def test_a_gpu_that_the_table_lacks_warns_once_for_all_kernels(monkeypatch, capability):
    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    triton_support.warn_once.cache_clear()
    triton_support.find_target.cache_clear()
    limit = triton_support.device_limit(gpu)
    with pytest.warns(UserWarning, match="^kernels: using plain .* not for a card") as caught:
        for name in ("attention", "bellman_cross_entropy", "task_linear"):
            assert not triton_support.use_kernel(name, None, gpu, limit)
    assert len(caught) == 1
    triton_support.find_target.cache_clear()


def test_a_gpu_without_a_kernel_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(triton_support, "device_limit", lambda device: None)
    triton_support.warn_once.cache_clear()
    use_kernel, gpu = triton_support.use_kernel, torch.device("cuda")
    message = "plain PyTorch, since the Triton kernel takes no cats"
    with pytest.warns(UserWarning, match=message) as caught:
        for backend in (None, None, "plain"):
            assert not use_kernel("attention", backend, gpu, "takes no cats")
    assert len(caught) == 1
    with pytest.raises(ValueError, match="takes no cats"):
        use_kernel("attention", "triton", gpu, "takes no cats")
    assert use_kernel("attention", None, gpu, None)
    assert not use_kernel("attention", None, torch.device("cpu"), None)


def test_without_triton_everything_is_plain():
    """As on macOS and Windows: the import of triton fails."""
    code = """
import sys
sys.modules["triton"] = None  # makes `import triton` raise ImportError
import torch
from kernels.attention import attention
from kernels.categorical_projection import bellman_cross_entropy
q = torch.randn(1, 2, 3, 16, requires_grad=True)
attention(q, q, q).sum().backward()
probs, one = torch.full((1, 5), 0.2), torch.ones(1)
bellman_cross_entropy(probs, probs, 0 * one, one, one, 0.5)
try:
    attention(q, q, q, backend="triton")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "needs the package triton" in run.stdout
