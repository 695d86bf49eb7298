"""Padding and flattening, which need no step of their own."""

from __future__ import annotations

from dataclasses import replace

from ..graph import Graph
from .trial import Kernels


def fold_padding(graph: Graph, kernels: Kernels) -> int:
    """pad, convolutions -> convolutions with more padding, where the border is even on both sides."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "pad"]:
        left, right, top, bottom = node.attrs["border"]
        readers = graph.readers(node)
        takers = [r for r in readers if r is not None and r.op == "conv2d" and r.inputs == [node]]
        if (left, top) != (right, bottom) or not takers or len(takers) != len(readers):
            continue
        for conv in takers:
            pad_h, pad_w = conv.attrs["padding"]
            conv.attrs["padding"] = (pad_h + top, pad_w + left)
            conv.fused.insert(0, node.name or "pad")
        graph.replace(node, node.inputs[0])
        count += 1
    return count


def flatten_into_linear(graph: Graph, kernels: Kernels) -> int:
    """flatten of [N, C, H, W], linear -> the linear layer reads [N, H*W*C], the map as it lies in memory.

    A flatten of more than one pixel that somebody else reads stays a PyTorch call.
    """
    count = 0
    for node in [n for n in graph.nodes if n.op == "flatten" and n.inputs[0].pixels > 1]:
        source, readers = node.inputs[0], graph.readers(node)
        fits = all(r is not None and r.op == "linear" and r.attrs["recipe"].spatial is None for r in readers)
        if not fits or source is graph.input:
            node.op = "aten"
            continue
        for linear in dict.fromkeys(readers):
            recipe = linear.attrs["recipe"]
            linear.attrs["recipe"] = replace(recipe, spatial=tuple((source.shape or ())[1:]))
        count += 1
    return count


def fuse_tail(graph: Graph, kernels: Kernels) -> int:
    """global average pool, flatten -> pool that writes [N, C]."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "flatten" and n.inputs[0].op == "global_avg_pool"]:
        pool = node.inputs[0]
        if graph.readers(pool) != [node]:
            continue
        pool.shape, pool.stride = node.shape, node.stride
        pool.fused.append(node.name or "flatten")
        graph.replace(node, pool)
        count += 1
    return count
