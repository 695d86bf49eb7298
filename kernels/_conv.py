"""What the convolutions share: argument checks, the formula, the derivative and the fake kernels.

    y[n, k, p, q] = act( sum_crs x[n, c, p*stride + r*dilation - padding, q*stride + s*dilation - padding]
                                 * weight[k, c, r, s]  + bias[k] + residual[n, k, p, q] )

Prepared arguments, in the order of the candidates: x, weight, bias, residual, stride, padding, dilation,
groups, activation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as is_compiling

from . import _checks, _conv_backward, _native, _recompute
from ._dispatch import Candidate
from ._function import Function

Pair = tuple[int, int]

# Winograd needs this many channels on both sides before its transforms pay for themselves. With the packing
# of the weight, which every call repeats: 1.1-1.8x over direct from 10x10 outputs on; at 7x7 0.9x for one
# image, 1.2x for four. The choice never looks at the batch, so that a sample has the same bits alone and in
# any batch.
_WINOGRAD_CHANNELS = 16
_WINOGRAD_TILES = 40  # of 5x5: fewer do not pay for 46 weights instead of 25


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


def refuse_winograd(x, weight, bias, residual, stride, padding, dilation, groups, activation) -> str | None:
    rows, columns = weight.shape[2], weight.shape[3]
    if (rows, columns) not in ((3, 3), (5, 5), (1, 7), (7, 1)):
        return f"kernel {rows}x{columns}: winograd handles 3x3, 5x5, 1x7 and 7x1"
    if stride != (1, 1):
        return f"stride {stride[0]}x{stride[1]}: winograd handles 1"
    if dilation != (1, 1):
        return f"dilation {dilation[0]}x{dilation[1]}: winograd handles 1"
    if groups != 1:
        return f"{groups} groups: winograd handles 1"
    return None


def decline_winograd(x, weight, bias, residual, stride, padding, *_) -> str | None:
    filters, depth, rows = weight.shape[:3]
    if min(filters, depth) < _WINOGRAD_CHANNELS:
        return f"{depth} to {filters} channels: winograd pays from {_WINOGRAD_CHANNELS} on"
    if rows == weight.shape[3] == 5:
        height, width = (x.shape[2 + i] + 2 * padding[i] - 4 for i in range(2))
        tiles = -(-height // 2) * -(-width // 2)
        if tiles < _WINOGRAD_TILES:
            return f"5x5 on {tiles} tiles of 2x2 outputs: winograd pays from {_WINOGRAD_TILES} on"
    return None


def decline_grouped(x, weight, bias, residual, stride, padding, dilation, groups, activation) -> str | None:
    return "1 group: the dense kernels are faster" if groups == 1 else None


# conv2d's native candidates, fastest first: name, op, what it cannot do, what it is not worth.
NATIVE = (
    ("grouped", "grouped_conv2d", refuse_grouped, decline_grouped),
    ("winograd", "winograd_conv2d", refuse_winograd, decline_winograd),
    ("direct", "conv2d", refuse_nothing, refuse_nothing),
)


class _NativeConv(Function):
    """A native forward, and gradients by native kernels where they are good at them. Keeps weight, and x or
    what x is made of. Entered only when autograd must record.

    With `passes` it returns x as well, for those that read x later: the gradient that reaches x there is
    added in the kernel that computes this one, and not by a pass over the map.
    """

    @staticmethod
    def forward(kernel, passes, x, weight, bias, residual, stride, padding, dilation, groups, activation):
        op = getattr(torch.ops.fast_backbones, kernel)
        y = op(x, weight, bias, residual, stride, padding, dilation, groups, activation)
        return (y, x.view_as(x)) if passes else y  # autograd wants an alias here

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, passes, x, weight, bias, _, *geometry, ctx.activation = inputs
        ctx.geometry = tuple(geometry)
        ctx.sizes, ctx.bias_sizes = x.shape, None if bias is None else list(bias.shape)
        y = output[0] if passes else output
        kept, ctx.how = _recompute.keep(x) if ctx.needs_input_grad[3] else ((None,), None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, y if ctx.activation == "relu" else None, *kept)

    @staticmethod
    def backward(ctx, grad, added=None):
        if grad is None:
            return None, None, added, *(None,) * 8
        weight, y, *kept = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        *needs, needs_residual = ctx.needs_input_grad[2:6]
        found = gradients(grad, weight, kept, ctx.how, ctx.sizes, ctx.bias_sizes, ctx.geometry, needs, added)
        return None, None, *found, grad if needs_residual else None, None, None, None, None, None


def gradients(
    grad: Tensor,
    weight: Tensor,
    kept: Sequence[Tensor | None],
    how: _recompute.How | None,
    sizes: torch.Size,
    bias_sizes: list[int] | None,
    geometry: tuple[Any, ...],
    needs: Sequence[bool],
    added: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of what a convolution has seen, of weight and of bias, where needed.

    Args:
        kept, how: what it has seen, as `_recompute.keep` or `_recompute.affine` say; sizes: of that.
        geometry: stride, padding, dilation, groups.
        added: to the first of the gradients, or None.
    """
    dx = dweight = x = None
    *window, groups = geometry
    if fast_backward(grad, weight):
        if groups == 1:
            if needs[0]:
                dx = _input_gradient(grad, weight, *geometry, sizes, added)
                added = added if dx is None else None
            if needs[1]:
                dweight = _conv_backward.dense_weight(grad, *_recompute.before(kept, how), weight, *window)
        elif weight.shape[1] == 1:
            x = _recompute.restore(kept, how) if needs[1] else _native.absent(grad, sizes)
            dx, dweight = _conv_backward.depthwise(grad, x, weight, *window, *needs[:2])
        else:
            x, affine = _native.absent(grad, sizes), (None, None, "none")
            if needs[1]:
                x, (mean, *affine) = _recompute.before(kept, how)
                if mean is not None:
                    x, affine = _recompute.restore(kept, how), (None, None, "none")
            dx, dweight = _conv_backward.grouped(grad, x, weight, *geometry, *needs[:2], affine)
            x = None if affine[0] is not None else x
    if x is None:
        # What is not needed is not there: of x only the sizes matter then.
        needs_x = needs[1] and dweight is None
        x = _recompute.restore(kept, how) if needs_x else _native.absent(grad, sizes)
    dx, *others = completed((dx, dweight), grad, x, weight, bias_sizes, geometry, needs)
    if needs[0] and added is not None:
        dx = dx + added
    return dx, *others


