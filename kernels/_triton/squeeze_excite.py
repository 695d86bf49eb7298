"""The passes of squeeze-and-excitation over large maps that lie as NHWC; its two small layers are PyTorch's.

    image_sums    sums[n, b, c] = sum over a block of pixels of x[n, m, c], or of g[n, m, c] * x[n, m, c]
    apply         y[m, c] = act(x[m, c] * gate[n, c] + residual[m, c]),   n the image of m
    input         dx[m, c] = g[m, c] * gate[n, c] + share[n, c];  dresidual = g

g is grad where the activation passed, else 0: by a mask (masks.py) where there is a residual, else as seen
from x * gate. A block of pixels belongs to one image and its size to the layer, so that an image has the same
bits in any batch; the blocks' sums are added by PyTorch.

    program (block of pixels of an image, tile of channels)    sums in float32 with Kahan's correction
    program (tile of pixels of all images, tile of channels)   apply and input
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import behind_activation
from .blocks import activate
from .launch import Launch, blocks, pixel_stride, unit
from .masks import mask_bytes, passed, store_bits
from .sums import added, column_sums, tile

PIXELS = 512  # of a block: a map of 56x56 has seven


@triton.jit
def gated(x, gate_ptr, images, mask, c, C):
    """gate and x * gate for pixels of these images."""
    gate = tl.load(gate_ptr + images.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)
    return gate, x * gate


@triton.jit
def _image_sums(
    g_ptr, x_ptr, mask_ptr, gate_ptr, sums_ptr,
    C, pixels, tiles, row_bytes, stride_gm, stride_xm,
    UNIT: tl.constexpr,  # of C and the strides
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_gm, stride_xm = C * UNIT, stride_gm * UNIT, stride_xm * UNIT
    per_image = tl.cdiv(pixels, tiles * BLOCK_M)
    image = tl.program_id(0) // per_image
    first = tl.program_id(0) % per_image * (tiles * BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    inside_c = c < C
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    rest = total
    for t in range(0, tiles):
        pixel = first + t * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = pixel < pixels
        mask = row_mask[:, None] & inside_c[None, :]
        rows = image.to(tl.int64) * pixels + pixel
        x = tl.load(x_ptr + rows[:, None] * stride_xm + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if g_ptr is not None:
            g = tl.load(g_ptr + rows[:, None] * stride_gm + c[None, :], mask=mask, other=0.0).to(tl.float32)
            v = x
            if ACTIVATION != 0 and mask_ptr is None:
                _, v = gated(x, gate_ptr, image + tl.zeros_like(pixel), mask, c, C)
            g = behind_activation(
                g, v, mask_ptr, rows, row_mask, first_c, row_bytes, ACTIVATION, BLOCK_M, BLOCK_C
            )
            x = g * x
        total, rest = added(total, rest, x)
    found = column_sums(total, rest).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * C + c, found, mask=inside_c)


@triton.jit
def _apply(
    x_ptr, gate_ptr, residual_ptr, y_ptr, mask_ptr,
    M, C, pixels, row_bytes, stride_xm, stride_ym, stride_rm,
    UNIT: tl.constexpr,  # of C and the strides
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_xm, stride_ym, stride_rm = C * UNIT, stride_xm * UNIT, stride_ym * UNIT, stride_rm * UNIT
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    row_mask = rows < M
    mask = row_mask[:, None] & (c < C)[None, :]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * stride_xm + c[None, :], mask=mask, other=0.0).to(tl.float32)
    _, v = gated(x, gate_ptr, rows // pixels, mask, c, C)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + wide * stride_rm + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        bits = passed(v, ACTIVATION) & mask
        store_bits(mask_ptr, bits, rows, row_mask, first_c, row_bytes, BLOCK_M, BLOCK_C)
    v = activate(v, ACTIVATION)
    tl.store(y_ptr + wide * stride_ym + c[None, :], v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _input(
    g_ptr, x_ptr, mask_ptr, gate_ptr, share_ptr, dx_ptr, dresidual_ptr,
    M, C, pixels, row_bytes, stride_gm, stride_xm, stride_dm, stride_rm,
    UNIT: tl.constexpr,  # of C and the strides
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_gm, stride_xm = C * UNIT, stride_gm * UNIT, stride_xm * UNIT
    stride_dm, stride_rm = stride_dm * UNIT, stride_rm * UNIT
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    row_mask = rows < M
    mask = row_mask[:, None] & (c < C)[None, :]
    wide = rows.to(tl.int64)[:, None]
    g = tl.load(g_ptr + wide * stride_gm + c[None, :], mask=mask, other=0.0).to(tl.float32)
    x = g
    if ACTIVATION != 0 and mask_ptr is None:
        x = tl.load(x_ptr + wide * stride_xm + c[None, :], mask=mask, other=0.0).to(tl.float32)
    gate, v = gated(x, gate_ptr, rows // pixels, mask, c, C)
    g = behind_activation(g, v, mask_ptr, rows, row_mask, first_c, row_bytes, ACTIVATION, BLOCK_M, BLOCK_C)
    if dresidual_ptr is not None:
        at = dresidual_ptr + wide * stride_rm + c[None, :]
        tl.store(at, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        at = (rows // pixels).to(tl.int64)[:, None] * C + c[None, :]
        dx = tl.fma(g, gate, tl.load(share_ptr + at, mask=mask, other=0.0))
        tl.store(dx_ptr + wide * stride_dm + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---- launches ----


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Pixels of the batch, channels, pixels of an image."""
    n, c, h, w = x.shape
    return n * h * w, c, h * w


