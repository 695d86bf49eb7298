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
        why = _refusal(graph, depthwise, pointwise)
        merged = None if why else _merged(depthwise, pointwise)
        why = why or kernels.why_not(merged, "separable_conv2d")
        if why:
            graph.miss(depthwise, "make_separable", f"not one step with what follows: {why}")
            continue
        pointwise.op, pointwise.attrs = merged.op, merged.attrs
        pointwise.fused = merged.fused
        graph.replace(depthwise, depthwise.inputs[0])
        count += 1
    return count


def _refusal(graph: Graph, depthwise: Node, pointwise: Node | None) -> str:
    """Why a depthwise convolution and its only reader are no separable convolution; "" when they are."""
    if pointwise is None:
        return f"its result goes to {graph.others_reading(depthwise)}"
    if not (pointwise.op == "conv2d" and is_pointwise(pointwise)):
        return f"{pointwise.label} ({pointwise.op}) is no 1x1 convolution"
    if depthwise.roles != ("x",) or depthwise.attrs.get("pre") is not None:
        return "it has a norm before it, or a sum or a gate behind"
    a = pointwise.attrs
    if a.get("pre") is not None or a.get("pre_activation", "none") != "none" or "gate" in pointwise.roles:
        return f"{pointwise.label} (conv2d) has a norm before it or a gate behind"
    if pointwise.inputs[0] is not depthwise or depthwise in pointwise.inputs[1:]:
        return f"{pointwise.label} (conv2d) adds it to its result"
    return ""


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
