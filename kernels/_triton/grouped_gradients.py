"""Gradients of a grouped 3x3 convolution with few channels a group, on tensor cores.

    dx[n, h, w, c] = sum_krs dy[n, p, q, k] * weight[k, r, s, c]      h + pad - r = p*stride, likewise w
    dw[k, r, s, c] = sum_npq dy[n, p, q, k] * x[n, h, w, c]           h = p*stride + r - pad, likewise w

Neighbouring groups become dense blocks of 16 channels or more, as in grouped_conv2d.py.

    input      at stride 1 grouped_conv2d itself, on filters turned round. At other strides:
               program (tile of pixels of dx, tile of its channels; block; phase): pixels whose h and w leave
               the same rests have the same taps, so no product is with a zero between pixels of dy
    weight     program (block of pixels of dy; block and its tiles; row of taps):
                 dy [BLOCK_K, BLOCK_P] x [BLOCK_P, BLOCK_C] for the three taps of the row, float32 sums
               and the blocks' sums in float64 by a second kernel (sums.total), in order; what two groups of a
               block have with each other is left out then
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grouped_conv2d
from .launch import Launch, blocks, pixel_stride, power_of_two, unit
from .sums import Cut, cut

Pair = tuple[int, int]


@triton.jit
def _input(
    g_ptr, w_ptr, dx_ptr,
    N, C, K, H, W, P, Q,  # N: images; C, K: channels of dx and of dy in a block
    pad_h, pad_w, stride_gm, stride_dm, stride_wc,
    UNIT_C: tl.constexpr, UNIT_K: tl.constexpr,  # of C, stride_dm; of K, stride_gm, stride_wc
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C, stride_dm = C * UNIT_C, stride_dm * UNIT_C
    K, stride_gm, stride_wc = K * UNIT_K, stride_gm * UNIT_K, stride_wc * UNIT_K
    group = tl.program_id(1)
    a, b = tl.program_id(2) // STRIDE_W, tl.program_id(2) % STRIDE_W  # the phase
    high, wide = (H - a + STRIDE_H - 1) // STRIDE_H, (W - b + STRIDE_W - 1) // STRIDE_W  # its pixels
    tiles_n = tl.cdiv(C, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < N * high * wide, columns < C
    high, wide = tl.maximum(high, 1), tl.maximum(wide, 1)
    image, i, j = rows // (high * wide), rows // wide % high, rows % wide
    r0, s0 = (a + pad_h) % STRIDE_H, (b + pad_w) % STRIDE_W  # the first taps that meet a pixel of dy
    count_s = (S - s0 + STRIDE_W - 1) // STRIDE_W
    count = (R - r0 + STRIDE_H - 1) // STRIDE_H * count_s
    depth = tl.arange(0, BLOCK_K)
    w_at = w_ptr + (group * C + columns).to(tl.int64)[None, :] * stride_wc
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    for step in range(0, count * steps):
        t, k = step // steps, step % steps * BLOCK_K + depth
        r, s = r0 + t // count_s * STRIDE_H, s0 + t % count_s * STRIDE_W
        p = i + (a + pad_h - r) // STRIDE_H
        q = j + (b + pad_w - s) // STRIDE_W
        inside = row_mask & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        pixel = (image * P + p).to(tl.int64) * Q + q
        at = g_ptr + pixel[:, None] * stride_gm + (group * K + k)[None, :]
        g = tl.load(at, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        weight = tl.load(
            w_at + ((r * S + s) * K + k)[:, None], mask=(k < K)[:, None] & column_mask[None, :], other=0.0
        )
        acc = tl.dot(g, weight, acc, input_precision=PRECISION)
    pixel = (image * H + a + i * STRIDE_H).to(tl.int64) * W + b + j * STRIDE_W
    at = dx_ptr + pixel[:, None] * stride_dm + (group * C + columns)[None, :]
    tl.store(at, acc.to(dx_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _column(x_ptr, row_at, inside, left, W, stride_xm, c, mask):
    """The pixels of x under one tap: [BLOCK_P, BLOCK_C]."""
    inside = inside & (left >= 0) & (left < W)
    at = x_ptr + (row_at + left)[:, None] * stride_xm + c[None, :]
    return tl.load(at, mask=inside[:, None] & mask[None, :], other=0.0)


@triton.jit
def _weight(
    g_ptr, x_ptr, parts_ptr,
    M, C, K, H, W, P, Q, tiles, filters,  # C, K: channels of x and of dy in a block; filters: all of dy
    stride_h, stride_w, pad_h, pad_w, stride_gm, stride_xm,
    UNIT_C: tl.constexpr, UNIT_K: tl.constexpr,  # of C, stride_xm; of K, stride_gm
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C, stride_xm, K, stride_gm = C * UNIT_C, stride_xm * UNIT_C, K * UNIT_K, stride_gm * UNIT_K
    first = tl.program_id(0) * (tiles * BLOCK_P)
    tiles_c, tiles_k = tl.cdiv(C, BLOCK_C), tl.cdiv(K, BLOCK_K)
    group = tl.program_id(1) // (tiles_c * tiles_k)
    k = tl.program_id(1) // tiles_c % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_k, inside_c = k < K, c < C
    r = tl.program_id(2)
    acc0 = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    acc1, acc2 = acc0, acc0
    for t in range(0, tiles):
        m = first + t * BLOCK_P + tl.arange(0, BLOCK_P)
        row_mask = m < M
        at = g_ptr + m.to(tl.int64)[None, :] * stride_gm + (group * K + k)[:, None]
        g = tl.load(at, mask=row_mask[None, :] & inside_k[:, None], other=0.0)
        h = m // Q % P * stride_h + r - pad_h
        left = m % Q * stride_w - pad_w
        inside = row_mask & (h >= 0) & (h < H)
        row_at = (m // (P * Q) * H + h).to(tl.int64) * W
        channels = group * C + c
        acc0 = tl.dot(
            g, _column(x_ptr, row_at, inside, left, W, stride_xm, channels, inside_c), acc0,
            input_precision=PRECISION,
        )  # fmt: skip
        acc1 = tl.dot(
            g, _column(x_ptr, row_at, inside, left + 1, W, stride_xm, channels, inside_c), acc1,
            input_precision=PRECISION,
        )  # fmt: skip
        acc2 = tl.dot(
            g, _column(x_ptr, row_at, inside, left + 2, W, stride_xm, channels, inside_c), acc2,
            input_precision=PRECISION,
        )  # fmt: skip
    filter_at = tl.program_id(0).to(tl.int64) * filters + group * K + k
    to = parts_ptr + ((filter_at * R + r) * (3 * C))[:, None] + c[None, :]
    mask = inside_k[:, None] & inside_c[None, :]
    tl.store(to, acc0, mask=mask)
    tl.store(to + C, acc1, mask=mask)
    tl.store(to + 2 * C, acc2, mask=mask)


# ---- filters ----


def turned(weight: Tensor, groups: int) -> Tensor:
    """Filters [K, C/G, R, S] with inputs and outputs exchanged in each group: [C, K/G, R, S]."""
    k, depth, r, s = weight.shape
    parts = weight.view(groups, k // groups, depth, r, s).transpose(1, 2)
    return parts.reshape(groups * depth, k // groups, r, s)


def unpacked(found: Tensor, like: Tensor, groups: int) -> Tensor:
    """Gradients [K, R, S, channels of a block] of dense blocks as those of the filters `like`."""
    k, depth, r, s = like.shape
    together = found.shape[3] // depth
    parts = found.view(groups // together, together, k // groups, r, s, together, depth)
    own = parts.diagonal(dim1=1, dim2=5)  # [blocks, K/G, R, S, C/G, groups of a block]
    return own.permute(0, 5, 1, 4, 2, 3).reshape(k, depth, r, s).to(like.dtype)


# ---- launches ----


def tile(x: Tensor, y: Tensor, groups: int) -> dict[str, int]:
    """Of grouped_conv2d from x to y. From more channels than it makes, it would spill with all its rows."""
    wide = groups // grouped_conv2d.blocked(x.shape[1], y.shape[1], groups)
    channels, filters = x.shape[1] // wide, y.shape[1] // wide
    found = grouped_conv2d.tile(y.numel() // y.shape[1], filters, channels, x.dtype)
    return {**found, "BLOCK_M": found["BLOCK_M"] // (2 if channels > filters else 1)}


def input_gradient(
    grad: Tensor, weight: Tensor, dx: Tensor, *, groups: int, stride: Pair, padding: Pair,
    precision: str = "ieee",
) -> Launch:  # fmt: skip
    """dx [N, C, H, W] from grad [N, K, P, Q] and filters [K, C/G, R, S] as they are."""
    n, c, h, w = dx.shape
    r, s = weight.shape[2:]
    filters = turned(weight, groups)
    if stride == (1, 1) and padding[0] < r and padding[1] < s:
        packed = grouped_conv2d.pack(filters.flip(2, 3), groups)
        behind = (r - 1 - padding[0], s - 1 - padding[1])
        return grouped_conv2d.launch(
            grad, packed, dx, kernel=(r, s), groups=groups, padding=behind, precision=precision,
            tiles=tile(grad, dx, groups),
        )  # fmt: skip
    k = grad.shape[1]
    packed = grouped_conv2d.pack(filters, groups)
    wide = groups // grouped_conv2d.blocked(k, c, groups)
    block_c, block_k = c // wide, k // wide
    unit_c = unit(block_c, pixel_stride(dx))
    unit_k = unit(block_k, pixel_stride(grad), packed.stride(0))
    exact = dx.dtype is torch.float32
    tiles = {
        "BLOCK_M": 64 if exact else 128, "BLOCK_N": power_of_two(block_c, 16, 64),
        "BLOCK_K": power_of_two(block_k, 16, 32 if exact else 64),
    }  # fmt: skip
    arguments = {
        "g_ptr": grad, "w_ptr": packed, "dx_ptr": dx,
        "N": n, "C": block_c // unit_c, "K": block_k // unit_k, "H": h, "W": w, "P": grad.shape[2],
        "Q": grad.shape[3], "pad_h": padding[0], "pad_w": padding[1],
        "stride_gm": pixel_stride(grad) // unit_k, "stride_dm": pixel_stride(dx) // unit_c,
        "stride_wc": packed.stride(0) // unit_k,
    }  # fmt: skip
    constants = {
        "UNIT_C": unit_c, "UNIT_K": unit_k, "R": r, "S": s, "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "PRECISION": precision, **tiles,
    }  # fmt: skip
    most = n * blocks(h, stride[0]) * blocks(w, stride[1])  # pixels of the largest phase
    grid = (blocks(most, tiles["BLOCK_M"]) * blocks(block_c, tiles["BLOCK_N"]), wide, stride[0] * stride[1])
    warps = 8 if exact and tiles["BLOCK_N"] * tiles["BLOCK_K"] >= 64 * 32 else 4
    return Launch("grouped_input_gradient", _input, grid, arguments, constants, warps, 3)


def weight_tiles(c: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """Of a block with so many channels of x and of dy. Exact float32 products want small tiles."""
    most = 32 if dtype is torch.float32 else 64
    return {
        "BLOCK_K": power_of_two(k, 16, most), "BLOCK_C": power_of_two(c, 16, most),
        "BLOCK_P": 32 if dtype is torch.float32 else 64,
    }  # fmt: skip


def weight_cut(grad: Tensor, x: Tensor, groups: int) -> tuple[Cut, int]:
    """How `weight_gradient` cuts the pixels of grad, and the channels of x in a block; its parts are float32
    [count, K, 3, 3, channels of a block]."""
    n, k, p, q = grad.shape
    wide = groups // grouped_conv2d.blocked(x.shape[1], k, groups)
    block_c, block_k = x.shape[1] // wide, k // wide
    found = weight_tiles(block_c, block_k, grad.dtype)
    others = 3 * wide * blocks(block_c, found["BLOCK_C"]) * blocks(block_k, found["BLOCK_K"])
    return cut(n * p * q, found["BLOCK_P"], others), block_c


def weight_gradient(
    grad: Tensor, x: Tensor, parts: Tensor, rows: Cut, *, groups: int, stride: Pair, padding: Pair,
    precision: str = "ieee",
) -> Launch:  # fmt: skip
    """The sums of blocks of pixels, for filters of 3x3: parts[b, k, r, s, c in the block of k]."""
    n, k, p, q = grad.shape
    block_c = parts.shape[-1]
    wide = x.shape[1] // block_c
    block_k = k // wide
    found = weight_tiles(block_c, block_k, grad.dtype)
    unit_c, unit_k = unit(block_c, pixel_stride(x)), unit(block_k, pixel_stride(grad))
    arguments = {
        "g_ptr": grad, "x_ptr": x, "parts_ptr": parts,
        "M": n * p * q, "C": block_c // unit_c, "K": block_k // unit_k, "H": x.shape[2], "W": x.shape[3],
        "P": p, "Q": q, "tiles": rows.tiles, "filters": k, "stride_h": stride[0], "stride_w": stride[1],
        "pad_h": padding[0], "pad_w": padding[1], "stride_gm": pixel_stride(grad) // unit_k,
        "stride_xm": pixel_stride(x) // unit_c,
    }  # fmt: skip
    constants = {"UNIT_C": unit_c, "UNIT_K": unit_k, "R": 3, "PRECISION": precision, **found}
    tiles = blocks(block_c, found["BLOCK_C"]) * blocks(block_k, found["BLOCK_K"])
    return Launch(
        "grouped_weight_gradient", _weight, (rows.count, wide * tiles, 3), arguments, constants, 4, 3
    )
