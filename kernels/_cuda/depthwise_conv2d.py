"""Depthwise convolution: csrc/cuda/depthwise_conv2d.cu has the loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .launch import Launch, conv_launch

SIGMOID = 3  # the first activation that does not leave zero where it is


def refusal(params: Mapping[str, Any]) -> str:
    """Why the kernel does not take such a layer; empty when it does."""
    if params.get("pre") or params.get("gated") or params.get("residual"):
        return "only scale, bias and activations"
    return "zero must stay zero before the sums" if params.get("pre_activation", 0) >= SIGMOID else ""


def pack(weight: Tensor) -> Tensor:
    """Filters [C, 1, R, S] as [R*S, C]."""
    return weight.flatten(1).t().contiguous()


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    pre_activation: int = 0,
    activation: int = 0,
) -> Launch:
    """x [N, C, H, W] and y [N, C, P, Q] lie as NHWC; weight [R*S, C] from `pack`."""
    return conv_launch(
        "depthwise_conv2d", x, weight, y, [pre_activation], kernel=kernel, stride=stride, padding=padding,
        dilation=dilation, scale=scale, bias=bias, activation=activation,
    )  # fmt: skip
