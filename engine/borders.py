"""The padding of a window, as attributes of nodes and parameters of kernels carry it.

    (height, width)                 the same in front of the image and behind it
    (top, left, bottom, right)      where the two differ

`F.pad` counts the other way round, (left, right, top, bottom); such a tuple is called a border here.
"""

from __future__ import annotations

from typing import Any

Padding = tuple[int, ...]


def sides(padding: Padding) -> tuple[int, int, int, int]:
    """(top, left, bottom, right)."""
    top, left, *behind = padding
    bottom, right = behind or (top, left)
    return top, left, bottom, right


def padding_of(top: int, left: int, bottom: int, right: int) -> Padding:
    return (top, left) if (top, left) == (bottom, right) else (top, left, bottom, right)


def is_even(padding: Padding) -> bool:
    return len(padding) == 2


def with_border(padding: Padding, border: tuple[int, int, int, int]) -> Padding:
    """The padding of a window whose input had this border of its own."""
    left, right, top, bottom = border
    return padding_of(*(a + b for a, b in zip(sides(padding), (top, left, bottom, right))))


def as_border(padding: Padding) -> tuple[int, int, int, int]:
    """What F.pad wants."""
    top, left, bottom, right = sides(padding)
    return left, right, top, bottom


def padding_params(padding: Padding) -> dict[str, Any]:
    """The parameters of a kernel."""
    top, left, bottom, right = sides(padding)
    params = {"pad_h": top, "pad_w": left}
    return params if is_even(padding) else {**params, "pad_bottom": bottom, "pad_right": right}
