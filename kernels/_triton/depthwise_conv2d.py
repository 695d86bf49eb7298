"""Depthwise convolution: one filter per channel, no sums over channels, so x and y in memory are the limit.

y[n, p, q, c] = act(sum_rs pre_act(x[n, h, w, c]) * w[r, s, c] * scale[c] + bias[c])
                                               h = p*stride + r*dilation - pad,  w likewise from q and s

program (row of output pixels in tiles of BLOCK_Q, BLOCK_C channels)
  for r in R, s in S                     unrolled; neighbouring taps read neighbouring pixels, from L1
    x [BLOCK_Q, BLOCK_C] * w [BLOCK_C]   float32 fma
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import activate
from .launch import Launch, blocks, geometry, pixel_stride, power_of_two, unit


@triton.jit
def _depthwise(
    x_ptr, w_ptr, y_ptr, scale_ptr, bias_ptr,
    C, H, W, P, Q,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    stride_xm, stride_ym,
    UNIT: tl.constexpr,  # of C, stride_xm, stride_ym
    R: tl.constexpr, S: tl.constexpr, ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_xm, stride_ym = C * UNIT, stride_xm * UNIT, stride_ym * UNIT
    tiles = tl.cdiv(Q, BLOCK_Q)
    row = tl.program_id(0) // tiles  # of all images
    q = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    image = row // P
    top = row % P * stride_h - pad_h + tl.zeros_like(q)  # one for each pixel, whose comparisons are masks
    acc = tl.zeros((BLOCK_Q, BLOCK_C), dtype=tl.float32)
    for r in tl.static_range(R):
        h = top + r * dilation_h
        line = (image * H + h).to(tl.int64) * W
        for s in tl.static_range(S):
            w = q * stride_w + s * dilation_w - pad_w
            inside = (q < Q) & (w >= 0) & (w < W) & (h >= 0) & (h < H)
            at = (line + w)[:, None] * stride_xm + c[None, :]
            x = tl.load(x_ptr + at, mask=inside[:, None] & inside_c[None, :], other=0.0).to(tl.float32)
            x = activate(x, PRE_ACTIVATION)
            if PRE_ACTIVATION == 3:  # the padding comes after the activation and stays zero
                x = tl.where(inside[:, None], x, 0.0)
            acc += x * tl.load(w_ptr + (r * S + s) * C + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    if scale_ptr is not None:
        acc = acc * tl.load(scale_ptr + c, mask=inside_c, other=0.0)[None, :]
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + c, mask=inside_c, other=0.0)[None, :]
    acc = activate(acc, ACTIVATION)
    y_at = (row.to(tl.int64) * Q + q)[:, None] * stride_ym + c[None, :]
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=(q < Q)[:, None] & inside_c[None, :])


def pack(weight: Tensor) -> Tensor:
    """Filters [C, 1, R, S] as [R*S, C]."""
    return weight.flatten(1).t().contiguous()


def tile(q: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """A thread holds 16 bytes of a pixel's channels."""
    block_c = power_of_two(c, 16, 64 if dtype is torch.float32 else 128)
    return {"BLOCK_Q": power_of_two(q, 1, 1024 // block_c * 2), "BLOCK_C": block_c, "num_warps": 4}


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    pre_activation: int = 0,
    activation: int = 0,
    tiles: dict[str, int] | None = None,
) -> Launch:
    """x [N, C, H, W] and y [N, C, P, Q] lie as NHWC; weight [R*S, C] from `pack`."""
    n, c, p, q = y.shape
    found = dict(tiles or tile(q, c, x.dtype))
    num_warps = found.pop("num_warps")
    together = unit(c, pixel_stride(x), pixel_stride(y))
    arguments = {
        "x_ptr": x, "w_ptr": weight, "y_ptr": y, "scale_ptr": scale, "bias_ptr": bias,
        "C": c // together, "H": x.shape[2], "W": x.shape[3], "P": p, "Q": q,
        **geometry(stride, padding, dilation),
        "stride_xm": pixel_stride(x) // together, "stride_ym": pixel_stride(y) // together,
    }  # fmt: skip
    constants = {
        "UNIT": together,
        "R": kernel[0],
        "S": kernel[1],
        "ACTIVATION": activation,
        "PRE_ACTIVATION": pre_activation,
        **found,
    }
    grid = (n * p * blocks(q, found["BLOCK_Q"]), blocks(c, found["BLOCK_C"]))
    return Launch("depthwise_conv2d", _depthwise, grid, arguments, constants, num_warps, 2)
