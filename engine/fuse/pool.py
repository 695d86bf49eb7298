"""An average pool and a 1x1 convolution commute: both are linear, one over pixels, one over channels.

    act(W pool(x) + b)  ->  act(pool(W x) + b)

The bias stays outside: a pool that counts its padding would make it smaller at the border. Afterwards the
pool works on fewer channels, and the convolution reads the same map as its siblings (siblings.py).
"""

from __future__ import annotations

from dataclasses import replace

from ..candidates import is_pointwise
from ..graph import Graph, Node
from .trial import Kernels, changed


def pool_after_conv(graph: Graph, kernels: Kernels) -> int:
    """avg pool of stride 1, 1x1 to no more channels -> 1x1, avg pool with bias and activation."""
    count = 0
    for pool in [n for n in graph.nodes if n.op == "avg_pool2d"]:
        conv = graph.only_reader(pool)
        if conv is None or not _fits(pool, conv):
            continue
        first, second = _swapped(pool, conv)
        why = kernels.lost(conv, first) or kernels.why_not(second, kernels.of(pool))
        if why:
            graph.miss(pool, "pool_after_conv", f"not behind {conv.label} (conv2d): {why}")
            continue
        graph.insert(first, before=conv)
        graph.insert(second, before=conv)
        graph.replace(conv, second)
        graph.drop(pool)
        count += 1
    return count


def _fits(pool: Node, conv: Node) -> bool:
    a = conv.attrs
    if not (conv.op == "conv2d" and is_pointwise(conv) and conv.roles == ("x",)):
        return False
    bare = a.get("pre") is None and a.get("pre_activation", "none") == "none"
    same_size = (pool.shape or ())[2:] == (pool.inputs[0].shape or ())[2:]
    fresh = pool.attrs["activation"] == "none" and pool.attrs["recipe"] is None
    return bare and same_size and fresh and a["filters"] <= pool.channels


def _swapped(pool: Node, conv: Node) -> tuple[Node, Node]:
    recipe = conv.attrs["recipe"]
    first = changed(conv, [pool.inputs[0]], recipe=replace(recipe, without_bias=True), activation="none")
    second = changed(
        pool, [first], recipe=None if recipe.only_scales else recipe, activation=conv.attrs["activation"]
    )
    second.shape, second.stride = conv.shape, conv.stride
    second.fused = ["bias", *conv.fused] if second.attrs["recipe"] else list(conv.fused)
    first.fused = []
    return first, second
