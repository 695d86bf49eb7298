"""From the fused graph to the steps of a plan: which kernel each node gets, and where each value lives.

The choice depends on the layer alone, never on the batch or the number of threads: a sample gets the same
bits in any batch. `refusal(kind, params)` asks the native library ("" when it accepts); what it says is kept
for explain().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .graph import Graph, Live, Node, map_leaves
from .plan import Output, Plan, Ref, Step, Value
from .weights import Recipe

Refusal = Callable[[str, dict[str, int]], str]
Candidate = tuple[str, dict[str, int], str]  # kind, parameters, why the engine declines ("" if it does not)

# Below these sizes the transforms of F(2x2, 3x3) cost more than the multiplications they save.
WINOGRAD_MIN_CHANNELS = 32
WINOGRAD_MIN_OUTPUT = 4

GROUP_WIDTHS = (4, 8, 16, 32)


def winograd_declined(p: dict[str, int]) -> str:
    """Why this 3x3 convolution of stride 1 does not go to Winograd; "" when it does."""
    if p["c"] < WINOGRAD_MIN_CHANNELS or p["k"] < WINOGRAD_MIN_CHANNELS:
        return f"{p['c']} to {p['k']} channels: pays from {WINOGRAD_MIN_CHANNELS} on"
    height, width = p["h"] + 2 * p["pad_h"] - 2, p["w"] + 2 * p["pad_w"] - 2
    if height < WINOGRAD_MIN_OUTPUT or width < WINOGRAD_MIN_OUTPUT:
        return f"output {height}x{width}: pays from {WINOGRAD_MIN_OUTPUT}x{WINOGRAD_MIN_OUTPUT} on"
    return ""


def conv_params(node: Node) -> dict[str, int]:
    a, (_, c, h, w) = node.attrs, node.inputs[0].shape or ()
    return {
        "n": 1, "h": h, "w": w, "c": c, "k": a["filters"], "r": a["kernel"][0], "s": a["kernel"][1],
        "stride_h": a["stride"][0], "stride_w": a["stride"][1],
        "pad_h": a["padding"][0], "pad_w": a["padding"][1],
        "dilation_h": a["dilation"][0], "dilation_w": a["dilation"][1], "groups": a["groups"],
        "activation": int(a["activation"] == "relu"),
    }  # fmt: skip


def conv_candidates(node: Node) -> Iterator[Candidate]:
    """Best first. Kinds that are made for something else altogether are not mentioned."""
    p = conv_params(node)
    window = (p["r"], p["s"], p["dilation_h"], p["dilation_w"])
    strides, pads = {p["stride_h"], p["stride_w"]}, {p["pad_h"], p["pad_w"]}
    if window == (3, 3, 1, 1) and p["groups"] == 1 and strides == {1} and len(pads) == 1 and pads <= {0, 1}:
        yield "winograd_conv2d", p, winograd_declined(p)
    if window == (3, 3, 1, 1) and p["groups"] > 1 and pads == {1} and strides in ({1}, {2}):
        width = p["c"] // p["groups"]
        fits = p["k"] == p["c"] and width in GROUP_WIDTHS
        declined = "" if fits else f"{width} channels a group, {p['c']} to {p['k']} channels"
        yield "grouped_conv2d", p, declined
    yield "conv2d", p, ""


def pool_params(node: Node) -> dict[str, int]:
    a, (_, c, h, w) = node.attrs, node.inputs[0].shape or ()
    return {
        "n": 1, "h": h, "w": w, "c": c, "k": c, "r": a["kernel"][0], "s": a["kernel"][1],
        "stride_h": a["stride"][0], "stride_w": a["stride"][1],
        "pad_h": a["padding"][0], "pad_w": a["padding"][1],
        "ceil_mode": int(a["ceil_mode"]),
    }  # fmt: skip


def candidates(node: Node) -> Iterator[Candidate]:
    """Kernels that may take this node, best first."""
    if node.op == "conv2d":
        yield from conv_candidates(node)
    elif node.op == "max_pool2d":
        yield "max_pool2d", pool_params(node), ""
    elif node.op == "global_avg_pool":
        _, c, h, w = node.inputs[0].shape or ()
        yield "global_avg_pool", {"n": 1, "h": h, "w": w, "c": c, "k": c}, ""
    elif node.op == "linear":
        params = {"n": 1, "h": 1, "w": 1, "c": (node.inputs[0].shape or ())[1], "k": node.attrs["filters"]}
        yield "linear", {**params, "activation": int(node.attrs["activation"] == "relu")}, ""


def choose(node: Node, refusal: Refusal) -> tuple[str, dict[str, int], list[str]]:
    """(kernel, parameters, what the better ones said); the kernel is "aten" when none accepts."""
    said: list[str] = []
    params: dict[str, int] = {}
    for kind, params, declined in candidates(node):
        why = declined or refusal(kind, params)
        if not why:
            return kind, params, said
        said.append(f"{kind}: {why}")
    return "aten", params, said or ["no kernel does this operation"]


def recipe_of(node: Node) -> Recipe | None:
    if node.op not in ("conv2d", "linear"):
        return None
    bias = node.attrs["bias"]
    return Recipe(node.attrs["weight"].name, bias.name if bias else None, node.attrs.get("norms", ()))


def make_plan(graph: Graph, planar_input: bool, refusal: Refusal) -> Plan:
    """The plan's values and steps, without schedule and places. `planar_input`: x is NCHW, else NHWC."""
    return _Builder(graph, planar_input, refusal).build()


