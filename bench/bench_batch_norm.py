"""Batch normalisation, addition and ReLU in training, forward and backward, against PyTorch's own calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast_backbones import kernels

SHAPES = ((16, 64, 112, 112), (16, 256, 56, 56), (16, 128, 28, 28), (16, 728, 14, 14), (16, 2048, 7, 7))
pytestmark = pytest.mark.benchmark(
    max_time=0.5, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def native(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return kernels.batch_norm(x, weight, bias, residual=residual, activation="relu", backend="native")


def reference(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """As torchvision writes it: the activation in place."""
    y = F.batch_norm(x, None, None, weight, bias, True)
    return F.relu_(y if residual is None else y.add_(residual))


@pytest.mark.parametrize("op", [reference, native], ids=lambda op: op.__name__)
@pytest.mark.parametrize("added", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_step(benchmark, shape, added, op):
    """A forward and its backward, channels last; parity is in tests/test_kernels_batch_norm.py."""
    draw = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(shape, generator=draw).contiguous(memory_format=torch.channels_last) for _ in range(3)
    ]
    x, residual, grad = maps
    leaves = [x, torch.ones(shape[1]), torch.zeros(shape[1]), residual if added else None]
    leaves = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
    wanted = [leaf for leaf in leaves if leaf is not None]
    benchmark.group = f"{shape} {'residual' if added else 'plain'}"
    benchmark(lambda: torch.autograd.grad(op(*leaves), wanted, grad))