def completed(found, grad, x, weight, bias_sizes, geometry, needs) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias; those that are needed and not among the `found` by PyTorch.

    That of bias alone is a sum: oneDNN computes the gradient of weight on the way to it, at the same price.
    """
    (dx, dweight), (stride, padding, dilation, groups) = found, geometry
    rest = [needs[0] and dx is None, needs[1] and dweight is None, needs[2]]
    if rest == [False, False, True]:
        return dx, dweight, grad.sum((0, 2, 3))
    if not any(rest):
        return dx, dweight, None
    call = torch.ops.aten.convolution_backward
    theirs = call(grad, x, weight, bias_sizes, stride, padding, dilation, False, [0, 0], groups, rest)
    return tuple(b if a is None else a for a, b in zip((dx, dweight, None), theirs))


def fast_backward(grad: Tensor, weight: Tensor) -> bool:
    """Whether native kernels may compute a gradient: nobody wants derivatives of it, nobody traces it."""
    if torch.is_grad_enabled() or is_compiling() or grad.numel() == 0:
        return False
    return _native.refusal(grad, weight) is None


def _input_gradient(grad, weight, stride, padding, dilation, groups, sizes, added) -> Tensor | None:
    """The gradient of x, and what is added to it, where it is a convolution that a native kernel is good at;
    else None.

    At stride 1 dx is the convolution of dy with the filters upside down, inputs and outputs exchanged:

        dx[n, c, i, j] = sum_krs dy[n, k, i + padding - r, j + padding - s] * weight[k, c, r, s]

    A 1x1 convolution of a larger stride has such a gradient at every stride-th pixel and 0 between them; its
    dilation says nothing.
    """
    rows, columns = weight.shape[2:]
    if groups == 1 and (rows, columns) == (1, 1) and padding == (0, 0) and stride != (1, 1):
        small = _input_gradient(grad, weight, (1, 1), padding, (1, 1), groups, sizes, None)
        return torch.ops.fast_backbones.spread_pixels(small, *sizes[2:], stride, added)
    if groups > 1 or stride != (1, 1) or dilation != (1, 1) or padding[0] >= rows or padding[1] >= columns:
        return None
    padding = (rows - 1 - padding[0], columns - 1 - padding[1])
    filters = torch.ops.fast_backbones.transposed_filters(weight, groups)
    args = (grad, filters, None, added, stride, padding, dilation, groups, "none")
    return getattr(torch.ops.fast_backbones, fastest(*args))(*args)


def fastest(*args) -> str:
    """The native op that conv2d runs on these prepared arguments."""
    return next(
        kernel for _, kernel, refuse, decline in NATIVE if refuse(*args) is None and decline(*args) is None
    )


def passing(x, weight, bias, stride, padding, dilation, groups) -> tuple[Tensor, Tensor] | None:
    """The convolution by native kernels, and x as `_NativeConv` passes it on; None where they refuse, and
    where nobody needs gradients."""
    args = x, weight, bias, None, stride, padding, dilation, groups, "none"
    if not x.requires_grad or not _native.needs_grad(x) or _native.refusal(*args[:3], cast_by_autocast=True):
        return None
    y, passed = _NativeConv.apply(fastest(*args), True, *args)
    _recompute.hand_on(x, passed)
    return y, passed


def native(name: str, kernel: str, refuse: Callable[..., str | None], **options) -> Candidate:
    """The candidate for torch.ops.fast_backbones.<kernel>; `refuse` says what shapes it cannot do."""

    def refuse_all(x, weight, bias, residual, *rest) -> str | None:
        # Shapes first: they tell the candidates apart at the price of a few comparisons.
        if reason := refuse(x, weight, bias, residual, *rest):
            return reason
        return _native.refusal(x, weight, bias, residual, cast_by_autocast=True)

    def run(x, weight, bias, residual, *rest) -> Tensor:
        if _native.needs_grad(x, weight, bias, residual):
            return _NativeConv.apply(kernel, False, x, weight, bias, _native.apart(residual, x), *rest)
        return getattr(torch.ops.fast_backbones, kernel)(x, weight, bias, residual, *rest)

    return Candidate(name, "native", refuse_all, run, **options)


def fake(x, weight, bias, residual, stride, padding, dilation, groups, activation):
    """What a convolution returns, without values."""
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


@_native.register_fake("spread_pixels")
def _fake_spread(small, height, width, stride, added):
    sizes = (*small.shape[:2], height, width)
    return small.new_empty(sizes).to(memory_format=torch.channels_last)


@_native.register_fake("transposed_filters")
def _fake_transposed(weight, groups):
    filters, depth, rows, columns = weight.shape
    return weight.new_empty((depth * groups, filters // groups, rows, columns))


for _kernel in ("conv2d", "winograd_conv2d", "grouped_conv2d"):
    _native.register_fake(_kernel)(fake)
