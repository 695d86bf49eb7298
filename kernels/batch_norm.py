"""Batch normalisation (Ioffe, Szegedy 2015, arXiv 1502.03167) with the addition and activation behind it,
forward and backward in two passes each."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _dispatch, _gpu_batch_norm, _gpu_training, _native, _recompute
from ._activation import NAMES, activated, unpacked
from ._function import Function


def batch_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """The formula in plain PyTorch: F.batch_norm, the addition, the activation."""
    tensors = (x, weight, bias, running_mean, running_var, residual)
    return _formula(*tensors, training, momentum, eps, activation)


def _formula(x, weight, bias, running_mean, running_var, residual, training, momentum, eps, activation):
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return activated(y, activation)


def _prepare(
    x,
    weight=None,
    bias=None,
    running_mean=None,
    running_var=None,
    *,
    residual=None,
    training=True,
    momentum=0.1,
    eps=1e-5,
    activation="none",
) -> tuple:
    op = "batch_norm"
    check(op, x, {"weight": weight, "bias": bias}, running_mean, running_var, training, activation)
    if residual is not None:
        _checks.same_kind(op, x, True, residual=residual)
        if residual.shape != x.shape:
            got = _checks.sizes(residual)
            raise RuntimeError(f"{op}: residual has sizes {got}, expected those of x, {_checks.sizes(x)}")
    tensors = (x, weight, bias, running_mean, running_var, residual)
    numbers = _checks.number(op, "momentum", momentum), _checks.number(op, "eps", eps)
    return *tensors, bool(training), *numbers, activation


def check(op, x, affine, running_mean, running_var, training, activation) -> tuple[Tensor | None, ...]:
    """The tensors of a batch norm of x that have one value for each channel, `affine` by their names, or an
    exception naming the wrong one."""
    _checks.activation(op, activation, "activation", NAMES)
    _checks.tensor(op, "x", x)
    if x.dim() < 2:
        raise RuntimeError(f"{op}: x has sizes {_checks.sizes(x)}, expected [N, C, ...]")
    channels = x.shape[1]
    given = {**affine, "running_mean": running_mean, "running_var": running_var}
    types = (x.dtype, torch.float32) if x.dtype in _native.NARROW else (x.dtype,)
    for name, t in given.items():
        if t is not None:
            _checks.tensor(op, name, t)
            if t.dtype not in types:
                expected = " or ".join(map(str, types))
                raise RuntimeError(f"{op}: {name} is {t.dtype}, expected {expected}, x being {x.dtype}")
            if t.device != x.device:
                raise RuntimeError(f"{op}: {name} is on {t.device}, expected {x.device}, where x is")
            if t.shape != (channels,):
                raise RuntimeError(f"{op}: {name} has sizes {_checks.sizes(t)}, expected [{channels}]")
    if (running_mean is None) != (running_var is None):
        raise RuntimeError(f"{op}: running_mean and running_var go together, one of them is None")
    if not training and running_mean is None:
        raise RuntimeError(f"{op}: training is False, expected running_mean and running_var")
    if training and x.numel() <= channels:
        got = f"{op}: x has sizes {_checks.sizes(x)}"
        raise ValueError(f"{got}. Expected more than 1 value per channel when training")  # PyTorch's words
    return tuple(given.values())


class _NativeBatchNorm(Function):
    """y, the moments, and a bit for each element that the activation passed; with `passes` x once more, as
    `_conv._NativeConv` does. Keeps x, the moments and the bits."""

    @staticmethod
    def forward(x, weight, bias, residual, mean, var, eps, activation, frozen, passes):
        op = torch.ops.fast_backbones.batch_norm
        found = op(x, weight, bias, residual, mean, var, eps, activation, True)
        return *found, x.view_as(x) if passes else None  # autograd wants an alias here

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, _, _, ctx.eps, ctx.activation, ctx.frozen, _ = inputs
        _, mean, var, _, mask, _ = output
        ctx.mark_non_differentiable(*output[1:5])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, var, mask)

    @staticmethod
    def backward(ctx, grad, *rest):
        added = rest[-1]
        if grad is None:
            return added, *(None,) * 9
        x, weight, mean, var, mask = ctx.saved_tensors
        mask = None if ctx.activation == "none" else mask
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # somebody wants derivatives of this
            passed = None if mask is None else unpacked(mask, x)
            dx, *others = _gradient_formula(grad, x, passed, weight, mean, var, ctx.eps, ctx.frozen)
            found = dx if added is None else dx + added, *others
        else:
            plain = mask is None  # dresidual is grad itself
            needs = needs_x, needs_weight or needs_bias, needs_residual and not plain
            how = ctx.eps, ctx.frozen, *needs
            backward = torch.ops.fast_backbones.batch_norm_backward
            found = backward(grad, x, mask, weight, mean, var, *how, added=added)
            found = (*found[:3], grad if plain else found[3])
        wanted = zip(found, (needs_x, needs_weight, needs_bias, needs_residual))
        return *(gradient if needed else None for gradient, needed in wanted), *(None,) * 6


class _GpuBatchNorm(Function):
    """The same by the kernels for GPUs. Keeps scale and bias, too, to see from x what the activation passed;
    the mask is empty without a residual."""

    @staticmethod
    def forward(x, weight, bias, residual, mean, var, eps, activation):
        return _gpu_batch_norm.forward(x, weight, bias, residual, mean, var, eps, activation, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, given, _, ctx.eps, ctx.activation = inputs
        _, mean, var, scale, mask = output
        ctx.frozen, ctx.has_mask = given is not None, mask.numel() > 0
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, var, scale, mask)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        x, weight, bias, mean, var, scale, mask = ctx.saved_tensors
        mask = mask if ctx.has_mask else None
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # somebody wants derivatives of this
            passed = _gpu_batch_norm.bits(mask, x, mean, scale, bias, ctx.activation)
            found = _gradient_formula(grad, x, passed, weight, mean, var, ctx.eps, ctx.frozen)
            kinds = (t.dtype if t is not None else mean.dtype for t in (x, weight, bias, grad))
            found = tuple(gradient.to(kind) for gradient, kind in zip(found, kinds))
        else:
            needs = needs_x, needs_weight or needs_bias, needs_residual
            how = ctx.eps, ctx.activation, ctx.frozen, needs
            found = _gpu_batch_norm.backward(grad, x, mask, weight, bias, mean, var, scale, *how)
        wanted = zip(found, (needs_x, needs_weight, needs_bias, needs_residual))
        return *(gradient if needed else None for gradient, needed in wanted), None, None, None, None


def _gradient_formula(grad, x, passed, weight, mean, var, eps, frozen) -> tuple[Tensor, ...]:
    """Of x, weight, bias and residual, in operations that autograd knows, computed in the type of the
    moments. passed: where the activation did, None without one."""
    dtype = x.dtype
    grad, x = grad.to(mean.dtype), x.to(mean.dtype)
    if passed is not None:
        grad = grad.masked_fill(~passed, 0.0)
    pixels, count = (0, 2, 3), x.numel() // x.shape[1]
    if not frozen:
        mean = x.mean(pixels)
        var = (x - mean[:, None, None]).square().mean(pixels)
    inverse = (var + eps).rsqrt()[:, None, None]
    normed = (x - mean[:, None, None]) * inverse
    dweight, dbias = (grad * normed).sum(pixels), grad.sum(pixels)
    dx = grad
    if not frozen:
        dx = grad - (dbias[:, None, None] + normed * dweight[:, None, None]) / count
    scale = inverse if weight is None else inverse * weight[:, None, None]
    return (dx * scale).to(dtype), dweight, dbias, grad.to(dtype)


def refuse(x, weight, bias, running_mean, running_var, residual, *_) -> str | None:
    """Why no native kernel can take these tensors, or None."""
    if x.dim() != 4:
        return f"{x.dim()} dimensions: native handles [N, C, H, W]"
    if x.numel() == 0:
        return f"sizes {_checks.sizes(x)}: native handles maps that are not empty"
    return _native.map_refusal(x, residual, weight, bias, running_mean, running_var)


def _run(*args) -> Tensor:
    return _results(*args)[0]


def _results(
    x,
    weight,
    bias,
    running_mean,
    running_var,
    residual,
    training,
    momentum,
    eps,
    activation,
    moments=(None, None),
    passes=False,
) -> tuple[Tensor, Tensor]:
    """y, and x for those that read it later. `moments`: those of x, where they are known."""
    weight, bias = _native.wide(weight, bias)
    if not training:
        moments = _native.wide(running_mean, running_var)
    residual = _native.apart(residual, x)
    args = (x, weight, bias, residual, *moments, eps, activation)
    passed = None
    if _native.needs_grad(x, weight, bias, residual):
        passes = passes and x.requires_grad
        y, mean, var, scale, _, passed = _NativeBatchNorm.apply(*args, not training, passes)
        if residual is None:
            how = _recompute.How(eps, activation, not training)
            _recompute.note(y, (x, weight, bias, mean, var, scale), how)
    else:
        y, mean, var, *_ = torch.ops.fast_backbones.batch_norm(*args, False)
    if training:
        update(running_mean, running_var, mean, var, momentum, x)
    return y, x if passed is None else passed


def _run_on_gpu(
    x, weight, bias, running_mean, running_var, residual, training, momentum, eps, activation
) -> Tensor:
    moments = (None, None) if training else (running_mean, running_var)
    args = (x, weight, bias, residual, *moments, eps, activation)
    if _native.needs_grad(x, weight, bias, residual):
        y, mean, var, scale, _ = _GpuBatchNorm.apply(*args)
        if residual is None:
            how = _recompute.How(eps, activation, not training, _gpu_training.FAMILY)
            _recompute.note(y, (x, weight, bias, mean, var, scale), how)
    else:
        y, mean, var, *_ = _gpu_batch_norm.forward(*args, False)
    if training:
        update(running_mean, running_var, mean, var, momentum, x)
    return y


def fused(*tensors: Tensor | None, moments=None, passes=False, **options) -> tuple[Tensor, Tensor]:
    """The op on x, weight, bias, running_mean and running_var that `refuse` takes, for the engine, which may
    know the moments: y, and x for those that read it later, whose gradient is added in the kernel."""
    return _results(*_prepare(*tensors, **options), moments=moments or (None, None), passes=passes)


def moments(x) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a map that native kernels take, float32."""
    mean, var, *_ = torch.ops.fast_backbones.batch_norm_affine(x, None, None, None, None, 1.0)
    return mean, var


