"""The loss of networks with auxiliary classifiers (GoogLeNet arXiv 1409.4842, Inception v3 1512.00567)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .label_smoothing import label_smoothing_cross_entropy

GOOGLENET_AUX_WEIGHT = 0.3  # each of the two heads: arXiv 1409.4842, section 5
INCEPTION_V3_AUX_WEIGHT = 0.4  # the one head, as in the published training code

_WEIGHTS = {
    ("logits", "aux_logits2", "aux_logits1"): GOOGLENET_AUX_WEIGHT,
    ("logits", "aux_logits"): INCEPTION_V3_AUX_WEIGHT,
}


def auxiliary_loss(
    outputs: Tensor | tuple[Tensor | None, ...],
    target: Tensor,
    *,
    aux_weight: float | None = None,
    label_smoothing: float = 0.0,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss of the main classifier plus `aux_weight` times that of each auxiliary one.

    loss = L(logits, target) + aux_weight * sum_i L(aux_i, target)

    L is cross entropy with `label_smoothing`, for every head alike, or `criterion`.

    Args:
        outputs: what the model returned in `train()`: the named tuple of GoogLeNet (logits, aux_logits2,
            aux_logits1) or of Inception v3 (logits, aux_logits), of this library or of torchvision; heads
            that are None are left out. A plain tensor, as in `eval()`, has no auxiliary part.
        target: as `label_smoothing_cross_entropy` takes it.
        aux_weight: None takes the papers' 0.3 for GoogLeNet, 0.4 for Inception v3. A tuple with other fields
            needs it; its first element is the main output.
        criterion: a function (logits, target) -> loss; excludes `label_smoothing`.
    Raises: TypeError when `outputs` is neither a tensor nor a tuple of tensors, ValueError for an unknown
        tuple without `aux_weight` and for a criterion next to `label_smoothing`.
    """
    if criterion is not None and label_smoothing != 0.0:
        raise ValueError("label_smoothing belongs to the built-in cross entropy: give it or a criterion")

    def loss_of(logits: Tensor) -> Tensor:
        if criterion is not None:
            return criterion(logits, target)
        return label_smoothing_cross_entropy(logits, target, label_smoothing=label_smoothing)

    if isinstance(outputs, Tensor):
        return loss_of(outputs)
    heads = _heads(outputs)
    scale = _weight_of(outputs) if aux_weight is None else aux_weight
    total = loss_of(outputs[0])
    for head in heads:
        total = total + scale * loss_of(head)
    return total


def _heads(outputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    if not isinstance(outputs, tuple) or not outputs or not isinstance(outputs[0], Tensor):
        raise TypeError(f"outputs must be a tensor or a tuple that starts with one, got {type(outputs)}")
    heads = [head for head in outputs[1:] if head is not None]
    if not all(isinstance(head, Tensor) for head in heads):
        raise TypeError(f"auxiliary outputs must be tensors or None, got {[type(h) for h in outputs[1:]]}")
    return heads


def _weight_of(outputs: tuple[Tensor | None, ...]) -> float:
    fields = getattr(outputs, "_fields", None)
    if fields not in _WEIGHTS:
        raise ValueError(
            f"no paper gives a weight for the outputs {fields or 'of a plain tuple'}: pass aux_weight"
        )
    return _WEIGHTS[fields]
