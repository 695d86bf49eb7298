"""What the convolutions share: argument checks, the formula, the derivative and the fake kernels.

    y[n, k, p, q] = act( sum_crs x[n, c, p*stride + r*dilation - padding, q*stride + s*dilation - padding]
                                 * weight[k, c, r, s]  + bias[k] + residual[n, k, p, q] )

Prepared arguments, in the order of the candidates: x, weight, bias, residual, stride, padding, dilation,
groups, activation.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _native
from ._dispatch import Candidate

Pair = tuple[int, int]


def check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
) -> tuple:
    """The prepared arguments, or an exception naming the wrong one. Unbatched tensors become batches."""
    _checks.tensor(op, "x", x)
    _checks.tensor(op, "weight", weight)
    if x.dim() == 3:
        x = x.unsqueeze(0)
        if residual is not None and residual.dim() == 3:
            residual = residual.unsqueeze(0)
    _checks.image(op, x)
    _checks.same_kind(op, x, True, weight=weight, bias=bias)
    _checks.same_kind(op, x, True, residual=residual)
    _checks.activation(op, activation)
    if weight.dim() != 4 or weight.numel() == 0:
        raise RuntimeError(
            f"{op}: weight has sizes {_checks.sizes(weight)}, expected [K, C/groups, R, S], none 0"
        )
    if groups < 1:
        raise RuntimeError(f"{op}: groups is {groups}, expected at least 1")
    filters, depth, rows, columns = weight.shape
    channels = x.shape[1]
    if channels != depth * groups:
        raise RuntimeError(
            f"{op}: x has {channels} channels, expected {depth * groups} for weight {_checks.sizes(weight)} "
            f"and {groups} groups"
        )
    if filters % groups != 0:
        raise RuntimeError(f"{op}: weight has {filters} filters, expected a multiple of groups, {groups}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != filters):
        raise RuntimeError(f"{op}: bias has sizes {_checks.sizes(bias)}, expected [{filters}]")
    p = _checks.output_size(op, "height", x.shape[2], rows, stride[0], padding[0], dilation[0])
    q = _checks.output_size(op, "width", x.shape[3], columns, stride[1], padding[1], dilation[1])
    if residual is not None and residual.shape != (x.shape[0], filters, p, q):
        expected = f"[{x.shape[0]}, {filters}, {p}, {q}]"
        got = _checks.sizes(residual)
        raise RuntimeError(f"{op}: residual has sizes {got}, expected {expected}, the sizes of the output")
    return x, weight, bias, residual, stride, padding, dilation, groups, activation


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
) -> Tensor:
    """The reference: three plain PyTorch calls."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


def refuse_nothing(*_) -> None:
    """The register tiles of conv2d take every convolution."""
    return None


def refuse_grouped(x, weight, bias, residual, stride, padding, dilation, groups, activation) -> str | None:
    """What the grouped rows kernel says to the shapes of a convolution."""
    filters, depth, rows, columns = weight.shape
    if filters not in (depth * groups, 2 * depth * groups):
        return f"{depth * groups} to {filters} channels: grouped rows keep their number or double it"
    if filters // groups not in (4, 8, 16, 32):
        return f"{filters // groups} output channels per group: grouped rows handle 4, 8, 16 and 32"
    if depth * groups % 16 != 0:
        return f"{depth * groups} channels: grouped rows handle multiples of 16"
    if (rows, columns) != (3, 3):
        return f"kernel {rows}x{columns}: grouped rows handle 3x3"
    if stride not in ((1, 1), (2, 2)):
        return f"stride {stride[0]}x{stride[1]}: grouped rows handle 1 and 2"
    if max(padding) > 1:
        return f"padding {padding[0]}x{padding[1]}: grouped rows handle 0 and 1"
    if dilation != (1, 1):
        return f"dilation {dilation[0]}x{dilation[1]}: grouped rows handle 1"
    return None


class _NativeConv(torch.autograd.Function):
    """A native forward with the derivative of the formula. Entered only when autograd must record."""

    @staticmethod
    def forward(kernel, x, weight, bias, residual, stride, padding, dilation, groups, activation):
        op = getattr(torch.ops.fast_backbones, kernel)
        return op(x, weight, bias, residual, stride, padding, dilation, groups, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, weight, bias, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.activation = inputs
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.save_for_backward(x, weight, output if ctx.activation == "relu" else None)

    @staticmethod
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[1:5]
        grad_x = grad_weight = grad_bias = None
        if needs_x or needs_weight or needs_bias:
            grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                ctx.bias_sizes,
                ctx.stride,
                ctx.padding,
                ctx.dilation,
                False,
                [0, 0],
                ctx.groups,
                [needs_x, needs_weight, needs_bias],
            )
        return (
            None,
            grad_x,
            grad_weight,
            grad_bias,
            grad if needs_residual else None,
            None,
            None,
            None,
            None,
            None,
        )


def native(name: str, kernel: str, refuse: Callable[..., str | None], **options) -> Candidate:
    """The candidate for torch.ops.fast_backbones.<kernel>; `refuse` says what shapes it cannot do."""

    def refuse_all(x, weight, bias, residual, *rest) -> str | None:
        # Shapes first: they tell the candidates apart at the price of a few comparisons.
        if reason := refuse(x, weight, bias, residual, *rest):
            return reason
        return _native.refusal(x, weight, bias, residual, cast_by_autocast=True)

    def run(x, weight, bias, residual, *rest) -> Tensor:
        if _native.needs_grad(x, weight, bias, residual):
            if residual is x:  # Dynamo traces a Function only when its tensors are distinct objects
                residual = residual.view_as(residual)
            return _NativeConv.apply(kernel, x, weight, bias, residual, *rest)
        return getattr(torch.ops.fast_backbones, kernel)(x, weight, bias, residual, *rest)

    return Candidate(name, "native", refuse_all, run, **options)


def _fake(x, weight, bias, residual, stride, padding, dilation, groups, activation):
    _checks.same_kind("conv2d", x, False, weight=weight, bias=bias, residual=residual)
    p = _checks.output_size(
        "conv2d", "height", x.shape[2], weight.shape[2], stride[0], padding[0], dilation[0]
    )
    q = _checks.output_size(
        "conv2d", "width", x.shape[3], weight.shape[3], stride[1], padding[1], dilation[1]
    )
    layout = _native.memory_format(x, weight)
    return torch.empty(
        (x.shape[0], weight.shape[0], p, q), dtype=x.dtype, device=x.device, memory_format=layout
    )


for _kernel in ("conv2d", "winograd_conv2d", "grouped_conv2d"):
    _native.register_fake(_kernel)(_fake)
