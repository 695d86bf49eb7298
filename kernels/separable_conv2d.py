"""Depthwise-separable convolution: a filter per channel, then a 1x1 convolution, in one pass.

Chollet, Xception, arXiv 1610.02357; Howard et al., MobileNets, arXiv 1704.04861.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _dispatch, _native
from ._activation import NAMES, activated
from ._function import Function

_OP_NAME = "separable_conv2d"
_LARGEST_WINDOW = 7


def separable_conv2d_ref(
    x: Tensor,
    depth_weight: Tensor,
    weight: Tensor,
    depth_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    depth_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    """The formula in plain PyTorch: two F.conv2d with their activations. Any dtype, any device."""
    return _formula(
        x, depth_weight, weight, depth_bias, bias, stride, padding, dilation, depth_activation, activation
    )


def _between(x, depth_weight, depth_bias, stride, padding, dilation, depth_activation) -> Tensor:
    """The map between the two convolutions."""
    y = F.conv2d(x, depth_weight, depth_bias, stride, padding, dilation, x.shape[-3])
    return activated(y, depth_activation)


def _formula(
    x, depth_weight, weight, depth_bias, bias, stride, padding, dilation, depth_activation, activation
) -> Tensor:
    between = _between(x, depth_weight, depth_bias, stride, padding, dilation, depth_activation)
    return activated(F.conv2d(between, weight, bias), activation)


def _prepare(
    x,
    depth_weight,
    weight,
    depth_bias=None,
    bias=None,
    *,
    stride=1,
    padding=1,
    dilation=1,
    depth_activation="none",
    activation="none",
) -> tuple:
    op = _OP_NAME
    stride = _checks.pair(op, "stride", stride, 1)
    padding = _checks.pair(op, "padding", padding, 0)
    dilation = _checks.pair(op, "dilation", dilation, 1)
    _checks.activation(op, depth_activation, "depth_activation", NAMES)
    _checks.activation(op, activation, "activation", NAMES)
    for name, t in (("x", x), ("depth_weight", depth_weight), ("weight", weight)):
        _checks.tensor(op, name, t)
    if x.dim() == 3:
        x = x.unsqueeze(0)
    _checks.image(op, x)
    _checks.same_kind(op, x, True, depth_weight=depth_weight, weight=weight, depth_bias=depth_bias, bias=bias)
    channels = x.shape[1]
    if depth_weight.dim() != 4 or depth_weight.shape[:2] != (channels, 1) or depth_weight.numel() == 0:
        got = _checks.sizes(depth_weight)
        raise RuntimeError(
            f"{op}: depth_weight has sizes {got}, expected [{channels}, 1, R, S] for x {_checks.sizes(x)}"
        )
    if weight.dim() != 4 or weight.shape[1:] != (channels, 1, 1) or weight.shape[0] == 0:
        got = _checks.sizes(weight)
        raise RuntimeError(
            f"{op}: weight has sizes {got}, expected [K, {channels}, 1, 1] for x {_checks.sizes(x)}"
        )
    for name, t, size in (("depth_bias", depth_bias, channels), ("bias", bias, weight.shape[0])):
        if t is not None and t.shape != (size,):
            raise RuntimeError(f"{op}: {name} has sizes {_checks.sizes(t)}, expected [{size}]")
    _output_sizes(x, depth_weight, stride, padding, dilation)
    return x, depth_weight, weight, depth_bias, bias, stride, padding, dilation, depth_activation, activation


def _output_sizes(x, depth_weight, stride, padding, dilation) -> tuple[int, int]:
    rows, columns = (
        _checks.output_size(
            _OP_NAME, axis, x.shape[2 + i], depth_weight.shape[2 + i], stride[i], padding[i], dilation[i]
        )
        for i, axis in enumerate(("height", "width"))
    )
    return rows, columns


def _masked(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    """The gradient in front of an activation whose result is y."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, y, 0)
    if activation == "relu6":
        return torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0)
    return grad


