"""The ways to compute a step on a GPU, from which engine/gpu_choices.py takes one.

    triton     kernels/_triton, for everything that a plan on a GPU has; a tile by rule, or one of `tiles`
    cuda       kernels/_cuda: depthwise, and grouped 3x3 in 16 bits
    library    PyTorch's convolution (cuDNN) or matrix product (cuBLAS), then one pass of affine for what it
               cannot do: scale, bias, gate, residual, activation, slices

    ways(kind, params, dtype, maps)              names, what is usual first
    tiles(way, kind, params, dtype)              other tiles than the rule's own, by name
    packed(way, kind, params, weight)            filters [K, C/G, R, S] as that way reads them
    launch(way, kind, params, operands, ...)     what to put on the stream
    compile_all(launches)                        before the first of them is called

All tiles of a way give the same bits: they cut the pixels and the filters and leave the order of a sum.
Ways may differ in the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ext
from ._cuda import depthwise_conv2d as cuda_depthwise
from ._cuda import grouped_conv2d as cuda_grouped

Params = Mapping[str, Any]
Operands = Mapping[str, Tensor | None]

TRITON, CUDA, LIBRARY = "triton", "cuda", "library"
PRODUCTS = ("conv2d", "grouped_conv2d", "depthwise_conv2d", "linear")
TANH = 4  # the last activation of csrc/cuda


def ways(kind: str, params: Params, dtype: torch.dtype, maps: Sequence[Tensor] = ()) -> list[str]:
    """Those that take such a step on this machine; never none for a step of a plan.

    maps: where it reads and writes, if that is known; some kernels want pixels on multiples of 16 bytes."""
    found = [TRITON]
    if not cuda_refusal(kind, params, dtype, maps) and _ext.cuda():
        # Sums over channels are Triton's until somebody has measured; depthwise has none, and row reuse wins.
        found.insert(0 if kind == "depthwise_conv2d" else 1, CUDA)
    return found if library_refusal(kind, params) else [*found, LIBRARY]


def cuda_refusal(kind: str, params: Params, dtype: torch.dtype, maps: Sequence[Tensor] = ()) -> str:
    """Why csrc/cuda does not take such a step; empty when it does."""
    if max(params.get("activation", 0), params.get("pre_activation", 0)) > TANH:
        return "no CUDA C++ kernel applies this activation"
    if kind == "depthwise_conv2d":
        return cuda_depthwise.refusal(params)
    if kind == "grouped_conv2d":
        return cuda_grouped.refusal(params, dtype, maps)
    return f"no CUDA C++ kernel for {kind}"


def library_refusal(kind: str, params: Params) -> str:
    if kind not in PRODUCTS:
        return f"{kind} is no convolution"
    if params.get("pre") or params.get("pre_activation"):
        return "something stands before the product"
    if "pad_bottom" in params or "pad_right" in params:
        return "a border that differs from side to side"
    return "an activation from some channel on" if params.get("act_from") else ""


def tiles(way: str, kind: str, params: Params, dtype: torch.dtype) -> list[str]:
    """Besides the rule's own: names for `launch`."""
    from ._triton import ops

    return list(ops.tiles(kind, params, dtype)) if way == TRITON else []


def packed(way: str, kind: str, params: Params, weight: Tensor) -> Tensor:
    from ._triton import ops

    if way == LIBRARY:
        return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
    if way == CUDA and kind == "grouped_conv2d":
        return cuda_grouped.pack(weight, params["groups"])
    return ops.packed(kind, params, weight)


def launch(
    way: str, kind: str, params: Params, operands: Operands, precision: str = "ieee", tile: str = ""
) -> Any:
    """precision: of float32 products, "ieee" or "tf32". tile: one of `tiles`, or "" for the rule's own."""
    from ._triton import ops

    if way == LIBRARY:
        return library(kind, params, operands)
    if way == TRITON:
        return ops.launch(kind, params, operands, precision, tile)
    shared = {"stride": ops.pair(params, "stride", 1), "padding": ops.pair(params, "pad", 0)}
    o = {name: operands.get(name) for name in ("scale", "bias")}
    end = {**shared, **o, "activation": params.get("activation", 0)}
    x, weight, y = (operands[name] for name in ("x", "weight", "y"))
    assert x is not None and weight is not None and y is not None
    more = [name for name in ("gate", "residual", "pre_scale") if operands.get(name) is not None]
    if more:
        raise ValueError(f"{kind} in CUDA C++ takes no {', '.join(more)}")
    if kind == "grouped_conv2d":
        return cuda_grouped.launch(x, weight, y, groups=params["groups"], **end)
    return cuda_depthwise.launch(
        x, weight, y, kernel=(params["r"], params["s"]), dilation=ops.pair(params, "dilation", 1),
        pre_activation=params.get("pre_activation", 0), **end,
    )  # fmt: skip


def compile_all(launches: Iterable[Any]) -> None:
    """Triton's, side by side on all cores; the others are compiled, or compile when they are called."""
    from ._triton.launch import compile_all

    compile_all(launches)


@dataclass(frozen=True)
class Library:
    """PyTorch's call for the sums, and one pass from there into y.

    cuDNN's calls with bias and ReLU inside are of no use here: PyTorch's return memory of their own, and the
    copy into the arena is the pass that they would save."""

    name: str
    sums: Callable[[], Tensor]
    finish: Callable[[Tensor], Any]

    def __call__(self) -> None:
        self.finish(self.sums())()


def library(kind: str, params: Params, operands: Operands) -> Library:
    """The product into memory of its own; then scale, bias, gate, residual, activation in one pass into y.
    Its precision is what PyTorch's switches say, as a plan's is."""
    from ._triton import affine, ops

    x, weight, y = (operands[name] for name in ("x", "weight", "y"))
    assert x is not None and weight is not None and y is not None
    end = {name: operands.get(name) for name in ("scale", "gate", "residual")}
    stride, padding = ops.pair(params, "stride", 1), ops.pair(params, "pad", 0)
    dilation, groups = ops.pair(params, "dilation", 1), params.get("groups", 1)
    filters = weight if weight.dim() == y.dim() else weight.flatten(1)
    if y.dim() == 4 and filters.dim() == 2:
        filters = filters[..., None, None]

    def convolved() -> Tensor:
        found = F.conv2d(x, filters, None, stride, padding, dilation, groups)
        return found.contiguous(memory_format=torch.channels_last)

    def finish(sums: Tensor) -> Any:
        return affine.launch(
            sums, y, shift=operands.get("bias"), activation=params.get("activation", 0), **end
        )

    return Library("library", convolved if y.dim() == 4 else lambda: F.linear(x, filters), finish)
