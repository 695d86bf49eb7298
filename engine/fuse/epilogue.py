"""What happens to each element after an operation becomes part of it.

    X, affine  ->  X with an epilogue          y = act((X * scale + shift) * gate + residual)

The parts of an epilogue have this order. A producer takes an affine node over when all parts of that node
come after those it has already; a factor may also pass a gate, which it commutes with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..graph import Graph, Node
from ..recipes import Product, Recipe, scaling
from .trial import Kernels, changed

HOSTS = {"conv2d", "separable_conv2d", "linear", "affine", "avg_pool2d"}
SCALABLE = HOSTS - {"avg_pool2d"}  # a pool has no factors


def fuse_epilogues(graph: Graph, kernels: Kernels) -> int:
    """Norms, activations, sums and gates into what they follow, if nobody else reads that."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "affine"]:
        said = []
        for host, others in _hosts(graph, node):
            merged = _refusal(graph, host, node) or absorbed(host, node, others)
            why = merged if isinstance(merged, str) else kernels.lost(host, merged)
            if why:
                said.append(f"no epilogue of {host.label} ({host.op}): {why}")
                continue
            _take(graph, host, node, merged)
            count += 1
            break
        else:
            graph.miss(node, "fuse_epilogues", "; ".join(said))
    return count


def _hosts(graph: Graph, node: Node) -> Iterator[tuple[Node, dict[str, Node]]]:
    """Producers that may take the node over, and what they would have to read besides.

    Of two terms of a sum either may do it. One that is a pass of its own anyway comes first; then the later
    one, so that no step has to move far.
    """
    x, residual = node.inputs[0], node.input("residual")
    others = dict(zip(node.roles[1:], node.inputs[1:]))
    found = [(x, others)]
    if residual is not None and node.attrs["recipe"] is None and "gate" not in others:
        found.append((residual, {"residual": x}))
    if len(found) > 1:
        found.sort(key=lambda pair: (pair[0].op == "affine", graph.nodes.index(pair[0])), reverse=True)
    yield from found


def _refusal(graph: Graph, host: Node, node: Node) -> str:
    """Why nothing can become an epilogue of this producer; "" when something can."""
    if host.op not in HOSTS:
        return "it takes none"
    if graph.readers(host) != [node]:
        others = graph.others_reading(host, node)
        return f"its result goes to {others}, too" if others else "its result is read twice here"
    return ""


def absorbed(host: Node, node: Node, others: dict[str, Node]) -> Node | str:
    """The host with the epilogue of `node` added to its own; a sentence when the order of the parts forbids
    it."""
    recipe, activation = node.attrs["recipe"], node.attrs["activation"]
    if host.attrs["activation"] != "none":
        return f"its epilogue ends with {host.attrs['activation']}"
    if "residual" in host.roles and (recipe is not None or others):
        return "its epilogue ends with a sum"
    if "gate" in host.roles and ("gate" in others or (recipe is not None and not recipe.only_scales)):
        return "its epilogue ends with a gate"
    attrs: dict[str, Any] = {"activation": activation}
    if recipe is not None:
        if host.op not in SCALABLE:
            return "it has no factors"
        attrs["recipe"] = followed(host, recipe)
    inputs, roles = [*host.inputs, *others.values()], (*host.roles, *others)
    return changed(host, inputs, roles, **attrs)


def followed(host: Node, recipe: Recipe) -> Recipe | Product:
    own = host.attrs["recipe"]
    return (scaling(host.channels) if own is None else own).then(recipe)


def _take(graph: Graph, host: Node, node: Node, merged: Node) -> None:
    host.attrs, host.stride = merged.attrs, node.stride
    host.fused += [node.label, *node.fused]
    if len(merged.inputs) > len(host.inputs):
        graph.rewire(node, [host], ("x",))
        graph.rewire(host, merged.inputs, merged.roles)
        graph.move(host, before=node)  # it may read the others only once they are there
    graph.replace(node, host)
