"""Batch normalisation and activation in front of a convolution: the map between the two is never written.

    y = conv2d(act((x - mean) / sqrt(var + eps) * norm_weight + norm_bias), weight) + bias

Forward reads x for its moments, and once more in the convolution, which normalises what it copies anyway.
Kept for backward: x. The gradient of weight normalises x as it copies it, and where the activation passed is
computed from x again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _conv, _dispatch, _native, _recompute
from ._activation import activated
from ._function import Function
from .batch_norm import check as check_norm
from .batch_norm import update as update_moments

_NAME = "batch_norm_conv2d"


class How(NamedTuple):
    """What is not a tensor."""

    kernel: str  # of the convolution
    eps: float
    frozen: bool  # mean and var are given, not those of x
    activation: str
    geometry: tuple[Any, ...]  # stride, padding, dilation, groups


def batch_norm_conv2d_ref(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The formula in plain PyTorch: F.batch_norm, the activation, F.conv2d."""
    norm = norm_weight, norm_bias, running_mean, running_var
    window = stride, padding, dilation, groups
    return _formula(x, *norm, weight, bias, training, momentum, eps, activation, *window)


def _formula(
    x,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    momentum,
    eps,
    activation,
    stride,
    padding,
    dilation,
    groups,
):
    y = F.batch_norm(x, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)
    return F.conv2d(activated(y, activation), weight, bias, stride, padding, dilation, groups)


def _prepare(
    x,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    weight,
    bias=None,
    *,
    training=True,
    momentum=0.1,
    eps=1e-5,
    activation="relu",
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
) -> tuple:
    _checks.tensor(_NAME, "x", x)
    _checks.tensor(_NAME, "weight", weight)
    if x.dim() != 4:
        raise RuntimeError(f"{_NAME}: x has sizes {_checks.sizes(x)}, expected [N, C, H, W]")
    pairs = (
        _checks.pair(_NAME, "stride", stride, 1),
        _checks.pair(_NAME, "padding", padding, 0),
        _checks.pair(_NAME, "dilation", dilation, 1),
    )
    norm = check_norm(
        _NAME,
        x,
        {"norm_weight": norm_weight, "norm_bias": norm_bias},
        running_mean,
        running_var,
        training,
        activation,
    )
    _conv.check(_NAME, x, weight, bias, None, *pairs, groups, "none")
    numbers = _checks.number(_NAME, "momentum", momentum), _checks.number(_NAME, "eps", eps)
    return x, *norm, weight, bias, bool(training), *numbers, activation, *pairs, groups


def refuse(x, norm_weight, norm_bias, running_mean, running_var, weight, bias, *_) -> str | None:
    """Why no native kernel can take these tensors, or None."""
    if x.dim() != 4 or x.numel() == 0:
        return f"sizes {_checks.sizes(x)}: native handles maps that are not empty"
    norm = norm_weight, norm_bias, running_mean, running_var
    return _native.refusal(x, *norm, weight, bias, cast_by_autocast=True)


class _NativeBatchNormConv(Function):
    """y, the moments, and with `passes` x once more, as `_conv._NativeConv` does. Keeps x and weights."""

    @staticmethod
    def forward(how, passes, x, norm_weight, norm_bias, mean, var, weight, bias):
        y, *affine = _forward(how, x, norm_weight, norm_bias, mean, var, weight, bias)
        return y, *affine, x.view_as(x) if passes else None  # autograd wants an alias here

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.how, _, x, norm_weight, norm_bias, _, _, weight, bias = inputs
        _, mean, var, scale, shift, _ = output
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.mark_non_differentiable(mean, var, scale, shift)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, var, scale, shift, weight)

    @staticmethod
    def backward(ctx, grad, *rest):
        added = rest[-1]
        if grad is None:
            return None, None, added, *(None,) * 6
        x, norm_weight, _, mean, var, scale, shift, weight = ctx.saved_tensors
        how, needs = ctx.how, ctx.needs_input_grad[2:]
        needs_x, needs_affine, needs_weight, needs_bias = needs[0], needs[1] or needs[2], *needs[5:]
        if torch.is_grad_enabled():  # somebody wants derivatives of this
            return None, None, *_gradients_of_formula(ctx, grad, added)
        kept = _recompute.affine(x, scale, shift, how.activation)
        inner = needs_x or needs_affine, needs_weight, needs_bias
        between, dweight, dbias = _conv.gradients(
            grad, weight, *kept, x.shape, ctx.bias_sizes, how.geometry, inner
        )
        dx = dnorm_weight = dnorm_bias = None
        if inner[0]:
            backward = torch.ops.fast_backbones.batch_norm_backward
            wanted = needs_x, needs_affine, False
            passed = scale, shift, how.activation
            of_norm = (between, x, None, norm_weight, mean, var, how.eps, how.frozen)
            dx, dnorm_weight, dnorm_bias, _ = backward(*of_norm, *wanted, *passed, added)
        found = dx, dnorm_weight, dnorm_bias, None, None, dweight, dbias
        return None, None, *(gradient if needed else None for gradient, needed in zip(found, needs))


