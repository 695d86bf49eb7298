"""Maximum, average and global average over windows of a map that lies as NHWC.

    max_pool2d       y[n, p, q, c] = max over the window's pixels in the image; a NaN wins, none gives -inf
    avg_pool2d       y[n, p, q, c] = act(sum / count + bias[c])
    global_avg_pool  y[n, c] = mean over the image

    program (tile of output pixels, tile of channels)      a tap after the other, sums in float32
    program (image, tile of channels)                      pixels in tiles of BLOCK_M, added in order

The order of a sum depends on the layer alone: same bits in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import activate
from .launch import Launch, blocks, pixel_stride, power_of_two, unit


@triton.jit
def _windows(
    x_ptr, y_ptr, bias_ptr,
    M, C, H, W, pixels, width,
    R, S, stride_h, stride_w, pad_h, pad_w, bottom, right, divisor,
    stride_xm, stride_ym,
    UNIT: tl.constexpr,  # of C and the strides
    MAXIMUM: tl.constexpr, INSIDE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_xm, stride_ym = C * UNIT, stride_xm * UNIT, stride_ym * UNIT
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask, inside_c = rows < M, c < C
    image, pixel = rows // pixels, rows % pixels
    top = pixel // width * stride_h - pad_h
    left = pixel % width * stride_w - pad_w
    acc = tl.full((BLOCK_M, BLOCK_C), float("-inf") if MAXIMUM else 0.0, dtype=tl.float32)
    for tap in range(R * S):
        h = top + tap // S
        w = left + tap % S
        inside = row_mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = ((image * H + h).to(tl.int64) * W + w)[:, None] * stride_xm + c[None, :]
        mask = inside[:, None] & inside_c[None, :]
        if MAXIMUM:
            x = tl.load(x_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
            acc = tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL)
        else:
            acc += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if not MAXIMUM:
        if divisor is not None:
            acc = tl.div_rn(acc, tl.zeros_like(acc) + divisor)
        else:  # INSIDE: pixels of the image; else those of the image and its padding
            if INSIDE:
                high = tl.minimum(top + R, H) - tl.maximum(top, 0)
                wide = tl.minimum(left + S, W) - tl.maximum(left, 0)
            else:
                high = tl.minimum(top + R, H + bottom) - top
                wide = tl.minimum(left + S, W + right) - left
            count = tl.maximum(high * wide, 1).to(tl.float32)[:, None]
            acc = tl.div_rn(acc, tl.zeros_like(acc) + count)
        if bias_ptr is not None:
            acc = acc + tl.load(bias_ptr + c, mask=inside_c, other=0.0)[None, :]
        acc = activate(acc, ACTIVATION)
    y_at = rows.to(tl.int64)[:, None] * stride_ym + c[None, :]
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & inside_c[None, :])


@triton.jit
def _adaptive(
    x_ptr, y_ptr,
    C, H, W, P, Q,
    stride_xm, stride_ym,
    UNIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_xm, stride_ym = C * UNIT, stride_xm * UNIT, stride_ym * UNIT
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    image, p, q = row // (P * Q), row // Q % P, row % Q
    h0, h1 = p * H // P, ((p + 1) * H + P - 1) // P
    w0, w1 = q * W // Q, ((q + 1) * W + Q - 1) // Q
    acc = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for h in range(h0, h1):
        for w in range(w0, w1):
            at = ((image * H + h).to(tl.int64) * W + w) * stride_xm + c
            acc += tl.load(x_ptr + at, mask=inside_c, other=0.0).to(tl.float32)
    acc = tl.div_rn(acc, tl.zeros_like(acc) + ((h1 - h0) * (w1 - w0)).to(tl.float32))
    tl.store(y_ptr + row.to(tl.int64) * stride_ym + c, acc.to(y_ptr.dtype.element_ty), mask=inside_c)


@triton.jit
def _mean(
    x_ptr, y_ptr, C, pixels, stride_xm, stride_yn, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr
):  # fmt: skip
    C, stride_xm, stride_yn = C * UNIT, stride_xm * UNIT, stride_yn * UNIT
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    row = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for first in range(0, pixels, BLOCK_M):
        pixel = first + row
        at = (image * pixels + pixel)[:, None] * stride_xm + c[None, :]
        acc += tl.load(x_ptr + at, mask=(pixel < pixels)[:, None] & inside_c[None, :], other=0.0).to(
            tl.float32
        )
    total = tl.sum(acc, 0)
    mean = tl.div_rn(total, tl.zeros_like(total) + pixels)
    tl.store(y_ptr + image * stride_yn + c, mean.to(y_ptr.dtype.element_ty), mask=inside_c)


def tile(m: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    block_c = power_of_two(c, 1, 64 if dtype is torch.float32 else 128)
    return {"BLOCK_M": power_of_two(m, 1, max(1, 2048 // block_c)), "BLOCK_C": block_c}


def windows(
    x: Tensor,
    y: Tensor,
    *,
    maximum: bool,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    behind: tuple[int, int] | None = None,
    count_include_pad: bool = True,
    divisor: int = 0,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Launch:
    """max_pool2d or avg_pool2d. behind: padding below and to the right, where it is another than in front."""
    n, c, p, q = y.shape
    bottom, right = behind if behind is not None else padding
    found = tile(n * p * q, c, x.dtype)
    together = unit(c, pixel_stride(x), pixel_stride(y))
    arguments = {
        "x_ptr": x, "y_ptr": y, "bias_ptr": bias,
        "M": n * p * q, "C": c // together, "H": x.shape[2], "W": x.shape[3], "pixels": p * q, "width": q,
        "R": kernel[0], "S": kernel[1], "stride_h": stride[0], "stride_w": stride[1], "pad_h": padding[0],
        "pad_w": padding[1], "bottom": bottom, "right": right, "divisor": divisor or None,
        "stride_xm": pixel_stride(x) // together, "stride_ym": pixel_stride(y) // together,
    }  # fmt: skip
    constants = {
        "UNIT": together,
        "MAXIMUM": maximum,
        "INSIDE": not count_include_pad,
        "ACTIVATION": activation,
        **found,
    }
    grid = (blocks(n * p * q, found["BLOCK_M"]), blocks(c, found["BLOCK_C"]))
    return Launch("max_pool2d" if maximum else "avg_pool2d", _windows, grid, arguments, constants, 4, 2)


def adaptive(x: Tensor, y: Tensor) -> Launch:
    """avg_pool2d to the size of y."""
    n, c, p, q = y.shape
    block_c = power_of_two(c, 1, 512)
    together = unit(c, pixel_stride(x), pixel_stride(y))
    arguments = {
        "x_ptr": x, "y_ptr": y, "C": c // together, "H": x.shape[2], "W": x.shape[3], "P": p,
        "Q": q, "stride_xm": pixel_stride(x) // together, "stride_ym": pixel_stride(y) // together,
    }  # fmt: skip
    return Launch(
        "avg_pool2d",
        _adaptive,
        (n * p * q, blocks(c, block_c)),
        arguments,
        {"UNIT": together, "BLOCK_C": block_c},
        4,
        2,
    )


def mean(x: Tensor, y: Tensor) -> Launch:
    """global_avg_pool: x [N, C, H, W] to y [N, C] or [N, C, 1, 1]."""
    n, c, h, w = x.shape
    block_c = power_of_two(c, 1, 64)
    stride_yn = y.stride(0) if n > 1 else c
    together = unit(c, pixel_stride(x), stride_yn)
    constants = {"UNIT": together, "BLOCK_M": power_of_two(h * w, 1, 32), "BLOCK_C": block_c}
    arguments = {
        "x_ptr": x, "y_ptr": y, "C": c // together, "pixels": h * w,
        "stride_xm": pixel_stride(x) // together, "stride_yn": stride_yn // together,
    }  # fmt: skip
    return Launch("global_avg_pool", _mean, (n, blocks(c, block_c)), arguments, constants, 4, 2)
