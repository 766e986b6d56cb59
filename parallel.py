"""This process and its fellows: signals and memory, several ranks, and what a run would take.

torchrun starts the ranks, and torch joins them. Each reads its part of every batch. By DDP each has
all the weights; by FSDP2 each keeps a share of them, and gathers a block's when the block is
computed.
"""

import ctypes
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from data import HISTORY, Batch
from model import Attention, Perceiver, computes_in_bf16, count_parameters

LAUNCHED = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
RANKS = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
PATIENCE = timedelta(hours=2)  # rank 0 evaluates alone, and the others wait as long

GPUS = {  # data sheets: bf16 FLOP/s, bytes
    "H100": (989e12, 80e9),
    "A100": (312e12, 80e9),
    "RTX 4090": (165e12, 24e9),
}
SPEED = 0.3  # share of the peak that a dry run reckons with [ours]

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
REPEATED = 3  # seconds in which several signals are one: terminal and torchrun both send Ctrl-C's

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class RankLost(Exception):
    """Another rank has ended."""


# ---------------------------------------------------------------- talking to the other ranks

@contextmanager
def ranks(device):
    """Join the other ranks, if torchrun started several. RankLost when one of them ends."""
    if RANKS == 1:
        yield
        return
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    # A rank that dies is noticed at once, however long the others would wait for an answer.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's are plain
            raise
        reason = str(error).splitlines()[0]
        raise RankLost(f"rank {RANK} stops, since another rank has ended ({reason}); the newest "
                       "checkpoint is whole: start again with --resume") from None
    dist.destroy_process_group()


def over_ranks(values, device, operation=dist.ReduceOp.SUM):
    """The sum, or another reduction, of a list of numbers over the ranks."""
    if RANKS == 1:
        return values
    values = torch.tensor(values, device=device, dtype=torch.float64)
    dist.all_reduce(values, operation)
    return values.tolist()


def add_over_ranks(*tensors):
    """Add up tensors over the ranks, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def of_all_ranks(x):
    """x (B, ...) of each rank -> (ranks * B, ...), in one process's order: rank r has every
    ranks-th row, from the r-th on."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts, dim=1).flatten(0, 1)


# ---------------------------------------------------------------- this process

def set_up(threads, deterministic):
    """What the whole process needs to know before it trains."""
    keep_memory()
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        # cuBLAS keeps an order of sums only with this.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def keep_memory():
    """Tell glibc to keep the memory it is given back.

    It would return an update's large tensors to the kernel, and every page costs a fault when the
    next update asks for it again: on a CPU up to 4% of an update of BC, 9% of PAC and 14% of PAC+V.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


class Outliving:
    """A stream whose reader may go away: a closed terminal or pipe does not end a run."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        try:
            return function(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def outlive_readers():
    sys.stdout, sys.stderr = Outliving(sys.stdout), Outliving(sys.stderr)


class Stop:
    """The first signal of STOPS asks to stop after the update in hand; another one, later than
    REPEATED seconds after it, ends at once."""

    def __init__(self):
        self.signal = self.since = 0
        self.default(self.ask)

    def ask(self, number, _):
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > REPEATED:
            self.default()
            os.kill(os.getpid(), number)

    def default(self, handler=signal.SIG_DFL):
        for number in STOPS:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number == getattr(signal, "SIGHUP", None)):  # nohup's doing
                signal.signal(number, handler)

    def agreed(self, device):
        """The signal that any rank has got: then all of them stop after the same update."""
        return int(over_ranks([self.signal], device, dist.ReduceOp.MAX)[0])


# ---------------------------------------------------------------- one learner on several ranks

class LossModule(nn.Module):
    """The model and its target as one module whose forward is the loss: what DDP and FSDP wrap."""

    def __init__(self, learner):
        super().__init__()
        self.model, self.target_model, self.loss = learner.model, learner.target_model, learner.loss

    def forward(self, batch, noise, share):
        return self.loss(batch, noise, share)


