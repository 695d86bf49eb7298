"""Cross entropy of logits against smoothed targets (Szegedy et al. 2015, arXiv 1512.00567, section 7)."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _dispatch, _native
from ._function import Function

REDUCTIONS = ("mean", "sum", "none")


def softmax_cross_entropy_ref(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The formula in plain PyTorch. Any floating dtype, any device, both modes of differentiation."""
    options = (label_smoothing, weight, ignore_index, reduction)
    return _shaped(logits, reduction, _formula(*_prepare_options(logits, target, *options)))


# ---- the formula ----


def _formula(logits, target, weight, eps, ignore_index, reduction) -> Tensor:
    labels = target.long()
    ignored = labels == ignore_index
    labels = labels.masked_fill(ignored, 0)
    if _native.transforming():  # these differentiate plain operations in ways a Function would have to repeat
        losses = _losses(_log_softmax(logits), labels, ignored, weight, eps).to(logits.dtype)
    else:
        losses, _ = _CrossEntropy.apply(logits, labels, ignored, weight, eps)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / _count(labels, ignored, weight).to(losses.dtype)


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return torch.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _count(labels: Tensor, ignored: Tensor, weight: Tensor | None) -> Tensor:
    """What the mean divides by: the sum of w[y] over the rows that are not ignored."""
    counts = ~ignored if weight is None else weight[labels].masked_fill(ignored, 0.0)
    return counts.sum()