def _image_tiles(pixels: int, c: int, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """How many tiles a block of an image has, and their sizes, by the layer alone."""
    found = tile(pixels, c, dtype)
    return blocks(min(pixels, PIXELS), found["BLOCK_M"]), found


def image_blocks(x: Tensor) -> int:
    """How many blocks `image_sums` makes of an image; its sums are float32 [N, blocks, C]."""
    _, c, pixels = _sizes(x)
    tiles, found = _image_tiles(pixels, c, x.dtype)
    return blocks(pixels, tiles * found["BLOCK_M"])


def image_sums(
    x: Tensor, sums: Tensor, *, grad: Tensor | None = None, mask: Tensor | None = None,
    gate: Tensor | None = None, activation: int = 0,
) -> Launch:  # fmt: skip
    """sums[n, b, c] of x, or with grad of g * x. gate float32 [N, C]: for an activation without a mask."""
    m, c, pixels = _sizes(x)
    tiles, found = _image_tiles(pixels, c, x.dtype)
    strides = {"stride_gm": pixel_stride(grad), "stride_xm": pixel_stride(x)}
    together = unit(c, *strides.values())
    arguments = {
        "g_ptr": grad, "x_ptr": x, "mask_ptr": mask, "gate_ptr": gate, "sums_ptr": sums,
        "C": c // together, "pixels": pixels, "tiles": tiles, "row_bytes": mask_bytes(c),
        **{name: stride // together for name, stride in strides.items()},
    }  # fmt: skip
    constants = {"UNIT": together, "ACTIVATION": activation, **found}
    grid = (m // pixels * image_blocks(x), blocks(c, found["BLOCK_C"]))
    return Launch("squeeze_excite_sums", _image_sums, grid, arguments, constants, 4, 2)


def apply(
    x: Tensor, gate: Tensor, residual: Tensor | None, y: Tensor, mask: Tensor | None, activation: int
) -> Launch:
    """y from x [N, C, H, W] and gate float32 [N, C]; mask: uint8 [pixels, mask_bytes(C)] to write or None."""
    m, c, pixels = _sizes(x)
    found = tile(m, c, x.dtype)
    strides = {
        "stride_xm": pixel_stride(x), "stride_ym": pixel_stride(y), "stride_rm": pixel_stride(residual)
    }  # fmt: skip
    together = unit(c, *strides.values())
    arguments = {
        "x_ptr": x, "gate_ptr": gate, "residual_ptr": residual, "y_ptr": y, "mask_ptr": mask,
        "M": m, "C": c // together, "pixels": pixels, "row_bytes": mask_bytes(c),
        **{name: stride // together for name, stride in strides.items()},
    }  # fmt: skip
    grid = (blocks(m, found["BLOCK_M"]), blocks(c, found["BLOCK_C"]))
    constants = {"UNIT": together, "ACTIVATION": activation, **found}
    return Launch("squeeze_excite_apply", _apply, grid, arguments, constants, 4, 2)


def input_gradient(
    grad: Tensor, x: Tensor, mask: Tensor | None, gate: Tensor, share: Tensor, dx: Tensor | None,
    dresidual: Tensor | None, activation: int,
) -> Launch:  # fmt: skip
    """dx and dresidual, each if it is there; gate and share float32 [N, C]."""
    m, c, pixels = _sizes(x)
    found = tile(m, c, x.dtype)
    maps = {"stride_gm": grad, "stride_xm": x, "stride_dm": dx, "stride_rm": dresidual}
    strides = {name: pixel_stride(t) for name, t in maps.items()}
    together = unit(c, *strides.values())
    arguments = {
        "g_ptr": grad, "x_ptr": x, "mask_ptr": mask, "gate_ptr": gate, "share_ptr": share, "dx_ptr": dx,
        "dresidual_ptr": dresidual, "M": m, "C": c // together, "pixels": pixels,
        "row_bytes": mask_bytes(c), **{name: stride // together for name, stride in strides.items()},
    }  # fmt: skip
    grid = (blocks(m, found["BLOCK_M"]), blocks(c, found["BLOCK_C"]))
    constants = {"UNIT": together, "ACTIVATION": activation, **found}
    return Launch("squeeze_excite_input", _input, grid, arguments, constants, 4, 2)
