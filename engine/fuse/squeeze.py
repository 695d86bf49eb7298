"""Squeeze and excitation: the gate is known before the convolution that it multiplies.

    y = W h,  m = mean(y),  y * gate(m)   ->   m = W mean(h),  then W h with the gate in its epilogue

The mean over the image is linear and W is a 1x1 convolution (with its norm folded in), so both orders give
the same m. Without this the map is written, read for the mean, read again for the product and written again.
Where an activation stands between W and the mean the two do not commute, and the gate stays an affine step.

The first layer of the excitation reads that mean and nothing stands between, so the two matrices are one:

    V (W m + b) + c  =  (V W) m + (V b + c)       V W [hidden, channels of h] is made with the plan

W is read once then, by the convolution, and not for the mean, too.
"""

from __future__ import annotations

from dataclasses import replace

from ..candidates import is_pointwise
from ..graph import Graph, Node
from ..recipes import Product, Recipe
from .trial import Kernels, changed


def squeeze_before_conv(graph: Graph, kernels: Kernels) -> int:
    """Each mean of a 1x1 convolution becomes the convolution of a mean, where a gate is all that follows."""
    count = 0
    for mean in [n for n in graph.nodes if n.op == "global_avg_pool"]:
        conv = mean.inputs[0]
        gate = next((r for r in graph.readers(conv) if r is not None and _gates(r, conv)), None)
        if gate is None:
            continue
        why = _refusal(graph, conv, mean, gate)
        inputs = [*conv.inputs, gate.input("gate") or mean]
        why = why or kernels.lost(conv, changed(conv, inputs, (*conv.roles, "gate")))
        if why:
            graph.miss(mean, "squeeze_before_conv", f"not before {conv.label} ({conv.op}): {why}")
            continue
        _merge(graph, _swap(graph, mean, conv), kernels)
        count += 1
    return count


def _gates(reader: Node, conv: Node) -> bool:
    return reader.op == "affine" and reader.input("gate") is not None and reader.inputs[0] is conv


def _refusal(graph: Graph, conv: Node, mean: Node, gate: Node) -> str:
    """Why the mean and what it is of do not commute, or more than a gate follows; "" when they do."""
    if not (conv.op == "conv2d" and is_pointwise(conv) and conv.roles == ("x",)):
        return "it is no plain 1x1 convolution"
    a = conv.attrs
    if a["activation"] != "none":
        return f"{a['activation']} stands between"
    if a.get("pre") is not None or a.get("pre_activation", "none") != "none":
        return "it has a norm or an activation before it"
    others = graph.others_reading(conv, mean, gate)
    if others or len(graph.readers(conv)) != 2:
        return f"its result goes to {others}, too" if others else "its gate reads it twice"
    return ""


def _swap(graph: Graph, mean: Node, conv: Node) -> Node:
    h, shape = conv.inputs[0], mean.shape or ()
    squeezed = Node(
        "global_avg_pool", mean.name, [h], {}, (shape[0], h.channels, *shape[2:]), None, mean.dtype
    )
    graph.insert(squeezed, before=mean)
    pooled = replace(
        conv, name=f"{conv.name} of the mean", inputs=[squeezed], shape=shape, stride=mean.stride,
        attrs=dict(conv.attrs), fused=list(conv.fused), op="conv2d" if len(shape) == 4 else "linear",
    )  # fmt: skip
    graph.insert(pooled, before=mean)
    graph.replace(mean, pooled)
    return pooled


def _merge(graph: Graph, pooled: Node, kernels: Kernels) -> None:
    """W of the mean into the layer that alone reads it, where their product is no larger than W."""
    layer = graph.only_reader(pooled)
    if layer is None or not _is_matrix(layer) or not _is_matrix(pooled):
        return
    if layer.channels > pooled.channels:
        return
    product = Product(pooled.attrs["recipe"], layer.attrs["recipe"])
    merged = changed(layer, pooled.inputs, recipe=product)
    if kernels.keeps(layer, merged):
        layer.attrs, layer.fused = merged.attrs, [pooled.name, *layer.fused]
        graph.rewire(layer, pooled.inputs)
        graph.drop(pooled)


def _is_matrix(node: Node) -> bool:
    """A product with rows or single pixels and what follows it; nothing before."""
    plain = node.op == "linear" or (node.op == "conv2d" and is_pointwise(node) and node.pixels == 1)
    a = node.attrs
    bare = a.get("pre") is None and a.get("pre_activation", "none") == "none" and node.roles == ("x",)
    return plain and bare and isinstance(a["recipe"], Recipe)
