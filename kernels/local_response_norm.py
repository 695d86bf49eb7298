"""Normalisation by the energy of neighbouring channels (Krizhevsky et al., 2012: AlexNet; GoogLeNet)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _dispatch, _native
from ._function import Function

_LARGEST_WINDOW = 64
_BETAS = (0.5, 0.75, 1.0)  # powers that are square roots


def local_response_norm_ref(
    x: Tensor, size: int, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """The formula in plain PyTorch: F.local_response_norm. Any floating dtype, any device."""
    return _formula(x, size, alpha, beta, k)


def _formula(x, size, alpha, beta, k) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def _prepare(x, size, *, alpha=1e-4, beta=0.75, k=1.0) -> tuple:
    op = "local_response_norm"
    _checks.tensor(op, "x", x)
    if x.dim() == 3:
        x = x.unsqueeze(0)
    _checks.image(op, x)
    if not hasattr(size, "__index__"):
        raise TypeError(f"{op}: size is {size!r}, expected an integer")
    if int(size) < 1:
        raise RuntimeError(f"{op}: size is {size!r}, expected at least 1")
    return x, int(size), float(alpha), float(beta), float(k)


def _mean_over_channels(t: Tensor, before: int, after: int) -> Tensor:
    """The mean over channels c - before to c + after; channels that do not exist count as zero."""
    padded = F.pad(t.unsqueeze(1), (0, 0, 0, 0, before, after))
    return F.avg_pool3d(padded, (before + after + 1, 1, 1), stride=1).squeeze(1)


class _NativeLocalResponseNorm(Function):
    """Native forward; with d = k + alpha mean(x^2) and y = x d^-beta,

    grad_x = grad d^-beta - 2 alpha beta x mean'(grad x d^(-beta - 1)), mean' over the mirrored window.
    """

    @staticmethod
    def forward(x, size, alpha, beta, k):
        return torch.ops.fast_backbones.local_response_norm(x, size, alpha, beta, k)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.options = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.options
        before, after = size // 2, (size - 1) // 2
        base = k + alpha * _mean_over_channels(x * x, before, after)
        around = _mean_over_channels(grad * x * base ** (-beta - 1), after, before)
        return grad * base**-beta - 2 * alpha * beta * x * around, None, None, None, None


def _refuse(x, size, alpha, beta, k) -> str | None:
    if reason := _native.refusal(x):
        return reason
    if size > _LARGEST_WINDOW:
        return f"size {size}: native handles 1 to {_LARGEST_WINDOW}"
    if beta not in _BETAS:
        return f"beta {beta}: native handles {', '.join(map(str, _BETAS))}"
    return None


def _run(x, *options) -> Tensor:
    if _native.needs_grad(x):
        return _NativeLocalResponseNorm.apply(x, *options)
    return torch.ops.fast_backbones.local_response_norm(x, *options)


@_native.register_fake("local_response_norm")
def _fake(x, size, alpha, beta, k):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_native.memory_format(x))


_OP = _dispatch.register(
    "local_response_norm",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(_formula),
)


def local_response_norm(
    x: Tensor,
    size: int,
    *,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Divide every value by a power of the mean square of the channels around it.

    y[n, c] = x[n, c] / (k + alpha/size * sum_i x[n, i]^2)^beta,  i from c - size//2 to c + (size - 1)//2

    Args:
        x: [N, C, H, W] or [C, H, W], any floating dtype and layout.
        size: channels in the window; those that do not exist count as zero. alpha, beta, k: numbers.
        backend: None (the current one), "auto", "native" or "reference".
    Returns: the sizes of x.
    Raises: RuntimeError for sizes, or when a backend asked for by name refuses.

    Fast path: float32 on the CPU, size up to 64, beta 0.5, 0.75 or 1, which are square roots. Derivatives are
    plain PyTorch.
    """
    if has_torch_function_variadic(x):
        return handle_torch_function(
            local_response_norm, (x,), x, size, alpha=alpha, beta=beta, k=k, backend=backend
        )
    y = _dispatch.run(_OP, _prepare(x, size, alpha=alpha, beta=beta, k=k), backend)
    return y.squeeze(0) if x.dim() == 3 else y
