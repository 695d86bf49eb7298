"""A depthwise convolution and the 1x1 behind it become one: the rows between them never leave the cache."""

from __future__ import annotations

from ..candidates import is_depthwise, is_pointwise
from ..graph import Graph, Node
from .trial import Kernels


def make_separable(graph: Graph, kernels: Kernels) -> int:
    """depthwise, 1x1 -> separable_conv2d, at the place of the 1x1."""
    count = 0
    for depthwise in [n for n in graph.nodes if n.op == "conv2d" and is_depthwise(n)]:
        pointwise = graph.only_reader(depthwise)
        if pointwise is None or not _fits(depthwise, pointwise):
            continue
        merged = _merged(depthwise, pointwise)
        if kernels.of(merged) != "separable_conv2d":
            continue
        pointwise.op, pointwise.attrs = merged.op, merged.attrs
        pointwise.fused = merged.fused
        graph.replace(depthwise, depthwise.inputs[0])
        count += 1
    return count


def _fits(depthwise: Node, pointwise: Node) -> bool:
    plain = depthwise.roles == ("x",) and depthwise.attrs.get("pre") is None
    a = pointwise.attrs
    if not (plain and pointwise.op == "conv2d" and is_pointwise(pointwise)):
        return False
    bare = (
        a.get("pre") is None and a.get("pre_activation", "none") == "none" and "gate" not in pointwise.roles
    )
    return bare and pointwise.inputs[0] is depthwise and depthwise not in pointwise.inputs[1:]


def _merged(depthwise: Node, pointwise: Node) -> Node:
    d, p = depthwise.attrs, pointwise.attrs
    attrs = {
        "recipe": p["recipe"], "activation": p["activation"], "filters": p["filters"],
        "depth": d["recipe"], "depth_activation": d["activation"],
        "pre_activation": d.get("pre_activation", "none"),
        "kernel": d["kernel"], "stride": d["stride"], "padding": d["padding"], "dilation": d["dilation"],
    }  # fmt: skip
    inputs = [depthwise.inputs[0], *pointwise.inputs[1:]]
    fused = [depthwise.label, *depthwise.fused, *pointwise.fused]
    return Node("separable_conv2d", pointwise.name, inputs, attrs, pointwise.shape, pointwise.stride,
                pointwise.dtype, fused, pointwise.roles)  # fmt: skip
