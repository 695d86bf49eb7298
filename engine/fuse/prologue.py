"""What happens to each element before a convolution becomes part of its loads.

    x * scale + shift, activation, convolution  ->  convolution of pre(x)

DenseNet's norm and ReLU stand before the convolution and read a concatenation that others read too;
Xception's leading ReLU reads a sum that the shortcut needs unrectified. Zero padding stays zero: it comes
after pre.
"""

from __future__ import annotations

from ..graph import Graph, Node
from .trial import Kernels, changed


def fuse_prologues(graph: Graph, kernels: Kernels) -> int:
    """Only if every reader can take it: else the result has to be written anyway."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "affine" and n.roles == ("x",)]:
        readers = graph.readers(node)
        takers = [r for r in readers if r is not None and _may_take(r, node)]
        if not takers or len(takers) != len(readers):
            continue
        made = [_prefixed(conv, node) for conv in takers]
        if not all(
            kernels.of(conv) != "aten" and kernels.keeps(conv, new) for conv, new in zip(takers, made)
        ):
            continue
        for conv, new in zip(takers, made):
            conv.attrs = new.attrs
            conv.fused[:0] = [node.label, *node.fused]
        graph.replace(node, node.inputs[0])
        count += 1
    return count


def _may_take(conv: Node, node: Node) -> bool:
    fresh = conv.attrs.get("pre") is None and conv.attrs.get("pre_activation", "none") == "none"
    return conv.op == "conv2d" and fresh and conv.inputs[0] is node and node not in conv.inputs[1:]


def _prefixed(conv: Node, node: Node) -> Node:
    inputs = [node.inputs[0], *conv.inputs[1:]]
    return changed(conv, inputs, pre=node.attrs["recipe"], pre_activation=node.attrs["activation"])
