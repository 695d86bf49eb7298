"""Gradients of depthwise and grouped convolutions, compiled against PyTorch's own, channels last."""

from __future__ import annotations

import pytest
import torch

from fast_backbones.kernels import _conv

# Name: channels, rows and columns, groups, window, stride. Of a batch of 16.
LAYERS = {
    "grouped 32x4 56x56": (128, 56, 32, 3, 1),
    "grouped 32x8 28x28": (256, 28, 32, 3, 1),
    "grouped 32x16 14x14": (512, 14, 32, 3, 1),
    "grouped 32x32 7x7": (1024, 7, 32, 3, 1),
    "grouped 32x8 56x56 stride 2": (256, 56, 32, 3, 2),
    "grouped 32x16 28x28 stride 2": (512, 28, 32, 3, 2),
    "grouped 32x32 14x14 stride 2": (1024, 14, 32, 3, 2),
    "depthwise 32 112x112": (32, 112, 32, 3, 1),
    "depthwise 64 112x112 stride 2": (64, 112, 64, 3, 2),
    "depthwise 128 56x56": (128, 56, 128, 3, 1),
    "depthwise 256 28x28 stride 2": (256, 28, 256, 3, 2),
    "depthwise 512 14x14": (512, 14, 512, 3, 1),
    "depthwise 512 14x14 stride 2": (512, 14, 512, 3, 2),
    "depthwise 1024 7x7": (1024, 7, 1024, 3, 1),
    "depthwise 728 19x19": (728, 19, 728, 3, 1),
    "depthwise 120 28x28 5x5": (120, 28, 120, 5, 1),
    "1x1 256 56x56": (256, 56, 1, 1, 1),
    "1x1 1024 14x14": (1024, 14, 1, 1, 1),
    "3x3 64 56x56": (64, 56, 1, 3, 1),
    "3x3 256 14x14": (256, 14, 1, 3, 1),
}
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def native(grad, x, weight, stride, padding, groups, needs_x, needs_weight):
    geometry = (stride, stride), (padding, padding), (1, 1)
    if groups == 1 and needs_x:
        return _conv._input_gradient(grad, weight, *geometry, groups)
    if groups == 1:
        return torch.ops.fast_backbones.conv2d_backward_weight(
            grad, x, weight, *geometry, None, None, None, "none"
        )
    if groups == x.shape[1]:
        op = torch.ops.fast_backbones.depthwise_conv2d_backward
        return op(grad, x, weight, *geometry, needs_x, needs_weight)
    op = torch.ops.fast_backbones.grouped_conv2d_backward
    return op(grad, x, weight, *geometry, groups, needs_x, needs_weight)


def reference(grad, x, weight, stride, padding, groups, needs_x, needs_weight):
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups
    needs = [needs_x, needs_weight, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, needs)


@pytest.mark.parametrize("op", [reference, native], ids=lambda op: op.__name__)
@pytest.mark.parametrize("of", ["x", "weight"])
@pytest.mark.parametrize("layer", LAYERS)
def bench_gradient(benchmark, layer, of, op):
    """One gradient; parity is in tests/test_kernels_conv_backward.py."""
    channels, size, groups, window, stride = LAYERS[layer]
    draw = torch.Generator().manual_seed(0)
    padding = window // 2
    outputs = (size + 2 * padding - window) // stride + 1
    grad, x = (
        torch.randn((16, channels, n, n), generator=draw).contiguous(memory_format=torch.channels_last)
        for n in (outputs, size)
    )
    weight = torch.randn((channels, channels // groups, window, window), generator=draw)
    benchmark.group = f"{layer}: {of}"
    benchmark(op, grad, x, weight, stride, padding, groups, of == "x", of == "weight")
