"""From the fused graph to the steps of a plan: each node gets its kernel, each value the place it lives in.

What `candidates.choose` says about the kernels that declined is kept for explain().
"""

from __future__ import annotations

from typing import Any

from .candidates import Choice, Choices, Params, Refusal, choose
from .graph import Graph, Node, map_leaves
from .plan import Output, Plan, Ref, Step, Value
from .recipes import Filters

PARTS = {"recipe": "weight", "pre": "pre", "depth": "depth"}  # attribute of a node: part in weights.OPERANDS


def make_plan(
    graph: Graph,
    planar_input: bool,
    refusal: Refusal,
    precision: str = "highest",
    choices: Choices | None = None,
) -> Plan:
    """The plan's values and steps, without schedule and places. `planar_input`: x is NCHW, else NHWC."""
    return _Builder(graph, planar_input, refusal, precision, choices).build()


class _Builder:
    def __init__(
        self,
        graph: Graph,
        planar_input: bool,
        refusal: Refusal,
        precision: str,
        choices: Choices | None,
    ) -> None:
        self.graph, self.planar_input, self.refusal = graph, planar_input, refusal
        self.precision, self.choices = precision, choices
        self.values: list[Value] = []
        self.steps: list[Step] = []
        self.id: dict[Node, int] = {}
        self.chosen: dict[Node, Choice] = {}
        self.input_as_map: int | None = None  # the input, once copied to NHWC
        self.copies: dict[tuple[int, str], int] = {}  # of values, for the caller, by the kernel that copies

    def build(self) -> Plan:
        self.id[self.graph.input] = self.value(self.graph.input, home="input")
        computed = [node for node in self.graph.nodes if node is not self.graph.input]
        self.chosen = {node: choose(node, self.refusal, self.precision, self.choices) for node in computed}
        for node in computed:
            self.place(node)
            if not self.is_view(node):
                self.step(node, *self.chosen[node])
        outputs = [self.output(item) for item in self.graph.outputs]
        batch = (self.graph.input.shape or (0,))[0]
        return Plan(batch, self.values, self.steps, self.id[self.graph.input], outputs, self.graph.out_spec,
                    self.planar_input, computed=self.graph.computed)  # fmt: skip

    def value(self, node: Node, home: str, same_as: int | None = None, channel: int = 0) -> int:
        gap = node.attrs.get("gap", 0) if node.op == "buffer" else 0
        number = len(self.values)
        self.values.append(Value(number, node.name, node.shape, node.stride, home, same_as, channel, gap))
        return number

    def place(self, node: Node) -> int:
        """The node's value, made if need be; its home is decided here. An owner comes before its slices."""
        if node not in self.id:
            self.id[node] = (
                self.within(node) if self.shows_another(node) else self.value(node, self.home(node))
            )
        return self.id[node]

    def shows_another(self, node: Node) -> bool:
        same_bytes = node.op in ("flatten", "row")
        return node.inside is not None or (same_bytes and self.is_native_memory(node.inputs[0]))

    def within(self, node: Node) -> int:
        owner, channel = node.inside if node.inside is not None else (node.inputs[0], 0)
        same_as = self.place(owner)
        return self.value(node, self.values[same_as].home, same_as, channel)

    def is_view(self, node: Node) -> bool:
        """Whether the bytes are there without a step: written by others, or shown in another shape."""
        if node.op in ("flatten", "row"):
            return self.values[self.id[node]].same_as is not None
        return node.op in ("cat", "slice")

    def is_native_memory(self, node: Node) -> bool:
        return self.values[self.place(node)].home in ("arena", "output")

    def home(self, node: Node) -> str:
        users = self.graph.readers(node) if node.op != "buffer" else []
        if node.op in ("buffer", "cat") or self.chosen[node][0] != "aten":
            returned = any(user is None for user in users)
            return "output" if returned and lies_as_nhwc(node) else "arena"
        feeds = any(user is not None and self.reads_memory(user) for user in users)
        return "arena" if feeds else "object"

    def reads_memory(self, node: Node) -> bool:
        """Whether this reader wants its input as a kernel would."""
        return node.op in ("cat", "flatten", "row", "slice") or self.chosen[node][0] != "aten"

    def step(self, node: Node, kernel: str, params: Params, said: list[str]) -> None:
        inputs = [self.id[source] for source in node.inputs]
        params = {key: value for key, value in params.items() if key != "n"}
        if kernel != "aten":
            inputs, params = self.feed(node, kernel, inputs, params)
        call = None
        if kernel == "aten" and node.op in CALLS:
            args, kwargs = self.arguments(node.attrs["args"]), self.arguments(node.attrs["kwargs"])
            call = (node.attrs["target"], args, kwargs)
        attrs = {key: value for key, value in node.attrs.items() if key not in NOT_PLAIN}
        step = Step(node.op, kernel, node.name, inputs, self.id[node], params, recipes_of(node),
                    list(node.fused), said, list(self.graph.missed.get(node, {}).values()), call, node.roles,
                    attrs)  # fmt: skip
        self.steps.append(step)

    def feed(self, node: Node, kernel: str, inputs: list[int], params: Params) -> tuple[list[int], Params]:
        """A kernel reads NHWC. The model's input may be planar: the kernel takes that, or gets a copy."""
        if not self.planar_input or self.id[self.graph.input] not in inputs:
            return inputs, params
        image = self.id[self.graph.input]
        planar = {**params, "nchw_in": 1}
        only_x = image not in inputs[1:]
        if node.op == "conv2d" and only_x and not self.refusal(kernel, {**planar, "n": 1}):
            return inputs, planar
        if self.input_as_map is None:
            self.input_as_map = self.value(self.graph.input, home="arena")
            self.steps.append(
                Step("to_nhwc", "to_nhwc", "input", [image], self.input_as_map, sizes_of(self.graph.input))
            )
        return [self.input_as_map if i == image else i for i in inputs], params

    def arguments(self, tree: Any) -> Any:
        return map_leaves(tree, lambda leaf: Ref(self.id[leaf]) if isinstance(leaf, Node) else leaf)

    def output(self, item: Any) -> Output:
        """What the caller receives is dense: slices and planar maps are copied out, once each."""
        if not isinstance(item, Node):
            return Output(None, item)
        value = self.values[self.id[item]]
        if (
            item.op in ("flatten", "row")
            or len(item.shape or ()) != 4
            or value.home not in ("arena", "output")
        ):
            return Output(value.id)
        is_slice = value.same_as is not None
        if is_planar(item) and (is_slice or value.home == "arena"):
            return Output(self.copy_out(item, value.id, "to_nchw", "planar"))
        if is_slice and lies_as_nhwc(item) and not self.refusal("affine", {**sizes_of(item), "n": 1}):
            return Output(self.copy_out(item, value.id, "affine", "output"))
        return Output(value.id)

    def copy_out(self, item: Node, value: int, kernel: str, home: str) -> int:
        if (value, kernel) not in self.copies:
            copy = self.copies[value, kernel] = self.value(item, home)
            attrs = {"activation": "none"}
            self.steps.append(Step(kernel, kernel, item.name, [value], copy, sizes_of(item), attrs=attrs))
        return self.copies[value, kernel]


