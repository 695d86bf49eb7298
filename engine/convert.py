"""From an exported ATen program to a Graph: recognise what has a kernel, make in-place operations functional.

In-place calls (`relu_`, `add_`) become their functional twins, and whoever reads the tensor afterwards reads
the result. That is right as long as nobody looks at the same memory through another tensor; if somebody does,
or if the model writes to its input or to a buffer, there is no plan.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from .capture import PREFIX, Uncapturable
from .graph import Call, Graph, Live, Node, leaves, map_leaves
from .recognise import RECOGNISERS, piece

aten = torch.ops.aten

# Checks that torch.export adds about facts which are fixed in a plan: shapes, dtypes, devices.
CHECKS = {
    "aten::_assert_tensor_metadata", "aten::_assert_scalar", "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
}  # fmt: skip
# A rewrite of fuse/ either gives these a meaning or makes them ATen calls again.
RETURNING = {"identity", "flatten", "slice", "pad", "cat", "layer_norm"}
# What they mean depends on how their argument lies in memory.
BY_STRIDES = {"aten::as_strided", "aten::as_strided_", "aten::as_strided_copy", "aten::as_strided_scatter"}
# In eval mode these return their input itself, which their schema does not say.
DROPOUTS = {"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout"}


def convert(exported: Any) -> Graph:
    """The Graph of an ExportedProgram. Raises Uncapturable when its meaning cannot be kept."""
    return _Converter(exported).run()


NARROW = (torch.bfloat16, torch.float16)


class _Converter:
    def __init__(self, exported: Any) -> None:
        self.exported = exported
        self.fx_nodes = list(exported.graph.nodes)
        self.position = {node: number for number, node in enumerate(self.fx_nodes)}
        self.value: dict[Any, Any] = {}  # fx node -> Node, Live or constant
        self.nodes: list[Node] = []
        self.memory = _Memory(self.fx_nodes)
        self.weight_shapes: dict[Live, tuple[int, ...]] = {}
        self.computed: dict[str, Call] = {}
        self.narrow: torch.dtype | None = None  # the 16-bit type that the model computes in

    def run(self) -> Graph:
        source = self.placeholders()
        for position, fx_node in enumerate(self.fx_nodes):
            if fx_node.op == "call_function":
                self.call(position, fx_node)
            elif fx_node.op not in ("placeholder", "output"):
                raise Uncapturable(f"the exported graph holds a {fx_node.op} node ({fx_node.target})")
        outputs = self.outputs()
        spec = self.exported.call_spec.out_spec
        shown = any(self.memory.is_input(node) for node in self.returned())
        return Graph(self.nodes, source, outputs, spec, self.computed, shown, self.weight_shapes)

    def placeholders(self) -> Node:
        signature = self.exported.graph_signature
        source = None
        for fx_node, spec in zip([n for n in self.fx_nodes if n.op == "placeholder"], signature.input_specs):
            kind = spec.kind.name
            if kind in ("PARAMETER", "BUFFER"):
                live = Live(spec.target.removeprefix(PREFIX))
                self.value[fx_node] = live
                self.weight_shapes[live] = tuple(fx_node.meta["val"].shape)
            elif kind == "USER_INPUT" and source is None:
                source = self.node(fx_node, "input", "input", [], {})
            else:
                raise Uncapturable(f"{spec.target} is a tensor, but neither input, parameter nor buffer")
        if source is None:
            raise Uncapturable("the model has no tensor input")
        return source

    def returned(self) -> list[Any]:
        """The fx nodes that are returned."""
        return [item for item in self.fx_nodes[-1].args[0] if isinstance(item, torch.fx.Node)]

    def outputs(self) -> list[Any]:
        if any(spec.kind.name != "USER_OUTPUT" for spec in self.exported.graph_signature.output_specs):
            raise Uncapturable("the forward changes a buffer or its input")
        returned = [self.read(item) for item in self.fx_nodes[-1].args[0]]
        if any(isinstance(item, Live) for item in returned):
            raise Uncapturable("the model returns one of its parameters")
        return returned

    def node(self, fx_node: Any, op: str, name: str, inputs: list[Node], attrs: dict[str, Any]) -> Node:
        roles = attrs.pop("roles", ("x",)) if op != "aten" else ("x",) * len(inputs)
        node = Node(op, name, inputs, attrs, roles=roles)
        result = fx_node.meta.get("val")
        if isinstance(result, torch.Tensor):
            node.shape, node.stride, node.dtype = tuple(result.shape), tuple(result.stride()), result.dtype
            if op == "input":
                self.narrow = result.dtype if result.dtype in NARROW else None
            if result.dtype is self.narrow:  # recognised and fused as if it were float32
                node.dtype, node.narrow = torch.float32, self.narrow
        self.nodes.append(node)
        self.value[fx_node] = node
        return node

    def read(self, item: Any) -> Any:
        return self.value[item] if isinstance(item, torch.fx.Node) else item

    def call(self, position: int, fx_node: Any) -> None:
        target = fx_node.target
        args, kwargs = map_leaves(list(fx_node.args), self.read), map_leaves(dict(fx_node.kwargs), self.read)
        if not isinstance(target, torch._ops.OpOverload):
            if target is not operator.getitem:
                raise Uncapturable(f"the exported graph calls {getattr(target, '__name__', target)}")
            return self.item(fx_node, target, args, kwargs)
        name = target._schema.name
        if name in CHECKS:
            return None
        if name in BY_STRIDES:
            raise Uncapturable(f"{name} reads memory by strides that are not the same in a plan")
        written = written_argument(target)
        if written is not None:
            target = self.functional(position, fx_node, target, written)
        bound = {key: self.as_live(value) for key, value in bind(target, args, kwargs).items()}
        bound["weight_shape"] = self.weight_shapes.get(bound.get("weight"))  # type: ignore[arg-type]
        bound |= {"shapes": self.weight_shapes, "computed": self.computed}
        recogniser = RECOGNISERS.get(target)
        result = fx_node.meta.get("val")
        found = recogniser(bound, result) if recogniser and isinstance(result, torch.Tensor) else None
        if found is None or not self.image_by_image(result, found[1]):
            self.aten(fx_node, target, args, kwargs)
        else:
            op, inputs, attrs = found
            if op in RETURNING:
                attrs = {**attrs, "target": target, "args": args, "kwargs": kwargs}
            node = self.node(fx_node, op, module_name(fx_node), inputs, attrs)
            if name in DROPOUTS:  # of a fake tensor they give a dense copy
                node.stride = inputs[0].stride
        if written is not None:  # whoever holds the tensor that was written to sees the result from here on
            for same in self.memory.same_tensor(fx_node.args[written]):
                if same in self.value:
                    self.value[same] = self.value[fx_node]
        return None

    def item(self, fx_node: Any, target: Any, args: Any, kwargs: Any) -> None:
        """One of several results: of a split some channels of its input, without the list in between."""
        pieces, result = fx_node.args[0].meta.get("val"), fx_node.meta.get("val")
        found = piece(args[0], args[1], pieces)
        if found is None or not self.image_by_image(result, found[1]):
            return self.aten(fx_node, target, args, kwargs)
        op, (source,), attrs = found
        start = attrs["start"]
        call = {
            "target": aten.slice.Tensor,
            "args": [source, 1, start, start + result.shape[1]],
            "kwargs": {},
        }
        self.node(fx_node, op, module_name(fx_node), [source], {**attrs, **call})
        return None

    def aten(self, fx_node: Any, target: Any, args: Any, kwargs: Any) -> None:
        inputs = [leaf for leaf in leaves([args, kwargs]) if isinstance(leaf, Node)]
        name = module_name(fx_node) or str(fx_node.name)
        if target is aten.view.default:  # eager's strides allow the view, the ones in the arena may not
            target = aten.reshape.default
        node = self.node(fx_node, "aten", name, inputs, {"target": target, "args": args, "kwargs": kwargs})
        self.note_constant(fx_node, node)

    def note_constant(self, fx_node: Any, node: Node) -> None:
        """Remember what depends on parameters alone: a layer may use it as its weight, packed once.

        Its name is the expression itself, so that equal names mean equal values in every plan of the model.
        """
        target, args, kwargs = (node.attrs[key] for key in ("target", "args", "kwargs"))
        random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        if node.dtype is not torch.float32 or random or target is operator.getitem:
            return
        group = self.memory.group(fx_node)
        if any(written_argument(user.target) is not None for other in group for user in other.users):
            return
        args, kwargs = map_leaves([args, kwargs], self.as_live)
        if any(isinstance(leaf, Node) for leaf in leaves([args, kwargs])):
            return
        texts = [*map(_text, args), *(f"{key}={_text(value)}" for key, value in kwargs.items())]
        live = Live(f"{target}({', '.join(texts)})")
        node.attrs["constant"] = live
        self.computed[live.name] = (target, args, kwargs)
        self.weight_shapes[live] = node.shape or ()

    def image_by_image(self, result: torch.Tensor, inputs: list[Node]) -> bool:
        """Whether the first dimension is the batch: kernels take as many images as the model was given."""
        batch = (self.nodes[0].shape or ())[:1]
        return all(tuple(shape or ())[:1] == batch for shape in (result.shape, *(n.shape for n in inputs)))

    def as_live(self, value: Any) -> Any:
        return value.attrs.get("constant", value) if isinstance(value, Node) and value.op == "aten" else value

    def functional(self, position: int, fx_node: Any, target: Any, written: int) -> Any:
        """The twin of an in-place operation, once it is sure that nobody can tell the difference."""
        base = fx_node.args[written] if written < len(fx_node.args) else None
        name = target._schema.name
        if not isinstance(base, torch.fx.Node) or not isinstance(self.value[base], Node):
            raise Uncapturable(f"{name} writes to a parameter or buffer")
        if self.value[base].op == "input" or self.memory.is_input(base):
            raise Uncapturable(f"{name} writes to the model's input")
        same = set(self.memory.same_tensor(base)) | {fx_node}
        for other in self.memory.group(base):
            earlier = self.position[other] < position  # a later view is made from the result
            if earlier and other not in same and any(self.position[user] > position for user in other.users):
                raise Uncapturable(f"{name} writes to memory that {other.name} shows through another tensor")
        packet = getattr(aten, name.removeprefix("aten::").removesuffix("_"), None)
        twin = getattr(packet, target._overloadname, None)
        given = leaves(map_leaves(list(fx_node.args), self.read))
        dtypes = {leaf.dtype for leaf in given if isinstance(leaf, Node)}
        if not name.endswith("_") or twin is None or dtypes != {self.value[base].dtype}:
            raise Uncapturable(f"{name} works in place and has no plain twin here")
        return twin


class _Memory:
    """Which fx nodes may show the same memory: what schemas say, and what the fake tensors share."""

    def __init__(self, fx_nodes: list[Any]) -> None:
        self.parent = {node: node for node in fx_nodes}
        self.object = {node: node for node in fx_nodes}  # in-place calls return what they were given
        storages: dict[int, Any] = {}
        for node in fx_nodes:
            result = node.meta.get("val")
            for tensor in leaves(result):
                if isinstance(tensor, torch.Tensor):
                    key = tensor.untyped_storage()._cdata
                    self.join(node, storages.setdefault(key, node))
            if node.op == "call_function":
                self.read_schema(node)
        self.groups: dict[Any, list[Any]] = {}
        for node in fx_nodes:
            self.groups.setdefault(self.root(node), []).append(node)

    def read_schema(self, node: Any) -> None:
        if node.target is operator.getitem:
            return self.join(node, node.args[0])
        schema = node.target._schema
        written = written_argument(node.target)
        if written is not None and written < len(node.args):
            self.object[node] = self.object[node.args[written]]
        returns_input = schema.name in DROPOUTS or any(r.alias_info is not None for r in schema.returns)
        for position, argument in enumerate(schema.arguments[: len(node.args)]):
            given = node.args[position]
            may_alias = argument.alias_info is not None or schema.name in DROPOUTS
            if isinstance(given, torch.fx.Node) and returns_input and may_alias:
                self.join(node, given)
        return None

    def root(self, node: Any) -> Any:
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def join(self, a: Any, b: Any) -> None:
        self.parent[self.root(a)] = self.root(b)

    def group(self, node: Any) -> list[Any]:
        return self.groups[self.root(node)]

    def same_tensor(self, node: Any) -> list[Any]:
        return [other for other in self.group(node) if self.object[other] is self.object[node]]

    def is_input(self, node: Any) -> bool:
        return any(other.op == "placeholder" for other in self.group(node))


def _text(value: Any) -> str:
    return value.name if isinstance(value, Live) else repr(value)


def written_argument(target: Any) -> int | None:
    """Which argument an operation writes to; None for the ordinary kind."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    aliases = [argument.alias_info for argument in target._schema.arguments]
    return next((i for i, alias in enumerate(aliases) if alias is not None and alias.is_write), None)


def bind(target: Any, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults included."""
    bound = {a.name: a.default_value if a.has_default_value() else None for a in target._schema.arguments}
    bound.update(zip(bound, args))
    bound.update(kwargs)
    return bound


def module_name(fx_node: Any) -> str:
    """The path of the innermost module that made this call: "layer1.0.conv1"."""
    stack = fx_node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.split("@")[0].removeprefix(PREFIX.rstrip(".")).removeprefix(".")
