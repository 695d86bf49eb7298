"""What is written for [N, H, W, C] works on the map [N, C, H, W] it was permuted from.

    permute(x), layer_norm, linear, gelu, permute back  ->  layer_norm(x), 1x1 convolution, gelu

A map lies in memory as [N, H, W, C] anyway: no permutation moves a byte. What has no such twin goes on
reading a permuted view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..graph import Graph, Live, Node
from ..recipes import Fixed, Recipe, Vector, scaling
from .trial import Kernels

aten = torch.ops.aten
TO_PIXELS, TO_MAP = [0, 2, 3, 1], [0, 3, 1, 2]


def drop_permutes(graph: Graph, kernels: Kernels) -> int:
    """Returns how many permutations have gone."""
    before = _permutes(graph)
    maps: dict[Node, Node] = {}  # of [N, H, W, C]: the map of the same numbers
    for node in list(graph.nodes):
        if _permutes_by(node, TO_PIXELS) and graph.is_map(node.inputs[0]):
            maps[node] = node.inputs[0]
        elif _permutes_by(node, TO_MAP) and node.inputs[0] in maps:
            _replace(graph, node, maps[node.inputs[0]])
        elif any(source in maps for source in node.inputs):
            twin = _twin(graph, node, maps)
            if twin is not None:
                graph.insert(twin, before=node)
                maps[node] = twin
    for node, twin in maps.items():
        if any(reader not in maps for reader in graph.readers(node)) and not _permutes_by(node, TO_PIXELS):
            _show(graph, node, twin)
    graph.drop_unused()
    for node in graph.nodes:
        if node.op == "layer_norm" and len(node.shape or ()) == 4 and "target" in node.attrs:
            node.op = "aten"
    return before - _permutes(graph)


def _permutes(graph: Graph) -> int:
    return sum(_permutes_by(node, TO_PIXELS) or _permutes_by(node, TO_MAP) for node in graph.nodes)


def _permutes_by(node: Node, dims: list[int]) -> bool:
    if node.op != "aten" or node.attrs["target"] is not aten.permute.default or len(node.shape or ()) != 4:
        return False
    return [d % 4 for d in node.attrs["args"][1]] == dims


def _replace(graph: Graph, node: Node, map_: Node) -> None:
    """A permutation back gives the map itself; one that the caller receives beside it stays."""
    if node in graph.outputs:
        if map_ in graph.outputs or map_.op == "input":
            return
        map_.stride = node.stride
    graph.replace(node, map_)


def _show(graph: Graph, node: Node, map_: Node) -> None:
    """Who reads [N, H, W, C] all the same gets a view of the map."""
    view = {"target": aten.permute.default, "args": [map_, TO_PIXELS], "kwargs": {}}
    graph.rewire(node, [map_], ("x",))
    node.op, node.attrs = "aten", view


def _twin(graph: Graph, node: Node, maps: dict[Node, Node]) -> Node | None:
    """The node that does to the map what this one does to [N, H, W, C]; None where there is none."""
    if len(node.shape or ()) != 4 or node.dtype is not torch.float32:
        return None
    key = node.attrs["target"] if node.op == "aten" else node.op
    made = TWINS[key](graph, node, maps) if key in TWINS else None
    if made is None:
        return None
    n, h, w, c = node.shape or ()
    return replace(made, name=node.name, shape=(n, c, h, w), dtype=node.dtype, narrow=node.narrow)


def _linear(graph: Graph, node: Node, maps: dict[Node, Node]) -> Node | None:
    x, weight, bias = [*node.attrs["args"], None][:3]
    weight, bias = _live(weight), _live(bias)
    if x not in maps or not isinstance(weight, Live) or not isinstance(bias, Live | None):
        return None
    filters, channels = graph.shapes[weight]
    call = (aten.reshape.default, [weight, [filters, channels, 1, 1]], {})
    name = f"{call[0]}({weight.name}, {call[1][1]})"
    graph.computed[name] = call
    attrs = {
        "recipe": Recipe(name, None if bias is None else bias.name), "activation": "none",
        "kernel": (1, 1), "filters": filters, "groups": 1,
        "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1),
    }  # fmt: skip
    return Node("conv2d", "", [maps[x]], attrs)


def _affine(graph: Graph, node: Node, maps: dict[Node, Node]) -> Node | None:
    """Activations, sums, and factors and shifts of one number."""
    recipe = node.attrs["recipe"]
    if "gate" in node.roles or any(source not in maps for source in node.inputs):
        return None
    twins = [maps[source] for source in node.inputs]
    if recipe is not None:
        if not all(isinstance(m, Fixed) and len(m.scale) == len(m.shift) == 1 for m in recipe.norms):
            return None
        recipe = scaling(twins[0].channels, *recipe.norms)
    return Node("affine", "", twins, {**node.attrs, "recipe": recipe}, roles=node.roles)


def _elementwise(graph: Graph, node: Node, maps: dict[Node, Node]) -> Node | None:
    if any(source not in maps for source in node.inputs):
        return None
    return Node(node.op, "", [maps[source] for source in node.inputs], dict(node.attrs), roles=node.roles)


def _identity(graph: Graph, node: Node, maps: dict[Node, Node]) -> Node | None:
    attrs = {"recipe": None, "activation": "none", "label": node.label}
    return Node("affine", "", [maps[node.inputs[0]]], attrs)


def _scaled(graph: Graph, node: Node, maps: dict[Node, Node]) -> Node | None:
    """x * weight with one number per channel, the last dimension."""
    x, weight = node.attrs["args"]
    x, weight = (x, weight) if isinstance(x, Node) and x in maps else (weight, x)
    weight = _live(weight)
    if x not in maps or not isinstance(weight, Live) or graph.shapes[weight] != (maps[x].channels,):
        return None
    recipe = scaling(maps[x].channels, Vector(scale=weight.name))
    return Node("affine", "", [maps[x]], {"recipe": recipe, "activation": "none", "label": "mul"})


def _layer_norm(graph: Graph, node: Node, maps: dict[Node, Node]) -> Node | None:
    return Node("layer_norm", "", [maps[node.inputs[0]]], {k: node.attrs[k] for k in ("recipe", "eps")})


def _live(value: Any) -> Any:
    return value.attrs.get("constant", value) if isinstance(value, Node) and value.op == "aten" else value


TWINS: dict[Any, Callable[[Graph, Node, dict[Node, Node]], Node | None]] = {
    aten.linear.default: _linear,
    aten.mul.Tensor: _scaled,
    "affine": _affine,
    "multiply": _elementwise,
    "leaky_relu": _elementwise,
    "identity": _identity,
    "layer_norm": _layer_norm,
}
