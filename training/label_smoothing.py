"""Cross entropy against smoothed targets (Szegedy et al. 2015, arXiv 1512.00567, section 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

REDUCTIONS = ("mean", "sum", "none")


def label_smoothing_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy with a share eps of each target spread evenly over all K classes.

    q'[k] = w[k] * ((1 - eps) * [k = y] + eps / K)          eps = label_smoothing, w = 1 without `weight`
    loss  = -sum_k q'[k] log p[k],   p = softmax(logits)
    dloss / dlogits = (sum_k q'[k]) * p - q'                p - q' without `weight`

    The same numbers as `torch.nn.functional.cross_entropy(..., label_smoothing=eps)`. The logits are read
    once, by the forward; backward makes the gradient in one pass over the log p that it kept. Higher
    derivatives (reverse mode) come from the formula; forward-mode ones are not defined.

    Args:
        logits: [N, K, ...] or [K], floating point; 16-bit logits are summed in float32.
        target: [N, ...] or [], whole numbers from 0 to K - 1, or `ignore_index`.
        label_smoothing: eps, from 0 (plain cross entropy) to 1.
        weight: [K], a factor for each class, without a gradient.
        ignore_index: rows with this target have loss and gradient 0 and do not count in the mean.
        reduction: "mean" (over the sum of w[y], the number of rows without weight), "sum" or "none".
    Returns: a scalar, or the shape of `target`, in the dtype of the logits (float32 under autocast).
    Raises: ValueError for sizes and options, TypeError for class probabilities as target, IndexError for a
        class that does not exist (checked on the CPU; other devices report it in their own way).
    """
    _check(logits, target, weight, label_smoothing, reduction)
    if torch.is_autocast_enabled(logits.device.type) and logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    scalar = logits.dim() == 1
    rows, labels = (logits.unsqueeze(0), target.unsqueeze(0)) if scalar else (logits, target)
    labels = labels.long()
    ignored = labels == ignore_index
    labels = labels.masked_fill(ignored, 0)
    try:
        losses, _ = _SmoothedCrossEntropy.apply(rows, labels, ignored, weight, float(label_smoothing))
    except (RuntimeError, IndexError) as problem:
        _explain_range(labels, rows.shape[1], problem)
        raise
    if reduction == "none":
        return losses.squeeze(0) if scalar else losses
    if reduction == "sum":
        return losses.sum()
    counts = ~ignored if weight is None else weight.to(losses.dtype)[labels].masked_fill(ignored, 0.0)
    return losses.sum() / counts.sum()


class LabelSmoothingCrossEntropy(nn.Module):
    """`label_smoothing_cross_entropy` as a module; `weight` is a buffer and moves with it."""

    weight: Tensor | None

    def __init__(
        self,
        label_smoothing: float = 0.1,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ):
        super().__init__()
        _check_options(label_smoothing, reduction)
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return label_smoothing_cross_entropy(
            logits,
            target,
            label_smoothing=self.label_smoothing,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"


class _SmoothedCrossEntropy(torch.autograd.Function):
    """[N, K, ...] logits -> [N, ...] losses and log p, which the gradient needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, labels, ignored, weight, eps):
        log_p = torch.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
        losses = -_expectation(log_p, labels, weight, eps).masked_fill_(ignored, 0.0)
        return losses.to(logits.dtype), log_p

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.eps = inputs[-1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], output[1])

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 5
        logits, labels, ignored, weight, log_p = ctx.saved_tensors
        grad = grad.to(log_p.dtype).masked_fill(ignored, 0.0)
        if torch.is_grad_enabled():  # somebody wants derivatives of this
            p = torch.softmax(logits, 1, dtype=log_p.dtype)
            gradient = _gradient_formula(p, grad, labels, weight, ctx.eps)
        else:
            gradient = _gradient(log_p, grad, labels, weight, ctx.eps)
        return gradient.to(logits.dtype), None, None, None, None


def _gradient_formula(p: Tensor, grad: Tensor, labels: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """grad * ((sum_k q'[k]) p - q') for grad [N, ...], in operations that autograd knows."""
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


def _expectation(log_p: Tensor, labels: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """sum_k q'[k] log p[k]: [N, ...]. Where a share is 0 its logarithm does not matter, however infinite."""
    value = log_p.gather(1, labels.unsqueeze(1)).squeeze(1) * _own_share(labels, weight, eps, log_p)
    if eps == 0.0:
        return value
    if weight is None:
        return value + log_p.sum(1) * (eps / log_p.shape[1])
    return value + (log_p * _even_share(weight, eps, log_p)).sum(1)


def _check_options(label_smoothing: float, reduction: str) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, reduction: str
) -> None:
    _check_options(label_smoothing, reduction)
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be [N, K, ...] or [K] floating point, got {_described(logits)}")
    if target.is_floating_point():
        raise TypeError(f"target must be class indices, got {_described(target)}: no probabilities here")
    expected = logits.shape[:0] if logits.dim() == 1 else (*logits.shape[:1], *logits.shape[2:])
    if tuple(target.shape) != tuple(expected):
        raise ValueError(
            f"target must be {list(expected)} for logits {list(logits.shape)}, got {list(target.shape)}"
        )
    classes = logits.shape[0] if logits.dim() == 1 else logits.shape[1]
    if classes == 0:
        raise ValueError("logits have no classes")
    if weight is not None and (tuple(weight.shape) != (classes,) or not weight.is_floating_point()):
        raise ValueError(f"weight must be [{classes}] floating point, got {_described(weight)}")
    if weight is not None and weight.requires_grad:
        raise ValueError("weight must not require a gradient")


def _explain_range(labels: Tensor, classes: int, problem: Exception) -> None:
    """Raise IndexError when a class that does not exist is what went wrong on the CPU."""
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise IndexError(f"target {wrong} is not a class from 0 to {classes - 1}") from problem


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
