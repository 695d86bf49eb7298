"""Strides: what an input is copied to, when its own show in the result, what eager gives where export errs.

    usual_strides     a plan reads NCHW or NHWC; other inputs are copied
    shown_strides     why an input that had to be copied may not use a plan
    in_doubt          whether the captured strides may be wrong
    true_strides      the results' strides from the modules themselves, where the captured ones are in doubt
    in_strides        a result with eager's strides

Fake tensors have eager's strides but for maps that are NCHW and NHWC at once (of one channel or one pixel) or
neither: there some operations choose otherwise than their fakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .capture import example_like, plain_path
from .graph import Graph, Node

NCHW, NHWC = (0, 1, 2, 3), (0, 2, 3, 1)

# The memory format of their result is NCHW or NHWC, whatever order of dimensions they read.
ORDERING = {"conv2d", "linear", "max_pool2d", "avg_pool2d"}


def usual_strides(x: Tensor) -> Tensor:
    """x, or a dense copy in the memory format that eager convolutions would take from its strides."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last if _is_wide(x) else torch.contiguous_format)


def _is_wide(x: Tensor) -> bool:
    """Whether convolutions and pools take x for NHWC: strides grow from C over W and H to N, gaps or not."""
    least = 1
    for axis in (1, 3, 2, 0):
        step = x.stride(axis)
        if step < least or (axis == 0 and least == x.stride(1)):  # the latter: one channel of one pixel
            return False
        least = step * x.shape[axis]
    return True


def shown_strides(x: Tensor, plan: Any) -> str | None:
    """Why x, which is neither NCHW nor NHWC, may not use a plan made for a dense copy of it."""
    if plan.shows_input:
        return f"the result shows the memory of the input, whose strides are {x.stride()}"
    if plan.follows_input and _is_odd(x):
        return f"the result has its dimensions in the order of the input, whose strides are {x.stride()}"
    return None


def _is_odd(x: Tensor) -> bool:
    """Whether an elementwise result of x has other strides than one of its dense copy."""
    like = torch.empty_like(x, device="meta")
    planar, wide = like.is_contiguous(), like.is_contiguous(memory_format=torch.channels_last)
    return not (planar or wide) or (planar and wide and _is_wide(x))


def follows_input(graph: Graph) -> bool:
    """Whether only elementwise operations and views lie between the input and something that is returned.

    What is computed elementwise from an input of one channel or pixel is NCHW or NHWC as the input is.
    """
    following: set[Node] = {graph.input}
    for node in graph.nodes:
        sources = following.intersection(node.inputs)
        if node.op in ORDERING:
            ambiguous = {source for source in sources if 1 in (source.channels, source.pixels)}
            sources = ambiguous - {graph.input}
        if sources:
            following.add(node)
    return any(output in following for output in graph.outputs if isinstance(output, Node))


def true_strides(graph: Graph, plain: Callable[[Tensor], Any], x: Tensor) -> None:
    """Give the outputs the strides that the modules give them, on zeros like x, if there is a doubt."""
    if not in_doubt(graph, x.stride(1) == 1):
        return
    with torch.inference_mode(False), torch.no_grad(), plain_path():
        results = pytree.tree_leaves(plain(example_like(x).zero_()))
    for output, result in zip(graph.outputs, results, strict=True):
        if isinstance(output, Node) and isinstance(result, Tensor):
            output.stride = tuple(result.stride())


def in_doubt(graph: Graph, wide: bool) -> bool:
    """Whether only the modules know the strides of what is returned; wide: the image is NHWC."""
    return any(_in_doubt(graph, node, wide) for node in graph.nodes if len(node.shape or ()) == 4)


def _in_doubt(graph: Graph, node: Node, wide: bool) -> bool:
    """Whether a fake map of this kind may lead to other strides than eager's; wide: the image is NHWC."""
    shape, stride = node.shape or (), node.stride or ()
    if node.op == "identity" and not _is_dense(shape, stride):
        return True  # dropout gives the view itself; views of its fake are views of a copy
    ambiguous = node.channels == 1 or (node.pixels == 1 and _decides(graph, node))
    side_by_side = stride[1] == 1 and _descend(shape, stride, NHWC)
    return (wide and ambiguous) or not (side_by_side or _descend(shape, stride, NCHW))


def _decides(graph: Graph, node: Node) -> bool:
    """Whether the strides of a map of one pixel show, in the result or in a larger map made of it."""
    readers = graph.readers(node)
    larger = any(r is not None and r.pixels > 1 and all(i.pixels == 1 for i in r.inputs) for r in readers)
    return larger or None in readers or node is graph.input


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    last = sum(step * (size - 1) for step, size in zip(stride, shape))
    return last + 1 == math.prod(shape)


def _descend(shape: tuple[int, ...], stride: tuple[int, ...], order: tuple[int, ...]) -> bool:
    """Whether strides get smaller along these axes; one of a single element has no say."""
    steps = [stride[axis] for axis in order if shape[axis] > 1]
    return steps == sorted(steps, reverse=True)


def in_strides(result: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A copy with these strides; where they are 0, one element stands for all, as in the result of expand."""
    once = result[tuple(slice(None) if step else slice(1) for step in stride)]
    copy = torch.empty_strided(once.shape, stride, dtype=result.dtype, device=result.device).copy_(once)
    return copy.expand(result.shape)


def same_strides(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    """Equal where a dimension has more than one element."""
    return all(n == 1 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), stride))
