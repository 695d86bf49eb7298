"""Padding and flattening, which need no step of their own."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from ..borders import with_border
from ..graph import Graph, Node
from .trial import Kernels, changed


def fold_padding(graph: Graph, kernels: Kernels) -> int:
    """pad, convolutions or pools -> the same with more padding, if all readers can; else pad is a copy."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "pad"]:
        readers = graph.readers(node)
        unlike = graph.others_reading(node, *(r for r in readers if r is not None and _pads_alike(r, node)))
        made = [] if unlike else [_padded(reader, node) for reader in readers]
        why = f"{unlike} cannot pad like this" if unlike else ""
        if not unlike:
            pools = [(old, new) for old, new in zip(readers, made) if new.op != "conv2d"]
            why = next(filter(None, (kernels.lost(old, new) for old, new in pools)), "")
        if why:
            graph.miss(node, "fold_padding", f"no padding of what follows: {why}")
            continue
        for reader, new in zip(readers, made):
            reader.attrs = new.attrs
            reader.fused.insert(0, node.name or "pad")
        graph.replace(node, node.inputs[0])
        count += 1
    return count


def _pads_alike(reader: Node, pad: Node) -> bool:
    """Whether what stands in the border is what the reader's own padding stands for."""
    a, value = reader.attrs, pad.attrs["value"]
    if reader.inputs != [pad]:
        return False
    if reader.op == "conv2d":
        return value == 0
    if reader.op == "max_pool2d":
        return value == -inf and not a["ceil_mode"]
    if reader.op != "avg_pool2d" or a["size"] is not None or a["ceil_mode"] or value != 0:
        return False
    return a["count_include_pad"] or a["divisor"] is not None or a["padding"] == (0, 0)


def _padded(reader: Node, pad: Node) -> Node:
    new = changed(reader, padding=with_border(reader.attrs["padding"], pad.attrs["border"]))
    if reader.op == "avg_pool2d":
        new.attrs["count_include_pad"] = True
    return replace(new, inputs=pad.inputs)


def flatten_into_linear(graph: Graph, kernels: Kernels) -> int:
    """flatten of [N, C, H, W], linear -> the linear layer reads [N, H*W*C], the map as it lies in memory.

    A flatten of more than one pixel that somebody else reads stays a PyTorch call.
    """
    count = 0
    for node in [n for n in graph.nodes if n.op == "flatten" and n.inputs[0].pixels > 1]:
        source, readers = node.inputs[0], graph.readers(node)
        fits = all(r is not None and r.op == "linear" and r.attrs["recipe"].spatial is None for r in readers)
        if not fits or source.op in ("input", "slice"):
            why = f"it shows the bytes of {source.label}"
            if not fits:
                why = f"what reads it is {graph.others_reading(node)}"
            graph.miss(node, "flatten_into_linear", f"no part of a linear layer: {why}")
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
