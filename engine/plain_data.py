"""Programs, recipes and what surrounds them as JSON, and back: no pickle, no names of classes, no code.

    value          JSON
    None, True, 3, 2.5, "text"      themselves
    [a, b] and (a, b)               [a, b]
    anything else                   {"<kind>": ...}, with the kinds of `_KINDS` below

An operation is written by its name and looked up among PyTorch's own and ours when it is read. Only those
whose arguments are tensors and plain data are taken (`operation_refusal`), so that a file can compute and
nothing else: not open files, not call Python.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .expressions import OPERATIONS, Expression
from .program import Facts, Instruction, Program, Result, Template, users_of
from .recipes import Fixed, Norm, Product, Recipe, Stack, Vector

NAMESPACES = ("aten", "fast_backbones")
ITEM = "getitem"  # Python's x[i], of an operation with several results
# Types of arguments, as schemas write them, without the marks of lists and optional ones.
ARGUMENTS = {"Tensor", "int", "SymInt", "float", "number", "Scalar", "bool", "ScalarType", "Layout", "Device",
             "MemoryFormat"}  # fmt: skip
# Arguments that are text and choose a formula.
WORDS = {"activation", "approximate", "equation", "indexing", "kind", "mode", "padding", "padding_mode",
         "reduce", "rounding_mode"}  # fmt: skip
# Operations that begin with "_" expect arguments that were checked before; these check them, too.
CHECKING = {
    "_adaptive_avg_pool2d", "_assert_scalar", "_assert_tensor_metadata", "_log_softmax",
    "_native_batch_norm_legit_no_training", "_safe_softmax", "_softmax", "_to_copy", "_unsafe_view",
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d",
}  # fmt: skip
# Single libraries' take tensors that hold data of their own, gradients' trust what a forward has returned.
INNER = ("_", "cudnn_", "fbgemm_", "miopen_", "mkldnn_", "mps_", "quantized_", "xnnpack_")
LAYOUTS = {"strided": torch.strided}
FORMATS = {
    str(one).removeprefix("torch."): one
    for one in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
}
DTYPES = {
    str(one).removeprefix("torch."): one
    for one in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                torch.int16, torch.int8, torch.uint8, torch.bool)
}  # fmt: skip
DEPTH = 100  # of what is nested


class NotPlain(ValueError):
    """Something that has no place in a plan file; the message is a clause about it."""


# ---- operations ----


def operation_name(target: Any) -> str:
    """ "aten::relu.default". NotPlain for what a file may not name."""
    if target is operator.getitem:
        return ITEM
    if not isinstance(target, torch._ops.OpOverload):
        raise NotPlain(f"calls {getattr(target, '__name__', target)}, which is no operation of PyTorch")
    name = f"{target._schema.name}.{target._overloadname}"
    if (reason := operation_refusal(target)) is not None:
        raise NotPlain(f"calls {name}, {reason}")
    return name


def operation(name: str) -> Any:
    """The operation of this name. NotPlain where there is none, or a file may not name it."""
    if name == ITEM:
        return operator.getitem
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    if namespace not in NAMESPACES or not packet.isidentifier() or not overload.isidentifier():
        raise NotPlain(f"calls {name!r}, expected an operation of {' or '.join(NAMESPACES)}")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise NotPlain(f"calls {name}, which torch {torch.__version__} does not have")
    if (reason := operation_refusal(found)) is not None:
        raise NotPlain(f"calls {name}, {reason}")
    return found


def operation_refusal(target: torch._ops.OpOverload) -> str | None:
    """Why a file may not name this operation."""
    schema = target._schema
    namespace, _, name = schema.name.partition("::")
    if namespace not in NAMESPACES:
        return f"which is one of {namespace}, not of {' or '.join(NAMESPACES)}"
    if (name.startswith(INNER) or "backward" in name) and name not in CHECKING:
        return "which is an inner operation, whose arguments are not checked"
    for argument in schema.arguments:
        kind = str(argument.type).replace("Optional", "").replace("List", "").strip("[]?")
        if kind == "str" and argument.name in WORDS:
            continue
        if kind not in ARGUMENTS and argument.name not in ("generator", "pin_memory"):
            return f"whose argument {argument.name} is a {argument.type}"
    return None


# ---- values ----


def encode(value: Any) -> Any:
    """As JSON. NotPlain where it cannot be."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if type(value) is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind, (classes, to_json, _) in _KINDS.items():
        if isinstance(value, classes):
            return {kind: to_json(value)}
    raise NotPlain(f"has a {type(value).__name__} among its arguments")


