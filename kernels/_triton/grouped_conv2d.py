"""Grouped convolution with few channels per group, on tensor cores: neighbouring groups become a dense block.

    channels of x   | g0 | g1 | g2 | g3 |    16 or more, so that a matrix instruction is full
    filters         | w0   0    0    0  |    zeros where a filter does not see a channel: with 4 channels
                    | 0    w1   0    0  |    per group three quarters of the products are wasted, but memory
                    | 0    0    w2   0  |    is the limit of such a layer, so they cost nothing
                    | 0    0    0    w3 |

The kernel is conv2d's, whose groups are these blocks. Zero times an infinity or a NaN of a neighbour group is
NaN: a map with such values is beyond help, but not in the same channels as in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import conv2d
from .launch import Launch

LEAST = 16  # channels of a block, in and out: the smallest matrix instruction


def blocked(channels: int, filters: int, groups: int) -> int:
    """How many groups become one block; a divisor of `groups`."""
    together = 1
    while (
        together < groups
        and groups % (2 * together) == 0
        and min(channels, filters) // groups * together < LEAST
    ):
        together *= 2
    return together


def pack(weight: Tensor, groups: int) -> Tensor:
    """Filters [K, C/G, R, S] as conv2d's [K, R*S*C_block], zeros between groups."""
    k, c, r, s = weight.shape
    together = blocked(c * groups, k, groups)
    per = k // groups
    wide = weight.new_zeros(groups // together, together, per, together, c, r, s)
    parts = weight.view(groups // together, together, per, c, r, s)
    for i in range(together):
        wide[:, i, :, i] = parts[:, i]
    return conv2d.pack(wide.view(k, together * c, r, s))


def tile(m: int, filters: int, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """Of one block: as many pixels as fit, since filters are few."""
    found = conv2d.tile(m, filters, channels, dtype)
    return {**found, "BLOCK_M": 64 if dtype is torch.float32 else 128, "num_warps": 4}


def tiles(c: int, k: int, groups: int, dtype: torch.dtype) -> list[dict[str, int]]:
    """Others to try: conv2d's, of one block."""
    wide = groups // blocked(c, k, groups)
    return conv2d.tiles(k // wide, c // wide, dtype)


def launch(
    x: Tensor, weight: Tensor, y: Tensor, *, kernel: tuple[int, int], groups: int, **options: Any
) -> Launch:
    """As conv2d.launch, with the weight from `pack`."""
    wide = groups // blocked(x.shape[1], y.shape[1], groups)
    channels, filters = x.shape[1] // wide, y.shape[1] // wide
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    tiles = options.pop("tiles", None) or tile(pixels, filters, channels, x.dtype)
    return conv2d.launch(
        x, weight, y, kernel=kernel, groups=wide, tiles=tiles, name="grouped_conv2d", **options
    )
