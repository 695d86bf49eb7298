"""Gradients of a depthwise convolution: of its input and of its filters, over maps that lie as NHWC.

dx[n, h, w, c] = sum_rs dy[n, p, q, c] * weight[r, s, c]      h + pad - r*dilation = p*stride, likewise w
dw[r, s, c]    = sum_npq dy[n, p, q, c] * x[n, h, w, c]       h = p*stride + r*dilation - pad,  likewise w

input      program (row of dx in tiles of BLOCK_Q, BLOCK_C channels): the taps that meet a pixel of dy; at
           stride 2 a quarter of them loads, the others are masked
weight     program (block of pixels of dy, BLOCK_C channels): all taps side by side as the first axis of a
           tile [TAPS, BLOCK_M, BLOCK_C], so that dy is loaded once for them and x comes from L1; one
           float32 sum for each element, over the tile at the end. The blocks' sums are added in float64
           by a second kernel (sums.total), in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import depthwise_conv2d
from .launch import Launch, blocks, geometry, pixel_stride, power_of_two, unit
from .sums import Cut, cut

Pair = tuple[int, int]


@triton.jit
def _input(
    g_ptr, w_ptr, dx_ptr,
    C, H, W, P, Q, pad_h, pad_w, dilation_h, dilation_w, stride_gm, stride_dm,
    UNIT: tl.constexpr,  # of C, stride_gm, stride_dm
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_gm, stride_dm = C * UNIT, stride_gm * UNIT, stride_dm * UNIT
    tiles = tl.cdiv(W, BLOCK_Q)
    row = tl.program_id(0) // tiles  # of all images
    w = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    image = row // H
    h = row % H + tl.zeros_like(w)  # one for each pixel, whose comparisons are masks
    acc = tl.zeros((BLOCK_Q, BLOCK_C), dtype=tl.float32)
    for r in tl.static_range(R):
        high = h + pad_h - r * dilation_h
        p = high // STRIDE_H
        line = (image * P + p).to(tl.int64) * Q
        for s in tl.static_range(S):
            wide = w + pad_w - s * dilation_w
            q = wide // STRIDE_W
            inside = (w < W) & (high >= 0) & (p < P) & (wide >= 0) & (q < Q)
            inside = inside & (high % STRIDE_H == 0) & (wide % STRIDE_W == 0)
            at = (line + q)[:, None] * stride_gm + c[None, :]
            g = tl.load(g_ptr + at, mask=inside[:, None] & inside_c[None, :], other=0.0).to(tl.float32)
            acc += g * tl.load(w_ptr + (r * S + s) * C + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    at = (row.to(tl.int64) * W + w)[:, None] * stride_dm + c[None, :]
    tl.store(dx_ptr + at, acc.to(dx_ptr.dtype.element_ty), mask=(w < W)[:, None] & inside_c[None, :])


@triton.jit
def _weight(
    g_ptr, x_ptr, parts_ptr,
    M, C, H, W, P, Q, tiles,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, stride_gm, stride_xm,
    UNIT: tl.constexpr,  # of C, stride_gm, stride_xm
    R: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_gm, stride_xm = C * UNIT, stride_gm * UNIT, stride_xm * UNIT
    first = tl.program_id(0) * (tiles * BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    tap = tl.arange(0, TAPS)
    below, right = tap // S * dilation_h - pad_h, tap % S * dilation_w - pad_w
    acc = tl.zeros((TAPS, BLOCK_M, BLOCK_C), dtype=tl.float32)
    for t in range(0, tiles):
        m = first + t * BLOCK_M + tl.arange(0, BLOCK_M)
        at = m.to(tl.int64)[:, None] * stride_gm + c[None, :]
        g = tl.load(g_ptr + at, mask=(m < M)[:, None] & inside_c[None, :], other=0.0).to(tl.float32)
        q, p, image = m % Q, m // Q % P, m // (P * Q)
        h = (p * stride_h)[None, :] + below[:, None]  # [TAPS, BLOCK_M]
        w = (q * stride_w)[None, :] + right[:, None]
        inside = (tap < R * S)[:, None] & (m < M)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        pixel = ((image * H)[None, :] + h).to(tl.int64) * W + w
        at = pixel[:, :, None] * stride_xm + c[None, None, :]
        x = tl.load(x_ptr + at, mask=inside[:, :, None] & inside_c[None, None, :], other=0.0).to(tl.float32)
        acc += x * g[None, :, :]
    sums = tl.sum(acc, 1)
    to = parts_ptr + (tl.program_id(0).to(tl.int64) * (R * S) + tap[:, None]) * C + c[None, :]
    tl.store(to, sums, mask=(tap < R * S)[:, None] & inside_c[None, :])


def tile(kernel: Pair, q: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """Of rows of q pixels, for the gradient of x and for a forward without an epilogue: smaller than those of
    plans, since the compiler moves the loads of all taps together, and more than these spill."""
    found = depthwise_conv2d.tile(q, c, dtype)
    most = 256 if kernel[0] * kernel[1] > 9 else 512 if found["BLOCK_C"] <= 64 else 1024
    return {**found, "BLOCK_Q": min(found["BLOCK_Q"], most // found["BLOCK_C"])}


def input_gradient(
    grad: Tensor, weight: Tensor, dx: Tensor, *, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Launch:
    """dx [N, C, H, W] from grad [N, C, P, Q]; weight [R*S, C] from `depthwise_conv2d.pack`."""
    n, c, h, w = dx.shape
    found = tile(kernel, w, c, dx.dtype)
    warps = found.pop("num_warps")
    together = unit(c, pixel_stride(grad), pixel_stride(dx))
    moves = geometry((1, 1), padding, dilation)
    arguments = {
        "g_ptr": grad, "w_ptr": weight, "dx_ptr": dx,
        "C": c // together, "H": h, "W": w, "P": grad.shape[2], "Q": grad.shape[3],
        **{name: value for name, value in moves.items() if not name.startswith("stride")},
        "stride_gm": pixel_stride(grad) // together, "stride_dm": pixel_stride(dx) // together,
    }  # fmt: skip
    constants = {
        "UNIT": together, "R": kernel[0], "S": kernel[1], "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        **found,
    }  # fmt: skip
    grid = (n * h * blocks(w, found["BLOCK_Q"]), blocks(c, found["BLOCK_C"]))
    return Launch("depthwise_input_gradient", _input, grid, arguments, constants, warps, 2)


def weight_tile(kernel: Pair, m: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """Some 2048 elements of all taps: 16 sums a thread, and as many loads in flight."""
    taps = power_of_two(kernel[0] * kernel[1], 2)
    block_c = power_of_two(c, 16, 32 if dtype is torch.float32 or taps > 32 else 64)
    return {"TAPS": taps, "BLOCK_M": power_of_two(m, 1, max(1, 2048 // (taps * block_c))), "BLOCK_C": block_c}


def weight_cut(grad: Tensor, kernel: Pair) -> Cut:
    """How `weight_gradient` cuts the pixels of grad; its parts are float32 [count, R*S, C]."""
    n, c, p, q = grad.shape
    found = weight_tile(kernel, n * p * q, c, grad.dtype)
    return cut(n * p * q, found["BLOCK_M"], blocks(c, found["BLOCK_C"]))


def weight_gradient(
    grad: Tensor, x: Tensor, parts: Tensor, rows: Cut, *, kernel: Pair, stride: Pair, padding: Pair,
    dilation: Pair,
) -> Launch:  # fmt: skip
    """The sums of blocks of pixels: parts[b, r*S + s, c]."""
    n, c, p, q = grad.shape
    found = weight_tile(kernel, n * p * q, c, grad.dtype)
    together = unit(c, pixel_stride(grad), pixel_stride(x))
    arguments = {
        "g_ptr": grad, "x_ptr": x, "parts_ptr": parts,
        "M": n * p * q, "C": c // together, "H": x.shape[2], "W": x.shape[3], "P": p, "Q": q,
        "tiles": rows.tiles, **geometry(stride, padding, dilation),
        "stride_gm": pixel_stride(grad) // together, "stride_xm": pixel_stride(x) // together,
    }  # fmt: skip
    constants = {"UNIT": together, "R": kernel[0], "S": kernel[1], **found}
    grid = (rows.count, blocks(c, found["BLOCK_C"]))
    return Launch("depthwise_weight_gradient", _weight, grid, arguments, constants, 4, 2)
