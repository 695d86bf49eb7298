"""1x1 convolution and linear layers: a product of pixels [M, K] with filters [N, K].

    y[m, n] = act((sum_k pre(x[m, k]) * w[n, k] * scale[n] + bias[n]) * gate[image(m), n] + residual[m, n])

    program (tile of pixels, tile of filters)   all filters of some pixels, then the next: x stays in L2
      for k in K step BLOCK_K                   ascending
        a [BLOCK_M, BLOCK_K]                    pre on the way; a strided convolution gathers its pixels
        b [BLOCK_K, BLOCK_N]                    filters lie as in PyTorch
        acc += a b                              tensor cores, float32 sums
      one pass over acc                         scale, bias, gate, residual, activation, into a slice

x, y, residual may be channels of wider pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import finished, prepared, swizzled
from .launch import PRODUCT_TILES, Launch, blocks, pixel_stride, power_of_two, product_tiles, unit


@triton.jit
def _pointwise(
    x_ptr, w_ptr, y_ptr, scale_ptr, bias_ptr, gate_ptr, residual_ptr, pre_scale_ptr, pre_shift_ptr,
    M, N, K,
    pixels, width,  # of an output image, of an output row
    image_rows, image_width,  # of the input, where it is strided
    stride_h, stride_w,
    stride_xm, stride_wn, stride_ym, stride_gn, stride_rm,
    act_from,
    # of K, stride_xm, stride_wn; of N, stride_ym, stride_gn, stride_rm
    UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
    ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr, STRIDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    K, stride_xm, stride_wn = K * UNIT_K, stride_xm * UNIT_K, stride_wn * UNIT_K
    N, stride_ym, stride_gn, stride_rm = (
        N * UNIT_N,
        stride_ym * UNIT_N,
        stride_gn * UNIT_N,
        stride_rm * UNIT_N,
    )
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    if STRIDED:
        image, pixel = rows // pixels, rows % pixels
        from_row = (image * image_rows + pixel // width * stride_h) * image_width + pixel % width * stride_w
    else:
        from_row = rows
    depth = tl.arange(0, BLOCK_K)
    x_at = x_ptr + from_row.to(tl.int64)[:, None] * stride_xm + depth[None, :]  # [BLOCK_M, BLOCK_K]
    w_at = w_ptr + columns.to(tl.int64)[None, :] * stride_wn + depth[:, None]  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + depth < K
        a = tl.load(x_at, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(w_at, mask=inside[:, None] & column_mask[None, :], other=0.0)
        channels = k + depth[None, :]
        a = prepared(a, None, pre_scale_ptr, pre_shift_ptr, channels, inside[None, :], PRE_ACTIVATION)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K
    acc = finished(
        acc, rows, row_mask, columns, column_mask, pixels, scale_ptr, bias_ptr, gate_ptr, residual_ptr,
        stride_gn, stride_rm, act_from, ACTIVATION,
    )  # fmt: skip
    y_at = y_ptr + rows.to(tl.int64)[:, None] * stride_ym + columns[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def tile(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps. BLOCK_K depends on the layer alone, but for few rows: their sums may have other
    bits than in a larger batch, unless torch.use_deterministic_algorithms asks for the same."""
    block_n = power_of_two(n, 16, 128)
    # Rows of a classifier or a gate: memory and latency of the weights, so many narrow tiles.
    if m <= 32 and not torch.are_deterministic_algorithms_enabled():
        wide = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128 if k >= 128 else 64}
        return {**wide, "num_warps": 4, "num_stages": 4}
    if dtype is torch.float32:
        width = min(block_n, 64)
        return {"BLOCK_M": 64, "BLOCK_N": width, "BLOCK_K": 32, "num_warps": warps(width), "num_stages": 3}
    block_m = 128 if m * blocks(n, block_n) >= 128 * 132 else 64  # enough tiles for all multiprocessors
    large = block_m * block_n >= 128 * 128
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": 64 if k > 32 else 32,
        "num_warps": 8 if large else 4,
        "num_stages": 3,
    }


def warps(width: int) -> int:
    """Of float32: exact products of 32 filters on 4 warps spill 24 bytes."""
    return 8 if width == 32 else 4


def tiles(n: int, k: int, dtype: torch.dtype) -> list[dict[str, int]]:
    """Others to try, with the order of sums that `tile` has for many rows."""
    if dtype is torch.float32:
        found = product_tiles(n, 32, ((64, 32), (64, 64), (128, 64)), 3)
        return [{**each, "num_warps": warps(each["BLOCK_N"])} for each in found]
    return product_tiles(n, 64 if k > 32 else 32, PRODUCT_TILES, 3)


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    pre_scale: Tensor | None = None,
    pre_shift: Tensor | None = None,
    pre_activation: int = 0,
    activation: int = 0,
    act_from: int = 0,
    precision: str = "ieee",
    tiles: dict[str, int] | None = None,
) -> Launch:
    """x [M pixels, K], weight [N, K], y [M pixels, N]: maps that lie as NHWC, or rows [N, C].

    precision: of float32 products, "ieee" or "tf32".
    """
    n, k = weight.shape
    height, width = (y.shape[2], y.shape[3]) if y.dim() == 4 else (1, 1)
    m = y.shape[0] * height * width
    found = dict(tiles or tile(m, n, k, x.dtype))
    num_warps, num_stages = found.pop("num_warps"), found.pop("num_stages")
    stride_xm, stride_wn, stride_ym = pixel_stride(x), weight.stride(0), pixel_stride(y)
    stride_gn, stride_rm = pixel_stride(gate), pixel_stride(residual)
    unit_k, unit_n = unit(k, stride_xm, stride_wn), unit(n, stride_ym, stride_gn, stride_rm)
    arguments = {
        "x_ptr": x, "w_ptr": weight, "y_ptr": y, "scale_ptr": scale, "bias_ptr": bias, "gate_ptr": gate,
        "residual_ptr": residual, "pre_scale_ptr": pre_scale, "pre_shift_ptr": pre_shift,
        "M": m, "N": n // unit_n, "K": k // unit_k, "pixels": height * width, "width": width,
        "image_rows": x.shape[2] if x.dim() == 4 else 1, "image_width": x.shape[3] if x.dim() == 4 else 1,
        "stride_h": stride[0], "stride_w": stride[1],
        "stride_xm": stride_xm // unit_k, "stride_wn": stride_wn // unit_k, "stride_ym": stride_ym // unit_n,
        "stride_gn": stride_gn // unit_n, "stride_rm": stride_rm // unit_n,
        "act_from": act_from or None,
    }  # fmt: skip
    constants = {
        "UNIT_K": unit_k, "UNIT_N": unit_n, "ACTIVATION": activation, "PRE_ACTIVATION": pre_activation,
        "STRIDED": stride != (1, 1),
        "PRECISION": precision, "GROUP_M": 8, **found,
    }  # fmt: skip
    grid = (blocks(m, found["BLOCK_M"]) * blocks(n, found["BLOCK_N"]),)
    return Launch("pointwise_conv2d", _pointwise, grid, arguments, constants, num_warps, num_stages)
