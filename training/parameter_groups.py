"""Which parameters get how much weight decay, and other settings that papers give to one kind of layer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

TF_BATCH_NORM_MOMENTUM = 0.0003  # TensorFlow's decay of 0.9997: Inception v3, v4 and Inception-ResNet

KINDS = ("weights", "depthwise", "biases", "norms")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    depthwise: float | None = None,
    biases: float | None = None,
    norms: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: each kind of parameter with its own weight decay.

    Args:
        weight_decay: of convolution and linear weights, and of each kind below that is None.
        depthwise: of depthwise filters (one filter for each channel). MobileNet: "little or no weight decay",
            as they have so few parameters (arXiv 1704.04861, section 3.2): 0.0.
        biases: of the biases of convolutions and linear layers.
        norms: of scales and shifts of batch, group and layer norms.
    Returns: `{"name", "params", "weight_decay"}` for each kind that occurs, in the order weights, depthwise,
        biases, norms; a shared parameter once, one without `requires_grad` not at all.
    Raises: ValueError for a negative weight decay.
    """
    decays = dict(zip(KINDS, (weight_decay, depthwise, biases, norms)))
    decays = {kind: weight_decay if decay is None else decay for kind, decay in decays.items()}
    for kind, decay in decays.items():
        if decay < 0:
            raise ValueError(f"weight decay of {kind} must not be negative, got {decay}")
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                members[_kind(module, name)].append(parameter)
    return [
        {"name": kind, "params": params, "weight_decay": decays[kind]}
        for kind, params in members.items()
        if params
    ]


def _kind(module: nn.Module, name: str) -> str:
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
        return "norms"
    if name == "bias":
        return "biases"
    if isinstance(module, _ConvNd) and module.groups == module.in_channels > 1:
        return "depthwise"
    return "weights"


def set_batch_norm_momentum(model: nn.Module, momentum: float | None = TF_BATCH_NORM_MOMENTUM) -> int:
    """Set how fast the running statistics of every batch norm follow; returns the number of batch norms.

    running = (1 - momentum) * running + momentum * batch

    PyTorch's 0.1 forgets in some ten steps. TensorFlow trained the Inception family with 0.0003, which needs
    some ten thousand steps to forget the initial 0 and 1: for long trainings only. None is the plain mean.
    Raises ValueError outside [0, 1].
    """
    if momentum is not None and not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be from 0 to 1 or None, got {momentum}")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for module in norms:
        module.momentum = momentum
    return len(norms)