def decode(found: Any, depth: int = 0) -> Any:
    """What `encode` was given, lists for tuples. NotPlain for what it never writes."""
    if depth > DEPTH:
        raise NotPlain(f"is nested more than {DEPTH} deep")
    if isinstance(found, list):
        return [decode(item, depth + 1) for item in found]
    if not isinstance(found, dict):
        return found
    if len(found) != 1:
        raise NotPlain(f"has a value of {len(found)} kinds")
    ((kind, content),) = found.items()
    if kind == "dict":
        return {decode(key, depth + 1): decode(item, depth + 1) for key, item in _pairs(content)}
    if kind not in _KINDS:
        raise NotPlain(f"has a value of the unknown kind {kind!r}")
    return _KINDS[kind][2](content, depth + 1)


def _pairs(found: Any) -> list[tuple[Any, Any]]:
    if not isinstance(found, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in found):
        raise NotPlain("has a dict that is no list of pairs")
    return [(key, item) for key, item in found]


def _named(names: dict[str, Any], what: str) -> Callable[[Any, int], Any]:
    def read(content: Any, _: int) -> Any:
        if not isinstance(content, str) or content not in names:
            raise NotPlain(f"has the {what} {content!r}, expected one of {', '.join(names)}")
        return names[content]

    return read


def _write_device(device: torch.device) -> str:
    if device.type != "cpu":
        raise NotPlain(f"lives on {device}, and plan files hold plans for the CPU")
    return "cpu"


def short(value: Any) -> str:
    """A type, layout or memory format without "torch."."""
    return str(value).removeprefix("torch.")


def _write_dtype(dtype: torch.dtype) -> str:
    if short(dtype) not in DTYPES:
        raise NotPlain(f"has the type {dtype}")
    return short(dtype)


def _write_facts(facts: Facts) -> list[Any]:
    device, layout = encode(facts.device), encode(facts.layout)
    axes = encode(facts.shape), encode(facts.stride)
    return [*axes, encode(facts.dtype), device, layout, facts.storage]


def _read_facts(content: Any, depth: int) -> Facts:
    shape, stride, dtype, device, layout, storage = decode(content, depth)
    sizes = [*shape, *stride]
    if len(shape) != len(stride) or not all(_is_size(size) for size in sizes) or not _is_size(storage):
        raise NotPlain(f"is a tensor of sizes {shape} and strides {stride}")
    if not isinstance(dtype, torch.dtype) or not isinstance(device, torch.device):
        raise NotPlain(f"is a tensor of type {dtype} on {device}")
    return Facts(tuple(shape), tuple(stride), dtype, device, layout, storage)


def _is_size(size: Any) -> bool:
    return isinstance(size, Expression) or (type(size) is int and 0 <= size < 1 << 48)


def _read_result(content: Any, _: int) -> Result:
    if type(content) is not int or content < 0:
        raise NotPlain(f"reads the result of instruction {content!r}")
    return Result(content)


def _read_expression(content: Any, depth: int) -> Expression:
    op, *operands = decode(content, depth)
    if op not in OPERATIONS and (op != "batch" or operands):
        raise NotPlain(f"has a size that is computed by {op!r}")
    if not all(type(one) is int or isinstance(one, Expression) for one in operands):
        raise NotPlain(f"has a size that is computed from {operands}")
    return Expression(op, tuple(operands))


