"""Dimensions between the batch and the channels: shuffled channels, split attention, convolved channels.

    view, transpose, view                         ->  shuffle: channel c * R + r is channel r * (C / R) + c
    stack or view, softmax over R = 2, mul, sum   ->  x_0 * sigmoid(z_0 - z_1) + x_1 * sigmoid(z_1 - z_0)
    conv1d of [N, 1, C], sigmoid                  ->  1xS convolution of the map of C pixels of one channel

Each of the R maps is a map, or a slice of one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..graph import Graph, Live, Node
from ..recipes import Fixed, Recipe, scaling
from .trial import Kernels

aten = torch.ops.aten
SHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


def find_shuffles(graph: Graph, kernels: Kernels) -> int:
    """view, transpose, view of channels -> shuffle."""
    count = 0
    for node in [n for n in graph.nodes if _calls(n, *SHAPES)]:
        turned = node.inputs[0]
        apart = turned.inputs[0] if _calls(turned, aten.transpose.int) else None
        if apart is None or not _calls(apart, *SHAPES):
            continue
        x, dims = apart.inputs[0], {d % 5 for d in turned.attrs["args"][1:]}
        shape, split = x.shape or (), apart.shape or ()
        fits = len(shape) == 4 and shape == node.shape and len(split) == 5 and dims == {1, 2}
        if not fits or (split[0], *split[3:]) != (shape[0], *shape[2:]) or not graph.is_map(x):
            continue
        shuffle = Node("shuffle", node.name, [x], {"groups": split[1]}, shape, node.stride, node.dtype)
        shuffle.narrow = node.narrow
        graph.insert(shuffle, before=node)
        graph.replace(node, shuffle)
        count += 1
    graph.drop_unused()
    return count


def split_attention(graph: Graph, kernels: Kernels) -> int:
    """Sums over R of stacked maps; returns how many."""
    finder = _Finder(graph)
    for node in list(graph.nodes):
        finder.look(node)
    graph.drop_unused()
    return finder.count


def convolve_channels(graph: Graph, kernels: Kernels) -> int:
    """The gates of ECA: neighbours among the C numbers of an image, which lie in memory like pixels."""
    count = 0
    for node in [n for n in graph.nodes if _calls(n, aten.conv1d.default)]:
        found = _channel_conv(graph, node)
        end = graph.only_reader(node)
        activation = "sigmoid" if _calls(end, aten.sigmoid.default) else "none"
        last = graph.only_reader(end) if activation != "none" else end
        n, _, channels = node.shape or (0, 0, 0)
        if found is None or not _calls(last, *SHAPES) or last.shape != (n, channels, 1, 1):
            continue
        source, attrs = found
        size = (1, 1, channels)
        row = Node("row", node.name, [source], {"size": size}, (n, *size), None, node.dtype, node.narrow)
        conv = replace(row, op="conv2d", inputs=[row], attrs={**attrs, "activation": activation}, fused=[])
        gate = replace(row, inputs=[conv], attrs={"size": (channels, 1, 1)}, shape=last.shape, fused=[])
        gate.stride = last.stride
        for each in (row, conv, gate):
            graph.insert(each, before=last)
        graph.replace(last, gate)
        count += 1
    graph.drop_unused()
    return count


def _channel_conv(graph: Graph, node: Node) -> tuple[Node, dict[str, Any]] | None:
    """The C numbers of each image, and the convolution along them; None where it changes their number."""
    given = [*node.attrs["args"], *(None,) * 7]
    view, weight, bias, stride, padding, dilation = given[:6]
    source = view.inputs[0] if _calls(view, *SHAPES) and view.inputs else None
    if source is None or node.attrs["kwargs"] or not isinstance(weight, Live) or bias is not None:
        return None
    size, (n, ones, channels) = graph.shapes[weight][2], node.shape or ()
    one_row = source.shape in ((n, channels), (n, channels, 1, 1)) and graph.is_map_or_rows(source)
    plain = stride in (None, [1]) and dilation in (None, [1]) and padding == [size // 2] and size % 2
    if not one_row or ones != 1 or not plain or _origin(source).op in ("input", "slice"):
        return None
    call = (aten.reshape.default, [weight, [1, 1, 1, size]], {})
    name = f"{call[0]}({weight.name}, {call[1][1]})"
    graph.computed[name] = call
    attrs = {
        "recipe": Recipe(name), "kernel": (1, size), "filters": 1, "groups": 1, "stride": (1, 1),
        "padding": (0, size // 2), "dilation": (1, 1),
    }  # fmt: skip
    return source, attrs


def _origin(node: Node) -> Node:
    """Whose bytes these are; those of a slice lie among others, and are no row."""
    while node.op in ("flatten", "row"):
        node = node.inputs[0]
    return node


class _Finder:
    """parts: the R maps that a node holds. rows: the map of one pixel whose numbers a node holds in order."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.count = graph, 0
        self.parts: dict[Node, list[Node]] = {}
        self.rows: dict[Node, Node] = {}

    def look(self, node: Node) -> None:
        if node.op not in ("aten", "flatten") or node.dtype is not torch.float32 or not node.inputs:
            return
        source = node.inputs[0]
        if _calls(node, aten.stack.default):
            if all(map(self.graph.is_map, node.inputs)) and node.attrs["args"][1:] == [1]:
                self.parts[node] = list(node.inputs)
        elif _calls(node, *SHAPES) or node.op == "flatten":
            self.reshape(node, source)
        elif _calls(node, aten.transpose.int):
            shape = source.shape or ()
            first, second = sorted(d % len(shape) for d in node.attrs["args"][1:])
            if source in self.rows and 0 < first == second - 1 and 1 in (shape[first], shape[second]):
                self.rows[node] = self.rows[source]
        elif _calls(node, aten.softmax.int):
            self.softmax(node, source)
        elif _calls(node, aten.mul.Tensor):
            self.gate(node)
        elif _calls(node, aten.sum.dim_IntList):
            self.sum(node, source)

    def reshape(self, node: Node, source: Node) -> None:
        shape = node.shape or ()
        if source in self.parts and all(part.pixels == 1 for part in self.parts[source]):
            self.parts[node] = self.parts[source]
        elif source in self.rows:
            self.rows[node] = self.rows[source]
        elif self.graph.is_map(source) and len(shape) == 5 and _same_images(source, shape):
            self.parts[node] = self.slices(source, shape[1])
        elif self.graph.is_map(source) and source.pixels == 1:
            self.rows[node] = source

    def slices(self, x: Node, count: int) -> list[Node]:
        n, channels, h, w = x.shape or ()
        size = channels // count
        found = []
        for start in range(0, channels, size):
            call = {"target": aten.slice.Tensor, "args": [x, 1, start, start + size], "kwargs": {}}
            shape, attrs = (n, size, h, w), {"start": start, **call}
            node = Node("slice", x.name, [x], attrs, shape, None, x.dtype, x.narrow)
            self.graph.insert(node, before=self.behind(x))
            found.append(node)
        return found

    def behind(self, x: Node) -> Node:
        return self.graph.nodes[self.graph.nodes.index(x) + 1]

    def softmax(self, node: Node, source: Node) -> None:
        """Of two, one is the sigmoid of their difference."""
        shape, given = node.shape or (), node.attrs["args"]
        if given[1] != 1 or shape[1] != 2 or given[2:] not in ([], [None]):
            return
        if source in self.parts and len(self.parts[source]) == 2:
            z = self.parts[source]
        elif source in self.rows:
            z = self.slices(self.rows[source], 2)
        else:
            return
        if all(part.pixels == 1 and part.shape[0] == shape[0] for part in z):
            less = scaling(z[0].channels, Fixed((-1.0,)))
            self.parts[node] = [
                self.affine(node, other, less, "sigmoid", residual=own) for own, other in (z, z[::-1])
            ]

    def gate(self, node: Node) -> None:
        both = [self.maps_of(side) for side in node.attrs["args"]]
        if None in both or len(both[0]) != len(both[1]):
            return
        x, gates = both if both[1][0].pixels == 1 else both[::-1]
        if gates[0].pixels == 1 and gates[0].channels == x[0].channels:
            self.parts[node] = [self.affine(node, part, gate=gate) for part, gate in zip(x, gates)]

    def sum(self, node: Node, source: Node) -> None:
        given = node.attrs["args"]
        parts = self.maps_of(source)
        if parts is None or node.attrs["kwargs"] or given[1:] not in ([[1]], [[1], False]) or len(parts) < 2:
            return
        total = parts[0]
        for part in parts[1:]:
            total = self.affine(node, part, residual=total)
        total.stride = node.stride
        self.graph.replace(node, total)
        self.count += 1

    def maps_of(self, node: Any) -> list[Node] | None:
        """The R maps of a node that shows them as [N, R, C, H, W]."""
        parts = self.parts.get(node) if isinstance(node, Node) else None
        if parts is None:
            return None
        n, *sizes = parts[0].shape or ()
        return parts if node.shape == (n, len(parts), *sizes) else None

    def affine(self, at: Node, x: Node, recipe: Any = None, activation: str = "none", **others: Node) -> Node:
        attrs = {"recipe": recipe, "activation": activation, "label": at.label}
        node = Node("affine", at.name, [x, *others.values()], attrs, x.shape, None, x.dtype, at.narrow)
        node.roles = ("x", *others)
        self.graph.insert(node, before=at)
        return node


def _same_images(x: Node, shape: tuple[int, ...]) -> bool:
    """Whether [N, R, C, H, W] are the channels of x, [N, R * C, H, W]."""
    n, _, h, w = x.shape or (0, 0, 0, 0)
    return (shape[0], *shape[3:]) == (n, h, w)


def _calls(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "aten" and node.attrs["target"] in targets
