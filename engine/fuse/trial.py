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

    def why_not(self, node: Node, kind: str) -> str:
        """Why a node would not run on this kind of kernel; "" when it would."""
        found, _, said = choose(node, self.refusal)
        return "" if found == kind else "; ".join(said) or f"it would run on {found} instead of {kind}"

    def keeps(self, node: Node, changed: Node) -> bool:
        """Whether the changed node runs on the kind of kernel that the node has; see `lost`."""
        return not self.lost(node, changed)

    def lost(self, node: Node, changed: Node) -> str:
        """Why the changed node would not run on the kind of kernel that the node has; "" when it does.

        PyTorch takes everything. "linear" is "conv2d" for maps of one pixel.
        """
        own, (kind, _, said) = self.of(node), choose(changed, self.refusal)
        if own == "aten" or {own, kind} <= {"linear", "conv2d"} or own == kind:
            return ""
        return "; ".join(said) or f"it would run on {kind} instead of {own}"


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