class _NativeSeparable(Function):
    """A native forward with the derivative of the formula; the map between is computed again in backward."""

    @staticmethod
    def forward(x, depth_weight, weight, depth_bias, bias, *geometry):
        op = torch.ops.fast_backbones.separable_conv2d
        return op(x, depth_weight, weight, depth_bias, bias, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, depth_weight, weight, depth_bias, bias, *ctx.geometry = inputs
        ctx.has_bias = bias is not None
        y = output if ctx.geometry[-1] != "none" else None
        ctx.save_for_backward(x, depth_weight, weight, depth_bias, y)

    @staticmethod
    def backward(ctx, grad):
        x, depth_weight, weight, depth_bias, y = ctx.saved_tensors
        stride, padding, dilation, depth_activation, activation = ctx.geometry
        if y is not None:
            grad = _masked(grad, y, activation)
        between = _between(x, depth_weight, depth_bias, stride, padding, dilation, depth_activation)
        needs_x, needs_depth_weight, needs_weight, needs_depth_bias, needs_bias = ctx.needs_input_grad[:5]
        needs_between = needs_x or needs_depth_weight or needs_depth_bias
        bias_sizes = [weight.shape[0]] if ctx.has_bias else None
        grad_between, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            between,
            weight,
            bias_sizes,
            *((1, 1), (0, 0), (1, 1), False, [0, 0], 1),
            [needs_between, needs_weight, needs_bias],
        )
        grad_x = grad_depth_weight = grad_depth_bias = None
        if needs_between:
            depth_bias_sizes = None if depth_bias is None else list(depth_bias.shape)
            grad_x, grad_depth_weight, grad_depth_bias = torch.ops.aten.convolution_backward(
                _masked(grad_between, between, depth_activation),
                x,
                depth_weight,
                depth_bias_sizes,
                *(stride, padding, dilation, False, [0, 0], x.shape[1]),
                [needs_x, needs_depth_weight, needs_depth_bias],
            )
        return (
            grad_x,
            grad_depth_weight,
            grad_weight,
            grad_depth_bias,
            grad_bias,
            *(None,) * 5,
        )


def _refuse(x, depth_weight, weight, depth_bias, bias, *_) -> str | None:
    rows, columns = depth_weight.shape[2:]
    if max(rows, columns) > _LARGEST_WINDOW:
        return f"kernel {rows}x{columns}: native handles up to {_LARGEST_WINDOW}x{_LARGEST_WINDOW}"
    return _native.refusal(x, depth_weight, weight, depth_bias, bias, cast_by_autocast=True)


def _run(x, depth_weight, weight, depth_bias, bias, *geometry) -> Tensor:
    if _native.needs_grad(x, depth_weight, weight, depth_bias, bias):
        return _NativeSeparable.apply(x, depth_weight, weight, depth_bias, bias, *geometry)
    op = torch.ops.fast_backbones.separable_conv2d
    return op(x, depth_weight, weight, depth_bias, bias, *geometry)


@_native.register_fake("separable_conv2d")
def _fake(x, depth_weight, weight, depth_bias, bias, stride, padding, dilation, depth_activation, activation):
    others = {"depth_weight": depth_weight, "weight": weight, "depth_bias": depth_bias, "bias": bias}
    _checks.same_kind(_OP_NAME, x, False, **others)
    rows, columns = _output_sizes(x, depth_weight, stride, padding, dilation)
    # A map of one channel and one pixel in between has no layout to hand on.
    ambiguous = x.shape[1] * rows * columns == 1
    layout = _native.memory_format(*(() if ambiguous else (x, depth_weight)), weight)
    return torch.empty(
        (x.shape[0], weight.shape[0], rows, columns), dtype=x.dtype, device=x.device, memory_format=layout
    )


_OP = _dispatch.register(
    _OP_NAME,
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(_formula),
)


def separable_conv2d(
    x: Tensor,
    depth_weight: Tensor,
    weight: Tensor,
    depth_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    depth_activation: str = "none",
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its own filter, then mix the channels, in one pass: no map lies in between.

    z[n, c, p, q] = depth_act( depth_bias[c] + sum_rs depth_weight[c, 0, r, s]
                               * x[n, c, p*stride + r*dilation - padding, q*stride + s*dilation - padding] )
    y[n, k, p, q] = act( sum_c z[n, c, p, q] * weight[k, c, 0, 0] + bias[k] )

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout. The output is channels_last when x or a
            weight is, else contiguous.
        depth_weight: [C, 1, R, S]. weight: [K, C, 1, 1]. depth_bias: [C] or None. bias: [K] or None.
        stride, padding, dilation: of the filters per channel, an integer or two.
        depth_activation, activation: "none", "relu" or "relu6".
        backend: None (the current one), "auto", "native" or "reference".
    Returns: [N, K, P, Q], P = (H + 2*padding - dilation*(R - 1) - 1) // stride + 1.
    Raises: RuntimeError for sizes, dtypes or devices that do not fit together, or when a backend asked for by
        name refuses; ValueError for an unknown activation or backend; TypeError for what is not a tensor or
        an integer.

    Fast path: float32 on the CPU, filters up to 7x7. Derivatives come from the formula; backward computes z
    again.
    """
    tensors = (x, depth_weight, weight, depth_bias, bias)
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "depth_activation": depth_activation,
        "activation": activation,
    }
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(separable_conv2d, tensors, *tensors, **options, backend=backend)
    y = _dispatch.run(_OP, _prepare(*tensors, **options), backend)
    return y.squeeze(0) if x.dim() == 3 else y
