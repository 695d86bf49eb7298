"""Channel gates of SE-ResNet: inference by layer, and training with the shortcut and ReLU behind the gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast_backbones import kernels

from .layers import time_layer

OP = "squeeze_excite"
SHAPES = ((16, 256, 56, 56), (16, 512, 28, 28), (16, 1024, 14, 14), (16, 2048, 7, 7))
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_squeeze_excite(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)


def native(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor):
    layers = weight1, bias1, weight2, bias2
    return kernels.squeeze_excite(x, *layers, residual=residual, activation="relu", backend="native")


def modules(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor):
    """As the public implementations write it: 1x1 convolutions, activations in place."""
    hidden = F.relu_(F.conv2d(x.mean((2, 3), keepdim=True), weight1, bias1))
    return F.relu_(x * torch.sigmoid(F.conv2d(hidden, weight2, bias2)) + residual)


@pytest.mark.parametrize("op", [modules, native], ids=lambda op: op.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_step(benchmark, shape, op):
    """A forward and its backward, channels last; parity is in tests/test_kernels_squeeze_excite.py."""
    draw = torch.Generator().manual_seed(0)
    c, hidden = shape[1], shape[1] // 16
    x, residual, grad = (
        torch.randn(shape, generator=draw).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    sizes = (hidden, c, 1, 1), (hidden,), (c, hidden, 1, 1), (c,)
    layers = [torch.randn(size, generator=draw) / c**0.5 for size in sizes]
    leaves = [t.requires_grad_() for t in (x, *layers, residual)]
    benchmark.group = f"squeeze_excite {shape} residual, relu: a step of training"
    benchmark(lambda: torch.autograd.grad(op(*leaves), leaves, grad))
