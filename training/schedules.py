"""The learning-rate schedules of the papers, as `torch.optim.lr_scheduler` objects stepped once an epoch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau, StepLR


def inception_schedule(optimizer: Optimizer, *, factor: float = 0.94, every: int = 2) -> StepLR:
    """Times 0.94 every two epochs, as a staircase: Inception v3 and v4, Xception (arXiv 1512.00567).

    lr(epoch) = lr * factor ** floor(epoch / every)
    """
    return _staircase(optimizer, factor, every)


def googlenet_schedule(optimizer: Optimizer, *, factor: float = 0.96, every: int = 8) -> StepLR:
    """Minus 4 % every 8 epochs: GoogLeNet (arXiv 1409.4842, section 6).

    lr(epoch) = lr * factor ** floor(epoch / every)
    """
    return _staircase(optimizer, factor, every)


def senet_schedule(optimizer: Optimizer, *, factor: float = 0.1, every: int = 30) -> StepLR:
    """A tenth every 30 epochs: SENet (arXiv 1709.01507, section 6.1).

    lr(epoch) = lr * factor ** floor(epoch / every)
    """
    return _staircase(optimizer, factor, every)


def step_schedule(
    optimizer: Optimizer, *, milestones: Sequence[int] = (30, 60), factor: float = 0.1
) -> MultiStepLR:
    """A tenth at each milestone; the default epochs 30 and 60 of 90 are DenseNet's (arXiv 1608.06993).

    lr(epoch) = lr * factor ** (number of milestones <= epoch)
    """
    if not milestones or list(milestones) != sorted(set(milestones)) or milestones[0] < 1:
        raise ValueError(f"milestones must be increasing epochs from 1 on, got {tuple(milestones)}")
    _check_factor(factor)
    return MultiStepLR(optimizer, list(milestones), factor)


def plateau_schedule(
    optimizer: Optimizer, *, factor: float = 0.1, times: int | None = 3, patience: int = 5
) -> ReduceLROnPlateau:
    """A tenth whenever the validation error stops falling: AlexNet, VGG, ResNet (arXiv 1512.03385).

    The papers did it by hand; here it is more than `patience` epochs in a row without an error below the
    smallest so far, by however little. Call `step(error)` once an epoch. After `times` reductions of every
    group the rate stays; None has no such limit. A tensor that is the rate of several groups is copied, so
    that each has its own.
    """
    _check_factor(factor)
    if times is not None and times < 1:
        raise ValueError(f"times must be at least 1, got {times}")
    _give_each_group_its_rate(optimizer)
    floors = [0.0 if times is None else float(g["lr"]) * factor**times for g in optimizer.param_groups]
    return ReduceLROnPlateau(optimizer, "min", factor, patience, threshold=0.0, min_lr=floors, eps=0.0)


def _give_each_group_its_rate(optimizer: Optimizer) -> None:
    """ReduceLROnPlateau changes tensors in place, group by group: a shared one would fall once for each."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and id(group["lr"]) in seen:
            group["lr"] = group["lr"].clone()
        seen.add(id(group["lr"]))


def _staircase(optimizer: Optimizer, factor: float, every: int) -> StepLR:
    _check_factor(factor)
    if every < 1:
        raise ValueError(f"every must be at least 1 epoch, got {every}")
    return StepLR(optimizer, every, factor)


def _check_factor(factor: float) -> None:
    if not 0.0 < factor < 1.0:
        raise ValueError(f"factor must be between 0 and 1, got {factor}")
