"""Training: the model's forward as a list of steps, with norms, shortcuts and activations fused.

In train() a backbone runs its own modules. Here the same calls are made from a list that torch.fx has traced
once, because what belongs together lies in different modules (train_steps.py): batch norm, the addition of
the shortcut and the activation become one op, or batch norm, activation and convolution, whose gradients are
compiled and keep less; on a GPU they are Triton's. All gradients are autograd's, so accumulation, retained
graphs, DDP and gradient hooks work as with modules.

    make_program(model, plain)    the program, or the sentence why the modules run
    program(x)

A fused step calls its modules one by one when one of them has hooks, so hooks of layers see what they always
see. Where a container (a block, a stage) has hooks, or the tracer cannot follow the forward, there is no
program.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from .. import kernels
from ..kernels import _ext, _native, _recompute
from .guard import Guard
from .locks import ForkSafeLock
from .rules import training_refusal
from .train_concat import Chain, Concat
from .train_steps import (
    ACTIVATIONS,
    FUNCTIONS,
    Attribute,
    Convolution,
    Gate,
    Method,
    Norm,
    NormConvolution,
    Pool,
    Tail,
    hooked,
)

Node = torch.fx.Node
_ADDITIONS = (operator.add, operator.iadd, torch.add)
# What reads a map and leaves it as it is: types and functions.
_READERS = {
    Convolution,
    NormConvolution,
    Norm,
    Gate,
    Concat,
    Pool,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
}
_READERS |= {torch.cat, operator.add, torch.add}
_OURS = f"{__package__.rpartition('.')[0]}.backbones"
_trace_lock = ForkSafeLock()  # torch.fx patches nn.Module for the whole process while it traces


@dataclass(frozen=True)
class Value:
    """Stands for the result of an earlier step among the arguments of a step."""

    number: int


class Step(NamedTuple):
    """values[out] = call(*args, **kwargs); then nobody needs the values in `last` any more. Where it passes a
    value on, the call returns that as well, for later steps."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int
    last: tuple[int, ...]
    passes: int | None = None


def is_traced_through(module: nn.Module) -> bool:
    """Whether a program makes the calls of a module, not the call of it: of our own, of nn.Sequential and of
    nn.Identity, which makes none.

    What a forward does beside calling on tensors (no_grad, random choices, a change of a buffer, an
    autograd.Function) leaves no trace. Ours do nothing of the kind; others' modules are called as they are.
    """
    return type(module) in (nn.Sequential, nn.Identity) or type(module).__module__.startswith(_OURS)


