"""Training: the model's forward as a list of steps, with norms, shortcuts and activations fused.

In train() a backbone runs its own modules. Here the same calls are made from a list that torch.fx has traced
once, because what belongs together lies in different modules: batch norm, the addition of the shortcut and
the activation become one call of `kernels.batch_norm`, and convolutions go to `kernels` as well, which have
compiled gradients and keep less for them; on a GPU those are Triton's, in 16 bits and under autocast, too.
All gradients are autograd's, so accumulation, retained graphs, DDP and gradient hooks work as with modules.

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
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import _ext, _native
from .guard import Guard
from .locks import ForkSafeLock
from .rules import training_refusal
from .train_concat import Chain, Concat

Node = torch.fx.Node
_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6"}
_OURS = f"{__package__.rpartition('.')[0]}.backbones"
_trace_lock = ForkSafeLock()  # torch.fx patches nn.Module for the whole process while it traces


@dataclass(frozen=True)
class Value:
    """Stands for the result of an earlier step among the arguments of a step."""

    number: int


class Step(NamedTuple):
    """values[out] = call(*args, **kwargs); then nobody needs the values in `last` any more."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int
    last: tuple[int, ...]


# ---- what a step calls ----


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see this module called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_traced_through(module: nn.Module) -> bool:
    """Whether a program makes the calls of a module, not the call of it: of our own and of nn.Sequential.

    What a forward does beside calling on tensors (no_grad, random choices, a change of a buffer, an
    autograd.Function) leaves no trace. Ours do nothing of the kind; others' modules are called as they are.
    """
    return type(module) is nn.Sequential or type(module).__module__.startswith(_OURS)


def containers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules inside the model that a program does not call, by name."""
    return {name: m for name, m in model.named_modules() if m is not model and is_traced_through(m)}


def hooked_among(parts: dict[str, nn.Module]) -> str | None:
    """Which of them, if any, has hooks."""
    return next((f"{name} has hooks" for name, part in parts.items() if hooked(part)), None)


class Convolution:
    """An nn.Conv2d by the op of `kernels` that its groups ask for."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module, self.op = module, kernels.conv2d
        self.window = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:
            self.op = kernels.depthwise_conv2d
        else:
            self.window["groups"] = module.groups

    @staticmethod
    def takes(module: nn.Module) -> bool:
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str)

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        if hooked(module):
            return module(x)
        return self.op(x, module.weight, module.bias, **self.window)


