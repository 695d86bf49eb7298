"""Batch normalisation with shortcut and activation, forward and backward, over maps that lie as NHWC.

    y[m, c] = act((x[m, c] - mean[c]) * scale[c] + bias[c] + residual[m, c])
    scale = weight / sqrt(var + eps)

    moments      program (block of rows, tile of channels): the block's mean and sum of squared deviations.
                 Deviations are from the mean of the block's first rows, so that a large mean costs no digits;
                 what that mean is off by is taken back in float64. x is read once (the first rows twice).
    statistics   program (tile of channels): mean and variance of all from those of the blocks (Chan, Golub,
                 LeVeque 1979), in float64, and scale; of given moments scale alone
    apply        program (tile of pixels, tile of channels): y, and with a residual a bit for each element
                 that the activation passed. Also y again, for whoever kept x in its place.

With g = grad where the activation passed, else 0, and M pixels:

    sums         sum_m g[m, c],  sum_m g[m, c] * (x[m, c] - mean[c])       as moments
    gradients    dbias, dweight, and the two factors of dx, from the sums of the blocks, in float64
    input        dx[m, c] = scale * (g - sum(g) / M - (x - mean) * sum(g (x - mean)) / (M (var + eps)))
                 dresidual = g; of given moments dx = scale * g

Maps are float32, float16 or bfloat16, what belongs to channels is float32 (weight and bias: any of these).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .blocks import activate
from .launch import Launch, blocks, pixel_stride, power_of_two, unit
from .masks import load_bits, mask_bytes, passed, store_bits
from .sums import COMBINE_B, COMBINE_C, Cut, added, column_sums, cut, tile


@triton.jit
def _moments(
    x_ptr, parts_ptr, M, C, tiles, stride_xm,
    UNIT: tl.constexpr,  # of C and the stride
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_xm = C * UNIT, stride_xm * UNIT
    first = tl.program_id(0) * (tiles * BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    row = first + tl.arange(0, BLOCK_M)
    count = tl.minimum(M - first, tiles * BLOCK_M)
    at = x_ptr + row.to(tl.int64)[:, None] * stride_xm + c[None, :]
    x = tl.load(at, mask=(row < M)[:, None] & inside_c[None, :], other=0.0).to(tl.float32)
    near = tl.sum(x, 0) / tl.minimum(count, BLOCK_M).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sums_rest, squares, squares_rest = sums, sums, sums
    for t in range(0, tiles):
        rows = row + t * BLOCK_M
        mask = (rows < M)[:, None] & inside_c[None, :]
        at = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + c[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - near[None, :], 0.0)
        sums, sums_rest = added(sums, sums_rest, d)
        squares, squares_rest = added(squares, squares_rest, d * d)
    s, q, n = column_sums(sums, sums_rest), column_sums(squares, squares_rest), count.to(tl.float64)
    to = parts_ptr + tl.program_id(0).to(tl.int64) * (2 * C) + c
    tl.store(to, near.to(tl.float64) + s / n, mask=inside_c)
    tl.store(to + C, q - s * s / n, mask=inside_c)


@triton.jit
def _statistics(
    parts_ptr, mean_ptr, var_ptr, weight_ptr, scale_ptr,
    B, M, C, block_rows, eps,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    if parts_ptr is not None:
        acc = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float64)
        for first in range(0, B, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            n = tl.minimum(M - b * block_rows, block_rows).to(tl.float64)
            at = parts_ptr + b.to(tl.int64)[:, None] * (2 * C) + c[None, :]
            acc += n[:, None] * tl.load(at, mask=(b < B)[:, None] & inside_c[None, :], other=0.0)
        mean = tl.sum(acc, 0) / M
        acc = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float64)
        for first in range(0, B, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            n = tl.minimum(M - b * block_rows, block_rows).to(tl.float64)
            at = parts_ptr + b.to(tl.int64)[:, None] * (2 * C) + c[None, :]
            mask = (b < B)[:, None] & inside_c[None, :]
            off = tl.load(at, mask=mask, other=0.0) - mean[None, :]
            acc += tl.where(mask, tl.load(at + C, mask=mask, other=0.0) + n[:, None] * off * off, 0.0)
        var = tl.sum(acc, 0) / M
        tl.store(mean_ptr + c, mean.to(tl.float32), mask=inside_c)
        tl.store(var_ptr + c, var.to(tl.float32), mask=inside_c)
    else:
        var = tl.load(var_ptr + c, mask=inside_c, other=1.0).to(tl.float64)
    scale = 1.0 / tl.sqrt(var + eps)
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + c, mask=inside_c, other=0.0).to(tl.float64)
    tl.store(scale_ptr + c, scale.to(tl.float32), mask=inside_c)


@triton.jit
def normalised(x, mean_ptr, scale_ptr, bias_ptr, c, inside_c):
    """x - mean; (x - mean) * scale + bias with one rounding, so that all kernels see the same sign."""
    d = x - tl.load(mean_ptr + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    scale = tl.load(scale_ptr + c, mask=inside_c, other=0.0)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
        return d, tl.fma(d, tl.broadcast_to(scale, d.shape), tl.broadcast_to(bias, d.shape))
    return d, d * scale


@triton.jit
def _apply(
    x_ptr, y_ptr, mask_ptr, mean_ptr, scale_ptr, bias_ptr, residual_ptr,
    M, C, row_bytes, stride_xm, stride_ym, stride_rm,
    UNIT: tl.constexpr,  # of C and the strides
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_xm, stride_ym, stride_rm = C * UNIT, stride_xm * UNIT, stride_ym * UNIT, stride_rm * UNIT
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    row_mask, inside_c = rows < M, c < C
    mask = row_mask[:, None] & inside_c[None, :]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * stride_xm + c[None, :], mask=mask, other=0.0).to(tl.float32)
    _, v = normalised(x, mean_ptr, scale_ptr, bias_ptr, c, inside_c)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + wide * stride_rm + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        bits = passed(v, ACTIVATION) & mask
        store_bits(mask_ptr, bits, rows, row_mask, first_c, row_bytes, BLOCK_M, BLOCK_C)
    v = activate(v, ACTIVATION)
    tl.store(y_ptr + wide * stride_ym + c[None, :], v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def behind_activation(
    g, v, mask_ptr, rows, row_mask, first_c, row_bytes,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g where the activation passed: by the mask, or by what stood before it."""
    if ACTIVATION != 0:
        if mask_ptr is not None:
            bits = load_bits(mask_ptr, rows, row_mask, first_c, row_bytes, BLOCK_M, BLOCK_C)
        else:
            bits = passed(v, ACTIVATION)
        g = tl.where(bits, g, 0.0)
    return g


