"""The question of every rewrite: does the library have a kernel for the node that it would make?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..candidates import Refusal, choose
from ..graph import Node


class Kernels:
    """Which kernel takes a node."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal

    def of(self, node: Node) -> str:
        """Its kind; "aten" when none does."""
        return choose(node, self.refusal)[0]

    def keeps(self, node: Node, changed: Node) -> bool:
        """Whether the changed node runs on the kind of kernel that the node has; PyTorch takes everything.

        "linear" is "conv2d" for maps of one pixel.
        """
        kinds = [{"linear": "conv2d"}.get(kind, kind) for kind in (self.of(node), self.of(changed))]
        return kinds[0] in ("aten", kinds[1])


def changed(
    node: Node, inputs: list[Node] | None = None, roles: tuple[str, ...] | None = None, **attrs: Any
) -> Node:
    """A copy of the node with other attributes and inputs, which no graph knows."""
    return replace(
        node,
        inputs=node.inputs if inputs is None else inputs,
        roles=node.roles if roles is None else roles,
        attrs={**node.attrs, **attrs},
        fused=list(node.fused),
    )
