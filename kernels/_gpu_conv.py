"""Convolutions of training on a GPU: who computes what, and what is kept for backward.

    "triton", depthwise      forward and both gradients by kernels/_triton
    "triton", grouped 3x3    the same, on tensor cores; 2 to 64 channels a group
    "library"                everything else by PyTorch (cuDNN, cuBLAS)

All keep the filters, and of x what it is made of where that is a batch norm whose input is kept anyway
(_recompute.py); PyTorch's own would keep x. Under autocast operands are cast as autocast casts them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _conv, _native, _recompute
from . import _gpu_training as gpu
from ._dispatch import Candidate
from ._function import Function

Pair = tuple[int, int]

MOST_TAPS = 49  # of an unrolled window
LEAST, MOST = 2, 64  # channels of a group, in and out


def refuse_depthwise(x, weight, bias, stride, padding, dilation, activation) -> str | None:
    """What the depthwise kernels say to the prepared arguments of depthwise_conv2d."""
    rows, columns = weight.shape[2:]
    if rows * columns > MOST_TAPS:
        return f"kernel {rows}x{columns}: triton unrolls up to {MOST_TAPS} taps"
    if x.numel() == 0:
        return "an empty map: triton handles maps that are not empty"
    return gpu.refusal(x, weight, bias)


def refuse_grouped(x, weight, bias, residual, stride, padding, dilation, groups, activation) -> str | None:
    """What the grouped kernels say to the prepared arguments of a convolution."""
    filters, depth, rows, columns = weight.shape
    if groups == 1:
        return "1 group: triton handles groups"
    if not all(LEAST <= count <= MOST for count in (depth, filters // groups)):
        return f"{depth} to {filters // groups} channels per group: triton handles {LEAST} to {MOST}"
    if (rows, columns) != (3, 3):
        return f"kernel {rows}x{columns}: triton handles 3x3"
    if stride not in ((1, 1), (2, 2)):
        return f"stride {stride[0]}x{stride[1]}: triton handles 1 and 2"
    if max(padding) > 2:
        return f"padding {padding[0]}x{padding[1]}: triton handles up to 2"
    if dilation != (1, 1):
        return f"dilation {dilation[0]}x{dilation[1]}: triton handles 1"
    if x.numel() == 0:
        return "an empty map: triton handles maps that are not empty"
    return refuse_library(x, weight, bias, residual)


def refuse_library(x, weight, bias, residual, *_) -> str | None:
    product = gpu.autocast_type(x) or x.dtype
    if residual is not None and residual.dtype != product:
        return f"residual is {residual.dtype}, the product {product}: they are added in one type"
    return gpu.refusal(x, weight, bias, residual)


def decline_library(x, weight, bias, residual, *_) -> str | None:
    if not _native.needs_grad(x, weight, bias, residual):
        return "no gradient is wanted: nothing is kept"
    return gpu.decline(x)


# ---- what a way computes ----


def depthwise(x: Tensor, weight: Tensor, bias, residual, stride, padding, dilation, groups, activation):
    from ._triton import depthwise_conv2d, depthwise_gradients

    y = gpu.empty_rows(x, x.shape[1], *_sizes(x, weight, stride, padding, dilation))
    kernel = tuple(weight.shape[2:])
    tiles = depthwise_gradients.tile(kernel, y.shape[3], y.shape[1], x.dtype)
    window = {"kernel": kernel, "tiles": tiles, "stride": stride, "padding": padding, "dilation": dilation}
    packed, number = depthwise_conv2d.pack(weight), gpu.NUMBERS[activation]
    gpu.put(x, depthwise_conv2d.launch(gpu.nhwc(x), packed, y, bias=bias, activation=number, **window))
    return gpu.in_layout_of(y, x, weight)


def grouped(x: Tensor, weight: Tensor, bias, residual, stride, padding, dilation, groups, activation):
    from ._triton import grouped_conv2d, grouped_gradients

    y = gpu.empty_rows(x, weight.shape[0], *_sizes(x, weight, stride, padding, dilation))
    window = {"kernel": weight.shape[2:], "stride": stride, "padding": padding, "groups": groups}
    end = {"bias": bias, "activation": gpu.NUMBERS[activation], "precision": gpu.precision()}
    end["tiles"] = grouped_gradients.tile(x, y, groups)
    shortcut = None if residual is None else gpu.nhwc(residual)
    packed = grouped_conv2d.pack(weight, groups)
    gpu.put(x, grouped_conv2d.launch(gpu.nhwc(x), packed, y, residual=shortcut, **window, **end))
    return gpu.in_layout_of(y, x, weight)


def _sizes(x, weight, stride, padding, dilation) -> tuple[int, int]:
    """Height and width of the output."""
    high, wide = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return high, wide


FORWARD = {"depthwise": depthwise, "grouped": grouped, "library": _conv.formula}


def depthwise_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int,
    needs_x: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Of x [N, C, H, W] and weight [C, 1, R, S]; None where not needed."""
    from ._triton import depthwise_conv2d, depthwise_gradients, sums

    kernel, g, dx, dweight, launches = tuple(weight.shape[2:]), gpu.nhwc(grad), None, None, []
    window = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    if needs_x:
        dx = gpu.empty_rows(grad, *x.shape[1:])
        packed = depthwise_conv2d.pack(weight)
        launches.append(depthwise_gradients.input_gradient(g, packed, dx, **window))
    if needs_weight:
        taps, channels = kernel[0] * kernel[1], weight.shape[0]
        rows = depthwise_gradients.weight_cut(g, kernel)
        parts = torch.empty(rows.count, taps * channels, dtype=torch.float32, device=x.device)
        found = torch.empty(taps * channels, dtype=weight.dtype, device=x.device)
        launches.append(depthwise_gradients.weight_gradient(g, gpu.nhwc(x), parts, rows, **window))
        launches.append(sums.total(parts, found))
    gpu.put(grad, *launches)
    if needs_weight:
        dweight = found.view(taps, channels).t().reshape(weight.shape)
    return dx, dweight


