"""Convolutions of 16-bit maps in training: PyTorch's kernels, with the input's source kept in its place.

oneDNN multiplies bfloat16 fast, forward and backward; what costs is the map between a batch norm and the
convolution behind it. Autocast's rule holds: weight and bias are cast to the type of the map, their gradients
back to their own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _conv, _conv_backward, _native, _recompute
from ._function import Function

Pair = tuple[int, int]


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x is a map of 16 bits whose source is known, and PyTorch would multiply in its type."""
    if x.dtype not in _native.NARROW or not x.is_cpu or not _native.needs_grad(weight):
        return False
    cast = torch.is_autocast_enabled("cpu")
    target = torch.get_autocast_dtype("cpu") if cast else weight.dtype
    return target is x.dtype and not _native.transforming() and _recompute.is_known(x)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """F.conv2d with weight [K, C/groups, R, S] and bias [K] or None in the type of x [N, C, H, W]."""
    bias = None if bias is None else bias.to(x.dtype)
    return _Convolution.apply(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)


class _Convolution(Function):
    """Keeps weight, and x or what x is made of."""

    @staticmethod
    def forward(x, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *ctx.geometry = inputs
        ctx.sizes, ctx.bias_sizes = x.shape, None if bias is None else list(bias.shape)
        kept, ctx.how = _recompute.keep(x) if ctx.needs_input_grad[1] else ((None,), None)
        ctx.save_for_backward(weight, *kept)

    @staticmethod
    def backward(ctx, grad):
        weight, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        # What is not needed is not there: of x only the sizes matter then.
        x = _recompute.restore(kept, ctx.how) if needs[1] else _native.absent(grad, ctx.sizes)
        dx = _strided_depthwise_input(grad, weight, ctx.sizes, *ctx.geometry) if needs[0] else None
        found = _conv.completed((dx, None), grad, x, weight, ctx.bias_sizes, tuple(ctx.geometry), needs)
        return *found, None, None, None, None


def _strided_depthwise_input(grad, weight, sizes, stride, padding, dilation, groups) -> Tensor | None:
    """The gradient of x by the kernel of float32, where PyTorch's takes ten times as long: 57 ms for 128
    channels of 16 images of 56x56 at stride 2."""
    if groups == 1 or weight.shape[1] > 1 or max(stride) == 1 or torch.is_grad_enabled():
        return None
    wide = grad.float()
    x = _native.absent(wide, sizes)
    dx, _ = _conv_backward.depthwise(wide, x, weight.float(), stride, padding, dilation, needs_weight=False)
    return None if dx is None else dx.to(grad.dtype)
