"""From a captured program to a Graph: recognise what has a kernel, make in-place operations functional.

In-place calls (`relu_`, `add_`) become their functional twins, and whoever reads the tensor afterwards reads
the result. That is right as long as nobody looks at the same memory through another tensor; if somebody does,
or if the model writes to its input or to a buffer, there is no plan.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from .graph import Call, Graph, Live, Node, leaves, map_leaves
from .program import PREFIX, Facts, Instruction, Program, Result, Uncapturable
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


def convert(program: Program) -> Graph:
    """Raises Uncapturable when the meaning of the program cannot be kept."""
    return _Converter(program).run()


NARROW = (torch.bfloat16, torch.float16)


class _Converter:
    def __init__(self, program: Program) -> None:
        self.program, self.instructions = program, program.instructions
        self.value: dict[int, Any] = {}  # position -> Node, Live or constant
        self.nodes: list[Node] = []
        self.memory = _Memory(program)
        self.weight_shapes: dict[Live, tuple[int, ...]] = {}
        self.computed: dict[str, Call] = {}
        self.narrow: torch.dtype | None = None  # the 16-bit type that the model computes in

    def run(self) -> Graph:
        source = self.placeholders()
        for position, instruction in enumerate(self.instructions):
            if instruction.op == "call_function":
                self.call(position, instruction)
            elif instruction.op not in ("placeholder", "output"):
                raise Uncapturable(f"the exported graph holds a {instruction.op} node ({instruction.target})")
        outputs = self.outputs()
        shown = any(self.memory.is_input(r.position) for r in self.returned() if isinstance(r, Result))
        spec = self.program.out_spec
        return Graph(self.nodes, source, outputs, spec, self.computed, shown, self.weight_shapes)

    def placeholders(self) -> Node:
        source = None
        for position, instruction in enumerate(self.instructions):
            if instruction.op != "placeholder":
                continue
            if instruction.kind in ("PARAMETER", "BUFFER"):
                live = Live(instruction.target.removeprefix(PREFIX))
                self.value[position] = live
                self.weight_shapes[live] = instruction.result.shape
            elif instruction.kind == "USER_INPUT" and source is None:
                source = self.node(position, "input", "input", [], {})
            else:
                raise Uncapturable(
                    f"{instruction.target} is a tensor, but neither input, parameter nor buffer"
                )
        if source is None:
            raise Uncapturable("the model has no tensor input")
        return source

    def returned(self) -> list[Any]:
        return list(self.instructions[-1].args[0])

    def outputs(self) -> list[Any]:
        if not self.program.only_returns:
            raise Uncapturable("the forward changes a buffer or its input")
        returned = [self.read(item) for item in self.returned()]
        if any(isinstance(item, Live) for item in returned):
            raise Uncapturable("the model returns one of its parameters")
        return returned

    def node(self, position: int, op: str, name: str, inputs: list[Node], attrs: dict[str, Any]) -> Node:
        roles = attrs.pop("roles", ("x",)) if op != "aten" else ("x",) * len(inputs)
        node = Node(op, name, inputs, attrs, roles=roles)
        result = self.instructions[position].result
        if isinstance(result, Facts):
            node.shape, node.stride, node.dtype = result.shape, result.stride, result.dtype
            if op == "input":
                self.narrow = result.dtype if result.dtype in NARROW else None
            if result.dtype is self.narrow:  # recognised and fused as if it were float32
                node.dtype, node.narrow = torch.float32, self.narrow
        self.nodes.append(node)
        self.value[position] = node
        return node

    def read(self, item: Any) -> Any:
        return self.value[item.position] if isinstance(item, Result) else item

    def call(self, position: int, instruction: Instruction) -> None:
        target = instruction.target
        args, kwargs = map_leaves(instruction.args, self.read), map_leaves(instruction.kwargs, self.read)
        if not isinstance(target, torch._ops.OpOverload):
            if target is not operator.getitem:
                raise Uncapturable(f"the exported graph calls {getattr(target, '__name__', target)}")
            return self.item(position, target, args, kwargs)
        name = target._schema.name
        if name in CHECKS:
            return None
        if name in BY_STRIDES:
            raise Uncapturable(f"{name} reads memory by strides that are not the same in a plan")
        written = written_argument(target)
        if written is not None:
            target = self.functional(position, target, written)
        if target is aten.view.default:  # eager's strides allow the view, the ones in the arena may not
            target = aten.reshape.default
        bound = {key: self.as_live(value) for key, value in bind(target, args, kwargs).items()}
        bound["weight_shape"] = self.weight_shapes.get(bound.get("weight"))  # type: ignore[arg-type]
        bound |= {"shapes": self.weight_shapes, "computed": self.computed}
        recogniser = RECOGNISERS.get(target)
        result = instruction.result
        found = recogniser(bound, result) if recogniser and isinstance(result, Facts) else None
        if found is None or not self.image_by_image(result, found[1]):
            self.aten(position, target, args, kwargs)
        else:
            op, inputs, attrs = found
            if op in RETURNING:
                attrs = {**attrs, "target": target, "args": args, "kwargs": kwargs}
            node = self.node(position, op, instruction.module, inputs, attrs)
            if name in DROPOUTS:  # of a fake tensor they give a dense copy
                node.stride = inputs[0].stride
        if written is not None:  # whoever holds the tensor that was written to sees the result from here on
            for same in self.memory.same_tensor(instruction.args[written].position):
                if same in self.value:
                    self.value[same] = self.value[position]
        return None

    def item(self, position: int, target: Any, args: Any, kwargs: Any) -> None:
        """One of several results: of a split some channels of its input, without the list in between."""
        given, result = self.instructions[position].args[0], self.instructions[position].result
        pieces = self.instructions[given.position].result
        found = piece(args[0], args[1], pieces)
        if found is None or not self.image_by_image(result, found[1]):
            return self.aten(position, target, args, kwargs)
        op, (source,), attrs = found
        start = attrs["start"]
        call = {
            "target": aten.slice.Tensor,
            "args": [source, 1, start, start + result.shape[1]],
            "kwargs": {},
        }
        self.node(position, op, self.instructions[position].module, [source], {**attrs, **call})
        return None

    def aten(self, position: int, target: Any, args: Any, kwargs: Any) -> None:
        inputs = [leaf for leaf in leaves([args, kwargs]) if isinstance(leaf, Node)]
        name = self.instructions[position].module or self.instructions[position].name
        node = self.node(position, "aten", name, inputs, {"target": target, "args": args, "kwargs": kwargs})
        self.note_constant(position, node)

    def note_constant(self, position: int, node: Node) -> None:
        """Remember what depends on parameters alone: a layer may use it as its weight, packed once.

        Its name is the expression itself, so that equal names mean equal values in every plan of the model.
        """
        target, args, kwargs = (node.attrs[key] for key in ("target", "args", "kwargs"))
        random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        if node.dtype is not torch.float32 or random or target is operator.getitem:
            return
        users = (user for other in self.memory.group(position) for user in self.program.users[other])
        if any(written_argument(self.instructions[user].target) is not None for user in users):
            return
        args, kwargs = map_leaves([args, kwargs], self.as_live)
        if any(isinstance(leaf, Node) for leaf in leaves([args, kwargs])):
            return
        texts = [*map(_text, args), *(f"{key}={_text(value)}" for key, value in kwargs.items())]
        live = Live(f"{target}({', '.join(texts)})")
        node.attrs["constant"] = live
        self.computed[live.name] = (target, args, kwargs)
        self.weight_shapes[live] = node.shape or ()

    def image_by_image(self, result: Facts, inputs: list[Node]) -> bool:
        """Whether the first dimension is the batch: kernels take as many images as the model was given."""
        batch = (self.nodes[0].shape or ())[:1]
        return all(tuple(shape or ())[:1] == batch for shape in (result.shape, *(n.shape for n in inputs)))

    def as_live(self, value: Any) -> Any:
        return value.attrs.get("constant", value) if isinstance(value, Node) and value.op == "aten" else value

    def functional(self, position: int, target: Any, written: int) -> Any:
        """The twin of an in-place operation, once it is sure that nobody can tell the difference."""
        args = self.instructions[position].args
        base = args[written] if written < len(args) else None
        name = target._schema.name
        if not isinstance(base, Result) or not isinstance(self.read(base), Node):
            raise Uncapturable(f"{name} writes to a parameter or buffer")
        if self.read(base).op == "input" or self.memory.is_input(base.position):
            raise Uncapturable(f"{name} writes to the model's input")
        same = {*self.memory.same_tensor(base.position), position}
        for other in self.memory.group(base.position):
            read_later = any(user > position for user in self.program.users[other])
            if other < position and other not in same and read_later:  # a later view is made from the result
                shown = self.instructions[other].name
                raise Uncapturable(f"{name} writes to memory that {shown} shows through another tensor")
        packet = getattr(aten, name.removeprefix("aten::").removesuffix("_"), None)
        twin = getattr(packet, target._overloadname, None)
        given = leaves(map_leaves(args, self.read))
        dtypes = {leaf.dtype for leaf in given if isinstance(leaf, Node)}
        if not name.endswith("_") or twin is None or dtypes != {self.read(base).dtype}:
            raise Uncapturable(f"{name} works in place and has no plain twin here")
        return twin


class _Memory:
    """Which results, by position, may show the same memory: by schemas, and by what fake tensors share."""

    def __init__(self, program: Program) -> None:
        self.instructions = program.instructions
        self.parent = list(range(len(self.instructions)))
        self.object = list(self.parent)  # in-place calls return what they were given
        storages: dict[int, int] = {}
        for position, instruction in enumerate(self.instructions):
            for facts in instruction.tensors():
                self.join(position, storages.setdefault(facts.storage, position))
            if instruction.op == "call_function":
                self.read_schema(position, instruction)
        self.groups: dict[int, list[int]] = {}
        for position in range(len(self.instructions)):
            self.groups.setdefault(self.root(position), []).append(position)

    def read_schema(self, position: int, instruction: Instruction) -> None:
        if instruction.target is operator.getitem:
            return self.join(position, instruction.args[0].position)
        if not isinstance(instruction.target, torch._ops.OpOverload):
            return None  # `call` refuses it
        schema = instruction.target._schema
        written = written_argument(instruction.target)
        if written is not None and written < len(instruction.args):
            base = instruction.args[written]
            self.object[position] = self.object[base.position] if isinstance(base, Result) else position
        returns_input = schema.name in DROPOUTS or any(r.alias_info is not None for r in schema.returns)
        for argument, given in zip(schema.arguments, instruction.args):
            may_alias = argument.alias_info is not None or schema.name in DROPOUTS
            if isinstance(given, Result) and returns_input and may_alias:
                self.join(position, given.position)
        return None

    def root(self, position: int) -> int:
        while self.parent[position] != position:
            position = self.parent[position]
        return position

    def join(self, a: int, b: int) -> None:
        self.parent[self.root(a)] = self.root(b)

    def group(self, position: int) -> list[int]:
        return self.groups[self.root(position)]

    def same_tensor(self, position: int) -> list[int]:
        return [other for other in self.group(position) if self.object[other] == self.object[position]]

    def is_input(self, position: int) -> bool:
        return any(self.instructions[other].op == "placeholder" for other in self.group(position))


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