class _Builder:
    def __init__(self, graph: Graph, planar_input: bool, refusal: Refusal) -> None:
        self.graph, self.planar_input, self.refusal = graph, planar_input, refusal
        self.users = graph.users()
        self.values: list[Value] = []
        self.steps: list[Step] = []
        self.id: dict[Node, int] = {}
        self.input_as_map: int | None = None  # the input, once copied to NHWC

    def build(self) -> Plan:
        self.id[self.graph.input] = self.value(self.graph.input, home="input")
        computed = [node for node in self.graph.nodes if node is not self.graph.input]
        chosen = {node: choose(node, self.refusal) for node in computed}
        for node, (kernel, params, said) in chosen.items():
            self.place(node, chosen)
            if self.values[self.id[node]].same_as is None:
                self.step(node, kernel, params, said)
        outputs = [self.output(item) for item in self.graph.outputs]
        batch = (self.graph.input.shape or (0,))[0]
        return Plan(batch, self.values, self.steps, self.id[self.graph.input], outputs, self.graph.out_spec,
                    self.planar_input)  # fmt: skip

    def value(self, node: Node, home: str, same_as: int | None = None) -> int:
        self.values.append(Value(len(self.values), node.name, node.shape, node.stride, home, same_as))
        return len(self.values) - 1

    def place(self, node: Node, chosen: dict[Node, tuple[str, dict[str, int], list[str]]]) -> None:
        """Decide the home of the node's value."""
        source = node.inputs[0] if node.inputs else None
        home = self.values[self.id[source]].home if source is not None else ""
        if node.op == "flatten" and home in ("arena", "output"):
            self.id[node] = self.value(node, home, same_as=self.id[source])
            return
        if chosen[node][0] != "aten":
            returned = any(user is None for user in self.users[node])
            self.id[node] = self.value(node, "output" if returned and lies_as_nhwc(node) else "arena")
            return
        feeds_kernel = any(user is not None and chosen[user][0] != "aten" for user in self.users[node])
        self.id[node] = self.value(node, "arena" if feeds_kernel else "object")

    def step(self, node: Node, kernel: str, params: dict[str, int], said: list[str]) -> None:
        inputs = [self.id[source] for source in node.inputs]
        params = {key: value for key, value in params.items() if key != "n"}
        if kernel != "aten":
            inputs, params = self.feed(node, kernel, inputs, params)
        call = None
        if node.op == "aten":
            args, kwargs = self.arguments(node.attrs["args"]), self.arguments(node.attrs["kwargs"])
            call = (node.attrs["target"], args, kwargs)
        attrs = {**params, **formula_attrs(node)} if kernel == "aten" else params
        step = Step(node.op, kernel, node.name, inputs, self.id[node], attrs, recipe_of(node), call=call)
        step.fused, step.refusals = list(node.fused), said
        self.steps.append(step)

    def feed(
        self, node: Node, kernel: str, inputs: list[int], params: dict[str, int]
    ) -> tuple[list[int], dict[str, int]]:
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
            _, c, h, w = self.graph.input.shape or ()
            shape = {"h": h, "w": w, "c": c, "k": c}
            self.steps.append(Step("to_nhwc", "to_nhwc", "input", [image], self.input_as_map, shape))
        return [self.input_as_map if i == image else i for i in inputs], params

    def arguments(self, tree: Any) -> Any:
        return map_leaves(tree, lambda leaf: Ref(self.id[leaf]) if isinstance(leaf, Node) else leaf)

    def output(self, item: Any) -> Output:
        if not isinstance(item, Node):
            return Output(None, item)
        value = self.values[self.id[item]]
        if value.home != "arena" or value.same_as is not None or not is_planar(item):
            return Output(value.id)
        known = [s for s in self.steps if s.op == "to_nchw" and s.inputs == [value.id]]
        if known:
            return Output(known[0].output)
        planar = self.value(item, home="planar")
        _, c, h, w = item.shape or ()
        shape = {"h": h, "w": w, "c": c, "k": c}
        self.steps.append(Step("to_nchw", "to_nchw", item.name, [value.id], planar, shape))
        return Output(planar)


def formula_attrs(node: Node) -> dict[str, Any]:
    """What the plain formula of a node needs when no kernel takes it (run_reference.formula)."""
    call = ("args", "kwargs", "target", "norms")
    return {k: v.name if isinstance(v, Live) else v for k, v in node.attrs.items() if k not in call}


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
