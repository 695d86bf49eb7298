"""Convolution with any window, in groups or not, as a product that gathers its left side.

    y[n, p, q, k] = act((sum_rsc pre(x[n, h, w, c]) * w[k, r, s, c] * scale[k] + bias[k]) * gate[n, k]
                        + residual[n, p, q, k]),   h = p*stride + r*dilation - pad,  w likewise from q and s

    program (tile of output pixels of all images, tile of filters; group)
      for tap in R x S, c in C step BLOCK_K     ascending: the sum's order depends on the layer alone
        a [BLOCK_M, BLOCK_K]                    channels of the pixels under this tap, zeros outside the image
        b [BLOCK_K, BLOCK_N]
        acc += a b                              tensor cores, float32 sums
      one pass over acc                         see blocks.finished

Images of few channels (C < 16) go through k = (tap, c) in one run instead (FLAT), so that a step of the
product is not mostly padding; that form reads any strides, planes too. A group is a range of channels of x, w
and y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import finished, prepared, swizzled
from .launch import (
    PRODUCT_TILES,
    Launch,
    blocks,
    geometry,
    pixel_stride,
    power_of_two,
    product_tiles,
    unit,
)  # fmt: skip

FLAT_CHANNELS = 16  # fewer go through taps and channels in one run


@triton.jit
def _conv(
    x_ptr, w_ptr, y_ptr, scale_ptr, bias_ptr, gate_ptr, residual_ptr, pre_scale_ptr, pre_shift_ptr,
    M, N, C, H, W,  # N, C: of a group
    pixels, width,  # of an output image, of an output row
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_wn, stride_ym, stride_gn, stride_rm,
    act_from,
    # of C, x's strides, stride_wn; of N, stride_ym, stride_gn, stride_rm
    UNIT_C: tl.constexpr, UNIT_N: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    C, stride_wn = C * UNIT_C, stride_wn * UNIT_C
    stride_xn, stride_xh, stride_xw = stride_xn * UNIT_C, stride_xh * UNIT_C, stride_xw * UNIT_C
    N, stride_ym, stride_gn, stride_rm = (
        N * UNIT_N,
        stride_ym * UNIT_N,
        stride_gn * UNIT_N,
        stride_rm * UNIT_N,
    )
    group = tl.program_id(1)
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    image, pixel = rows // pixels, rows % pixels
    top = pixel // width * stride_h - pad_h
    left = pixel % width * stride_w - pad_w
    depth = tl.arange(0, BLOCK_K)
    image_at = x_ptr + image.to(tl.int64) * stride_xn  # [BLOCK_M]
    w_at = w_ptr + (group * N + columns).to(tl.int64)[None, :] * stride_wn  # [1, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FLAT:
        for k0 in range(0, R * S * C, BLOCK_K):
            k = k0 + depth
            inside_k = k < R * S * C
            tap, c = k // C, k % C
            h = top[:, None] + (tap // S * dilation_h)[None, :]
            w = left[:, None] + (tap % S * dilation_w)[None, :]
            inside = row_mask[:, None] & inside_k[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = (
                h.to(tl.int64) * stride_xh
                + w.to(tl.int64) * stride_xw
                + (group * C + c).to(tl.int64)[None, :] * stride_xc
            )
            a = tl.load(image_at[:, None] + at, mask=inside, other=0.0)
            channels = (group * C + c)[None, :]
            a = prepared(a, inside, pre_scale_ptr, pre_shift_ptr, channels, inside_k[None, :], PRE_ACTIVATION)
            b = tl.load(w_at + k[:, None], mask=inside_k[:, None] & column_mask[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        steps = tl.cdiv(C, BLOCK_K)
        for step in range(0, R * S * steps):
            tap, c = step // steps, step % steps * BLOCK_K + depth
            inside_c = c < C
            h = top + tap // S * dilation_h
            w = left + tap % S * dilation_w
            inside = row_mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw  # [BLOCK_M]
            mask = inside[:, None] & inside_c[None, :]
            channels = (group * C + c)[None, :]
            a = tl.load((image_at + at)[:, None] + channels, mask=mask, other=0.0)
            a = prepared(a, mask, pre_scale_ptr, pre_shift_ptr, channels, inside_c[None, :], PRE_ACTIVATION)
            b = tl.load(
                w_at + (tap * C + c)[:, None], mask=inside_c[:, None] & column_mask[None, :], other=0.0
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    columns += group * N
    column_mask = column_mask & (columns < (group + 1) * N)
    acc = finished(
        acc, rows, row_mask, columns, column_mask, pixels, scale_ptr, bias_ptr, gate_ptr, residual_ptr,
        stride_gn, stride_rm, act_from, ACTIVATION,
    )  # fmt: skip
    y_at = y_ptr + rows.to(tl.int64)[:, None] * stride_ym + columns[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


# 128x32 spills 8 bytes on sm_80.
TILES = tuple(size for size in PRODUCT_TILES if size != (128, 32))


def pack(weight: Tensor) -> Tensor:
    """Filters [K, C/G, R, S] as [K, R*S*(C/G)], rows on addresses that wide loads like."""
    k, depth = weight.shape[0], weight[0].numel()
    rows = weight.new_zeros(k, blocks(depth, 16) * 16)[:, :depth]
    return rows.copy_(weight.permute(0, 2, 3, 1).flatten(1))


def tile(m: int, n: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps. BLOCK_K depends on the layer alone, so that batches agree to the bit."""
    block_k = 32 if c < FLAT_CHANNELS else power_of_two(c, 16, 64)
    if dtype is torch.float32:
        width, block_k = power_of_two(n, 16, 64), min(block_k, 32)
        return {"BLOCK_M": 64, "BLOCK_N": width, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
    block_n = power_of_two(n, 16, 128)
    if c < FLAT_CHANNELS:  # an address for each element: 128 pixels spill
        return {
            "BLOCK_M": 64,
            "BLOCK_N": min(block_n, 64),
            "BLOCK_K": block_k,
            "num_warps": 4,
            "num_stages": 3,
        }
    block_m = 128 if block_n > 32 and m * blocks(n, block_n) >= 128 * 132 else 64
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": 8 if block_m * block_n >= 128 * 128 else 4,
        "num_stages": 3,
    }


