"""What the kernels share: activations, what stands before and behind a product, the order of tiles.

ACTIVATION is the number that the engine gives it, see engine/candidates.py.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """NaN stays NaN, as in torch.relu."""
    if ACTIVATION == 1 or ACTIVATION == 2:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == 2:
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == 3:
        x = sigmoid(x)
    if ACTIVATION == 4:
        # exp(-2|x|) is at most 1; below 0.2 the difference would cancel, and four terms of the series are
        # exact enough.
        a = tl.abs(x)
        e = tl.exp(-2.0 * a)
        far = tl.div_rn(1.0 - e, 1.0 + e)
        s = a * a
        near = a * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
        t = tl.where(a < 0.2, near, far)
        x = tl.where(x < 0, -t, t)
    if ACTIVATION == 5:
        x = x * sigmoid(x)
    if ACTIVATION == 6 or ACTIVATION == 7:
        ramp = activate(x + 3.0, 2)
        x = tl.div_rn(ramp if ACTIVATION == 6 else x * ramp, tl.full(x.shape, 6.0, tl.float32))
    if ACTIVATION == 8:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == 9:
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def prepared(x, inside, scale_ptr, shift_ptr, channels, mask, ACTIVATION: tl.constexpr):
    """What a convolution multiplies: act(x * scale + shift) in float32, then x's type again.

    channels, their mask: [1, BLOCK]. inside: what of x is no padding, which stays zero; None without padding.
    """
    if scale_ptr is not None or ACTIVATION != 0:
        made = x.to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + channels, mask=mask, other=0.0)
            made = made * scale + tl.load(shift_ptr + channels, mask=mask, other=0.0)
        made = activate(made, ACTIVATION).to(x.dtype)
        x = tl.where(inside, made, 0.0) if inside is not None else made
    return x


@triton.jit
def finished(
    acc,  # [BLOCK_M, BLOCK_N] float32
    rows, row_mask,  # output pixels [BLOCK_M]
    columns, column_mask,  # output channels [BLOCK_N]
    pixels,  # of an image
    scale_ptr, bias_ptr, gate_ptr, residual_ptr,
    stride_gn, stride_rm,
    act_from,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """act((acc * scale + bias) * gate + residual); channels below act_from get no activation."""
    if scale_ptr is not None:
        acc = acc * tl.load(scale_ptr + columns, mask=column_mask, other=0.0)[None, :]
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + columns, mask=column_mask, other=0.0)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if gate_ptr is not None:
        image = (rows // pixels).to(tl.int64)
        gate = tl.load(gate_ptr + image[:, None] * stride_gn + columns[None, :], mask=mask, other=0.0)
        acc = acc * gate.to(tl.float32)
    if residual_ptr is not None:
        at = rows.to(tl.int64)[:, None] * stride_rm + columns[None, :]
        acc = acc + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != 0:
        acted = activate(acc, ACTIVATION)
        acc = tl.where(columns[None, :] >= act_from, acted, acc) if act_from is not None else acted
    return acc


@triton.jit
def swizzled(program, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Which tile a program makes: GROUP_M tiles of rows go through all columns before the next ones, so that
    both operands of neighbours are in L2."""
    in_group = GROUP_M * blocks_n
    group = program // in_group
    first = group * GROUP_M
    size = min(blocks_m - first, GROUP_M)
    within = program % in_group
    return first + within % size, within // size
