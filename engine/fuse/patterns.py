"""Several operations that are one: what F.local_response_norm and a change of the input's range come as."""

from __future__ import annotations

from typing import Any

import torch

from ..graph import Graph, Node
from ..recipes import Fixed, scaling
from .trial import Kernels

aten = torch.ops.aten


def find_response_norms(graph: Graph, kernels: Kernels) -> int:
    """x / (k + alpha * avg_pool3d(x^2 over `size` channels))^beta -> local_response_norm."""
    count = 0
    for node in [n for n in graph.nodes if _calls(n, aten.div.Tensor)]:
        formula = _response_norm(node)
        if formula is None:
            continue
        norm = Node("local_response_norm", node.name, [node.inputs[0]], {"formula": formula}, node.shape,
                    node.stride, node.dtype)  # fmt: skip
        graph.insert(norm, before=node)
        graph.replace(node, norm)
        count += 1
    graph.drop_unused()
    return count


def _response_norm(div: Node) -> dict[str, Any] | None:
    """size, alpha, beta, offset; walks from the division up to the square of the same x."""
    x, power = div.attrs["args"]
    if not isinstance(power, Node) or not _calls(power, aten.pow.Tensor_Scalar):
        return None
    added, beta = power.attrs["args"]
    scaled = _fixed(added)
    averaged = _fixed(scaled[0]) if scaled and scaled[1] == 1.0 else None
    if scaled is None or averaged is None or averaged[2] != 0.0:
        return None
    pool = _through(averaged[0], aten.view.default, aten.reshape.default, aten.squeeze.dim)
    if not _calls(pool, aten.avg_pool3d.default) or len(pool.attrs["args"]) > 3:
        return None
    (size, *flat), stride = pool.attrs["args"][1], pool.attrs["args"][2]
    pad = pool.inputs[0]
    if (
        flat != [1, 1]
        or list(stride) != [1, 1, 1]
        or not _calls(pad, aten.pad.default, aten.constant_pad_nd.default)
    ):
        return None
    square = _through(pad.inputs[0], aten.view.default, aten.reshape.default, aten.unsqueeze.default)
    border = [0, 0, 0, 0, size // 2, (size - 1) // 2]
    same = _calls(square, aten.mul.Tensor) and square.inputs == [x, x]
    if not same or list(pad.attrs["args"][1]) != border or not isinstance(x, Node) or len(x.shape or ()) != 4:
        return None
    return {"size": size, "alpha": averaged[1], "beta": float(beta), "offset": scaled[2]}


def _calls(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "aten" and node.attrs["target"] in targets


def _through(node: Any, *targets: Any) -> Any:
    while isinstance(node, Node) and (_calls(node, *targets) or node.op in ("flatten", "identity")):
        node = node.inputs[0]
    return node


def _fixed(node: Any) -> tuple[Node, float, float] | None:
    """x, factor and shift of an affine node with one number for all channels."""
    if not isinstance(node, Node) or node.op != "affine" or node.roles != ("x",):
        return None
    recipe = node.attrs["recipe"]
    if recipe is None or node.attrs["activation"] != "none" or len(recipe.norms) != 1:
        return None
    (only,) = recipe.norms
    plain = isinstance(only, Fixed) and len(only.scale) == len(only.shift) == 1
    return (node.inputs[0], only.scale[0], only.shift[0]) if plain else None


def map_input_channels(graph: Graph, kernels: Kernels) -> int:
    """cat of every channel of x in order, each scaled and shifted -> affine(x)."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "cat"]:
        found = [_channel(part) for part in node.inputs]
        sources = {x for x, _, _, _ in found if x is not None}
        if len(sources) != 1:
            continue
        (x,) = sources
        if [start for _, start, _, _ in found] != list(range(x.channels)):
            continue
        numbers = Fixed(tuple(a for _, _, a, _ in found), tuple(b for _, _, _, b in found))
        attrs = {"recipe": scaling(x.channels, numbers), "activation": "none", "label": "input range"}
        affine = Node("affine", node.name, [x], attrs, node.shape, node.stride, node.dtype)
        graph.insert(affine, before=node)
        graph.replace(node, affine)
        count += 1
    graph.drop_unused()
    return count


def _channel(node: Node) -> tuple[Node | None, int, float, float]:
    """x, channel, factor and shift, when the node is a map of one channel of x."""
    scale, shift = 1.0, 0.0
    while (found := _fixed(node)) is not None:
        node, a, b = found
        scale, shift = scale * a, shift + scale * b
    if node.op != "slice" or node.channels != 1:
        return None, -1, 0.0, 0.0
    return node.inputs[0], node.attrs["start"], scale, shift
