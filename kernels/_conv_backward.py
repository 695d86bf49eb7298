"""Compiled gradients of convolutions: what the kernels cannot do, fakes, callers.

    y[n, k, p, q]       = sum_crs x[n, c, h, w] * weight[k, c, r, s]       c in the group of k
    dx[n, c, h, w]      = sum_krs grad[n, k, p, q] * weight[k, c, r, s]
    dweight[k, c, r, s] = sum_npq grad[n, k, p, q] * x[n, c, h, w]

each with h = p*stride + r*dilation - padding, w = q*stride + s*dilation - padding.

Sums of dweight go over fixed runs of rows in float32 and are added in double, in an order that neither
threads nor instruction sets change (the portable kernels round products on their own).
"""

import torch
from torch import Tensor

from . import _checks, _ext, _native

Pair = tuple[int, int]

_LARGEST_WINDOW = 7
_LEAST_CHANNELS = 16  # of a dense convolution: a vector of them is filled up with zeros


def refuse_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> str | None:
    """What the gradients of depthwise convolution say to a call; None when they take it."""
    filters, depth, rows, columns = weight.shape
    if depth != 1 or filters != x.shape[1]:
        return f"{x.shape[1]} channels and {filters} filters: depthwise gradients have one filter per channel"
    if rows > _LARGEST_WINDOW or columns > _LARGEST_WINDOW:
        return (
            f"kernel {rows}x{columns}: depthwise gradients handle up to {_LARGEST_WINDOW}x{_LARGEST_WINDOW}"
        )
    return _native.refusal(grad, x, weight)


def refuse_grouped_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    needs_x: bool = True,
) -> str | None:
    """What the gradients of grouped convolution say to a call; None when they take it."""
    filters, depth, rows, columns = weight.shape
    channels = depth * groups
    if filters not in (channels, 2 * channels):
        return f"{channels} to {filters} channels: grouped gradients keep their number or double it"
    if needs_x and filters != channels:
        return f"{channels} to {filters} channels: the gradient of x handles as many out as in"
    if filters // groups not in (4, 8, 16, 32):
        return f"{filters // groups} output channels per group: grouped gradients handle 4, 8, 16 and 32"
    if channels % 16 != 0:
        return f"{channels} channels: grouped gradients handle multiples of 16"
    if (rows, columns) != (3, 3):
        return f"kernel {rows}x{columns}: grouped gradients handle 3x3"
    if tuple(stride) not in ((1, 1), (2, 2)):
        return f"stride {stride[0]}x{stride[1]}: grouped gradients handle 1 and 2"
    if max(padding) > 1:
        return f"padding {padding[0]}x{padding[1]}: grouped gradients handle 0 and 1"
    if tuple(dilation) != (1, 1):
        return f"dilation {dilation[0]}x{dilation[1]}: grouped gradients handle 1"
    return _native.refusal(grad, x, weight)


def decline_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, needs_x: bool
) -> str | None:
    """Where PyTorch's gradients are faster than these, which could; None elsewhere."""
    if not needs_x and tuple(stride) == (1, 1) and grad.shape[3] <= 7 and weight.shape[2:] == (3, 3):
        return f"rows of {grad.shape[3]} pixels: PyTorch's gradient of the weight is up to 1.3 times as fast"
    return None


def decline_grouped_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, needs_x: bool
) -> str | None:
    """Where PyTorch's gradients are faster than these, which could; None elsewhere."""
    module = _ext.native()
    wide = weight.shape[1] >= 16 and tuple(stride) == (1, 1) and grad.shape[3] > 7
    if needs_x and wide and module is not None and module.isa() != "avx512":
        return (
            f"{weight.shape[1]} channels per group without AVX-512: PyTorch's gradient of x is up to "
            "1.3 times as fast"
        )
    return None


def dense_weight(
    grad: Tensor,
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None, Tensor | None, str],
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor | None:
    """The gradient of weight [K, C, R, S] where the convolution has seen act((x - mean) * scale + bias), norm
    being (mean, scale, bias, act) or (None, scale, bias, act) without a mean, or x; None where PyTorch is
    faster."""
    if weight.shape[1] < _LEAST_CHANNELS or _native.refusal(x) is not None:
        return None
    return torch.ops.fast_backbones.conv2d_backward_weight(grad, x, weight, stride, padding, dilation, *norm)


def depthwise(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needs_x: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x [N, C, H, W] and of weight [C, 1, R, S], float32; None where not needed, and where
    these kernels refuse or decline."""
    args = grad, x, weight, stride, padding, dilation
    if refuse_depthwise_backward(*args) is not None:
        return None, None
    needs_weight = needs_weight and decline_depthwise_backward(*args, needs_x) is None
    if not needs_x and not needs_weight:
        return None, None
    op = torch.ops.fast_backbones.depthwise_conv2d_backward
    dx, dweight = op(*args, needs_x, needs_weight)
    return dx if needs_x else None, dweight if needs_weight else None


def grouped(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    needs_x: bool = True,
    needs_weight: bool = True,
    affine: tuple[Tensor | None, Tensor | None, str] = (None, None, "none"),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x [N, C, H, W] and of weight [K, C / groups, 3, 3], float32; None where not needed,
    and where these kernels refuse or decline. With affine = (scale, shift, act) the convolution has seen
    act(x * scale + shift), whose gradient the first one is."""
    args = grad, x, weight, stride, padding, dilation
    needs_x, needs_weight = (
        needed
        and refuse_grouped_backward(*args, groups, of_x) is None
        and decline_grouped_backward(*args, of_x) is None
        for needed, of_x in ((needs_x, True), (needs_weight, False))
    )
    if not needs_x and not needs_weight:
        return None, None
    op = torch.ops.fast_backbones.grouped_conv2d_backward
    dx, dweight = op(*args, groups, needs_x, needs_weight, *affine)
    return dx if needs_x else None, dweight if needs_weight else None


def _fake(op, grad, x, weight, needs_x, needs_weight):
    _checks.same_kind(op, x, False, weight=weight, grad=grad)
    # dx lies as an output of the convolution does, dweight as the weight.
    layouts = _native.memory_format(x, weight), _native.memory_format(weight)
    wanted = zip((x, weight), (needs_x, needs_weight), layouts)
    dx, dweight = (
        torch.empty_like(t, memory_format=layout) if needed else t.new_empty(0)
        for t, needed, layout in wanted
    )
    return dx, dweight


@_native.register_fake("conv2d_backward_weight")
def _fake_weight(grad, x, weight, stride, padding, dilation, mean, scale, bias, activation):
    return _fake("conv2d_backward_weight", grad, x, weight, False, True)[1]


@_native.register_fake("depthwise_conv2d_backward")
def _fake_depthwise(grad, x, weight, stride, padding, dilation, needs_x, needs_weight):
    return _fake("depthwise_conv2d_backward", grad, x, weight, needs_x, needs_weight)


@_native.register_fake("grouped_conv2d_backward")
def _fake_grouped(
    grad, x, weight, stride, padding, dilation, groups, needs_x, needs_weight, *affine, **named
):
    return _fake("grouped_conv2d_backward", grad, x, weight, needs_x, needs_weight)
