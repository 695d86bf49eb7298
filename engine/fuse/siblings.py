"""1x1 convolutions of one input become one: the input is read once, and the matrix is wide enough to be fast.

    a = A x, b = B x, c = C x    ->    one convolution with all their filters; a, b, c are its slices

A convolution writes one range of channels. When one of the siblings opens a concatenation, the others are put
in front of it, in the same buffer:

    channels    | gap | a            b        | c           d        e        |
                      |<-- one convolution, a b c -------->|
                                              |<-- the concatenation -------->|

The gap makes the concatenation start at a whole cache line. Siblings without an activation (those whose pool
comes later) stand first, and `act_from` says where the activation begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..candidates import is_pointwise
from ..graph import Graph, Node
from ..recipes import Recipe, Stack
from .concat import is_flattened
from .trial import Kernels

ACT_FROM_MULTIPLE = 32  # the kernel switches its activation on between two panels of filters
LINE = 16  # floats in a cache line


@dataclass
class Family:
    """bare: without activation; inner: read inside the module only; first: opens the concatenation `cat`.
    alone: who stays outside, and why."""

    bare: list[Node]
    inner: list[Node]
    first: Node | None
    cat: Node | None
    alone: dict[Node, str] = field(default_factory=dict)

    @property
    def members(self) -> list[Node]:
        return [*self.bare, *self.inner, *([self.first] if self.first is not None else [])]


def merge_siblings(graph: Graph, kernels: Kernels) -> int:
    """Returns how many convolutions disappeared."""
    by_input: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "conv2d" and _may_merge(node) and kernels.of(node) == "conv2d":
            by_input.setdefault(node.inputs[0], []).append(node)
    count = 0
    for siblings in by_input.values():
        family = _family(graph, siblings)
        if len(siblings) > 1:
            for node, why in family.alone.items():
                graph.miss(node, "merge_siblings", f"not one step with {_beside(node, siblings)}: {why}")
        if len(family.members) < 2:
            continue
        merged = _merged(family)
        why = kernels.why_not(merged, "conv2d")
        if why:
            for node in family.members:
                graph.miss(node, "merge_siblings", f"not one step with {_beside(node, siblings)}: {why}")
            continue
        _apply(graph, family, merged)
        count += len(family.members) - 1
    return count


def _beside(node: Node, siblings: list[Node]) -> str:
    return ", ".join(sibling.label for sibling in siblings if sibling is not node)


def _may_merge(conv: Node) -> bool:
    a = conv.attrs
    bare = a.get("pre") is None and a.get("pre_activation", "none") == "none" and conv.roles == ("x",)
    return bare and is_pointwise(conv) and isinstance(a["recipe"], Recipe)


def _family(graph: Graph, siblings: list[Node]) -> Family:
    """Who goes together.

    Who opens no concatenation but stands in one, is returned, or is flattened into a row stays alone.
    """
    family = Family([], [], None, None)
    activations = {s.attrs["activation"] for s in siblings} - {"none"}
    common = activations.pop() if len(activations) == 1 else "none"
    for sibling in siblings:
        readers, activation = graph.readers(sibling), sibling.attrs["activation"]
        cats = [r for r in readers if r is not None and r.op == "cat"]
        bare = activation == "none" and common != "none"
        if None in readers or is_flattened(graph, sibling):
            family.alone[sibling] = "the caller receives it, or its pixels are read as one row"
        elif activation not in ("none", common):
            family.alone[sibling] = f"{activation} is not what they end with"
        elif bare and (cats or sibling.attrs["filters"] % ACT_FROM_MULTIPLE):
            family.alone[sibling] = f"no activation, and its filters are no multiple of {ACT_FROM_MULTIPLE}"
            if cats:
                family.alone[sibling] = f"no activation, and it is part of {cats[0].label}"
        elif bare:
            family.bare.append(sibling)
        elif not cats:
            family.inner.append(sibling)
        elif family.first is None and len(cats) == 1 and _opens(graph, sibling, cats[0]):
            family.first, family.cat = sibling, cats[0]
        else:
            family.alone[sibling] = f"it is part of {cats[0].label}, and not what opens it"
    return family


def _opens(graph: Graph, sibling: Node, cat: Node) -> bool:
    """Whether the sibling is the first input of an outermost concatenation, whose bytes are still free."""
    nested = any(r is not None and r.op == "cat" for r in graph.readers(cat))
    opens = cat.inputs[0] is sibling and cat.inputs.count(sibling) == 1
    return opens and not nested and not is_flattened(graph, cat)


def _merged(family: Family) -> Node:
    members = family.members
    one, last = members[0], members[-1]
    filters = sum(m.attrs["filters"] for m in members)
    bare = sum(m.attrs["filters"] for m in family.bare)
    attrs = {**last.attrs, "recipe": Stack(tuple(m.attrs["recipe"] for m in members)), "filters": filters,
             "act_from": bare}  # fmt: skip
    n, _, h, w = one.shape or (0, 0, 0, 0)
    fused = [name for m in members for name in m.fused]
    return Node(
        "conv2d", common_name(members), [one.inputs[0]], attrs, (n, filters, h, w), None, one.dtype, fused
    )


def _apply(graph: Graph, family: Family, merged: Node) -> None:
    members = family.members
    graph.insert(merged, before=min(members, key=graph.nodes.index))
    if family.cat is not None:
        _share_buffer(family, merged)
    start = 0
    for member in members:
        graph.rewire(member, [merged])
        filters = member.attrs["filters"]
        member.op, member.attrs, member.fused = "slice", {"start": start}, []
        member.inside = (merged, start)
        start += filters


def _share_buffer(family: Family, merged: Node) -> None:
    """One buffer for what the convolution writes and for the concatenation behind it."""
    assert family.cat is not None and family.first is not None
    cat, inner = family.cat, merged.channels - family.first.channels
    gap = -inner % LINE
    n, channels, h, w = cat.shape or (0, 0, 0, 0)
    shape = (n, gap + inner + channels, h, w)
    buffer = Node("buffer", f"{cat.name or 'cat'} and its siblings", [], {"gap": gap}, shape, None, cat.dtype)
    merged.inside = (buffer, gap)
    cat.inside = (buffer, gap + inner)


def common_name(members: list[Node]) -> str:
    """ "mixed.{branch0, branch1.0}" for "mixed.branch0" and "mixed.branch1.0"."""
    parts = [m.name.split(".") for m in members]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    prefix = ".".join([*parts[0][:shared], ""])
    return f"{prefix}{{{', '.join('.'.join(p[shared:]) for p in parts)}}}"