@triton.jit
def _sums(
    g_ptr, x_ptr, mask_ptr, mean_ptr, scale_ptr, bias_ptr, parts_ptr,
    M, C, tiles, row_bytes, stride_gm, stride_xm,
    UNIT: tl.constexpr,  # of C and the strides
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_gm, stride_xm = C * UNIT, stride_gm * UNIT, stride_xm * UNIT
    row = tl.program_id(0) * (tiles * BLOCK_M) + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    inside_c = c < C
    sums = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sums_rest, products, products_rest = sums, sums, sums
    for t in range(0, tiles):
        rows = row + t * BLOCK_M
        row_mask = rows < M
        mask = row_mask[:, None] & inside_c[None, :]
        wide = rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + wide * stride_xm + c[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + wide * stride_gm + c[None, :], mask=mask, other=0.0).to(tl.float32)
        d, v = normalised(x, mean_ptr, scale_ptr, bias_ptr, c, inside_c)
        g = behind_activation(
            g, v, mask_ptr, rows, row_mask, first_c, row_bytes, ACTIVATION, BLOCK_M, BLOCK_C
        )
        sums, sums_rest = added(sums, sums_rest, g)
        products, products_rest = added(products, products_rest, tl.where(mask, g * d, 0.0))
    to = parts_ptr + tl.program_id(0).to(tl.int64) * (2 * C) + c
    tl.store(to, column_sums(sums, sums_rest), mask=inside_c)
    tl.store(to + C, column_sums(products, products_rest), mask=inside_c)


@triton.jit
def _gradients(
    parts_ptr, var_ptr, dweight_ptr, dbias_ptr, level_ptr, slope_ptr,
    B, M, C, eps,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    sums = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float64)
    products = sums
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        at = parts_ptr + b.to(tl.int64)[:, None] * (2 * C) + c[None, :]
        mask = (b < B)[:, None] & inside_c[None, :]
        sums += tl.load(at, mask=mask, other=0.0)
        products += tl.load(at + C, mask=mask, other=0.0)
    s, p = tl.sum(sums, 0), tl.sum(products, 0)
    inverse = 1.0 / tl.sqrt(tl.load(var_ptr + c, mask=inside_c, other=1.0).to(tl.float64) + eps)
    tl.store(dweight_ptr + c, (p * inverse).to(tl.float32).to(dweight_ptr.dtype.element_ty), mask=inside_c)
    tl.store(dbias_ptr + c, s.to(tl.float32).to(dbias_ptr.dtype.element_ty), mask=inside_c)
    tl.store(level_ptr + c, (s / M).to(tl.float32), mask=inside_c)
    tl.store(slope_ptr + c, (p * inverse * inverse / M).to(tl.float32), mask=inside_c)


@triton.jit
def _input(
    g_ptr, x_ptr, mask_ptr, mean_ptr, scale_ptr, bias_ptr, level_ptr, slope_ptr, dx_ptr, dresidual_ptr,
    M, C, row_bytes, stride_gm, stride_xm, stride_dm, stride_rm,
    UNIT: tl.constexpr,  # of C and the strides
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, stride_gm, stride_xm = C * UNIT, stride_gm * UNIT, stride_xm * UNIT
    stride_dm, stride_rm = stride_dm * UNIT, stride_rm * UNIT
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    row_mask, inside_c = rows < M, c < C
    mask = row_mask[:, None] & inside_c[None, :]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * stride_xm + c[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + wide * stride_gm + c[None, :], mask=mask, other=0.0).to(tl.float32)
    d, v = normalised(x, mean_ptr, scale_ptr, bias_ptr, c, inside_c)
    g = behind_activation(g, v, mask_ptr, rows, row_mask, first_c, row_bytes, ACTIVATION, BLOCK_M, BLOCK_C)
    if dresidual_ptr is not None:
        at = dresidual_ptr + wide * stride_rm + c[None, :]
        tl.store(at, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        if level_ptr is not None:
            level = tl.load(level_ptr + c, mask=inside_c, other=0.0)[None, :]
            slope = tl.load(slope_ptr + c, mask=inside_c, other=0.0)[None, :]
            g = g - level - d * slope
        dx = g * tl.load(scale_ptr + c, mask=inside_c, other=0.0)[None, :]
        tl.store(dx_ptr + wide * stride_dm + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---- launches ----


def pixels_of(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def row_cut(x: Tensor) -> Cut:
    """How `moments` and `sums` cut the pixels of x; their parts are float64 [count, 2, C]."""
    m, c = pixels_of(x), x.shape[1]
    found = tile(m, c, x.dtype)
    return cut(m, found["BLOCK_M"], blocks(c, found["BLOCK_C"]))


def _strided(c: int, row_bytes: int | None, **maps: Tensor | None) -> tuple[dict[str, int], dict[str, int]]:
    """Arguments and constants of a kernel that walks over maps: C and the strides in units."""
    strides = {name: pixel_stride(t) for name, t in maps.items()}
    together = unit(c, *strides.values())
    arguments = {"C": c // together, **{name: stride // together for name, stride in strides.items()}}
    if row_bytes is not None:
        arguments["row_bytes"] = row_bytes
    return arguments, {"UNIT": together}


def moments(x: Tensor, parts: Tensor, rows: Cut) -> Launch:
    """The means of blocks of rows and their sums of squared deviations: parts[b, 0, c] and parts[b, 1, c]."""
    m, c = pixels_of(x), x.shape[1]
    found = tile(m, c, x.dtype)
    arguments, constants = _strided(c, None, stride_xm=x)
    arguments |= {"x_ptr": x, "parts_ptr": parts, "M": m, "tiles": rows.tiles}
    grid = (rows.count, blocks(c, found["BLOCK_C"]))
    return Launch("batch_norm_moments", _moments, grid, arguments, {**constants, **found}, 4, 2)


def statistics(
    parts: Tensor | None, m: int, block_rows: int, eps: float, weight: Tensor | None,
    mean: Tensor, var: Tensor, scale: Tensor,
) -> Launch:  # fmt: skip
    """mean and var (biased) of m pixels from `moments`, and scale; without parts scale alone, of this var."""
    c = scale.shape[0]
    arguments = {
        "parts_ptr": parts, "mean_ptr": mean, "var_ptr": var, "weight_ptr": weight, "scale_ptr": scale,
        "B": 0 if parts is None else parts.shape[0], "M": m, "C": c, "block_rows": block_rows,
        "eps": float(eps),
    }  # fmt: skip
    return Launch(
        "batch_norm_statistics", _statistics, (blocks(c, COMBINE_C),), arguments, _combine(parts), 4, 2
    )


def _combine(parts: Tensor | None) -> dict[str, int]:
    count = 2 if parts is None else power_of_two(parts.shape[0], 2, COMBINE_B)
    return {"BLOCK_B": count, "BLOCK_C": COMBINE_C}


def apply(
    x: Tensor, y: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: int,
) -> Launch:  # fmt: skip
    """y from x [N, C, H, W], both as NHWC; mask: uint8 [pixels, mask_bytes(C)] to write, or None."""
    m, c = pixels_of(x), x.shape[1]
    found = tile(m, c, x.dtype)
    arguments, constants = _strided(c, mask_bytes(c), stride_xm=x, stride_ym=y, stride_rm=residual)
    arguments |= {
        "x_ptr": x, "y_ptr": y, "mask_ptr": mask, "mean_ptr": mean, "scale_ptr": scale, "bias_ptr": bias,
        "residual_ptr": residual, "M": m,
    }  # fmt: skip
    constants |= {"ACTIVATION": activation, **found}
    grid = (blocks(m, found["BLOCK_M"]), blocks(c, found["BLOCK_C"]))
    return Launch("batch_norm_apply", _apply, grid, arguments, constants, 4, 2)


def sums(
    grad: Tensor, x: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, bias: Tensor | None,
    parts: Tensor, rows: Cut, activation: int,
) -> Launch:  # fmt: skip
    """Of blocks of rows: parts[b, 0, c] = sum of g, parts[b, 1, c] = sum of g * (x - mean). Without a mask
    the activation's bits come from x."""
    m, c = pixels_of(x), x.shape[1]
    found = tile(m, c, x.dtype)
    arguments, constants = _strided(c, mask_bytes(c), stride_gm=grad, stride_xm=x)
    arguments |= {
        "g_ptr": grad, "x_ptr": x, "mask_ptr": mask, "mean_ptr": mean, "scale_ptr": scale, "bias_ptr": bias,
        "parts_ptr": parts, "M": m, "tiles": rows.tiles,
    }  # fmt: skip
    constants |= {"ACTIVATION": activation, **found}
    grid = (rows.count, blocks(c, found["BLOCK_C"]))
    return Launch("batch_norm_sums", _sums, grid, arguments, constants, 4, 2)


def gradients(
    parts: Tensor, m: int, eps: float, var: Tensor, dweight: Tensor, dbias: Tensor, level: Tensor,
    slope: Tensor,
) -> Launch:  # fmt: skip
    """dweight, dbias, and level = sum(g) / m, slope = sum(g (x - mean)) / (m (var + eps)), from `sums`."""
    c = var.shape[0]
    arguments = {
        "parts_ptr": parts, "var_ptr": var, "dweight_ptr": dweight, "dbias_ptr": dbias, "level_ptr": level,
        "slope_ptr": slope, "B": parts.shape[0], "M": m, "C": c, "eps": float(eps),
    }  # fmt: skip
    return Launch(
        "batch_norm_gradients", _gradients, (blocks(c, COMBINE_C),), arguments, _combine(parts), 4, 2
    )


def input_gradient(
    grad: Tensor, x: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, bias: Tensor | None,
    level: Tensor | None, slope: Tensor | None, dx: Tensor | None, dresidual: Tensor | None, activation: int,
) -> Launch:  # fmt: skip
    """dx and dresidual, each if it is there; without level and slope dx of given moments."""
    m, c = pixels_of(x), x.shape[1]
    found = tile(m, c, x.dtype)
    maps = {"stride_gm": grad, "stride_xm": x, "stride_dm": dx, "stride_rm": dresidual}
    arguments, constants = _strided(c, mask_bytes(c), **maps)
    arguments |= {
        "g_ptr": grad, "x_ptr": x, "mask_ptr": mask, "mean_ptr": mean, "scale_ptr": scale, "bias_ptr": bias,
        "level_ptr": level, "slope_ptr": slope, "dx_ptr": dx, "dresidual_ptr": dresidual, "M": m,
    }  # fmt: skip
    constants |= {"ACTIVATION": activation, **found}
    grid = (blocks(m, found["BLOCK_M"]), blocks(c, found["BLOCK_C"]))
    return Launch("batch_norm_input", _input, grid, arguments, constants, 4, 2)