def containers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules inside the model that a program does not call, by name."""
    return {name: m for name, m in model.named_modules() if m is not model and is_traced_through(m)}


def rewritten(model: nn.Module) -> str | None:
    """Which method of ours somebody has replaced, on a module or in its class, if any: what is there now may
    do what leaves no trace."""
    for name, module in model.named_modules():
        for base in type(module).__mro__ if is_traced_through(module) else ():
            written_here = f"{base.__qualname__}."
            for key, value in vars(base).items() if base.__module__.startswith(_OURS) else ():
                if type(value) is not FunctionType:
                    continue
                on_instance = key in vars(module) and (module is not model or key != "forward")
                if on_instance or not value.__qualname__.startswith(written_here):
                    return f"{name or 'the model'} has a {key} of its own, which is not this library's"
    return None


def results_among(model: nn.Module) -> str | None:
    """Which tensor of a module, if any, other operations have made: functional_call's, an old weight_norm's.
    The next call has another one, and whoever holds this one holds its graph."""
    for name, module in model.named_modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for key, value in held.items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    return f"{name}.{key}".lstrip(".") + " is the result of other operations"
    return None


def hooked_among(parts: dict[str, nn.Module]) -> str | None:
    """Which of them, if any, has hooks."""
    return next((f"{name} has hooks" for name, part in parts.items() if hooked(part)), None)


# ---- the list ----


class Program:
    """The steps of one model in train(). Holds its modules, not the model itself."""

    def __init__(self, guard: Guard, parts: dict[str, nn.Module], steps: list[Step], result: Any) -> None:
        self.guard, self.containers, self.steps, self.result = guard, parts, steps, result
        self.weights = [tensor for tensor in guard.every if tensor.dim() == 4]
        self.returned = _numbers(result)

    def ready(self) -> Program | str:
        """The program; why it may not run now, while a part whose call it does not make has hooks."""
        return hooked_among(self.containers) or self

    def __call__(self, x: Tensor) -> Any:
        planar = _native.memory_format(x) is torch.contiguous_format
        values: list[Any] = [_with_channels_last(x) if planar else x] + [None] * len(self.steps)
        for call, args, kwargs, out, last, passes in self.steps:
            found = call(*_filled(args, values), **_filled(kwargs, values))
            if passes is None:
                values[out] = found
            else:
                values[out], values[passes] = found
            if out in self.returned and isinstance(values[out], Tensor):
                _recompute.forget(values[out])
            for number in last:
                values[number] = None
        result = _filled(self.result, values)
        return _planar(result) if planar and not any(map(_is_channels_last, self.weights)) else result


def _with_channels_last(x: Tensor) -> Tensor:
    """Kernels compute in this order of memory: one conversion instead of two for each step."""
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    return x if c > 1 else x.as_strided((n, c, h, w), (h * w, 1, w, 1))  # PyTorch calls it both


def _is_channels_last(weight: Tensor) -> bool:
    """Whether PyTorch would answer a planar image with channels last for its sake."""
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _planar(result: Any) -> Any:
    """What the modules would have returned for a planar image: planar maps."""
    return _mapped(result, lambda t: t.contiguous() if isinstance(t, Tensor) and t.dim() == 4 else t)


class Unprogrammed(NamedTuple):
    """A model that has no program, as long as the guard holds, and why."""

    guard: Guard
    reason: str

    def ready(self) -> str:
        return self.reason


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nesting of tuples (also named ones), lists, dicts and slices with `change` applied to what is
    in them. torch.fx's own containers become plain ones."""
    if isinstance(tree, (tuple, list)):
        parts = [_mapped(part, change) for part in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*parts)
        return tuple(parts) if isinstance(tree, tuple) else parts
    if isinstance(tree, dict):
        return {key: _mapped(part, change) for key, part in tree.items()}
    if isinstance(tree, slice):
        return slice(*(_mapped(part, change) for part in (tree.start, tree.stop, tree.step)))
    return change(tree)


def _filled(args: Any, values: list[Any]) -> Any:
    """The arguments with results in the place of `Value`s."""
    return _mapped(args, lambda leaf: values[leaf.number] if type(leaf) is Value else leaf)


# ---- tracing ----