def grouped_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int,
    needs_x: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Of x [N, C, H, W] and weight [K, C/G, 3, 3]; None where not needed."""
    from ._triton import grouped_gradients, sums

    g, dx, dweight = gpu.nhwc(grad), None, None
    how = {"groups": groups, "stride": stride, "padding": padding, "precision": gpu.precision()}
    if needs_x:
        dx = gpu.empty_rows(grad, *x.shape[1:])
        gpu.put(grad, grouped_gradients.input_gradient(g, weight, dx, **how))
    if needs_weight:
        rows, channels = grouped_gradients.weight_cut(g, x, groups)
        sizes = weight.shape[0], 3, 3, channels
        parts = torch.empty(rows.count, *sizes, dtype=torch.float32, device=x.device)
        found = torch.empty(sizes, dtype=torch.float32, device=x.device)
        blocks = grouped_gradients.weight_gradient(g, gpu.nhwc(x), parts, rows, **how)
        gpu.put(grad, blocks, sums.total(parts.flatten(1), found.flatten()))
        dweight = grouped_gradients.unpacked(found, weight, groups)
    return dx, dweight


GRADIENTS = {"depthwise": depthwise_gradients, "grouped": grouped_gradients}


class _GpuConv(Function):
    """A forward and gradients by one of the ways. Keeps weight, and x or what x is made of."""

    @staticmethod
    def forward(way, x, weight, bias, residual, stride, padding, dilation, groups, activation):
        return FORWARD[way](x, weight, bias, residual, stride, padding, dilation, groups, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.way, x, weight, bias, _, *geometry, ctx.activation = inputs
        ctx.geometry = tuple(geometry)
        ctx.sizes, ctx.bias_sizes = x.shape, None if bias is None else list(bias.shape)
        kept, ctx.how = _recompute.keep(x) if ctx.needs_input_grad[2] else ((None,), None)
        ctx.save_for_backward(weight, None if ctx.activation == "none" else output, *kept)

    @staticmethod
    def backward(ctx, grad):
        weight, y, *kept = ctx.saved_tensors
        if ctx.activation == "relu":
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        elif ctx.activation == "relu6":
            grad = torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0)
        *needs, needs_residual = ctx.needs_input_grad[1:5]
        # What is not needed is not there: of x only the sizes matter then.
        x = _recompute.restore(kept, ctx.how) if needs[1] else _native.absent(grad, ctx.sizes)
        found = None, None
        if ctx.way in GRADIENTS and not torch.is_grad_enabled() and grad.numel() > 0:
            found = GRADIENTS[ctx.way](grad, x, weight, *ctx.geometry, *needs[:2])
        found = _conv.completed(found, grad, x, weight, ctx.bias_sizes, ctx.geometry, needs)
        return None, *found, grad if needs_residual else None, *(None,) * 5


def call(way: str, x: Tensor, weight: Tensor, bias, residual, *rest) -> Tensor:
    """One of the ways, with autograd where it must record."""
    x, weight, bias = gpu.cast(x, weight, bias)
    if _native.needs_grad(x, weight, bias, residual):
        return _GpuConv.apply(way, x, weight, bias, residual, *rest)
    return FORWARD[way](x, weight, bias, residual, *rest)


# ---- candidates ----


def _decline(x, *_) -> str | None:
    return gpu.decline(x)


def _run_grouped(*args) -> Tensor:
    return call("grouped", *args)


def _run_library(*args) -> Tensor:
    return call("library", *args)


def _run_depthwise(x, weight, bias, stride, padding, dilation, activation) -> Tensor:
    return call("depthwise", x, weight, bias, None, stride, padding, dilation, x.shape[1], activation)


TRITON_DEPTHWISE = Candidate("triton", gpu.FAMILY, refuse_depthwise, _run_depthwise, _decline)
TRITON_GROUPED = Candidate("triton", gpu.FAMILY, refuse_grouped, _run_grouped, _decline)
LIBRARY = Candidate("library", gpu.FAMILY, refuse_library, _run_library, decline_library)