CALLS = ("aten", "identity", "pad")  # what PyTorch runs as it was written when no rewrite has found better
NOT_PLAIN = {"args", "kwargs", "target", *PARTS}


def sizes_of(node: Node) -> Params:
    """Of a copy."""
    _, c, h, w = node.shape or ()
    return {"h": h, "w": w, "c": c, "k": c}


def recipes_of(node: Node) -> dict[str, Filters]:
    found = {part: node.attrs[attr] for attr, part in PARTS.items() if node.attrs.get(attr) is not None}
    if node.op == "avg_pool2d" and "weight" in found:
        found["bias"] = found.pop("weight")
    return found


def lies_as_nhwc(node: Node) -> bool:
    """Whether eager's strides put this result into memory as NHWC, or as rows [N, C]."""
    shape, stride = node.shape or (), node.stride or ()
    if len(shape) == 2:
        return is_dense(shape, stride, (0, 1))
    return len(shape) == 4 and is_dense(shape, stride, (0, 2, 3, 1))


def is_planar(node: Node) -> bool:
    return len(node.shape or ()) == 4 and is_dense(node.shape or (), node.stride or (), (0, 1, 2, 3))


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...], order: tuple[int, ...]) -> bool:
    """Whether the elements lie without gaps, the last axis of `order` innermost."""
    expected = 1
    for axis in reversed(order):
        if shape[axis] != 1 and stride[axis] != expected:
            return False
        expected *= shape[axis]
    return True
