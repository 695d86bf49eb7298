"""What pooling ops share: the checks of their windows, and what their outputs look like."""

import torch
from torch import Tensor

from . import _checks, _native


def prepare(op: str, x: Tensor, kernel_size, stride, padding, ceil_mode) -> tuple:
    """(x as [N, C, H, W], kernel_size, stride and padding as pairs); RuntimeError with a sentence."""
    _checks.tensor(op, "x", x)
    if x.dim() == 3:
        x = x.unsqueeze(0)
    _checks.image(op, x)
    kernel_size = _checks.pair(op, "kernel_size", kernel_size, 1)
    stride = kernel_size if stride is None else _checks.pair(op, "stride", stride, 1)
    padding = _checks.pair(op, "padding", padding, 0)
    if 2 * padding[0] > kernel_size[0] or 2 * padding[1] > kernel_size[1]:
        raise RuntimeError(f"{op}: padding is {padding}, expected at most half of kernel_size, {kernel_size}")
    output_sizes(op, x, kernel_size, stride, padding, ceil_mode)
    return x, kernel_size, stride, padding


def output_sizes(op: str, x: Tensor, kernel_size, stride, padding, ceil_mode) -> tuple[int, int]:
    p, q = (
        _checks.output_size(op, axis, x.shape[2 + i], kernel_size[i], stride[i], padding[i], 1, ceil_mode)
        for i, axis in enumerate(("height", "width"))
    )
    return p, q


def fake(op: str, x: Tensor, kernel_size, stride, padding, ceil_mode) -> Tensor:
    """The output without its values: sizes, and x's layout."""
    p, q = output_sizes(op, x, kernel_size, stride, padding, ceil_mode)
    layout = _native.memory_format(x)
    return torch.empty((x.shape[0], x.shape[1], p, q), dtype=x.dtype, device=x.device, memory_format=layout)


def ghost(x: Tensor) -> Tensor:
    """An empty tensor that hangs on the graph of x, without its memory. Second derivatives of a pool with
    respect to x are zeros, as PyTorch's, and not missing: `gradient + ghost.sum()`."""
    return x[:0].clone()
