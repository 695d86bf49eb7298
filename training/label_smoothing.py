"""Cross entropy against smoothed targets (Szegedy et al. 2015, arXiv 1512.00567, section 7)."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.softmax_cross_entropy import check_options, softmax_cross_entropy


def label_smoothing_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`kernels.softmax_cross_entropy` with the paper's eps of 0.1: a share eps of each target goes to all K.

    q'[k] = w[k] * ((1 - eps) * [k = y] + eps / K)          eps = label_smoothing, w = 1 without `weight`
    loss  = -sum_k q'[k] log p[k],   p = softmax(logits)
    dloss / dlogits = (sum_k q'[k]) * p - q'                p - q' without `weight`

    The same numbers as `torch.nn.functional.cross_entropy(..., label_smoothing=eps)`. float32 logits [N, K]
    on the CPU take a compiled kernel: one pass over the logits forward, one backward. Everything else runs
    in plain PyTorch, with a backward of one pass over log p. Higher derivatives of both modes exist.

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
    return softmax_cross_entropy(
        logits,
        target,
        label_smoothing=label_smoothing,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )


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
        check_options(label_smoothing, reduction)
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
