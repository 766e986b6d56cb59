"""An update as a GPU would get it: the host never waits, and launches little.

No GPU is needed. Fake tensors have shapes and no values, so that whatever asks for a value raises;
and the kernels are chosen as on a GPU, since their operators take fake tensors too.
"""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import learner as learning
from kernels import attention, categorical_projection, task_linear, triton_support
from studies.gpu import new_learner
from studies.kernels import Traffic

pytestmark = pytest.mark.skipif(triton_support.triton is None, reason="triton is not installed")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Whatever a kernel can take, it takes."""
    monkeypatch.setattr(triton_support, "find_target", lambda device: "sm_90")
    for module in (attention, categorical_projection, task_linear):
        monkeypatch.setattr(module, "use_kernel", lambda name, backend, device, limit: not limit)