def _losses(log_p: Tensor, labels: Tensor, ignored: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """-sum_k q'[k] log p[k]: [N, ...]. Where a share is 0 its logarithm does not matter, however infinite."""
    value = log_p.gather(1, labels.unsqueeze(1)).squeeze(1) * _own_share(labels, weight, eps, log_p)
    if eps > 0.0 and weight is None:
        value = value + log_p.sum(1) * (eps / log_p.shape[1])
    elif eps > 0.0:
        value = value + (log_p * _even_share(weight, eps, log_p)).sum(1)
    return -value.masked_fill(ignored, 0.0)


class _CrossEntropy(Function):
    """[N, K, ...] logits -> [N, ...] losses and log p, from which backward makes the gradient in one pass."""

    @staticmethod
    def forward(ctx, logits, labels, ignored, weight, eps):
        log_p = _log_softmax(logits)
        losses = _losses(log_p, labels, ignored, weight, eps)
        ctx.eps = eps
        ctx.mark_non_differentiable(log_p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, ignored, weight, log_p)
        return losses.to(logits.dtype), log_p

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 5
        logits, labels, ignored, weight, log_p = ctx.saved_tensors
        grad = grad.to(log_p.dtype).masked_fill(ignored, 0.0)
        if torch.is_grad_enabled():  # somebody wants derivatives of this
            gradient = _gradient_formula(logits, grad, labels, weight, ctx.eps)
        else:
            gradient = _gradient(log_p, grad, labels, weight, ctx.eps)
        return gradient.to(logits.dtype), None, None, None, None


def _gradient_formula(
    logits: Tensor, grad: Tensor, labels: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """grad * ((sum_k q'[k]) p - q') for grad [N, ...], in operations that autograd knows."""
    p = torch.softmax(logits, 1, dtype=grad.dtype)
    share = _target_share(grad, labels, weight, eps, p)
    return p * share.sum(1, keepdim=True) - share


def _gradient(log_p: Tensor, grad: Tensor, labels: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same from log p, in one pass: ATen's own x - exp(log p) * sum(x) with x = -grad q'."""
    share = _target_share(-grad, labels, weight, eps, log_p)
    return torch.ops.aten._log_softmax_backward_data(share, log_p, 1, log_p.dtype)


def _target_share(grad: Tensor, labels: Tensor, weight: Tensor | None, eps: float, like: Tensor) -> Tensor:
    """grad * q': [N, K, ...]."""
    even = (grad.unsqueeze(1) * _even_share(weight, eps, like)).expand(like.shape).contiguous()
    own = grad * _own_share(labels, weight, eps, like)
    return even.scatter_add_(1, labels.unsqueeze(1), own.unsqueeze(1))


def _own_share(labels: Tensor, weight: Tensor | None, eps: float, like: Tensor) -> Tensor:
    """(1 - eps) w[y] for each row: [N, ...]."""
    if weight is None:
        return torch.full_like(labels, 1.0 - eps, dtype=like.dtype)
    return (1.0 - eps) * weight.to(like.dtype)[labels]


def _even_share(weight: Tensor | None, eps: float, like: Tensor) -> Tensor | float:
    """eps / K times w: what every class gets. A number without weights, else [K, 1, ...]."""
    share = eps / like.shape[1]
    if weight is None:
        return share
    return share * weight.to(like.dtype).reshape(-1, *(1,) * (like.dim() - 2))


# ---- the compiled kernel ----


class _NativeCrossEntropy(Function):
    """Native forward and backward; backward reads the logits again, with two numbers kept of each row."""

    @staticmethod
    def forward(ctx, logits, target, weight, *options):
        loss, kept = torch.ops.fast_backbones.softmax_cross_entropy(logits, target, weight, *options)
        ctx.options = options
        ctx.save_for_backward(logits, target, weight, kept)
        return loss

    @staticmethod
    def backward(ctx, grad):
        logits, target, weight, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants derivatives of this
            gradient = _reduced_gradient_formula(grad, logits, target, weight, *ctx.options)
        else:
            backward = torch.ops.fast_backbones.softmax_cross_entropy_backward
            gradient = backward(grad, logits, target, weight, kept, *ctx.options)
        return gradient, None, None, None, None, None


def _reduced_gradient_formula(grad, logits, target, weight, eps, ignore_index, reduction) -> Tensor:
    """The gradient of the reduced loss, in operations that autograd knows."""
    ignored = target == ignore_index
    labels = target.masked_fill(ignored, 0)
    if reduction == "mean":
        grad = grad / _count(labels, ignored, weight)
    grad = grad.expand(target.shape).masked_fill(ignored, 0.0)
    return _gradient_formula(logits, grad, labels, weight, eps)


def _refuse(logits, target, weight, *_) -> str | None:
    if reason := _native.refusal(logits, weight):
        return reason
    if target.device.type != "cpu":
        return f"target on device {target.device}: native handles cpu"
    if logits.dim() != 2:
        return f"{logits.dim()} dimensions: native handles [N, K]"
    return None


def _run(logits, target, weight, *options) -> Tensor:
    target = target.long()
    if _native.needs_grad(logits):
        return _NativeCrossEntropy.apply(logits, target, weight, *options)
    return torch.ops.fast_backbones.softmax_cross_entropy(logits, target, weight, *options)[0]


@_native.register_fake("softmax_cross_entropy")
def _fake(logits, target, weight, label_smoothing, ignore_index, reduction):
    rows = logits.shape[0]
    return logits.new_empty((rows,) if reduction == "none" else ()), logits.new_empty((rows, 2))


@_native.register_fake("softmax_cross_entropy_backward")
def _fake_backward(grad, logits, target, weight, kept, label_smoothing, ignore_index, reduction):
    return logits.new_empty(logits.shape)


# ---- the op ----


def _prepare_options(logits, target, label_smoothing, weight, ignore_index, reduction) -> tuple:
    _check(logits, target, weight, label_smoothing, reduction)
    device = logits.device.type
    if logits.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(device):
        logits = logits.float()
    if logits.dim() == 1:
        logits, target = logits.unsqueeze(0), target.unsqueeze(0)
    if weight is not None:
        weight = weight.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, target, weight, float(label_smoothing), int(ignore_index), reduction


def _prepare(
    logits, target, *, label_smoothing=0.0, weight=None, ignore_index=-100, reduction="mean"
) -> tuple:
    return _prepare_options(logits, target, label_smoothing, weight, ignore_index, reduction)


def _shaped(logits: Tensor, reduction: str, losses: Tensor) -> Tensor:
    return losses.squeeze(0) if reduction == "none" and logits.dim() == 1 else losses


_OP = _dispatch.register(
    "softmax_cross_entropy",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(_formula),
)


def softmax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross entropy with a share eps of each target spread evenly over all K classes.

    q'[k] = w[k] * ((1 - eps) * [k = y] + eps / K)          eps = label_smoothing, w = 1 without `weight`
    loss  = -sum_k q'[k] log p[k],   p = softmax(logits)
    dloss / dlogits = (sum_k q'[k]) * p - q'                p - q' without `weight`

    The same numbers as `torch.nn.functional.cross_entropy(..., label_smoothing=eps)`.

    Args:
        logits: [N, K, ...] or [K], floating point; 16-bit logits are summed in float32.
        target: [N, ...] or [], whole numbers from 0 to K - 1, or `ignore_index`.
        label_smoothing: eps, from 0 (plain cross entropy) to 1.
        weight: [K], a factor for each class, without a gradient.
        ignore_index: rows with this target have loss and gradient 0 and do not count in the mean.
        reduction: "mean" (over the sum of w[y], the number of rows without weight), "sum" or "none".
        backend: None (the current one), "auto", "native" or "reference".
    Returns: a scalar, or the shape of `target`, in the dtype of the logits (float32 under autocast).
    Raises: ValueError for sizes and options, TypeError for class probabilities as target or what is no
        tensor, IndexError for a class that does not exist (checked on the CPU; other devices report it in
        their own way), RuntimeError when a backend asked for by name refuses.

    Fast path: float32 [N, K] or [K] on the CPU. Forward reads the logits once and keeps two numbers of each
    row; backward reads them once more and writes the gradient. Sums go in blocks of an order that K fixes.
    Elsewhere the formula runs, whose backward is one pass over the log p that it keeps. Higher derivatives
    and forward-mode ones come from the formula.
    """
    if has_torch_function_variadic(logits, target, weight):
        return handle_torch_function(
            softmax_cross_entropy,
            (logits, target, weight),
            logits,
            target,
            label_smoothing=label_smoothing,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
        )
    args = _prepare_options(logits, target, label_smoothing, weight, ignore_index, reduction)
    try:
        losses = _dispatch.run(_OP, args, backend)
    except (RuntimeError, IndexError) as problem:
        _explain_range(args[0], args[1], ignore_index, problem)
        raise
    return _shaped(logits, reduction, losses)


# ---- checks ----


def check_options(label_smoothing: float, reduction: str) -> None:
    """ValueError unless the smoothing is from 0 to 1 and the reduction is known."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, reduction: str
) -> None:
    check_options(label_smoothing, reduction)
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(value).__name__}")
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be [N, K, ...] or [K] floating point, got {_described(logits)}")
    if target.is_floating_point():
        raise TypeError(f"target must be class indices, got {_described(target)}: no probabilities here")
    sizes = logits.shape
    expected = sizes[:1] + sizes[2:] if len(sizes) > 1 else ()
    if target.shape != expected:
        raise ValueError(
            f"target must be {list(expected)} for logits {list(sizes)}, got {list(target.shape)}"
        )
    classes = sizes[1] if len(sizes) > 1 else sizes[0]
    if classes == 0:
        raise ValueError("logits have no classes")
    if weight is not None:
        _check_weight(weight, classes)


def _check_weight(weight: Tensor, classes: int) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor or None, got a {type(weight).__name__}")
    if weight.shape != (classes,) or not weight.is_floating_point():
        raise ValueError(f"weight must be [{classes}] floating point, got {_described(weight)}")
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient")


def _explain_range(logits: Tensor, target: Tensor, ignore_index: int, problem: Exception) -> None:
    """Raise IndexError when a class that does not exist is what went wrong on the CPU."""
    labels = target[target != ignore_index]
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    low, high, classes = labels.min().item(), labels.max().item(), logits.shape[1]
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise IndexError(f"target {wrong} is not a class from 0 to {classes - 1}") from problem


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
