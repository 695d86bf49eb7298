"""The mean of every channel (Lin et al., Network in Network, arXiv 1312.4400)."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _dispatch, _native
from ._function import Function


def global_avg_pool_ref(x: Tensor) -> Tensor:
    """The formula in plain PyTorch. Any floating dtype, any device."""
    return x.mean((-2, -1))


def _prepare(x) -> tuple:
    _checks.tensor("global_avg_pool", "x", x)
    if x.dim() == 3:
        x = x.unsqueeze(0)
    _checks.image("global_avg_pool", x)
    return (x,)


class _NativeGlobalAvgPool(Function):
    """Native forward; every pixel has the same share of the gradient."""

    @staticmethod
    def forward(x):
        return torch.ops.fast_backbones.global_avg_pool(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx, grad):
        return grad[:, :, None, None].expand(ctx.shape) / (ctx.shape[2] * ctx.shape[3])


def _refuse(x) -> str | None:
    return _native.refusal(x)


def _run(x) -> Tensor:
    if _native.needs_grad(x):
        return _NativeGlobalAvgPool.apply(x)
    return torch.ops.fast_backbones.global_avg_pool(x)


@_native.register_fake("global_avg_pool")
def _fake(x):
    return torch.empty((x.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)


_OP = _dispatch.register(
    "global_avg_pool",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(global_avg_pool_ref),
)


def global_avg_pool(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The mean over all pixels of each channel.

    y[n, c] = sum_hw x[n, c, h, w] / (H W)

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout.
        backend: None (the current one), "auto", "native" or "reference".
    Returns: [N, C] or [C], contiguous.
    Raises: RuntimeError for sizes, or when a backend asked for by name refuses.

    Fast path: float32 on the CPU. The order of summation differs from PyTorch's. Derivatives come from the
    formula.
    """
    if has_torch_function_variadic(x):
        return handle_torch_function(global_avg_pool, (x,), x, backend=backend)
    y = _dispatch.run(_OP, _prepare(x), backend)
    return y.squeeze(0) if x.dim() == 3 else y
