"""Concatenation costs nothing when every producer writes its channels where the result will lie.

    cat of a, b, c       a, b and c are inside(cat) at channels 0, C_a, C_a + C_b
    cat of prefixes      a dense block concatenates x0 x1, then x0 x1 x2, ...: all are views of the last one
    cat of cats          inside one another

Concatenations are taken in reverse order, so that the outermost and the longest come first. An input that
cannot live there (the image, something that lies in another place already) gets one copying step.
"""

from __future__ import annotations

from ..graph import Graph, Node
from .trial import Kernels


def write_into_slices(graph: Graph, kernels: Kernels) -> int:
    """Set `inside` of everything that is concatenated; insert copies where that cannot be."""
    cats = [n for n in graph.nodes if n.op == "cat"]
    for cat in reversed(cats):
        home = _common_home(cat) if cat.inside is None and not is_flattened(graph, cat) else None
        if home is not None:
            cat.inside = home
        else:
            _place_inputs(graph, cat)
    return len(cats)


def show_slices(graph: Graph, kernels: Kernels) -> int:
    """Some channels of a map are a view of its bytes; of the caller's image they stay calls."""
    slices = [n for n in graph.nodes if n.op == "slice" and n.inside is None]
    for node in slices:
        source = node.inputs[0]
        if source.op == "input":
            graph.miss(node, "show_slices", "no view: the image is the caller's")
            node.op = "aten"
        else:
            node.inside = (source, node.attrs["start"])
    return sum(node.op == "slice" for node in slices)


def resolve(node: Node) -> tuple[Node, int]:
    """The node that owns the bytes, and the first channel in them."""
    channel = 0
    while node.inside is not None:
        node, first = node.inside
        channel += first
    return node, channel


def _common_home(cat: Node) -> tuple[Node, int] | None:
    """Where all inputs lie side by side already: then the concatenation is a view."""
    owner, start = resolve(cat.inputs[0])
    if owner is cat.inputs[0]:
        return None
    channel = start
    for part in cat.inputs:
        if resolve(part) != (owner, channel):
            return None
        channel += part.channels
    return owner, start


def _place_inputs(graph: Graph, cat: Node) -> None:
    owner, start = resolve(cat)
    inputs, channel = [], 0
    for part in cat.inputs:
        if part.inside is None and not _stays(graph, part):
            part.inside = (cat, channel)
        elif resolve(part) != (owner, start + channel):
            part = _copy(graph, part, cat, channel)
        inputs.append(part)
        channel += part.channels
    if inputs != cat.inputs:
        graph.rewire(cat, inputs)


def is_flattened(graph: Graph, node: Node) -> bool:
    """Whether the map is read as one row [H*W*C] besides: then its pixels have to lie side by side."""
    readers = [r for r in graph.readers(node) if r is not None]
    flat = [r for r in readers if r.op == "flatten"]
    return any(r.op == "row" for r in readers) or any(node.pixels > 1 or is_flattened(graph, r) for r in flat)


def _stays(graph: Graph, node: Node) -> str:
    """Why what the node computes cannot lie in a concatenation; "" when it can."""
    if node.op == "input":
        return "it is the caller's"
    if node.op in ("flatten", "row", "slice"):
        return f"it shows the bytes of {node.inputs[0].label}"
    return "its pixels are read as one row, too" if is_flattened(graph, node) else ""


def _copy(graph: Graph, part: Node, cat: Node, channel: int) -> Node:
    attrs = {"recipe": None, "activation": "none", "label": "copy"}
    name = f"{part.name or part.op} into {cat.name or 'cat'}"
    copy = Node("affine", name, [part], attrs, part.shape, None, part.dtype, inside=(cat, channel))
    graph.insert(copy, before=cat)
    why = _stays(graph, part) or "it lies in another place already"
    graph.miss(copy, "write_into_slices", f"{part.label} does not write into {cat.label}: {why}")
    return copy
