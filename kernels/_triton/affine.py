"""One pass over a map: norms, activations, sums and gates that no convolution has taken; copies into slices.

y[m, c] = act((x[m, c] * scale[c] + shift[c]) * gate[image(m), c] + residual[m, c])

program (tile of pixels, tile of channels)      limited by memory: 16 bytes a thread
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import finished
from .launch import Launch, blocks, pixel_stride, power_of_two, unit


@triton.jit
def _affine(
    x_ptr, y_ptr, scale_ptr, shift_ptr, gate_ptr, residual_ptr,
    M, C, pixels, stride_xm, stride_ym, stride_gn, stride_rm,
    UNIT: tl.constexpr,  # of C and the strides
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_xm, stride_ym = C * UNIT, stride_xm * UNIT, stride_ym * UNIT
    stride_gn, stride_rm = stride_gn * UNIT, stride_rm * UNIT
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask, column_mask = rows < M, columns < C
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_xm + columns[None, :], mask=mask, other=0.0)
    y = finished(
        x.to(tl.float32), rows, row_mask, columns, column_mask, pixels, scale_ptr, shift_ptr, gate_ptr,
        residual_ptr,
        stride_gn, stride_rm, None, ACTIVATION,
    )  # fmt: skip
    y_at = y_ptr + rows.to(tl.int64)[:, None] * stride_ym + columns[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


def tile(m: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    block_c = power_of_two(c, 1, 128 if dtype is torch.float32 else 256)
    return {"BLOCK_M": power_of_two(m, 1, max(1, 4096 // block_c)), "BLOCK_C": block_c, "num_warps": 4}


def launch(
    x: Tensor,
    y: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    tiles: dict[str, int] | None = None,
) -> Launch:
    """x, y, residual [N, C, H, W] lie as NHWC, or are rows [N, C]; scale, shift [C]; gate [N, C]."""
    n, c, *size = y.shape
    pixels = size[0] * size[1] if size else 1
    found = dict(tiles or tile(n * pixels, c, x.dtype))
    num_warps = found.pop("num_warps")
    strides = {
        "stride_xm": pixel_stride(x), "stride_ym": pixel_stride(y),
        "stride_gn": pixel_stride(gate),
        "stride_rm": pixel_stride(residual),
    }  # fmt: skip
    together = unit(c, *strides.values())
    arguments = {
        "x_ptr": x, "y_ptr": y, "scale_ptr": scale, "shift_ptr": shift, "gate_ptr": gate,
        "residual_ptr": residual,
        "M": n * pixels, "C": c // together, "pixels": pixels,
        **{name: stride // together for name, stride in strides.items()},
    }  # fmt: skip
    grid = (blocks(n * pixels, found["BLOCK_M"]), blocks(c, found["BLOCK_C"]))
    return Launch(
        "affine",
        _affine,
        grid,
        arguments,
        {"UNIT": together, "ACTIVATION": activation, **found},
        num_warps,
        2,
    )
