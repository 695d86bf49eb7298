"""Argument checks shared by the ops. A message names the argument, what came, and what was expected.

The exception types are torch's own: RuntimeError for sizes, dtypes and devices, TypeError for things that are
not tensors or numbers, ValueError for misspelt options.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu")
_LIMIT = 2**31 - 1


def tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a tensor")


def sizes(t: Tensor) -> str:
    return f"[{', '.join(str(size) for size in t.shape)}]"


def pair(op: str, name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """(3, 3) from 3, (3, 3) from [3] and (2, 3) from [2, 3]."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) == 1:
        values = (values[0], values[0])
    if len(values) != 2:
        raise RuntimeError(f"{op}: {name} is {value!r}, expected an integer or two")
    first, second = values
    if not (hasattr(first, "__index__") and hasattr(second, "__index__")):
        raise TypeError(f"{op}: {name} is {value!r}, expected integers")
    first, second = int(first), int(second)
    if not (least <= first <= _LIMIT and least <= second <= _LIMIT):
        raise RuntimeError(f"{op}: {name} is {value!r}, expected {least} to {_LIMIT}")
    return (first, second)


def number(op: str, name: str, value: object) -> float:
    if not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} is {value!r}, expected a number")
    return float(value)


def activation(op: str, value: str, name: str = "activation", known: Sequence[str] = ACTIVATIONS) -> str:
    if value not in known:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(known)}")
    return value


def same_kind(op: str, x: Tensor, cast_by_autocast: bool, **others: Tensor | None) -> None:
    """All have the dtype and the device of x; under autocast dtypes may differ where autocast casts them."""
    for name, t in others.items():
        if t is None:
            continue
        tensor(op, name, t)
        if t.device != x.device:
            raise RuntimeError(f"{op}: {name} is on {t.device}, expected {x.device}, where x is")
        if t.dtype != x.dtype and not (cast_by_autocast and torch.is_autocast_enabled(x.device.type)):
            raise RuntimeError(f"{op}: {name} is {t.dtype}, expected {x.dtype}, the dtype of x")


def output_size(
    op: str,
    axis: str,
    size: int,
    window: int,
    stride: int,
    padding: int,
    dilation: int = 1,
    ceil_mode: bool = False,
) -> int:
    """(size + 2 padding - dilation (window - 1) - 1) / stride + 1, at least 1; rounded up in ceil mode, where
    every window still starts inside the image or its left padding."""
    extent = dilation * (window - 1) + 1
    room = size + 2 * padding - extent + (stride - 1 if ceil_mode else 0)
    if room < 0:
        padded = f"{size} + 2 * {padding}"
        raise RuntimeError(
            f"{op}: the kernel covers {extent} in {axis}, more than the padded input, {padded}"
        )
    count = room // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def image(op: str, x: Tensor) -> None:
    """x is [N, C, H, W] with something in it; only the batch may be empty."""
    if x.dim() != 4:
        raise RuntimeError(f"{op}: x has sizes {sizes(x)}, expected [N, C, H, W] or [C, H, W]")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise RuntimeError(f"{op}: x has sizes {sizes(x)}, expected at least one channel and one pixel")
