"""Squeeze and excitation: the gate is known before the convolution that it multiplies.

    y = W h,  m = mean(y),  y * gate(m)   ->   m = W mean(h),  then W h with the gate in its epilogue

The mean over the image is linear and W is a 1x1 convolution (with its norm folded in), so both orders give
the same m. Without this the map is written, read for the mean, read again for the product and written again.
Where an activation stands between W and the mean the two do not commute, and the gate stays an affine step.
"""

from __future__ import annotations

from dataclasses import replace

from ..candidates import is_pointwise
from ..graph import Graph, Node
from .trial import Kernels, changed


def squeeze_before_conv(graph: Graph, kernels: Kernels) -> int:
    """Each mean of a 1x1 convolution becomes the convolution of a mean, where a gate is all that follows."""
    count = 0
    for mean in [n for n in graph.nodes if n.op == "global_avg_pool"]:
        conv = mean.inputs[0]
        if not _commutes(conv) or not _only_gated(graph, conv, mean):
            continue
        gate = next(r for r in graph.readers(conv) if r is not None and r is not mean)
        inputs = [*conv.inputs, gate.input("gate") or mean]
        if not kernels.keeps(conv, changed(conv, inputs, (*conv.roles, "gate"))):
            continue
        _swap(graph, mean, conv)
        count += 1
    return count


def _commutes(conv: Node) -> bool:
    if not (conv.op == "conv2d" and is_pointwise(conv) and conv.roles == ("x",)):
        return False
    a = conv.attrs
    return a["activation"] == "none" and a.get("pre") is None and a.get("pre_activation", "none") == "none"


def _only_gated(graph: Graph, conv: Node, mean: Node) -> bool:
    readers = graph.readers(conv)
    gates = [r for r in readers if r is not None and r.op == "affine" and r.input("gate") is not None]
    return len(readers) == 2 and mean in readers and len(gates) == 1 and gates[0].inputs[0] is conv


def _swap(graph: Graph, mean: Node, conv: Node) -> None:
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
