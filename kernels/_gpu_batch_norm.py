"""batch_norm on a GPU: the calls of kernels/_triton/batch_norm.py, and their derivative.

Kept for backward: x, the moments, scale and bias; with a residual and an activation also a bit for each
element that the activation passed, else that is seen from x once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _gpu_training as gpu
from ._activation import unpacked


def refuse(x, weight, bias, running_mean, running_var, residual, *_) -> str | None:
    """What the kernels say to the prepared arguments of batch_norm; None when they take them."""
    if x.dim() != 4:
        return f"{x.dim()} dimensions: triton handles [N, C, H, W]"
    if x.numel() == 0:
        return "an empty map: triton handles maps that are not empty"
    if x.numel() // x.shape[1] >= 2**31:
        return f"{x.numel() // x.shape[1]} pixels: triton counts fewer than 2**31"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype}, x {x.dtype}: triton adds them in one type"
    return gpu.refusal(x, weight, bias, running_mean, running_var, residual)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor | None,
    var: Tensor | None, eps: float, activation: str, needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, mean, var, scale and the mask, which is empty where nobody needs it. mean, var: given moments."""
    from ._triton import batch_norm, masks

    rows, given = gpu.nhwc(x), mean is not None
    n, c, h, w = x.shape
    pixels = n * h * w
    channels = {"dtype": torch.float32, "device": x.device}
    scale, cut = torch.empty(c, **channels), batch_norm.row_cut(x)
    if given:
        mean, var = (t.to(torch.float32, copy=True) for t in (mean, var))
        parts, launches = None, []
    else:
        mean, var = torch.empty(c, **channels), torch.empty(c, **channels)
        parts = torch.empty(cut.count, 2, c, dtype=torch.float64, device=x.device)
        launches = [batch_norm.moments(rows, parts, cut)]
    launches.append(batch_norm.statistics(parts, pixels, cut.rows, eps, weight, mean, var, scale))
    has_mask = needs_mask and residual is not None and activation != "none"
    mask = torch.empty(pixels if has_mask else 0, masks.mask_bytes(c), dtype=torch.uint8, device=x.device)
    y, number = gpu.like(x), gpu.NUMBERS[activation]
    shortcut = None if residual is None else gpu.nhwc(residual)
    bits = mask if has_mask else None
    launches.append(batch_norm.apply(rows, y, bits, mean, scale, bias, shortcut, number))
    gpu.put(x, *launches)
    return gpu.in_layout_of(y, x), mean, var, scale, mask


def again(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act((x - mean) * scale + bias), with the bits that `forward` gave."""
    from ._triton import batch_norm

    y, rows = gpu.like(x), gpu.nhwc(x)
    gpu.put(x, batch_norm.apply(rows, y, None, mean, scale, bias, None, gpu.NUMBERS[activation]))
    return gpu.in_layout_of(y, x)


def backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    var: Tensor, scale: Tensor, eps: float, activation: str, frozen: bool, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight, bias and residual; None where not needed. needs: of x, of weight or bias, of
    residual. Without an activation that of the residual is grad."""
    from ._triton import batch_norm

    needs_x, needs_affine, needs_residual = needs
    pixels, c = x.numel() // x.shape[1], x.shape[1]
    number = gpu.NUMBERS[activation]
    rows, g = gpu.nhwc(x), gpu.nhwc(grad)
    seen = (g, rows, mask, mean, scale, bias)
    dweight = dbias = level = slope = None
    launches: list[Any] = []
    if needs_affine or (needs_x and not frozen):
        cut = batch_norm.row_cut(x)
        parts = torch.empty(cut.count, 2, c, dtype=torch.float64, device=x.device)
        kinds = (mean if weight is None else weight).dtype, (mean if bias is None else bias).dtype
        dweight, dbias = (torch.empty(c, dtype=kind, device=x.device) for kind in kinds)
        level, slope = torch.empty_like(mean), torch.empty_like(mean)
        launches.append(batch_norm.sums(*seen, parts, cut, number))
        launches.append(batch_norm.gradients(parts, pixels, eps, var, dweight, dbias, level, slope))
    dx = gpu.like(x) if needs_x else None
    dresidual = gpu.like(x) if needs_residual and activation != "none" else None
    if dx is not None or dresidual is not None:
        factors = (None, None) if frozen else (level, slope)
        launches.append(batch_norm.input_gradient(*seen, *factors, dx, dresidual, number))
    gpu.put(x, *launches)
    if needs_residual and activation == "none":
        dresidual = grad
    return dx, dweight, dbias, dresidual


def before_activation(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What the activation sees without a residual, float32, in plain PyTorch."""
    v = (x.float() - mean[:, None, None]) * scale[:, None, None]
    return v if bias is None else v + bias.float()[:, None, None]


def bits(mask: Tensor | None, x: Tensor, mean, scale, bias, activation: str) -> Tensor | None:
    """Where the activation passed, as booleans like x; None without an activation."""
    if activation == "none":
        return None
    if mask is not None:
        return unpacked(mask, x)
    v = before_activation(x, mean, scale, bias).detach()
    passed = ~(v <= 0)
    return passed & ~(v >= 6) if activation == "relu6" else passed
