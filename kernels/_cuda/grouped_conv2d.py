"""Grouped 3x3 convolution on tensor cores: csrc/cuda/grouped_conv2d.cu has the loops.

The product of a block of channels goes over units of 8 channels under one tap, two units a step. Filters are
packed in the order in which the lanes of a warp hold them, so that a step reads 256 bytes in one go:

    [block, step, column of 8 filters, lane = (filter g, pair t), unit of the step, element of the pair]

A block is one group, or two of 4 channels, whose products with each other are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, conv_launch

PER_GROUP = (4, 8, 16, 32, 64)
CHANNELS = 64  # of a thread block
UNIT = 8  # channels in 16 bytes
ALIGNMENT = 16
TAPS = 9


def refusal(params: Mapping[str, Any], dtype: torch.dtype, maps: Sequence[Tensor] = ()) -> str:
    """Why the kernel does not take such a layer between these maps; empty when it does."""
    per_group = params["c"] // params["groups"]
    pairs = {name: (params.get(f"{name}_h", usual), params.get(f"{name}_w", usual))
             for name, usual in (("stride", 1), ("dilation", 1))}  # fmt: skip
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}: tensor cores take 16 bits"
    if (params.get("r"), params.get("s")) != (3, 3) or pairs["dilation"] != (1, 1):
        return "only windows of 3x3 without dilation"
    if pairs["stride"] not in ((1, 1), (2, 2)):
        return f"stride {pairs['stride']}: only 1 and 2, both ways"
    if params["k"] != params["c"] or per_group not in PER_GROUP or params["c"] % CHANNELS:
        return f"{per_group} channels per group, {params['c']} of {params['k']} in all"
    if params.get("pre") or params.get("pre_activation") or params.get("gated") or params.get("residual"):
        return "only scale, bias and activation"
    if params.get("nchw_in") or params.get("act_from"):
        return "takes no planes, and one activation for all channels"
    return "" if all(map(aligned, maps)) else "pixels of a map do not lie on multiples of 16 bytes"


def aligned(x: Tensor) -> bool:
    """Whether every pixel starts on a multiple of 16 bytes, as far as its tensor's memory does."""
    steps = [stride for d, (size, stride) in enumerate(zip(x.shape, x.stride())) if size > 1 and d != 1]
    return all(step * x.element_size() % ALIGNMENT == 0 for step in (x.storage_offset(), *steps))


def pack(weight: Tensor, groups: int) -> Tensor:
    """Filters [K, C/G, 3, 3] as [K/B, steps, B/8, 32 lanes, 4], B = max(8, C/G)."""
    filters, per_group = weight.shape[:2]
    wide = max(UNIT, per_group)
    together, blocks = wide // per_group, filters // wide
    dense = weight.new_zeros(blocks, together, per_group, together, per_group, TAPS)
    parts = weight.reshape(blocks, together, per_group, per_group, TAPS)
    for i in range(together):
        dense[:, i, :, i] = parts[:, i]
    # [block, filter, channel, tap] -> [block, tap and 8 channels, channel, filter]
    units = TAPS * wide // UNIT
    by_unit = dense.view(blocks, wide, wide // UNIT, UNIT, TAPS).permute(0, 4, 2, 3, 1)
    steps = (units + 1) // 2
    padded = weight.new_zeros(blocks, 2 * steps, UNIT, wide)
    padded[:, :units] = by_unit.reshape(blocks, units, UNIT, wide)
    lanes = padded.view(blocks, steps, 2, 4, 2, wide // 8, 8).permute(0, 1, 5, 6, 3, 2, 4)
    return lanes.reshape(blocks, steps, wide // 8, 32, 4).contiguous()


def launch(
    x: Tensor,
    packed: Tensor,
    y: Tensor,
    *,
    groups: int,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Launch:
    """x [N, C, H, W] and y [N, C, P, Q] lie as NHWC, pixels on multiples of 16 bytes."""
    return conv_launch(
        "grouped_conv2d", x, packed, y, [x.shape[1] // groups], kernel=kernel, stride=stride, padding=padding,
        scale=scale, bias=bias, activation=activation,
    )  # fmt: skip
