"""A captured forward as plain data: the calls of ATen operations, and what is known of their results.

    Facts         of a tensor: sizes, strides, type, and which memory it shows
    Instruction   a parameter, the input, a call, or what is returned
    Program       the instructions, in their order; what one batch runs
    Template      the same for any batch: sizes and arguments may be expressions of it

Made from what torch.export returns, of which nothing is held afterwards: neither tensors nor its shape
environment. A Template is made from an export whose batch is a symbol. torch.export takes it to be 2 or more,
and writes down as a guard whatever else the forward has asked about it; `fits` puts the number into these.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from .expressions import Expression, from_sympy
from .graph import leaves, map_leaves


class Uncapturable(Exception):
    """The model has no plan, for the reason in the message; its modules run instead."""


PREFIX = "model."  # of the names of parameters and modules in the exported program
LEAST = 2  # images that a symbol stands for: PyTorch's rules of shapes and strides are others for 0 and 1


@dataclass(frozen=True, slots=True)
class Result:
    """Stands for the result of the instruction at this position."""

    position: int


@dataclass(frozen=True, slots=True)
class Facts:
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    storage: int  # tensors with the same number show the same memory

    def alike(self) -> tuple[Any, ...]:
        """For comparisons: the stride of a single element has no say."""
        steps = tuple(step for size, step in zip(self.shape, self.stride) if size != 1)
        return self.shape, steps, self.dtype, self.device, self.layout, self.storage


@dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    op: str  # as torch.fx has it: "placeholder", "call_function", "output"
    kind: str  # of a placeholder: "PARAMETER", "BUFFER", "USER_INPUT", ...
    name: str
    module: str  # the path of the innermost module that made this call: "layer1.0.conv1"
    target: Any  # the operation, or the name of the parameter
    args: list[Any]
    kwargs: dict[str, Any]
    result: Any  # Facts, nested lists of them, or something that is no tensor

    def tensors(self) -> Iterator[Facts]:
        return (leaf for leaf in leaves(self.result) if isinstance(leaf, Facts))


@dataclass
class Program:
    instructions: list[Instruction]
    users: list[list[int]]  # of each instruction, by position
    out_spec: Any  # how to rebuild the return value from the arguments of "output"
    only_returns: bool  # it changes no buffer and not its input

    def digest(self) -> bytes:
        """Programs with the same one compute the same, and return it with the same strides."""
        rows = [
            (i.op, i.kind, str(i.target), i.args, i.kwargs, [facts.alike() for facts in i.tensors()])
            for i in self.instructions
        ]
        returned = [
            self.instructions[r.position] for r in self.instructions[-1].args[0] if isinstance(r, Result)
        ]
        strides = [facts.stride for i in returned for facts in i.tensors()]
        text = repr((rows, strides, self.out_spec, self.only_returns))
        return hashlib.sha256(text.encode()).digest()


@dataclass
class Template:
    program: Program  # sizes and arguments may be an Expression
    guards: list[Expression]
    most: int | None  # images

    def __post_init__(self) -> None:
        found = [list(expressions_of(i)) for i in self.program.instructions]
        self.expressions = list(dict.fromkeys(e for each in found for e in each))
        self.where = [position for position, each in enumerate(found) if each]

    def fits(self, batch: int) -> bool:
        """Whether the forward does with this batch what it did while it was captured."""
        within = batch >= LEAST and (self.most is None or batch <= self.most)
        return within and self.numbers(batch) is not None

    def numbers(self, batch: int) -> dict[Expression, int] | None:
        """What the expressions are for this batch. None where a guard, or one of them, does not hold."""
        try:
            if not all(guard.value(batch) for guard in self.guards):
                return None
            found = {expression: expression.value(batch) for expression in self.expressions}
        except ZeroDivisionError:
            return None
        if any(Fraction(number).denominator != 1 for number in found.values()):
            return None
        return {expression: int(number) for expression, number in found.items()}

    def at(self, batch: int) -> Program:
        """The program for a batch whose `numbers` there are."""
        numbers = self.numbers(batch)
        assert numbers is not None, f"a batch of {batch} does not fit"

        def number(leaf: Any) -> Any:
            if isinstance(leaf, Facts):
                sizes, steps = (tuple(map(number, axes)) for axes in (leaf.shape, leaf.stride))
                return dataclasses.replace(leaf, shape=sizes, stride=steps)
            return numbers[leaf] if isinstance(leaf, Expression) else leaf

        instructions = list(self.program.instructions)
        for position in self.where:
            old = instructions[position]
            args, kwargs, result = (map_leaves(tree, number) for tree in (old.args, old.kwargs, old.result))
            instructions[position] = dataclasses.replace(old, args=args, kwargs=kwargs, result=result)
        return dataclasses.replace(self.program, instructions=instructions)


def users_of(instructions: list[Instruction]) -> list[list[int]]:
    """Who reads the result of each, by position."""
    users: list[list[int]] = [[] for _ in instructions]
    for position, instruction in enumerate(instructions):
        read = leaves([instruction.args, instruction.kwargs])
        for source in dict.fromkeys(leaf.position for leaf in read if isinstance(leaf, Result)):
            users[source].append(position)
    return users


def program_of(exported: Any) -> Program:
    """Of an ExportedProgram for one batch."""
    return _Reader(exported).program()


def template_of(exported: Any) -> Template:
    """Of an ExportedProgram whose batch was to be a symbol. Raises Uncapturable where it became a number."""
    inputs = [node for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs]
    sizes = [node.meta["val"].shape[0] for node in inputs if isinstance(node.meta["val"], torch.Tensor)]
    if len(sizes) != 1 or not isinstance(sizes[0], torch.SymInt):
        raise Uncapturable("the forward is another one for each batch")
    symbol, env = sizes[0].node.expr, sizes[0].node.shape_env
    if not symbol.is_Symbol or env.replacements or env.deferred_runtime_asserts:
        raise Uncapturable("the batch is tied to other sizes")
    asked = [guard.expr for guard in env.guards]
    if any(guard.free_symbols != {symbol} for guard in asked):
        raise Uncapturable("the forward asks about sizes that are known when it runs")
    reader = _Reader(exported, symbol)
    program, upper = reader.program(), env.var_to_range[symbol].upper
    most = int(upper) if upper.is_Integer else None
    return Template(program, [reader.plain(guard) for guard in asked], most)


def expressions_of(instruction: Instruction) -> Iterator[Expression]:
    every = [*leaves([instruction.args, instruction.kwargs])]
    every += [size for facts in instruction.tensors() for size in (*facts.shape, *facts.stride)]
    return (leaf for leaf in every if isinstance(leaf, Expression))


class _Reader:
    """With a symbol, sizes are expressions of it, and calls that compute with sizes are left out: who reads
    their results has the expressions."""

    def __init__(self, exported: Any, symbol: Any = None) -> None:
        self.exported, self.symbol = exported, symbol
        self.value: dict[Any, Any] = {}  # fx node -> Result, or an expression
        self.storages: dict[int, int] = {}

    def program(self) -> Program:
        signature = self.exported.graph_signature
        specs = iter(signature.input_specs)
        instructions: list[Instruction] = []
        for node in self.exported.graph.nodes:
            found = node.meta.get("val") if node.op != "output" else None
            if self.symbol is not None and isinstance(found, torch.SymInt | torch.SymFloat | torch.SymBool):
                self.value[node] = self.size(found)
                continue
            if takes_all(node):
                self.value[node] = self.value[node.args[0]]
                continue
            kind, target = "", node.target
            if node.op == "placeholder":
                spec = next(specs)
                kind, target = spec.kind.name, spec.target
            args, kwargs = map_leaves(list(node.args), self.read), map_leaves(dict(node.kwargs), self.read)
            self.value[node] = Result(len(instructions))
            result = map_leaves(found, self.facts)
            instructions.append(
                Instruction(node.op, kind, str(node.name), module_of(node), target, args, kwargs, result)
            )
        only_returns = all(spec.kind.name == "USER_OUTPUT" for spec in signature.output_specs)
        return Program(instructions, users_of(instructions), self.exported.call_spec.out_spec, only_returns)

    def read(self, leaf: Any) -> Any:
        return self.value[leaf] if isinstance(leaf, torch.fx.Node) else leaf

    def facts(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        shape, stride = tuple(map(self.size, leaf.shape)), tuple(map(self.size, leaf.stride()))
        storage = self.storages.setdefault(leaf.untyped_storage()._cdata, len(self.storages))
        return Facts(shape, stride, leaf.dtype, leaf.device, leaf.layout, storage)

    def size(self, size: Any) -> Any:
        """A number, or an expression of the batch. Without a symbol, what it is: known when the call runs."""
        if self.symbol is None or isinstance(size, int):
            return size
        expression = size.node.expr
        if not isinstance(size, torch.SymInt):
            raise Uncapturable(f"the forward computes {expression}, a fraction or a condition, from sizes")
        if expression.is_Integer:
            return int(expression)
        if expression.free_symbols != {self.symbol}:
            raise Uncapturable(f"a size is {expression}, which is known when the forward runs")
        return self.plain(expression)

    def plain(self, expression: Any) -> Expression:
        try:
            return from_sympy(expression, self.symbol)
        except ValueError as error:
            raise Uncapturable(f"the forward asks for {error}") from error


def takes_all(node: Any) -> bool:
    """x[:], also inside x[:, :2]. Where the size is known, PyTorch leaves it out or writes an alias; where it
    is a symbol, it writes a slice."""
    if node.target is torch.ops.aten.alias.default:
        return True
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    before, after = (
        [size if isinstance(size, int) else size.node.expr for size in one.meta["val"].shape]
        for one in (node.args[0], node)
    )
    return before == after


def module_of(node: Any) -> str:
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.split("@")[0].removeprefix(PREFIX.rstrip(".")).removeprefix(".")
