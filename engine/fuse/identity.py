"""Operations that do nothing in eval mode."""

from __future__ import annotations

from ..graph import Graph, Node
from .trial import Kernels


def drop_identity(graph: Graph, kernels: Kernels) -> int:
    """One stays when the caller receives both it and its source: clone() gives a second tensor."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "identity" or _pads_nothing(n)]:
        source = node.inputs[0]
        if node in graph.outputs:
            if source.op == "input" or source in graph.outputs:
                node.op = "aten"
                continue
            source.stride = node.stride
        graph.replace(node, source)
        count += 1
    return count


def _pads_nothing(node: Node) -> bool:
    return node.op == "pad" and not any(node.attrs["border"])
