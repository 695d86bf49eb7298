"""Depthwise convolution and the 1x1 behind it in one kernel: what is between stays in the multiprocessor.

    d[m, c] = depth_act(sum_rs pre_act(x[pixel(m, r, s), c]) * w_depth[r, s, c] * depth_scale[c] + depth_bias)
    y[m, k] = act(sum_c d[m, c] * w[k, c] * scale[k] + bias[k] + residual[m, k])

    program (tile of output pixels, tile of filters)
      for c in C step BLOCK_K
        for r in R                        not unrolled: one row of taps in flight; the loads of all taps spill
          d [BLOCK_M, BLOCK_K]            S loads, float32 sums, rounded to x's type
        acc += d w                        tensor cores
      one pass over acc                   see blocks.finished

Filters beyond one tile compute d again, with loads from L1 and L2. BLOCK_K 32 and no pipelining: with more, d
spills (636 bytes at 64) or the nine loads take 182 KB of shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import activate, finished, swizzled
from .launch import Launch, blocks, geometry, pixel_stride, power_of_two, unit


@triton.jit
def _separable(
    x_ptr, w_ptr, y_ptr, depth_ptr, depth_scale_ptr, depth_bias_ptr, scale_ptr, bias_ptr, residual_ptr,
    M, N, C, H, W,
    pixels, width,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    stride_xm, stride_wn, stride_ym, stride_rm,
    UNIT_C: tl.constexpr, UNIT_N: tl.constexpr,  # of C, stride_xm, stride_wn; of N, stride_ym, stride_rm
    R: tl.constexpr, S: tl.constexpr,
    ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr, DEPTH_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    C, stride_xm, stride_wn = C * UNIT_C, stride_xm * UNIT_C, stride_wn * UNIT_C
    N, stride_ym, stride_rm = N * UNIT_N, stride_ym * UNIT_N, stride_rm * UNIT_N
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    image, pixel = rows // pixels, rows % pixels
    top = pixel // width * stride_h - pad_h
    left = pixel % width * stride_w - pad_w
    depth = tl.arange(0, BLOCK_K)
    w_at = w_ptr + columns.to(tl.int64)[None, :] * stride_wn + depth[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, C, BLOCK_K):
        c = k + depth
        inside_c = c < C
        d = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for r in range(R):
            h = top + r * dilation_h
            line = (image * H + h).to(tl.int64) * W
            for s in tl.static_range(S):
                w = left + s * dilation_w
                inside = row_mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                at = (line + w)[:, None] * stride_xm + c[None, :]
                x = tl.load(x_ptr + at, mask=inside[:, None] & inside_c[None, :], other=0.0).to(tl.float32)
                x = activate(x, PRE_ACTIVATION)  # of zero it is zero
                tap = tl.load(depth_ptr + (r * S + s) * C + c, mask=inside_c, other=0.0).to(tl.float32)
                d += x * tap[None, :]
        if depth_scale_ptr is not None:
            d = d * tl.load(depth_scale_ptr + c, mask=inside_c, other=0.0)[None, :]
        if depth_bias_ptr is not None:
            d = d + tl.load(depth_bias_ptr + c, mask=inside_c, other=0.0)[None, :]
        d = activate(d, DEPTH_ACTIVATION)
        b = tl.load(w_at, mask=inside_c[:, None] & column_mask[None, :], other=0.0)
        acc = tl.dot(d.to(x_ptr.dtype.element_ty), b, acc, input_precision=PRECISION)
        w_at += BLOCK_K
    acc = finished(
        acc, rows, row_mask, columns, column_mask, pixels, scale_ptr, bias_ptr, None, residual_ptr, 0,
        stride_rm,
        None, ACTIVATION,
    )  # fmt: skip
    y_at = y_ptr + rows.to(tl.int64)[:, None] * stride_ym + columns[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def tile(n: int, dtype: torch.dtype, precision: str) -> dict[str, int]:
    """As many filters as fit: each further tile computes d again, 18 flops on ordinary cores where a tile of
    128 filters has 256 on tensor cores, which take as long. 64 pixels: twice as many spill with 256
    filters."""
    if dtype is torch.float32:
        width = power_of_two(n, 16, 32 if precision == "ieee" else 64)  # 64 exact ones spill
        return {"BLOCK_M": 64, "BLOCK_N": width, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    block_n = power_of_two(n, 16, 256)
    return {
        "BLOCK_M": 64,
        "BLOCK_N": block_n,
        "BLOCK_K": 32,
        "num_warps": 8 if block_n >= 128 else 4,
        "num_stages": 1,
    }


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    depth_weight: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    depth_scale: Tensor | None = None,
    depth_bias: Tensor | None = None,
    depth_activation: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    pre_activation: int = 0,
    activation: int = 0,
    precision: str = "ieee",
    tiles: dict[str, int] | None = None,
) -> Launch:
    """x [N, C, H, W] and y [N, K, P, Q] lie as NHWC; weight [K, C], depth_weight [R*S, C]
    (depthwise_conv2d.pack). pre_activation: one that leaves zero where it is."""
    n, k, p, q = y.shape
    found = dict(tiles or tile(k, x.dtype, precision))
    num_warps, num_stages = found.pop("num_warps"), found.pop("num_stages")
    stride_rm = pixel_stride(residual)
    unit_c = unit(x.shape[1], pixel_stride(x), weight.stride(0))
    unit_n = unit(k, pixel_stride(y), stride_rm)
    arguments = {
        "x_ptr": x, "w_ptr": weight, "y_ptr": y, "depth_ptr": depth_weight, "depth_scale_ptr": depth_scale,
        "depth_bias_ptr": depth_bias, "scale_ptr": scale, "bias_ptr": bias, "residual_ptr": residual,
        "M": n * p * q, "N": k // unit_n, "C": x.shape[1] // unit_c, "H": x.shape[2], "W": x.shape[3],
        "pixels": p * q, "width": q,
        **geometry(stride, padding, dilation),
        "stride_xm": pixel_stride(x) // unit_c, "stride_wn": weight.stride(0) // unit_c,
        "stride_ym": pixel_stride(y) // unit_n, "stride_rm": stride_rm // unit_n,
    }  # fmt: skip
    constants = {
        "UNIT_C": unit_c, "UNIT_N": unit_n, "R": kernel[0], "S": kernel[1], "ACTIVATION": activation,
        "PRE_ACTIVATION": pre_activation,
        "DEPTH_ACTIVATION": depth_activation, "PRECISION": precision, "GROUP_M": 8, **found,
    }  # fmt: skip
    grid = (blocks(n * p * q, found["BLOCK_M"]) * blocks(k, found["BLOCK_N"]),)
    return Launch("separable_conv2d", _separable, grid, arguments, constants, num_warps, num_stages)
