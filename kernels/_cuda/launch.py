"""A call of a CUDA C++ kernel as plain data, like a launch of Triton's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Launch:
    """torch.ops.fast_backbones.<name>_into(*arguments), on the current stream of y's device."""

    name: str
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        getattr(torch.ops.fast_backbones, f"{self.name}_into")(*self.arguments)


def conv_launch(
    name: str,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    own: list[int],
    *,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair = (1, 1),
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Launch:
    """own: what this kernel asks for besides. `padding`: above and to the left; what is behind the image
    follows from y's size."""
    geometry = (list(kernel), list(stride), list(padding), list(dilation))
    return Launch(name, (x, weight, y, scale, bias, *geometry, *own, activation))
