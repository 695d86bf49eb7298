"""The captured network as a small graph of nodes, before anything is placed or chosen.

    Node    one operation; its inputs are nodes, its parameters are recipes over the model's tensors
    Graph   nodes in execution order, the input, the outputs

Operations with a meaning of their own (the rest is "aten" and runs through PyTorch):

    input
    conv2d             act(((conv(pre(x)) + bias) * gate) + residual)
    separable_conv2d   act(conv1x1(depth_act(depthwise(pre_act(x)) + depth_bias)) + bias + residual)
    linear             act(x W^T + b)
    affine             act((x * scale + shift) * gate + residual): norms, activations, sums, gates, copies
    max_pool2d   avg_pool2d   global_avg_pool   local_response_norm   cat   pad
    layer_norm         (x - mean) / sqrt(variance + eps) * scale + shift, over the channels of rows or pixels
    group_norm         the same over the pixels and channels of each group
    multiply           x * residual, two maps   leaky_relu   upsample_nearest2d
    l2_normalize       x / max(||x||, eps), over the channels of rows or pixels
    squared_distances  of rows [N, C] to centres [K, C]
    flatten            [N, C, 1, 1] to [N, C] or back, or a map to rows for a linear layer: the same bytes
    row                [N, C] as a map of C pixels of one channel, or back: the same bytes
    slice              some channels
    shuffle            [N, G * C, H, W] with channel c * G + g where channel g * C + c was
    identity           dropout and its like in eval mode

`roles` says what each input is: x, gate, residual. `inside` says that the result is written into the bytes of
another node's: (owner, first channel). An owner may be a node of op "buffer", which stands for bytes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Live:
    """A parameter or buffer of the model, by its dotted name; its value is looked up when it is needed."""

    name: str


Call = tuple[Any, Any, Any]  # target, args, kwargs


@dataclass(eq=False)
class Node:
    op: str
    name: str  # path of the module it came from: "layer1.0.conv1"
    inputs: list[Node] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None  # None: the result is no tensor (a list from chunk, say)
    stride: tuple[int, ...] | None = None  # what eager PyTorch gives
    dtype: torch.dtype | None = None  # in which a plan holds it
    narrow: torch.dtype | None = None  # the 16-bit type of the model, in which eager holds it
    fused: list[str] = field(default_factory=list)  # names of what was absorbed, in order
    roles: tuple[str, ...] = ("x",)
    inside: tuple[Node, int] | None = None

    def input(self, role: str) -> Node | None:
        return dict(zip(self.roles, self.inputs)).get(role)

    @property
    def label(self) -> str:
        """The module's path, else what the operation is called."""
        return self.name or str(self.attrs.get("label", self.op))

    @property
    def channels(self) -> int:
        return (self.shape or (0, 0))[1]

    @property
    def pixels(self) -> int:
        """Of one image."""
        shape = self.shape or ()
        return shape[2] * shape[3] if len(shape) == 4 else 1

    @property
    def called(self) -> str:
        """The ATen operation that the node calls, "aten.cumsum"; its own where it calls none."""
        target = self.attrs.get("target")
        if target is None:
            return self.op
        packet = getattr(target, "overloadpacket", None)
        return str(getattr(target, "__name__", target)) if packet is None else str(packet)

    def __repr__(self) -> str:
        return f"{self.op}({self.name}, {self.shape})"


