"""The captured network as a small graph of nodes, before anything is placed or chosen.

    Node    one operation; its inputs are nodes, its parameters are names of the model's tensors
    Graph   nodes in execution order, the input, the outputs

Operations with a meaning of their own (the rest is "aten" and runs through PyTorch):

    input   conv2d   batch_norm   relu   add   max_pool2d   global_avg_pool   flatten   linear   identity

`flatten` only joins [N, C, 1, 1] to [N, C]: the same bytes. `identity` is dropout and its like in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Live:
    """A parameter or buffer of the model, by its dotted name; its value is looked up when it is needed."""

    name: str


@dataclass(eq=False)
class Node:
    op: str
    name: str  # path of the module it came from: "layer1.0.conv1"
    inputs: list[Node] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None  # None: the result is no tensor (a list from chunk, say)
    stride: tuple[int, ...] | None = None  # what eager PyTorch gives
    dtype: torch.dtype | None = None
    fused: list[str] = field(default_factory=list)  # names of what was absorbed, in order

    def __repr__(self) -> str:
        return f"{self.op}({self.name}, {self.shape})"


@dataclass(eq=False)
class Graph:
    nodes: list[Node]
    input: Node
    outputs: list[Any]  # nodes, or constants that the model returned
    out_spec: Any  # how to rebuild the model's return value from `outputs`

    def users(self) -> dict[Node, list[Node | None]]:
        """Who reads each node; None stands for the caller of the model. Reading twice counts twice."""
        found: dict[Node, list[Node | None]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                found[source].append(node)
        for output in self.outputs:
            if isinstance(output, Node):
                found[output].append(None)
        return found

    def replace(self, old: Node, new: Node) -> None:
        """Make everybody who reads `old` read `new`, and drop `old`."""
        for node in self.nodes:
            if old in node.inputs:
                node.inputs = [new if source is old else source for source in node.inputs]
                if "args" in node.attrs:
                    node.attrs["args"] = swap(node.attrs["args"], old, new)
                    node.attrs["kwargs"] = swap(node.attrs["kwargs"], old, new)
        self.outputs = [new if output is old else output for output in self.outputs]
        self.nodes.remove(old)

    def drop_unused(self) -> None:
        """Remove nodes that nobody reads. No captured operation has side effects (see convert.py)."""
        used: set[Node] = {output for output in self.outputs if isinstance(output, Node)} | {self.input}
        for node in reversed(self.nodes):
            if node in used:
                used.update(node.inputs)
        self.nodes = [node for node in self.nodes if node in used]


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves of nested lists, tuples and dicts (the arguments of an ATen call)."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        yield tree
        return
    for item in tree:
        yield from leaves(item)


def map_leaves(tree: Any, change: Any) -> Any:
    """The same nesting with `change` applied to every leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(item, change) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [map_leaves(item, change) for item in tree]
    return change(tree)


def swap(tree: Any, old: Node, new: Node) -> Any:
    return map_leaves(tree, lambda leaf: new if leaf is old else leaf)


def unique(items: Iterable[Node]) -> list[Node]:
    return list(dict.fromkeys(items))
