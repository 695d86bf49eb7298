"""What happens to each element before a convolution becomes part of its loads.

    x * scale + shift, activation, convolution  ->  convolution of pre(x)

DenseNet's norm and ReLU stand before the convolution and read a concatenation that others read too;
Xception's leading ReLU reads a sum that the shortcut needs unrectified. Zero padding stays zero: it comes
after pre.
"""

from __future__ import annotations

from functools import partial

from ..graph import Graph, Node
from .trial import Kernels, changed


def fuse_prologues(graph: Graph, kernels: Kernels) -> int:
    """Only if every reader can take it: else the result has to be written anyway."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "affine" and n.roles == ("x",)]:
        readers = graph.readers(node)
        if not any(r is not None and r.op == "conv2d" for r in readers):
            continue
        why = next(filter(None, (_refusal(r, node) for r in readers)), "")
        made = [] if why else [_prefixed(conv, node) for conv in readers]
        why = why or next(filter(None, map(partial(_lost, kernels), readers, made)), "")
        if why:
            graph.miss(node, "fuse_prologues", f"no prologue: {why}")
            continue
        for conv, new in zip(readers, made):
            conv.attrs = new.attrs
            conv.fused[:0] = [node.label, *node.fused]
        graph.replace(node, node.inputs[0])
        count += 1
    return count


def _refusal(reader: Node | None, node: Node) -> str:
    """Why this reader cannot take the node as its prologue; "" when it can."""
    if reader is None:
        return "the caller receives it, too"
    if reader.op != "conv2d":
        return f"{reader.label} ({reader.op}) reads it, too"
    if reader.inputs[0] is not node or node in reader.inputs[1:]:
        return f"{reader.label} ({reader.op}) adds it to its result"
    fresh = reader.attrs.get("pre") is None and reader.attrs.get("pre_activation", "none") == "none"
    return "" if fresh else f"{reader.label} ({reader.op}) has one"


def _lost(kernels: Kernels, conv: Node, new: Node) -> str:
    why = "PyTorch runs it" if kernels.of(conv) == "aten" else kernels.lost(conv, new)
    return f"{conv.label} ({conv.op}): {why}" if why else ""


def _prefixed(conv: Node, node: Node) -> Node:
    inputs = [node.inputs[0], *conv.inputs[1:]]
    return changed(conv, inputs, pre=node.attrs["recipe"], pre_activation=node.attrs["activation"])
