"""Sums over the pixels of a batch in two stages, without atomics: the same bits in every run.

    program (block of rows, tile of channels)    BLOCK_M rows at a time, a sum for each element of the tile in
                                                 float32 with Kahan's correction; at the end over the tile in
                                                 float64: one number of a channel goes to memory
    second kernel (tile of channels)             adds the blocks' numbers up in float64, in order

How rows are cut into blocks depends on the sizes of the map alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks, power_of_two

PROGRAMS = 2048  # of a first stage, about: some for each multiprocessor of a large GPU
COMBINE_B, COMBINE_C = 32, 32  # tile of a second stage: blocks and channels


@triton.jit
def added(total, rest, value):
    """Kahan's sum: total - rest has the digits of float64, nearly."""
    value = value - rest
    found = total + value
    return found, (found - total) - value


@triton.jit
def column_sums(total, rest):
    """Over the rows of a tile, in float64: [BLOCK_C]."""
    return tl.sum(total.to(tl.float64) - rest.to(tl.float64), 0)


class Cut(NamedTuple):
    """How a first stage cuts its rows: `count` blocks of `tiles` times BLOCK_M rows."""

    count: int
    tiles: int
    block_m: int

    @property
    def rows(self) -> int:
        return self.tiles * self.block_m


def cut(m: int, block_m: int, others: int) -> Cut:
    """For m rows, where `others` programs share each block of rows."""
    tiles = blocks(m, block_m * max(1, PROGRAMS // others))
    return Cut(blocks(m, block_m * tiles), tiles, block_m)


def tile(m: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """A thread of 4 warps holds 16 bytes of a pixel, twice; with 2048 elements of float32 the sums spill.
    BLOCK_C is a multiple of 16, as a row of bits is."""
    block_c, elements = power_of_two(c, 16, 64), 1024
    if dtype is not torch.float32:
        block_c, elements = power_of_two(c, 16, 128), 2048
    return {"BLOCK_M": power_of_two(m, 2, elements // block_c), "BLOCK_C": block_c}


@triton.jit
def _total(parts_ptr, y_ptr, B, L, BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    acc = tl.zeros((BLOCK_B, BLOCK_L), dtype=tl.float64)
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        mask = (b < B)[:, None] & (at < L)[None, :]
        acc += tl.load(parts_ptr + b.to(tl.int64)[:, None] * L + at[None, :], mask=mask, other=0.0).to(
            tl.float64
        )
    y = tl.sum(acc, 0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < L)


def total(parts: Tensor, y: Tensor) -> Launch:
    """y[l] = sum_b parts[b, l]: parts [B, L] and y [L] contiguous."""
    b, length = parts.shape
    block_b, block_l = power_of_two(b, 2, 16), 128
    arguments = {"parts_ptr": parts, "y_ptr": y, "B": b, "L": length}
    constants = {"BLOCK_B": block_b, "BLOCK_L": block_l}
    return Launch("total", _total, (blocks(length, block_l),), arguments, constants, 4, 2)