def _gradients_of_formula(ctx, grad, added) -> tuple[Tensor | None, ...]:
    """Of x, norm_weight, norm_bias, mean, var, weight and bias, in operations that autograd knows."""
    x, norm_weight, norm_bias, mean, var, _, _, weight = ctx.saved_tensors
    how, needs = ctx.how, ctx.needs_input_grad[2:]
    # Aliases: one tensor may be two of these, or made of another of them.
    tensors = x, norm_weight, norm_bias, weight
    x, norm_weight, norm_bias, weight = inputs = [None if t is None else t.view_as(t) for t in tensors]
    moments = (mean, var) if how.frozen else (None, None)
    y = F.batch_norm(x, *moments, norm_weight, norm_bias, not how.frozen, 0.0, how.eps)
    y = F.conv2d(activated(y, how.activation), weight, None, *how.geometry)
    needed = *needs[:3], needs[5]
    wanted = [t for t, is_needed in zip(inputs, needed) if is_needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True) if wanted else ())
    dx, dnorm_weight, dnorm_bias, dweight = (next(found) if is_needed else None for is_needed in needed)
    if dx is not None and added is not None:
        dx = dx + added
    return dx, dnorm_weight, dnorm_bias, None, None, dweight, grad.sum((0, 2, 3)) if needs[6] else None


def _forward(how, x, norm_weight, norm_bias, mean, var, weight, bias) -> tuple[Tensor, ...]:
    """y, mean, var, scale and shift."""
    ops = torch.ops.fast_backbones
    affine = ops.batch_norm_affine(x, norm_weight, norm_bias, mean, var, how.eps)
    y = ops.affine_conv2d(how.kernel, x, *affine[2:], how.activation, weight, bias, *how.geometry)
    return y, *affine


def _kernel(x, weight, stride, padding, dilation, groups) -> str:
    filters, depth, rows, columns = weight.shape
    if depth == 1 and groups == filters == x.shape[1] and max(rows, columns) <= 7:
        return "depthwise_conv2d"
    return _conv.fastest(x, weight, None, None, stride, padding, dilation, groups, "none")


def run(
    x,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    momentum,
    eps,
    activation,
    *geometry,
    moments=(None, None),
    passes=False,
):
    """The op on prepared arguments that were not refused.

    Args:
        moments: mean and biased variance of x where they are known in training.
        passes: return x as well, for those that read it later (`_conv._NativeConv`).
    Returns: y, or y and x.
    """
    mean, var = moments if training else (running_mean, running_var)
    how = How(_kernel(x, weight, *geometry), eps, not training, activation, geometry)
    args = x, norm_weight, norm_bias, mean, var, weight, bias
    passes = passes and x.requires_grad
    if _native.needs_grad(x, norm_weight, norm_bias, weight, bias):
        y, mean, var, _, _, passed = _NativeBatchNormConv.apply(how, passes, *args)
        passed = passed if passes else x
    else:
        (y, mean, var, _, _), passed = _forward(how, *args), x
    if training:
        update_moments(running_mean, running_var, mean, var, momentum, x)
    _recompute.hand_on(x, passed)
    return (y, passed) if passes else y


def fused(*tensors: Tensor | None, moments=None, passes=False, **options) -> tuple[Tensor, Tensor]:
    """The op on tensors that `refuse` takes, for the engine, which may know the moments: y, and x for those
    that read it later."""
    args = _prepare(*tensors, **options)
    found = run(*args, moments=moments or (None, None), passes=passes)
    return found if isinstance(found, tuple) else (found, tensors[0])


@_native.register_fake("batch_norm_affine")
def _fake_affine(x, weight, bias, mean, var, eps):
    channels = x.shape[1]
    return tuple(x.new_empty(channels, dtype=torch.float32) for _ in range(4))


@_native.register_fake("affine_conv2d")
def _fake_conv(kind, x, scale, shift, pre_activation, weight, bias, stride, padding, dilation, groups):
    return _conv.fake(x, weight, bias, None, stride, padding, dilation, groups, "none")


_OP = _dispatch.register(
    _NAME,
    _prepare,
    _dispatch.Candidate("native", "native", refuse, run),
    _dispatch.reference(_formula),
)


def batch_norm_conv2d(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Normalise each channel (Ioffe, Szegedy 2015, arXiv 1502.03167), apply the activation, convolve.

    y = conv2d(act((x - mean) / sqrt(var + eps) * norm_weight + norm_bias), weight) + bias

    Args:
        x: [N, C, H, W]. norm_weight, norm_bias: [C] or None.
        running_mean, running_var: [C], changed in training as by `batch_norm`; None in training keeps no
            record. training, momentum, eps: as of `batch_norm`.
        weight: [K, C/groups, R, S]. bias: [K] or None.
        activation: "none", "relu" or "relu6", between the two.
        stride, padding, dilation: an integer or two. groups: of the convolution.
        backend: None (the current one), "auto", "native" or "reference".
    Returns: [N, K, P, Q], channels_last when x or weight is.
    Raises: as `batch_norm` and `conv2d`.

    Fast path: float32 on the CPU. What is convolved is act(x * scale + shift) with scale = norm_weight /
    sqrt(var + eps) and shift = norm_bias - mean * scale, both computed in double and rounded once. The
    convolution is the one that `conv2d` or `depthwise_conv2d` would run; it normalises while it copies its
    input, and a 1x1 convolution copies it for that. Kept for backward: x. Higher derivatives come from the
    formula.
    """
    tensors = (x, norm_weight, norm_bias, running_mean, running_var, weight, bias)
    options = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "activation": activation,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(batch_norm_conv2d, tensors, *tensors, **options, backend=backend)
    return _dispatch.run(_OP, _prepare(*tensors, **options), backend)