def join(learner, shard):
    """Make `learner` one of several ranks. shard: FSDP2 instead of DDP."""
    module = LossModule(learner)
    if not shard:
        # An algorithm may leave a decoder unused: BC both critics', PAC that of V.
        learner.forward = DistributedDataParallel(
            module, find_unused_parameters=True, broadcast_buffers=False,
            gradient_as_bucket_view=True)  # without the view, each gradient is there twice
        return
    mesh = init_device_mesh(learner.device.type, (dist.get_world_size(),))
    gathered = torch.bfloat16 if computes_in_bf16(learner.model.config, learner.device) else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in [m for m in module.modules() if isinstance(m, Attention)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    learner.forward = fully_shard(module, mesh=mesh)
    learner.make_optimizer()  # the parameters are others now: the shards


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def full(tensor):
    """A sharded tensor as a whole one; every rank has to take part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(model):
    """The model itself, or, of a sharded one, a copy with all the weights on rank 0.

    Every rank has to take part; the others get None.
    """
    state = model.state_dict()
    if not any(map(is_sharded, state.values())):
        return model
    state = {name: full(value) for name, value in state.items()}
    if RANK > 0:
        return None
    copy = Perceiver(model.config).to(next(iter(state.values())).device)
    copy.load_state_dict(state)
    return copy


# ---------------------------------------------------------------- what a run would take

def meta_batch(learner, batch_size):
    """A Batch for a learner on the meta device, where tensors have shapes but no memory."""
    O, A = learner.model.obs_mean.shape[1], learner.model.action_mask.shape[1]
    rows = torch.empty(batch_size, learner.settings.n_step + 1, O + A + 3, device="meta")
    batch = Batch(rows, O, torch.empty(batch_size, dtype=torch.long, device="meta"))
    frame = learner.model.config.frame
    if frame:
        batch.frames = torch.empty(batch_size, 2, HISTORY, *frame, dtype=torch.uint8,
                                   device="meta")
    return batch


def flops_per_update(learner, batch_size, share=0):
    """Floating-point operations of one update: the matrix products of the loss, forward and
    backward. learner: one on the meta device; share: of the observed return, 1 in the warm-up."""
    batch = meta_batch(learner, batch_size)
    with FlopCounterMode(display=False) as counter:
        learner.loss(batch, learner.noise(batch, None), share)[0].backward()
    return counter.get_total_flops()


def saved_bytes(learner, batch, recompute):
    """Bytes that the forward pass keeps for the backward pass, weights apart; leaves gradients."""
    weights = {p.untyped_storage()._cdata for p in learner.model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # holding it, so that its address stays its own
        return tensor

    learner.model.recompute = recompute
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.loss(batch, learner.noise(batch, None), False)[0].backward()
    return sum(storage.nbytes() for storage in kept.values())


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def memory(learner, batch_size, recompute=False):
    """Bytes of weights (model and target), gradients, optimiser and activations, of a learner on
    the meta device. Activations are what the backward pass is left; the peak is above it by what
    one operation needs."""
    config, batch = learner.model.config, meta_batch(learner, batch_size)
    activations = saved_bytes(learner, batch, False)
    parameters = list(learner.model.parameters())
    gradients = nbytes(p.grad for p in parameters if p.grad is not None)
    if recompute:  # the blocks' inputs, and one block at a time
        outside = saved_bytes(learner, batch, True)
        inputs = config.blocks * batch_size * config.latents * config.width * 4
        activations = outside + inputs + (activations - outside) // max(1, config.blocks)
    optimizer = sum(nbytes(state.values()) for state in learner.optimizer.state.values())
    return {"weights": 2 * nbytes(parameters), "gradients": gradients, "optimiser": optimizer,
            "activations": activations}


def report(learner, batch_size, accumulate=1, recompute=False, shard=False):
    """What a run would take on 1 to 256 GPUs, as text. learner: one on the meta device."""
    config = learner.model.config
    flops = flops_per_update(learner, batch_size) * (4 / 3 if recompute else 1)
    need = memory(learner, max(1, batch_size // accumulate), recompute)
    with torch.device("meta"):
        block = nbytes(Attention(config.width, config.heads, config.widening).parameters())
    again = ", a quarter of it to recompute activations" if recompute else ""
    way = "Whole on each GPU (DDP)."
    if shard:
        way = ("Sharded (FSDP): beside its share, a GPU gathers a block or two at a time, "
               f"of {block / 1e9:.3f} GB.")
    head = "".join(f"{name:>12}" for name in (*need, "sum", *GPUS))
    lines = [
        f"{count_parameters(learner.model):,} parameters; {flops / 1e12:.3g} TFLOP an update "
        f"of {batch_size} transitions{again}",
        way,
        f"GB of each GPU in float32, and seconds an update at {SPEED:.0%} of the peak in bf16,",
        "with communication hidden behind it; -: it would not fit.",
        f"{'GPUs':>4}{'batch':>6}{head}",
    ]
    for gpus in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if batch_size % (gpus * accumulate):
            lines.append(f"{gpus:>4}  GPUs or more: a batch of {batch_size} has no equal parts for "
                         "them; choose another --batch-size")
            break
        share = []
        for name, size in need.items():
            share.append(size / gpus if shard or name == "activations" else size)
        share.append(sum(share))
        row = "".join(f"{size / 1e9:>12.3f}" for size in share)
        for peak, capacity in GPUS.values():
            seconds = flops / (gpus * SPEED * peak)
            row += f"{seconds:>12.3g}" if share[-1] < capacity else f"{'-':>12}"
        lines.append(f"{gpus:>4}{batch_size // gpus:>6}{row}")
    return "\n".join(lines)
