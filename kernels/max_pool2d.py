"""Maximum over a sliding window."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _dispatch, _native, _pool
from ._function import Function

_NATIVE_TAPS = 64  # of a window


def max_pool2d_ref(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """The formula in plain PyTorch: F.max_pool2d. Any dtype, any device."""
    return _formula(x, kernel_size, kernel_size if stride is None else stride, padding, ceil_mode)


def _formula(x, kernel_size, stride, padding, ceil_mode) -> Tensor:
    return F.max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def _prepare(x, kernel_size, *, stride=None, padding=0, ceil_mode=False) -> tuple:
    return *_pool.prepare("max_pool2d", x, kernel_size, stride, padding, ceil_mode), bool(ceil_mode)


class _NativeMaxPool(Function):
    """y, and a byte for each of its elements: which tap of the window was the largest. Keeps those alone."""

    @staticmethod
    def forward(x, ghost, kernel_size, stride, padding, ceil_mode):
        return torch.ops.fast_backbones.max_pool2d_taps(x, kernel_size, stride, padding, ceil_mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ghost, *ctx.window, ctx.ceil_mode = inputs
        ctx.sizes = x.shape
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], ghost)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        taps, ghost = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants derivatives of this
            x = _native.absent(grad, ctx.sizes)
            window = *ctx.window, (1, 1), ctx.ceil_mode
            indices = _indices(taps, ctx.sizes, *ctx.window)
            dx = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *window, indices) + ghost.sum()
        else:
            backward = torch.ops.fast_backbones.max_pool2d_backward
            dx = backward(grad, taps, *ctx.sizes[2:], *ctx.window)
        return dx, None, None, None, None, None


def _indices(taps: Tensor, sizes: torch.Size, kernel_size, stride, padding) -> Tensor:
    """PyTorch's indices [N, C, P, Q] into an image, from taps [N, P, Q, C]."""
    taps = taps.permute(0, 3, 1, 2).long()
    p, q = (torch.arange(taps.shape[2 + i]) * stride[i] - padding[i] for i in range(2))
    rows = taps // kernel_size[1] + p[:, None]
    return rows * sizes[3] + taps % kernel_size[1] + q


def _refuse(x, kernel_size, stride, padding, ceil_mode) -> str | None:
    if reason := _native.refusal(x):
        return reason
    if kernel_size[0] * kernel_size[1] > _NATIVE_TAPS:
        return f"window {kernel_size[0]}x{kernel_size[1]}: native handles up to {_NATIVE_TAPS} taps"
    return None


def _run(x, kernel_size, stride, padding, ceil_mode) -> Tensor:
    if _native.needs_grad(x):
        return _NativeMaxPool.apply(x, _pool.ghost(x), kernel_size, stride, padding, ceil_mode)[0]
    return torch.ops.fast_backbones.max_pool2d(x, kernel_size, stride, padding, ceil_mode)


@_native.register_fake("max_pool2d")
def _fake(x, kernel_size, stride, padding, ceil_mode):
    return _pool.fake("max_pool2d", x, kernel_size, stride, padding, ceil_mode)


@_native.register_fake("max_pool2d_taps")
def _fake_taps(x, kernel_size, stride, padding, ceil_mode):
    y = _fake(x, kernel_size, stride, padding, ceil_mode)
    n, c, p, q = y.shape
    return y, x.new_empty((n, p, q, c), dtype=torch.uint8)


@_native.register_fake("max_pool2d_backward")
def _fake_backward(grad, taps, height, width, kernel_size, stride, padding):
    sizes = (*grad.shape[:2], height, width)
    return grad.new_empty(sizes).to(memory_format=_native.memory_format(grad))


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

    Fast path: float32 on the CPU, windows of up to 64 elements. Kept for backward: a byte for each element of
    y. Of equal values the first gets the gradient, as in PyTorch. Second derivatives come from the formula.
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