@dataclass(eq=False)
class Graph:
    """Change inputs and nodes through the methods: they keep the list of readers."""

    nodes: list[Node]
    input: Node
    outputs: list[Any]  # nodes, or constants that the model returned
    out_spec: Any  # how to rebuild the model's return value from `outputs`
    computed: dict[str, Call] = field(default_factory=dict)  # from parameters alone, by name
    shows_input: bool = False  # whether an output may show the input's own memory
    shapes: dict[Live, tuple[int, ...]] = field(default_factory=dict)  # of the model's tensors
    missed: dict[Node, dict[str, str]] = field(default_factory=dict)  # see `miss`
    _readers: dict[Node, list[Node | None]] | None = None

    def is_map(self, node: Any, ranks: tuple[int, ...] = (4,)) -> bool:
        """Of floats, one for each image of the batch: kernels take as many images as the model was given."""
        shape = (node.shape or ()) if isinstance(node, Node) and node.dtype is torch.float32 else ()
        return len(shape) in ranks and shape[0] == (self.input.shape or ())[0]

    def is_map_or_rows(self, node: Any) -> bool:
        return self.is_map(node, (2, 4))

    def users(self) -> dict[Node, list[Node | None]]:
        """Who reads each node; None stands for the caller of the model. Reading twice counts twice."""
        if self._readers is None:
            found: dict[Node, list[Node | None]] = {node: [] for node in self.nodes}
            for node in self.nodes:
                for source in node.inputs:
                    found[source].append(node)
            for output in self.outputs:
                if isinstance(output, Node):
                    found[output].append(None)
            self._readers = found
        return self._readers

    def readers(self, node: Node) -> list[Node | None]:
        return self.users()[node]

    def only_reader(self, node: Node) -> Node | None:
        """The node that alone reads this one, once; None when there is no such node."""
        readers = self.readers(node)
        return readers[0] if len(readers) == 1 else None

    def others_reading(self, node: Node, *known: Node) -> str:
        """Who reads the node beside the known ones, in words; "" when nobody does."""
        others = [r for r in dict.fromkeys(self.readers(node)) if r not in known]
        names = ["the caller" if r is None else f"{r.label} ({r.op})" for r in others[:3]]
        more = [f"{len(others) - 3} more"] if len(others) > 3 else []
        return " and ".join(names + more)

    def miss(self, node: Node, rewrite: str, why: str) -> None:
        """Keep the sentence why this rewrite leaves the node a step of its own; the last one counts. It goes
        with the node."""
        self.missed.setdefault(node, {})[rewrite] = why

    def rewire(self, node: Node, inputs: list[Node], roles: tuple[str, ...] | None = None) -> None:
        """Let the node read other inputs."""
        users = self.users()
        for source in node.inputs:
            users[source].remove(node)
        for source in inputs:
            users[source].append(node)
        node.inputs = inputs
        node.roles = node.roles if roles is None else roles

    def insert(self, node: Node, before: Node) -> None:
        users = self.users()
        users[node] = []
        for source in node.inputs:
            users[source].append(node)
        self.nodes.insert(self.nodes.index(before), node)

    def move(self, node: Node, before: Node) -> None:
        self.nodes.remove(node)
        self.nodes.insert(self.nodes.index(before), node)

    def replace(self, old: Node, new: Node) -> None:
        """Make everybody who reads `old` read `new`, and drop `old`."""
        users = self.users()
        for node in dict.fromkeys(users[old]):
            if node is None:
                self.outputs = [new if output is old else output for output in self.outputs]
                continue
            node.inputs = [new if source is old else source for source in node.inputs]
            if "args" in node.attrs:
                node.attrs["args"] = swap(node.attrs["args"], old, new)
                node.attrs["kwargs"] = swap(node.attrs["kwargs"], old, new)
        users[new] += users[old]
        users[old] = []
        self.drop(old)

    def drop(self, node: Node) -> None:
        """Remove a node that nobody reads."""
        users = self.users()
        assert not users[node], f"{node} has readers"
        for source in node.inputs:
            users[source].remove(node)
        del users[node]
        self.missed.pop(node, None)
        self.nodes.remove(node)

    def drop_unused(self) -> None:
        """Remove nodes that nobody reads. No captured operation has side effects (see convert.py)."""
        used: set[Node] = {output for output in self.outputs if isinstance(output, Node)} | {self.input}
        for node in reversed(self.nodes):
            if node in used:
                used.update(node.inputs)
        self.nodes = [node for node in self.nodes if node in used]
        self._readers = None


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
