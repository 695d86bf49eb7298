"""The float64 truth that every result is compared with: plain modules, in double precision.

PyTorch has no float64 kernel for depthwise convolution: it convolves channel by channel, which takes 43 s for
a MobileNet on two images of 66 pixels. `float64` computes those convolutions tap by tap instead, over all
channels at once; everything else is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def float64(forward: Callable[[Tensor], Any], x: Tensor) -> Any:
    """`forward(x.double())` for a forward whose parameters are float64."""
    with depthwise_by_taps():
        return forward(x.double())


@contextmanager
def depthwise_by_taps() -> Iterator[None]:
    """F.conv2d with one float64 filter per channel is a sum over taps while this is open. Not thread-safe."""
    plain = F.conv2d

    def conv2d(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        channels = input.shape[1]
        depthwise = groups == channels == weight.shape[0] and groups > 1
        if not depthwise or input.dtype is not torch.float64 or isinstance(padding, str):
            return plain(input, weight, bias, stride, padding, dilation, groups)
        return sum_of_taps(input, weight, bias, pair(stride), pair(padding), pair(dilation))

    F.conv2d = conv2d
    try:
        yield
    finally:
        F.conv2d = plain


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def sum_of_taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """y[n, c, p, q] = bias[c] + sum_rs x[n, c, p*stride + r*dilation, q*stride + s*dilation] w[c, 0, r, s].

    x [N, C, H, W] is padded with zeros first; w, the weight, is [C, 1, R, S].
    """
    x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]])
    rows, columns = weight.shape[2:]
    height = (x.shape[2] - dilation[0] * (rows - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (columns - 1) - 1) // stride[1] + 1
    total = x.new_zeros(x.shape[0], x.shape[1], height, width)
    for r in range(rows):
        for s in range(columns):
            top, left = r * dilation[0], s * dilation[1]
            below, right = top + (height - 1) * stride[0] + 1, left + (width - 1) * stride[1] + 1
            seen = x[:, :, top : below : stride[0], left : right : stride[1]]
            total.addcmul_(seen, weight[:, :1, r, s].unsqueeze(-1))
    return total if bias is None else total + bias.view(-1, 1, 1)