class Tail(NamedTuple):
    """What follows a norm or a gate: the function that adds the shortcut, the activation (a module or a
    function of one argument); each may be None."""

    addition: Callable[..., Any] | None = None
    activation: Any = None

    @property
    def name(self) -> str:
        """The activation, as `kernels` call it."""
        if self.activation is None:
            return "none"
        return _FUNCTIONS.get(self.activation) or _ACTIVATIONS[type(self.activation)]

    def modules(self) -> list[nn.Module]:
        return [self.activation] if isinstance(self.activation, nn.Module) else []

    def __call__(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if self.addition is not None:
            y = self.addition(y, residual)
        return y if self.activation is None else self.activation(y)


class Norm:
    """An nn.BatchNorm2d and its tail."""

    def __init__(self, norm: nn.BatchNorm2d, tail: Tail) -> None:
        self.norm, self.tail = norm, tail
        self.modules = [norm, *tail.modules()]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        norm = self.norm
        if any(map(hooked, self.modules)) or not _fits(x, residual):
            return self.tail(norm(x), residual)
        mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
        batch = norm.training or mean is None
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # the average of all batches
                momentum = 1.0 / float(norm.num_batches_tracked)
        if norm.training and not norm.track_running_stats:
            mean = var = None
        return kernels.batch_norm(
            x,
            norm.weight,
            norm.bias,
            mean,
            var,
            residual=residual,
            training=batch,
            momentum=0.0 if momentum is None else momentum,
            eps=norm.eps,
            activation=self.tail.name,
        )


class Gate:
    """x * sigmoid(fc2(relu(fc1(mean of x)))) of squeeze-and-excitation, and its tail."""

    def __init__(self, layers: tuple[nn.Module, ...], tail: Tail) -> None:
        self.layers, self.tail = layers, tail
        self.modules = [*layers, *tail.modules()]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fc1, _, fc2, _ = self.layers
        if any(map(hooked, self.modules)) or not _fits(x, residual):
            gate = x.mean((2, 3), keepdim=True)
            for layer in self.layers:
                gate = layer(gate)
            return self.tail(x * gate, residual)
        small = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        return kernels.squeeze_excite(x, *small, residual=residual, activation=self.tail.name)


def _fits(x: Tensor, residual: Tensor | None) -> bool:
    """Whether nothing is broadcast or promoted: that is PyTorch's affair."""
    if residual is None:
        return True
    return isinstance(residual, Tensor) and (residual.shape, residual.dtype) == (x.shape, x.dtype)


class Attribute:
    """A parameter, buffer or constant of the model, read at every call."""

    def __init__(self, model: nn.Module, target: str) -> None:
        path, _, self.name = target.rpartition(".")
        self.owner = model.get_submodule(path) if path else model

    def __call__(self) -> Any:
        return getattr(self.owner, self.name)


class Method:
    """A method of the first argument."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, self.name)(*args, **kwargs)


# ---- the list ----


class Program:
    """The steps of one model in train(). Holds its modules, not the model itself."""

    def __init__(self, guard: Guard, parts: dict[str, nn.Module], steps: list[Step], result: Any) -> None:
        self.guard, self.containers, self.steps, self.result = guard, parts, steps, result
        self.weights = [tensor for tensor in guard.every if tensor.dim() == 4]

    def ready(self) -> Program | str:
        """The program; why it may not run now, while a part whose call it does not make has hooks."""
        return hooked_among(self.containers) or self

    def __call__(self, x: Tensor) -> Any:
        planar = _native.memory_format(x) is torch.contiguous_format
        values: list[Any] = [_with_channels_last(x) if planar else x] + [None] * len(self.steps)
        for call, args, kwargs, out, last in self.steps:
            values[out] = call(*_filled(args, values), **_filled(kwargs, values))
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
    refusal = training_refusal(model)
    if not is_traced_through(model):
        refusal = f"the forward of {type(model).__name__} is not one of this library's"
    if refusal is not None:
        return Unprogrammed(guard, refusal)
    with _trace_lock, kernels.backend("reference"):
        try:
            graph = _Tracer(plain).trace(model)
        except Exception as error:  # whatever a user's forward or the tracer raises: the modules still run
            reason = (str(error).splitlines() or ["no message"])[0]
            return Unprogrammed(guard, f"torch.fx: {type(error).__name__}: {reason}")
    inputs = sum(node.op == "placeholder" for node in graph.nodes)
    if inputs != 1:
        return Unprogrammed(guard, f"the forward takes {inputs} arguments, expected the image alone")
    return Program(guard, containers(model), *_steps(model, graph))


# The call, its arguments, the nodes it replaces.
Group = tuple[Norm | Gate | Concat, tuple[Node, ...], list[Node]]


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
    return _with_last_uses(planned, result), result


def _with_last_uses(planned: list[tuple[Callable[..., Any], Any, Any, int]], result: Any) -> list[Step]:
    steps: list[Step] = []
    needed = _numbers(result)
    for call, args, kwargs, out in reversed(planned):
        used = (_numbers(args) | _numbers(kwargs) | {out}) - needed
        needed |= used
        steps.append(Step(call, args, kwargs, out, tuple(sorted(used))))
    return steps[::-1]


def _call_of(model: nn.Module, node: Node) -> tuple[Callable[..., Any], Any, Any]:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        call = Convolution(module) if Convolution.takes(module) and not node.kwargs else module
        return call, node.args, node.kwargs
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
        return self.group(Norm(norm, tail), (*node.args, *residual), [node, *members])

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

    def group(self, call: Norm | Gate, args: tuple[Any, ...], members: list[Node]) -> Group:
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
            return module if type(module) in _ACTIVATIONS else None
        plain = node.op == "call_function" and len(node.args) == 1 and not node.kwargs.get("inplace")
        return node.target if plain and node.target in _FUNCTIONS else None


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
