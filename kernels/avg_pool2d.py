"""Mean over a sliding window."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _dispatch, _native, _pool, memory
from ._function import Function


def avg_pool2d_ref(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The formula in plain PyTorch: F.avg_pool2d. Any floating dtype, any device."""
    stride = kernel_size if stride is None else stride
    return _formula(x, kernel_size, stride, padding, ceil_mode, count_include_pad)


def _formula(x, kernel_size, stride, padding, ceil_mode, count_include_pad) -> Tensor:
    return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad)


def _prepare(x, kernel_size, *, stride=None, padding=0, ceil_mode=False, count_include_pad=True) -> tuple:
    window = _pool.prepare("avg_pool2d", x, kernel_size, stride, padding, ceil_mode)
    return *window, bool(ceil_mode), bool(count_include_pad)


class _NativeAvgPool(Function):
    """Native forward. Keeps no map. Backward writes windows that lie side by side, the rest is PyTorch's."""

    @staticmethod
    def forward(x, ghost, kernel_size, stride, padding, ceil_mode, count_include_pad):
        op = torch.ops.fast_backbones.avg_pool2d
        return op(x, kernel_size, stride, padding, ceil_mode, count_include_pad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ghost, *ctx.window = inputs
        ctx.save_for_backward(ghost)
        ctx.sizes, ctx.layout = x.shape, _native.memory_format(x)

    @staticmethod
    def backward(ctx, grad):
        kernel_size, stride, padding, *_ = ctx.window
        (p, q), (r, s) = grad.shape[2:], kernel_size
        side_by_side = stride == kernel_size and padding == (0, 0) and ctx.sizes[2:] == (p * r, q * s)
        plain = is_compiling() or torch.is_grad_enabled() or _native.refusal(grad) or grad.numel() == 0
        fast = ctx.layout is torch.channels_last and not plain and not _native.batched(grad)
        if side_by_side and fast:
            dx = memory.empty_map(_native.absent(grad, ctx.sizes), ctx.sizes[1])
            windows = dx.view(*ctx.sizes[:2], p, r, q, s)
            windows.copy_((grad / (r * s))[:, :, :, None, :, None])
        else:
            like_x = torch.empty(
                ctx.sizes, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout
            )  # never touched: the formula looks at its sizes and layout
            dx = torch.ops.aten.avg_pool2d_backward(grad, like_x, *ctx.window, None)
            if torch.is_grad_enabled():
                dx = dx + ctx.saved_tensors[0].sum()
        return dx, None, None, None, None, None, None


def _refuse(x, kernel_size, stride, padding, ceil_mode, count_include_pad) -> str | None:
    return _native.refusal(x)


def _run(x, *window) -> Tensor:
    if _native.needs_grad(x):
        return _NativeAvgPool.apply(x, _pool.ghost(x), *window)
    return torch.ops.fast_backbones.avg_pool2d(x, *window)


@_native.register_fake("avg_pool2d")
def _fake(x, kernel_size, stride, padding, ceil_mode, count_include_pad):
    return _pool.fake("avg_pool2d", x, kernel_size, stride, padding, ceil_mode)


_OP = _dispatch.register(
    "avg_pool2d",
    _prepare,
    _dispatch.Candidate("native", "native", _refuse, _run),
    _dispatch.reference(_formula),
)


def avg_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The mean of every window.

    y[n, c, p, q] = sum_rs x[n, c, p*stride + r - padding, q*stride + s - padding] / count

    count is the part of the window inside the padded image, or inside the image without count_include_pad.

    Args:
        x: [N, C, H, W] or [C, H, W], any dtype and layout that PyTorch pools; the output keeps its layout.
        kernel_size, stride, padding: an integer or two; stride None means kernel_size; padding is at most
            half of kernel_size.
        ceil_mode: round the output size up; every window still starts inside the image or its left padding.
        count_include_pad: whether padding counts as pixels that are zero.
        backend: None (the current one), "auto", "native" or "reference".
    Returns: [N, C, P, Q], P = (H + 2*padding - R) // stride + 1, or rounded up.
    Raises: RuntimeError for sizes that do not fit together, or when a backend asked for by name refuses.

    Fast path: float32 on the CPU. Columns of a window are summed first, which differs from PyTorch's order.
    Derivatives come from PyTorch's own pooling.
    """
    options = {
        "stride": stride,
        "padding": padding,
        "ceil_mode": ceil_mode,
        "count_include_pad": count_include_pad,
    }
    if has_torch_function_variadic(x):
        return handle_torch_function(avg_pool2d, (x,), x, kernel_size, **options, backend=backend)
    y = _dispatch.run(_OP, _prepare(x, kernel_size, **options), backend)
    return y.squeeze(0) if x.dim() == 3 else y