def tiles(n: int, c: int, dtype: torch.dtype) -> list[dict[str, int]]:
    """Others to try, with the order of sums that `tile` has."""
    block_k = tile(1, n, c, dtype)["BLOCK_K"]
    if dtype is torch.float32 or c < FLAT_CHANNELS:
        return product_tiles(n, block_k, ((64, 32), (64, 64)), 3)
    return product_tiles(n, block_k, TILES, 3)


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    kernel: tuple[int, int],
    groups: int = 1,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
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
    name: str = "conv2d",
) -> Launch:
    """x [N, C, H, W], weight [K, R*S*(C/G)] from `pack`, y [N, K, P, Q]. `padding`: above and to the left;
    what is behind the image follows from y's size. x may be planar when it has fewer than 16 channels in a
    group."""
    filters, channels = weight.shape[0] // groups, weight.shape[1] // (kernel[0] * kernel[1])
    n, _, p, q = y.shape
    m = n * p * q
    found = dict(tiles or tile(m, filters, channels, x.dtype))
    num_warps, num_stages = found.pop("num_warps"), found.pop("num_stages")
    if x.dtype is torch.float32 and precision == "ieee" and found["BLOCK_N"] * found["BLOCK_K"] >= 64 * 32:
        num_warps = 8  # exact products of 64x64x32 on 4 spill 96 bytes on sm_80
    strides = {
        "stride_xn": x.stride(0),
        "stride_xh": x.stride(2),
        "stride_xw": x.stride(3),
        "stride_wn": weight.stride(0),
    }
    behind = {
        "stride_ym": pixel_stride(y), "stride_gn": pixel_stride(gate), "stride_rm": pixel_stride(residual),
    }  # fmt: skip
    unit_c, unit_n = unit(channels, *strides.values()), unit(filters, *behind.values())
    arguments = {
        "x_ptr": x, "w_ptr": weight, "y_ptr": y, "scale_ptr": scale, "bias_ptr": bias, "gate_ptr": gate,
        "residual_ptr": residual, "pre_scale_ptr": pre_scale, "pre_shift_ptr": pre_shift,
        "M": m, "N": filters // unit_n, "C": channels // unit_c, "H": x.shape[2], "W": x.shape[3],
        "pixels": p * q, "width": q,
        **geometry(stride, padding, dilation),
        "stride_xc": x.stride(1), **{name: stride // unit_c for name, stride in strides.items()},
        **{name: stride // unit_n for name, stride in behind.items()}, "act_from": act_from or None,
    }  # fmt: skip
    constants = {
        "UNIT_C": unit_c, "UNIT_N": unit_n, "R": kernel[0], "S": kernel[1], "FLAT": channels < FLAT_CHANNELS,
        "ACTIVATION": activation,
        "PRE_ACTIVATION": pre_activation, "PRECISION": precision, "GROUP_M": 8, **found,
    }  # fmt: skip
    grid = (blocks(m, found["BLOCK_M"]) * blocks(filters, found["BLOCK_N"]), groups)
    return Launch(name, _conv, grid, arguments, constants, num_warps, num_stages)
