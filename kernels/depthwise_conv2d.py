"""Convolution with one filter per channel, bias and activation in the same pass (Xception, MobileNet)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _conv, _dispatch, _gpu_conv, _native, _recompute
from ._activation import NAMES, activated
from ._function import Function

_LARGEST_WINDOW = 7


def depthwise_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """The formula in plain PyTorch: F.conv2d with as many groups as channels, then the activation."""
    return _formula(x, weight, bias, stride, padding, dilation, activation)


def _formula(x, weight, bias, stride, padding, dilation, activation) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding, dilation, x.shape[-3])
    return activated(y, activation)


def _prepare(x, weight, bias=None, *, stride=1, padding=0, dilation=1, activation="none") -> tuple:
    op = "depthwise_conv2d"
    stride = _checks.pair(op, "stride", stride, 1)
    padding = _checks.pair(op, "padding", padding, 0)
    dilation = _checks.pair(op, "dilation", dilation, 1)
    _checks.activation(op, activation, "activation", NAMES)
    _checks.tensor(op, "x", x)
    _checks.tensor(op, "weight", weight)
    if x.dim() == 3:
        x = x.unsqueeze(0)
    _checks.image(op, x)
    _checks.same_kind(op, x, True, weight=weight, bias=bias)
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1) or weight.numel() == 0:
        raise RuntimeError(
            f"{op}: weight has sizes {_checks.sizes(weight)}, expected [{channels}, 1, R, S] for x "
            f"{_checks.sizes(x)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise RuntimeError(f"{op}: bias has sizes {_checks.sizes(bias)}, expected [{channels}]")
    _output_sizes(x, weight, stride, padding, dilation)
    return x, weight, bias, stride, padding, dilation, activation


def _output_sizes(x, weight, stride, padding, dilation) -> tuple[int, int]:
    p, q = (
        _checks.output_size(
            "depthwise_conv2d", axis, x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]
        )
        for i, axis in enumerate(("height", "width"))
    )
    return p, q


class _NativeDepthwise(Function):
    """A native forward and gradients. Keeps weight, and x or what x is made of."""

    @staticmethod
    def forward(x, weight, bias, stride, padding, dilation, activation):
        op = torch.ops.fast_backbones.depthwise_conv2d
        return op(x, weight, bias, stride, padding, dilation, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *geometry, ctx.activation = inputs
        ctx.geometry = tuple(geometry)
        ctx.sizes, ctx.bias_sizes = x.shape, None if bias is None else list(bias.shape)
        kept, ctx.how = _recompute.keep(x) if ctx.needs_input_grad[1] else ((None,), None)
        ctx.save_for_backward(weight, None if ctx.activation == "none" else output, *kept)

    @staticmethod
    def backward(ctx, grad):
        weight, y, *kept = ctx.saved_tensors
        if ctx.activation == "relu":
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        elif ctx.activation == "relu6":
            grad = torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0)
        needs, geometry = ctx.needs_input_grad[:3], (*ctx.geometry, ctx.sizes[1])
        found = _conv.gradients(grad, weight, kept, ctx.how, ctx.sizes, ctx.bias_sizes, geometry, needs)
        return *found, None, None, None, None


def _refuse(x, weight, bias, stride, padding, dilation, activation) -> str | None:
    rows, columns = weight.shape[2:]
    if rows > _LARGEST_WINDOW or columns > _LARGEST_WINDOW:
        return f"kernel {rows}x{columns}: native handles up to {_LARGEST_WINDOW}x{_LARGEST_WINDOW}"
    return _native.refusal(x, weight, bias, cast_by_autocast=True)


def _run(x, weight, bias, *rest) -> Tensor:
    if _native.needs_grad(x, weight, bias):
        return _NativeDepthwise.apply(x, weight, bias, *rest)
    return torch.ops.fast_backbones.depthwise_conv2d(x, weight, bias, *rest)


@_native.register_fake("depthwise_conv2d")
def _fake(x, weight, bias, stride, padding, dilation, activation):
    _checks.same_kind("depthwise_conv2d", x, False, weight=weight, bias=bias)
    p, q = _output_sizes(x, weight, stride, padding, dilation)
    layout = _native.memory_format(x, weight)
    return torch.empty((x.shape[0], x.shape[1], p, q), dtype=x.dtype, device=x.device, memory_format=layout)


_OP = _dispatch.register(
    "depthwise_conv2d",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _gpu_conv.TRITON_DEPTHWISE,
    _dispatch.reference(_formula),
)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its own filter, add the bias and apply the activation in one pass.

    y[n, c, p, q] = act( sum_rs x[n, c, p*stride + r*dilation - padding, q*stride + s*dilation - padding]
                                * weight[c, 0, r, s] + bias[c] )

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout. The output is channels_last when x or
            weight is, else contiguous.
        weight: [C, 1, R, S], same dtype and device as x. bias: [C] or None.
        stride, padding, dilation: an integer or two. activation: "none", "relu" or "relu6".
        backend: None (the current one), "auto", "native", "triton" or "reference".
    Returns: [N, C, P, Q], P = (H + 2*padding - dilation*(R - 1) - 1) // stride + 1.
    Raises: as `conv2d`.

    Fast path: float32 on the CPU, kernels up to 7x7; 3x3 with stride 1 or 2 and padding up to 1 reads every
    pixel once for the outputs around it. Products are added in the order of the kernel. Gradients come
    from native kernels, second derivatives from the formula. On a GPU (with FB_GPU_PLANS=1) float32, float16
    and bfloat16, up to 49 taps, forward and both gradients by Triton.
    """
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(
            depthwise_conv2d,
            (x, weight, bias),
            x,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            activation=activation,
            backend=backend,
        )
    args = _prepare(x, weight, bias, stride=stride, padding=padding, dilation=dilation, activation=activation)
    y = _dispatch.run(_OP, args, backend)
    return y.squeeze(0) if x.dim() == 3 else y
