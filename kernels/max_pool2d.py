"""Maximum over a sliding window."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _dispatch, _native, _pool

_NATIVE_TAPS = 64  # of a window


def max_pool2d_ref(x, kernel_size, *, stride=None, padding=0, ceil_mode=False) -> Tensor:
    """The formula in plain PyTorch: F.max_pool2d. Any dtype, any device."""
    return _formula(x, kernel_size, kernel_size if stride is None else stride, padding, ceil_mode)


def _formula(x, kernel_size, stride, padding, ceil_mode) -> Tensor:
    return F.max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def _prepare(x, kernel_size, *, stride=None, padding=0, ceil_mode=False) -> tuple:
    return *_pool.prepare("max_pool2d", x, kernel_size, stride, padding, ceil_mode), bool(ceil_mode)


class _NativeMaxPool(torch.autograd.Function):
    """The native forward keeps no indices; backward finds them again with PyTorch's own pooling."""

    @staticmethod
    def forward(x, kernel_size, stride, padding, ceil_mode):
        return torch.ops.fast_backbones.max_pool2d(x, kernel_size, stride, padding, ceil_mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.window = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        kernel_size, stride, padding, ceil_mode = ctx.window
        _, indices = torch.ops.aten.max_pool2d_with_indices(
            x, kernel_size, stride, padding, (1, 1), ceil_mode
        )
        grad_x = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, x, kernel_size, stride, padding, (1, 1), ceil_mode, indices
        )
        return grad_x, None, None, None, None


def _refuse(x, kernel_size, stride, padding, ceil_mode) -> str | None:
    if reason := _native.refusal(x):
        return reason
    if kernel_size[0] * kernel_size[1] > _NATIVE_TAPS:
        return f"window {kernel_size[0]}x{kernel_size[1]}: native handles up to {_NATIVE_TAPS} taps"
    return None


def _run(x, kernel_size, stride, padding, ceil_mode) -> Tensor:
    if _native.needs_grad(x):
        return _NativeMaxPool.apply(x, kernel_size, stride, padding, ceil_mode)
    return torch.ops.fast_backbones.max_pool2d(x, kernel_size, stride, padding, ceil_mode)


@_native.register_fake("max_pool2d")
def _fake(x, kernel_size, stride, padding, ceil_mode):
    return _pool.fake("max_pool2d", x, kernel_size, stride, padding, ceil_mode)


_OP = _dispatch.register(
    "max_pool2d",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(_formula),
)


def max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The largest value of every window; a NaN in the window wins, padding never does.

    y[n, c, p, q] = max_rs x[n, c, p*stride + r - padding, q*stride + s - padding]

    Args:
        x: [N, C, H, W] or [C, H, W], any dtype and layout that PyTorch pools; the output keeps its layout.
        kernel_size, stride, padding: an integer or two; stride None means kernel_size; padding is at most
            half of kernel_size.
        ceil_mode: round the output size up; every window still starts inside the image or its left padding.
        backend: None (the current one), "auto", "native" or "reference".
    Returns: [N, C, P, Q], P = (H + 2*padding - R) // stride + 1, or rounded up.
    Raises: RuntimeError for sizes that do not fit together, or when a backend asked for by name refuses.

    Fast path: float32 on the CPU, windows of up to 64 elements. Derivatives come from PyTorch's own pooling.
    """
    if has_torch_function_variadic(x):
        return handle_torch_function(
            max_pool2d,
            (x,),
            x,
            kernel_size,
            stride=stride,
            padding=padding,
            ceil_mode=ceil_mode,
            backend=backend,
        )
    args = _prepare(x, kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode)
    y = _dispatch.run(_OP, args, backend)
    return y.squeeze(0) if x.dim() == 3 else y