def _read_float(content: Any, _: int) -> float:
    if content not in ("inf", "-inf", "nan"):
        raise NotPlain(f"has the number {content!r}")
    return float(content)


Kind = tuple[Any, Callable[[Any], Any], Callable[[Any, int], Any]]

_KINDS: dict[str, Kind] = {
    "float": ((), str, _read_float),
    "result": (Result, lambda r: r.position, _read_result),
    "size": (Expression, lambda e: [e.op, *encode(e.operands)], _read_expression),
    "tensor": (Facts, _write_facts, _read_facts),
    "dtype": (torch.dtype, _write_dtype, _named(DTYPES, "type")),
    "device": (torch.device, _write_device, _named({"cpu": torch.device("cpu")}, "device")),
    "layout": (torch.layout, short, _named(LAYOUTS, "layout")),
    "memory_format": (torch.memory_format, short, _named(FORMATS, "memory format")),
}


# ---- programs ----


def encode_program(program: Program) -> dict[str, Any]:
    """NotPlain with a sentence that names the step."""
    if not program.only_returns:
        raise NotPlain("the forward changes a buffer or its input")
    instructions = []
    for one in program.instructions:
        try:
            call = one.op == "call_function"
            target = operation_name(one.target) if call else str(one.target or one.name)
            parts = [encode(part) for part in (one.args, one.kwargs, one.result)]
        except NotPlain as error:
            raise NotPlain(f"step {one.name}{f' of {one.module}' if one.module else ''} {error}") from error
        instructions.append([one.op, one.kind, one.name, one.module, target, *parts])
    return {"instructions": instructions, "returns": encode_structure(program.out_spec)}


def decode_program(found: Any) -> Program:
    instructions: list[Instruction] = []
    for position, row in enumerate(_rows(found["instructions"])):
        op, kind, name, module, target = row[:5]
        texts = (op, kind, name, module, target)
        if not all(isinstance(text, str) for text in texts):
            raise NotPlain(f"instruction {position} has names that are no text")
        try:
            args, kwargs, result = map(decode, row[5:])
            target = operation(target) if op == "call_function" else target
        except NotPlain as error:
            raise NotPlain(f"step {name}{f' of {module}' if module else ''} {error}") from error
        instructions.append(Instruction(op, kind, name, module, target, args, kwargs, result))
    out_spec = decode_structure(found["returns"])
    return _checked(instructions, out_spec)


def _rows(found: Any) -> list[list[Any]]:
    if not isinstance(found, list) or any(not isinstance(row, list) or len(row) != 8 for row in found):
        raise NotPlain("the program is no list of instructions")
    return found


def _checked(instructions: list[Instruction], out_spec: Any) -> Program:
    """Instructions read what comes before them, and the last one returns."""
    for position, one in enumerate(instructions):
        read = [
            leaf.position for leaf in pytree.tree_leaves([one.args, one.kwargs]) if isinstance(leaf, Result)
        ]
        if any(other >= position for other in read):
            raise NotPlain(f"step {one.name} reads what comes after it")
        if not isinstance(one.args, list) or not isinstance(one.kwargs, dict):
            raise NotPlain(f"step {one.name} has no list of arguments")
        if one.op == "placeholder" and not isinstance(one.result, Facts):
            raise NotPlain(f"step {one.name} stands for no tensor")
    last = instructions[-1] if instructions else None
    if last is None or last.op != "output" or len(last.args) != 1 or not isinstance(last.args[0], list):
        raise NotPlain("the program returns nothing")
    if len(last.args[0]) != out_spec.num_leaves:
        raise NotPlain(f"the program returns {len(last.args[0])} values, expected {out_spec.num_leaves}")
    return Program(instructions, users_of(instructions), out_spec, True)


def encode_template(template: Template) -> dict[str, Any]:
    guards = [encode(guard) for guard in template.guards]
    return {"program": encode_program(template.program), "guards": guards, "most": template.most}


