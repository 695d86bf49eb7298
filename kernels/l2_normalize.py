"""Vectors of length one, as embeddings are compared (Schroff et al., FaceNet, arXiv 1503.03832)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _dispatch, _native
from ._function import Function


def l2_normalize_ref(x: Tensor, *, eps: float = 1e-12) -> Tensor:
    """The formula in plain PyTorch: F.normalize over dimension 1. Any floating dtype, any device."""
    return _formula(x, eps)


def _formula(x, eps) -> Tensor:
    return F.normalize(x, p=2.0, dim=1, eps=eps)


def _prepare(x, *, eps=1e-12) -> tuple:
    op = "l2_normalize"
    _checks.tensor(op, "x", x)
    if x.dim() not in (2, 4) or 0 in x.shape[1:]:
        expected = "[N, C] or [N, C, H, W], only N may be 0"
        raise RuntimeError(f"{op}: x has sizes {_checks.sizes(x)}, expected {expected}")
    if not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps is {eps!r}, expected a number")
    if not eps >= 0:
        raise RuntimeError(f"{op}: eps is {eps!r}, expected 0 or more")
    return x, float(eps)


class _NativeL2Normalize(Function):
    """Native forward; with d = max(||x||, eps) and y = x / d,

    grad_x = grad / d - x (grad . x) / (d^2 ||x||), the second term only where ||x|| >= eps and not 0.
    """

    @staticmethod
    def forward(x, eps):
        return _call(x, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.eps = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        divisor = length.clamp_min(ctx.eps)
        moves = (length >= ctx.eps) & (length != 0)
        safe = torch.where(moves, length, torch.ones_like(length))
        along = (grad * x).sum(1, keepdim=True) / (safe * safe * safe)
        return grad / divisor - x * torch.where(moves, along, torch.zeros_like(along)), None


def _call(x, eps) -> Tensor:
    if x.dim() == 4:
        return torch.ops.fast_backbones.l2_normalize(x, eps)
    return torch.ops.fast_backbones.l2_normalize(x[:, :, None, None], eps)[:, :, 0, 0]


def _refuse(x, eps) -> str | None:
    return _native.refusal(x)


def _run(x, eps) -> Tensor:
    return _NativeL2Normalize.apply(x, eps) if _native.needs_grad(x) else _call(x, eps)


@_native.register_fake("l2_normalize")
def _fake(x, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_native.memory_format(x))


_OP = _dispatch.register(
    "l2_normalize",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(_formula),
)


def l2_normalize(x: Tensor, *, eps: float = 1e-12, backend: str | None = None) -> Tensor:
    """Divide every row, or every pixel of a map, by its length over the channels.

    y[n, c] = x[n, c] / max( sqrt( sum_i x[n, i]^2 ), eps )

    Args:
        x: [N, C] or [N, C, H, W], any floating dtype and layout.
        eps: no length is taken to be less: rows of zeros stay zeros.
        backend: None (the current one), "auto", "native" or "reference".
    Returns: the sizes of x.
    Raises: RuntimeError for sizes or a negative eps, or when a backend asked for by name refuses; TypeError
        for what is not a tensor or a number; ValueError for an unknown backend.

    Fast path: float32 on the CPU, lengths summed in float64. Derivatives are plain PyTorch.
    """
    if has_torch_function_variadic(x):
        return handle_torch_function(l2_normalize, (x,), x, eps=eps, backend=backend)
    return _dispatch.run(_OP, _prepare(x, eps=eps), backend)