class _Tracer(torch.fx.Tracer):
    """Follows a bound method of the model. Other threads, which torch.fx's patches reach too, are let be."""

    def __init__(self, plain: MethodType) -> None:
        super().__init__()
        self.traced_func_name = plain.__func__.__name__
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_traced_through(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def make_program(model: nn.Module, plain: MethodType) -> Program | Unprogrammed:
    """Trace and fuse, or say why that cannot be done."""
    guard = Guard(model, _ext.require())
    refusal = training_refusal(model) or rewritten(model)
    if not is_traced_through(model):
        refusal = f"the forward of {type(model).__name__} is not one of this library's"
    if refusal is not None:
        return Unprogrammed(guard, refusal)
    with _trace_lock, kernels.backend("reference"):
        tracer = _Tracer(plain)
        try:
            graph = tracer.trace(model)
        except Exception as error:  # whatever a user's forward or the tracer raises: the modules still run
            reason = (str(error).splitlines() or ["no message"])[0]
            return Unprogrammed(guard, f"torch.fx: {type(error).__name__}: {reason}")
        finally:
            vars(tracer).clear()  # it lies in a cycle, and would hold the model until that is collected
    inputs = sum(node.op == "placeholder" for node in graph.nodes)
    if inputs != 1:
        return Unprogrammed(guard, f"the forward takes {inputs} arguments, expected the image alone")
    return Program(guard, containers(model), *_steps(model, graph))


# The call, its arguments, the nodes it replaces.
Group = tuple[Norm | NormConvolution | Gate | Concat, tuple[Node, ...], list[Node]]


def _steps(model: nn.Module, graph: torch.fx.Graph) -> tuple[list[Step], Any]:
    parts = _Parts(model)
    # Gates first: the norm of a shortcut leaves them the addition.
    groups = [parts.gate_at(node) for node in graph.nodes]
    groups += [parts.norm_at(node) for node in graph.nodes]
    groups += parts.chains(graph)
    fused = {group[2][-1]: group for group in groups if group is not None}
    inside = parts.claimed - set(fused)

    numbers: dict[Node, int] = {}
    planned: list[tuple[Callable[..., Any], Any, Any, int]] = []
    result: Any = None
    for node in graph.nodes:
        if node.op == "placeholder":
            numbers[node] = 0
        elif node.op == "output":
            result = _valued(node.args[0], numbers)
        elif node not in inside:
            numbers[node] = len(planned) + 1
            call, args, kwargs = (*fused[node][:2], {}) if node in fused else _call_of(model, node)
            planned.append((call, _valued(args, numbers), _valued(kwargs, numbers), numbers[node]))
    return _with_passes(_with_last_uses(planned, result), _numbers(result)), result


def _with_last_uses(planned: list[tuple[Callable[..., Any], Any, Any, int]], result: Any) -> list[Step]:
    steps: list[Step] = []
    needed = _numbers(result)
    for call, args, kwargs, out in reversed(planned):
        used = (_numbers(args) | _numbers(kwargs) | {out}) - needed
        needed |= used
        steps.append(Step(call, args, kwargs, out, tuple(sorted(used))))
    return steps[::-1]


def _with_passes(steps: list[Step], returned: set[int]) -> list[Step]:
    """A map that several steps read is passed on from one to the next, where they can, and where none changes
    it or has hooks, which would see an alias with the gradient of later readers alone."""
    readers: dict[int, list[Step]] = {}
    for step in steps:
        for number in _numbers(step.args) | _numbers(step.kwargs):
            readers.setdefault(number, []).append(step)
    changed = []
    for step in steps:
        number = step.args[0].number if step.args and type(step.args[0]) is Value else None
        passes = (
            isinstance(step.call, (Convolution, NormConvolution))
            and number not in {*step.last, *returned}
            and all(map(_only_reads, readers[number]))
        )
        changed.append(step._replace(call=step.call.passing, passes=number) if passes else step)
    return changed


def _only_reads(step: Step) -> bool:
    modules = [step.call] if isinstance(step.call, nn.Module) else getattr(step.call, "modules", [])
    return bool(_READERS & {type(step.call), step.call}) and not any(map(hooked, modules))


def _call_of(model: nn.Module, node: Node) -> tuple[Callable[..., Any], Any, Any]:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        layers = (kind for kind in (Convolution, Pool) if kind.takes(module) and not node.kwargs)
        call = next(layers, None)
        return call(module) if call else module, node.args, node.kwargs
    if node.op == "get_attr":
        return Attribute(model, str(node.target)), (), {}
    if node.op == "call_method":
        return Method(str(node.target)), node.args, node.kwargs
    assert callable(node.target)
    return node.target, node.args, node.kwargs


class _Parts:
    """Finds what is fused. `claimed`: the nodes that belong to a group already."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.claimed: set[Node] = set()

    def module(self, node: Any) -> nn.Module | None:
        """What a node with one argument calls."""
        if not isinstance(node, Node) or node.op != "call_module" or node.kwargs or len(node.args) != 1:
            return None
        return self.model.get_submodule(str(node.target))

    def norm_at(self, node: Node) -> Group | None:
        norm = self.module(node)
        if type(norm) is not nn.BatchNorm2d:
            return None
        tail, residual, members = self.tail(node)
        call, members = Norm(norm, tail), [node, *members]
        user = _only_user(members[-1])
        module = self.module(user)
        if not residual and module is not None and Convolution.takes(module) and user not in self.claimed:
            return self.group(NormConvolution(call, Convolution(module)), node.args, [*members, user])
        return self.group(call, (*node.args, *residual), members)

    def gate_at(self, node: Node) -> Group | None:
        """The multiplication of a map by the gate that is made of its own means."""
        if node.op != "call_function" or node.target is not operator.mul or len(node.args) != 2:
            return None
        for x, gate in (node.args, node.args[::-1]):
            layers: list[tuple[Node, nn.Module]] = []
            for kind in (nn.Sigmoid, nn.Conv2d, nn.ReLU, nn.Conv2d):
                module = self.module(gate)
                if (
                    type(module) is not kind
                    or _only_user(gate) is None
                    or (kind is nn.Conv2d and not _is_1x1(module))
                ):
                    break
                layers.append((gate, module))
                gate = gate.args[0]
            if len(layers) == 4 and _is_mean_of(gate, x):
                tail, residual, members = self.tail(node)
                inner = [gate, *(inner for inner, _ in reversed(layers)), node]
                call = Gate(tuple(module for _, module in reversed(layers)), tail)
                return self.group(call, (x, *residual), [*inner, *members])
        return None

    def chains(self, graph: torch.fx.Graph) -> list[Group]:
        """Concatenations that continue another one by one map, and that nobody but norms can see."""
        cats: dict[tuple[Node, ...], Node] = {}
        for node in graph.nodes:
            if (items := self.concatenated(node)) is not None:
                cats.setdefault(tuple(items), node)
        follows = {node: cats[items[:-1]] for items, node in cats.items() if items[:-1] in cats}
        chain_of: dict[Node, Chain] = {}
        groups = []
        for items, node in cats.items():  # in the order of the graph
            before = follows.get(node)
            if before is None and node not in follows.values():
                continue
            chain = chain_of[node] = Chain() if before is None else chain_of[before]
            norms = (self.module(user) for user in node.users)
            widths = [norm.num_features for norm in norms if isinstance(norm, nn.BatchNorm2d)]
            chain.channels = max([chain.channels, *widths])  # the first run has the bits of all others, too
            args = items if before is None else (before, items[-1])
            groups.append((Concat(chain, before is None), args, [node]))
        return groups

    def concatenated(self, node: Node) -> list[Node] | None:
        """The maps that a node concatenates along the channels."""
        if node.op != "call_function" or node.target is not torch.cat or node.kwargs or len(node.args) != 2:
            return None
        items, axis = node.args
        if axis != 1 or not isinstance(items, (list, tuple)) or not all(isinstance(i, Node) for i in items):
            return None
        seen = all(type(self.module(u)) is nn.BatchNorm2d or u.target is torch.cat for u in node.users)
        return list(items) if seen else None

    def group(self, call: Norm | NormConvolution | Gate, args: tuple[Any, ...], members: list[Node]) -> Group:
        self.claimed.update(members)
        return call, args, members

    def tail(self, node: Node) -> tuple[Tail, tuple[Node, ...], list[Node]]:
        """What follows a node that nobody else reads; the shortcut; the nodes."""
        addition, residual, members = None, (), []
        user = _only_user(node)
        if user is not None and user not in self.claimed and self.adds(user, node):
            addition = user.target
            residual = tuple(arg for arg in user.args if arg is not node)
            members.append(user)
            user = _only_user(user)
        activation = self.activation(user)
        if activation is not None:
            members.append(user)
        return Tail(addition, activation), residual, members

    def adds(self, user: Node, node: Node) -> bool:
        """Whether `user` adds another map to this one, and this one is the operand to fuse it with."""
        if user.op != "call_function" or user.target not in _ADDITIONS or user.kwargs or len(user.args) != 2:
            return False
        first, second = user.args
        if first is second or not isinstance(first, Node) or not isinstance(second, Node):
            return False
        if user.target is operator.iadd:  # changes its first operand
            return node is first
        both = type(self.module(first)) is nn.BatchNorm2d and _only_user(first) is not None
        return node is first or not both

    def activation(self, node: Node | None) -> Any:
        """The activation that this node is, as a module or a function of one argument."""
        if node is None or node in self.claimed:
            return None
        module = self.module(node)
        if module is not None:
            return module if type(module) in ACTIVATIONS else None
        plain = node.op == "call_function" and len(node.args) == 1 and not node.kwargs.get("inplace")
        return node.target if plain and node.target in FUNCTIONS else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_1x1(conv: nn.Conv2d) -> bool:
    window = conv.kernel_size, conv.stride, conv.padding, conv.groups
    return window == ((1, 1), (1, 1), (0, 0), 1)


def _is_mean_of(node: Any, x: Any) -> bool:
    """The means over the image, with two dimensions of 1 behind them."""
    if (
        not isinstance(node, Node)
        or node.op != "call_method"
        or node.target != "mean"
        or _only_user(node) is None
    ):
        return False
    return node.args == (x, (2, 3)) and dict(node.kwargs) == {"keepdim": True}


def _valued(args: Any, numbers: dict[Node, int]) -> Any:
    """The arguments of a node, with `Value`s for nodes."""
    return _mapped(args, lambda leaf: Value(numbers[leaf]) if isinstance(leaf, Node) else leaf)


def _numbers(args: Any) -> set[int]:
    """Of the `Value`s among the arguments."""
    found: set[int] = set()
    _mapped(args, lambda leaf: found.add(leaf.number) if type(leaf) is Value else None)
    return found
