"""What an activation hands on, for the backward pass: where it does, and those bits in memory.

A mask is uint8 [rows, ceil(C / 16) * 2], bit c % 8 of byte c / 8 for channel c, as that of csrc/cpu.
Where there is no mask the bits come from what stood before the activation, in the same operations.
"""

import triton
import triton.language as tl


def mask_bytes(channels: int) -> int:
    """Of a row."""
    return (channels + 15) // 16 * 2


@triton.jit
def passed(v, ACTIVATION: tl.constexpr):
    """Whether relu (1) or relu6 (2) hands a gradient on; a NaN does, as in PyTorch."""
    found = ~(v <= 0.0)
    if ACTIVATION == 2:
        found = found & ~(v >= 6.0)
    return found


@triton.jit
def store_bits(
    mask_ptr, bits, rows, row_mask, first_c, row_bytes, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """bits [BLOCK_M, BLOCK_C], of channels from first_c on, false where there is no channel."""
    weights = (1 << tl.arange(0, 8))[None, None, :]
    found = tl.sum(bits.to(tl.int32).reshape(BLOCK_M, BLOCK_C // 8, 8) * weights, 2)
    at = first_c // 8 + tl.arange(0, BLOCK_C // 8)
    mask = row_mask[:, None] & (at < row_bytes)[None, :]
    tl.store(mask_ptr + rows.to(tl.int64)[:, None] * row_bytes + at[None, :], found.to(tl.uint8), mask=mask)


@triton.jit
def load_bits(mask_ptr, rows, row_mask, first_c, row_bytes, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """What store_bits has stored; false beyond the mask."""
    at = first_c // 8 + tl.arange(0, BLOCK_C // 8)
    mask = row_mask[:, None] & (at < row_bytes)[None, :]
    found = tl.load(mask_ptr + rows.to(tl.int64)[:, None] * row_bytes + at[None, :], mask=mask, other=0)
    bits = (found.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return bits.reshape(BLOCK_M, BLOCK_C) != 0