def update(running_mean, running_var, mean, var, momentum, x) -> None:
    """Move the running moments, if there are any, towards those of x."""
    if running_mean is None:
        return
    count = x.numel() // x.shape[1]
    # .data: as F.batch_norm, which does not count these changes. Graphs of eval() have saved the moments.
    with torch.no_grad():
        _move(running_mean.data, mean, momentum)
        _move(running_var.data, var, momentum, count / (count - 1))


def _move(running: Tensor, batch: Tensor, momentum: float, factor: float = 1.0) -> None:
    """running += momentum * (factor * batch - running), rounded once to the type of running."""
    if running.dtype is torch.float32:
        running.mul_(1.0 - momentum).add_(batch, alpha=momentum * factor)
    else:
        running.copy_(running.float().mul_(1.0 - momentum).add_(batch, alpha=momentum * factor))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_native.memory_format(x))


@_native.register_fake("batch_norm")
def _fake(x, weight, bias, residual, mean, var, eps, activation, needs_mask):
    n, c, h, w = x.shape
    rows = n * h * w if needs_mask and activation != "none" else 0
    mask = x.new_empty((rows, (c + 15) // 16 * 2), dtype=torch.uint8)
    return _like(x), *(x.new_empty(c, dtype=torch.float32) for _ in range(3)), mask


@_native.register_fake("batch_norm_again")
def _fake_again(x, mean, scale, bias, activation):
    return _like(x)


@_native.register_fake("batch_norm_backward")
def _fake_backward(
    grad, x, mask, weight, mean, var, eps, frozen, needs_x, needs_affine, needs_residual, *_, **__
):
    affine = (x.shape[1],) if needs_affine else (0,)
    dweight, dbias = (x.new_empty(affine, dtype=torch.float32) for _ in range(2))
    none = x.new_empty(0, dtype=torch.float32)
    dx, dresidual = (_like(x) if needed else none.clone() for needed in (needs_x, needs_residual))
    return dx, dweight, dbias, dresidual


_OP = _dispatch.register(
    "batch_norm",
    _prepare,
    _dispatch.Candidate("native", "native", refuse, _run),
    _dispatch.Candidate(
        "triton", _gpu_training.FAMILY, _gpu_batch_norm.refuse, _run_on_gpu, _gpu_training.decline
    ),
    _dispatch.reference(_formula),
)


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Normalise each channel, add the shortcut, apply the activation.

    y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    In training mean and var (biased) are those of x over N, H and W, and the running ones move in place:
    running += momentum * (of this batch - running), with the unbiased variance, as in nn.BatchNorm2d.
    Otherwise they are the running ones, which need not be constant for autograd's sake: the gradient takes
    them as such (frozen batch norm).

    Args:
        x: [N, C, H, W] (any [N, C, ...] through the formula). weight, bias: [C] or None; of the type of x or,
            where that has 16 bits, float32.
        running_mean, running_var: [C], changed in training; None in training keeps no record. Their types are
            those that weight may have.
        residual: like x, added before the activation.
        training: whose moments. momentum: of the running ones. eps: added to the variance.
        activation: "none", "relu" or "relu6".
        backend: None (the current one), "auto", "native", "triton" or "reference".
    Returns: like x; channels_last when x is.
    Raises: RuntimeError for sizes that do not fit, ValueError for an unknown activation and for one value
        per channel in training, TypeError for what is no tensor.

    Fast path: float32, bfloat16 and float16 on the CPU. Values of 16 bits are converted where they are read
    and rounded where they are written; moments, sums and what lies between are float32 or double. Forward
    reads x for its moments (in pieces of rows that stay in cache, so that deviations are from the mean) and
    once more for y; backward reads grad and x for two sums and once more for dx. Sums of pieces are added in
    double, in an order that threads do not change. Kept for backward: x, and a bit of each element that the
    activation passed. Higher derivatives come from the formula. On a
    GPU (with FB_GPU_PLANS=1) the same types in the same passes, by Triton: moments and sums in float64 at the
    end of a block of rows, in an order that the sizes fix; bits are kept with a residual only, and are seen
    from x without one.
    """
    tensors = (x, weight, bias, running_mean, running_var)
    if has_torch_function_variadic(*tensors, residual):
        return handle_torch_function(
            batch_norm,
            (*tensors, residual),
            *tensors,
            residual=residual,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            backend=backend,
        )
    args = _prepare(
        *tensors,
        residual=residual,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
    )
    return _dispatch.run(_OP, args, backend)
