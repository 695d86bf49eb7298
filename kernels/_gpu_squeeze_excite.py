"""squeeze_excite on a GPU: passes over the maps by kernels/_triton/squeeze_excite.py, the small layers by
PyTorch's matrix products in float32, and their derivative.

Under autocast, and for 16-bit maps, means, layers and gate are float32: their weights are widened, nothing is
rounded between them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _gpu_training as gpu
from ._activation import unpacked

Small = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def refuse(x, weight1, bias1, weight2, bias2, residual, activation, gate) -> str | None:
    """What the kernels say to the prepared arguments of squeeze_excite; None when they take them."""
    if gate != "sigmoid":
        return f"gate {gate}: triton handles sigmoid"
    if x.numel() == 0:
        return "an empty map: triton handles maps that are not empty"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype}, x {x.dtype}: triton adds them in one type"
    return gpu.refusal(x, weight1, bias1, weight2, bias2, residual)


def wide(*small: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.float() for t in small)


def layers(means: Tensor, weight1, bias1, weight2, bias2) -> tuple[Tensor, Tensor]:
    """Hidden layer and gate from the means, float32."""
    weight1, bias1, weight2, bias2 = wide(weight1, bias1, weight2, bias2)
    with torch.autocast("cpu" if means.is_cpu else "cuda", enabled=False):
        hidden = F.relu(F.linear(means, weight1, bias1))
        return hidden, torch.sigmoid(F.linear(hidden, weight2, bias2))


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    residual: Tensor | None, activation: str, needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, means, hidden layer, gate, and the mask, which is empty where nobody needs it."""
    from ._triton import masks, squeeze_excite

    n, c, h, w = x.shape
    rows = gpu.nhwc(x)
    sums = torch.empty(n, squeeze_excite.image_blocks(x), c, dtype=torch.float32, device=x.device)
    gpu.put(x, squeeze_excite.image_sums(rows, sums))
    means = sums.sum(1) / (h * w)
    hidden, gate = layers(means, weight1, bias1, weight2, bias2)
    has_mask = needs_mask and residual is not None and activation != "none"
    sizes = n * h * w if has_mask else 0, masks.mask_bytes(c)
    mask, y = torch.empty(sizes, dtype=torch.uint8, device=x.device), gpu.like(x)
    shortcut = None if residual is None else gpu.nhwc(residual)
    bits, number = mask if has_mask else None, gpu.NUMBERS[activation]
    gpu.put(x, squeeze_excite.apply(rows, gate, shortcut, y, bits, number))
    return gpu.in_layout_of(y, x), means, hidden, gate, mask


def backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, small: Small, means: Tensor, hidden: Tensor, gate: Tensor,
    activation: str, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, the four of the layers, and residual; None where not needed. Without an activation that
    of the residual is grad."""
    from ._triton import squeeze_excite

    needs_x, *needs_small, needs_residual = needs
    n, c, h, w = x.shape
    rows, g, number = gpu.nhwc(x), gpu.nhwc(grad), gpu.NUMBERS[activation]
    share, found = gate, [None] * 4
    if needs_x or any(needs_small):
        sums = torch.empty(n, squeeze_excite.image_blocks(x), c, dtype=torch.float32, device=x.device)
        how: dict[str, Any] = {"grad": g, "mask": mask, "gate": gate, "activation": number}
        gpu.put(x, squeeze_excite.image_sums(rows, sums, **how))
        weight1, _, weight2, _ = wide(*small)
        with torch.autocast("cpu" if x.is_cpu else "cuda", enabled=False):
            grad2 = sums.sum(1) * gate * (1 - gate)
            grad1 = torch.ops.aten.threshold_backward(grad2 @ weight2, hidden, 0)
            share = (grad1 @ weight1) / (h * w)
            found = [grad1.t() @ means, grad1.sum(0), grad2.t() @ hidden, grad2.sum(0)]
        found = [None if t is None else gradient.to(t.dtype) for gradient, t in zip(found, small)]
    dx = gpu.like(x) if needs_x else None
    dresidual = gpu.like(x) if needs_residual and activation != "none" else None
    if dx is not None or dresidual is not None:
        gpu.put(x, squeeze_excite.input_gradient(g, rows, mask, gate, share, dx, dresidual, number))
    if needs_residual and activation == "none":
        dresidual = grad
    return dx, *found, dresidual


def passed(mask: Tensor | None, x: Tensor, gate: Tensor, activation: str) -> Tensor | None:
    """Where the activation handed on, as booleans like x; None without an activation."""
    if activation == "none":
        return None
    if mask is not None:
        return unpacked(mask, x)
    v = x.detach().float() * gate[:, :, None, None]
    found = ~(v <= 0)
    return found & ~(v >= 6) if activation == "relu6" else found