def decode_template(found: Any) -> Template:
    guards, most = decode(found["guards"]), found["most"]
    if not all(isinstance(guard, Expression) for guard in guards) or type(most) not in (int, type(None)):
        raise NotPlain("the conditions on the batch are no expressions")
    return Template(decode_program(found["program"]), guards, most)


# ---- what a model returns ----


class _Leaf:
    pass


def encode_structure(spec: Any) -> Any:
    """Of tuples, lists, dicts and named tuples."""
    return _write_structure(pytree.tree_unflatten([_Leaf()] * spec.num_leaves, spec))


def _write_structure(tree: Any) -> Any:
    if isinstance(tree, _Leaf):
        return "leaf"
    if tree is None:
        return "none"
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [_write_structure(item) for item in tree]}
    if type(tree) in (dict, OrderedDict):
        kind = "dict" if type(tree) is dict else "ordered dict"
        if not all(type(key) in (str, int) for key in tree):
            raise NotPlain("the model returns a dict whose keys are neither text nor whole numbers")
        return {kind: [[key, _write_structure(item)] for key, item in tree.items()]}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        items = [_write_structure(item) for item in tree]
        return {"named tuple": [type(tree).__name__, list(tree._fields), items]}
    raise NotPlain(
        f"the model returns a {type(tree).__name__}, expected tensors in tuples, lists, dicts, named tuples"
    )


def decode_structure(found: Any) -> Any:
    """The TreeSpec. Named tuples get a class of their own, with that name and these fields."""
    return pytree.tree_structure(_read_structure(found, 0))


def _read_structure(found: Any, depth: int) -> Any:
    if depth > DEPTH:
        raise NotPlain(f"what the model returns is nested more than {DEPTH} deep")
    if found in ("leaf", "none"):
        return _Leaf() if found == "leaf" else None
    if not isinstance(found, dict) or len(found) != 1:
        raise NotPlain(f"the model returns {found!r}")
    ((kind, content),) = found.items()

    def read(items: Any) -> list[Any]:
        return [_read_structure(item, depth + 1) for item in items]

    if kind in ("tuple", "list"):
        return tuple(read(content)) if kind == "tuple" else read(content)
    if kind in ("dict", "ordered dict"):
        items = [(key, _read_structure(item, depth + 1)) for key, item in _pairs(content)]
        if not all(type(key) in (str, int) for key, _ in items):
            raise NotPlain("the model returns a dict whose keys are neither text nor whole numbers")
        return dict(items) if kind == "dict" else OrderedDict(items)
    if kind == "named tuple":
        name, fields, items = content
        try:
            return namedtuple(name, fields)(*read(items))
        except (TypeError, ValueError) as error:
            raise NotPlain(f"the model returns a named tuple that cannot be: {error}") from error
    raise NotPlain(f"the model returns a {kind}")


# ---- recipes ----

_RECIPES = {cls.__name__: cls for cls in (Norm, Vector, Fixed, Recipe, Stack, Product)}


def encode_recipe(value: Any) -> Any:
    """Recipes, and plain data around them."""
    if type(value) in _RECIPES.values():
        fields = {name: encode_recipe(getattr(value, name)) for name in value.__dataclass_fields__}
        return {type(value).__name__: fields}
    if isinstance(value, list | tuple):
        return [encode_recipe(item) for item in value]
    return encode(value)


def decode_recipe(found: Any, depth: int = 0) -> Any:
    """With tuples where `encode_recipe` was given lists or tuples, as recipes have."""
    if depth > DEPTH:
        raise NotPlain(f"a recipe is nested more than {DEPTH} deep")
    if isinstance(found, list):
        return tuple(decode_recipe(item, depth + 1) for item in found)
    if isinstance(found, dict) and len(found) == 1 and next(iter(found)) in _RECIPES:
        ((name, fields),) = found.items()
        try:
            return _RECIPES[name](**{key: decode_recipe(item, depth + 1) for key, item in fields.items()})
        except (TypeError, AttributeError) as error:
            raise NotPlain(f"the recipe of some weights cannot be read: {error}") from error
    return decode(found, depth)
