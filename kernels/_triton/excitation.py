"""The two small layers between a mean and a gate, in one launch: what is left of squeeze-and-excitation.

    gate[n, k] = act2((sum_j h[n, j] * w2[k, j]) * scale2[k] + bias2[k])
    h[n, j] = act1((sum_c x[n, c] * w1[j, c]) * scale1[j] + bias1[j])

    program (tile of images, tile of gates)
      for c in C step BLOCK_C           x [BLOCK_M, BLOCK_C] w1 -> h [BLOCK_M, BLOCK_H], all in registers
      h w2 -> gate [BLOCK_M, BLOCK_N]   one product

Each tile of gates computes h once more: C * hidden products, from weights that are in L2, instead of another
launch. h is rounded to the type of x, as between two launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import activate
from .launch import Launch, blocks, pixel_stride, power_of_two, unit

MOST_HIDDEN = 128  # of h in registers; more needs over 100 KiB of shared memory


@triton.jit
def _excitation(
    x_ptr, w1_ptr, scale1_ptr, bias1_ptr, w2_ptr, scale2_ptr, bias2_ptr, y_ptr,
    M, N, C, HIDDEN,
    stride_xm, stride_ym, stride_w1, stride_w2,
    UNIT_C: tl.constexpr, UNIT_H: tl.constexpr,  # of C, stride_xm, stride_w1; of HIDDEN, stride_w2
    ACTIVATION_1: tl.constexpr, ACTIVATION_2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    C, stride_xm, stride_w1 = C * UNIT_C, stride_xm * UNIT_C, stride_w1 * UNIT_C
    HIDDEN, stride_w2 = HIDDEN * UNIT_H, stride_w2 * UNIT_H
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden = tl.arange(0, BLOCK_H)
    depth = tl.arange(0, BLOCK_C)
    row_mask, column_mask, hidden_mask = rows < M, columns < N, hidden < HIDDEN
    h = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        inside = c + depth < C
        x_at = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + (c + depth)[None, :]
        w_at = w1_ptr + hidden[None, :] * stride_w1 + (c + depth)[:, None]
        a = tl.load(x_at, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(w_at, mask=inside[:, None] & hidden_mask[None, :], other=0.0)
        h = tl.dot(a, b, h, input_precision=PRECISION)
    if scale1_ptr is not None:
        h = h * tl.load(scale1_ptr + hidden, mask=hidden_mask, other=0.0)[None, :]
    if bias1_ptr is not None:
        h = h + tl.load(bias1_ptr + hidden, mask=hidden_mask, other=0.0)[None, :]
    h = activate(h, ACTIVATION_1).to(x_ptr.dtype.element_ty)  # beyond HIDDEN the filters below are zero
    w_at = w2_ptr + columns.to(tl.int64)[None, :] * stride_w2 + hidden[:, None]
    b = tl.load(w_at, mask=hidden_mask[:, None] & column_mask[None, :], other=0.0)
    acc = tl.dot(h, b, input_precision=PRECISION)
    if scale2_ptr is not None:
        acc = acc * tl.load(scale2_ptr + columns, mask=column_mask, other=0.0)[None, :]
    if bias2_ptr is not None:
        acc = acc + tl.load(bias2_ptr + columns, mask=column_mask, other=0.0)[None, :]
    acc = activate(acc, ACTIVATION_2)
    y_at = y_ptr + rows.to(tl.int64)[:, None] * stride_ym + columns[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def launch(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    y: Tensor,
    *,
    scale1: Tensor | None = None,
    bias1: Tensor | None = None,
    scale2: Tensor | None = None,
    bias2: Tensor | None = None,
    activation1: int = 0,
    activation2: int = 0,
    precision: str = "ieee",
) -> Launch:
    """x [N, C], weight1 [hidden, C], weight2 [K, hidden], y [N, K]; scales and biases float32. x and y do not
    overlap."""
    (hidden, c), (k, _) = weight1.shape, weight2.shape
    if hidden > MOST_HIDDEN:
        raise ValueError(f"excitation: {hidden} hidden channels, at most {MOST_HIDDEN}")
    m = x.shape[0]
    stride_xm, stride_w1, stride_w2 = pixel_stride(x), weight1.stride(0), weight2.stride(0)
    unit_c, unit_h = unit(c, stride_xm, stride_w1), unit(hidden, stride_w2)
    arguments = {
        "x_ptr": x, "w1_ptr": weight1, "scale1_ptr": scale1, "bias1_ptr": bias1, "w2_ptr": weight2,
        "scale2_ptr": scale2, "bias2_ptr": bias2, "y_ptr": y,
        "M": m, "N": k, "C": c // unit_c, "HIDDEN": hidden // unit_h,
        "stride_xm": stride_xm // unit_c, "stride_ym": pixel_stride(y), "stride_w1": stride_w1 // unit_c,
        "stride_w2": stride_w2 // unit_h,
    }  # fmt: skip
    block_n = power_of_two(k, 16, 64)
    constants = {
        "UNIT_C": unit_c, "UNIT_H": unit_h, "ACTIVATION_1": activation1, "ACTIVATION_2": activation2,
        "PRECISION": precision, "BLOCK_M": 16, "BLOCK_N": block_n,
        "BLOCK_C": 64 if x.element_size() == 2 else 32, "BLOCK_H": power_of_two(hidden, 16, MOST_HIDDEN),
    }  # fmt: skip
    warps = 8 if x.dtype is torch.float32 else 4  # on 4, exact products spill 1100 bytes
    grid = (blocks(m, 16), blocks(k, block_n))
    return Launch("excitation", _excitation, grid, arguments, constants, warps, 3)
