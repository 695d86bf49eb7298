"""torch.compile(model, backend="fast_backbones"): graphs that Dynamo finds run by plans where there is one.

Dynamo hands over a graph of PyTorch calls with the parameters among its inputs. Those become the parameters
of a small module; what is left, one image and sizes, is what a plan is made for. Sizes that are the image's
own, as Dynamo's symbols are, the module reads from it: so one capture serves all batches. A graph without a
plan (no image or several, gradients) runs as it is, or goes to inductor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .capture import example_like
from .optimize import call_of
from .rules import call_refusal
from .state import EngineState
from .strides import usual_strides

FALLBACKS = ("eager", "inductor")
MOST_MODULES = 64  # with one graph, as for blocks that are alike
log = logging.getLogger(__name__)


def fast_backbones(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """What Dynamo calls for each graph. options: {"fallback": "eager" or "inductor"}."""
    options = dict(options or {})
    fallback = options.pop("fallback", "eager")
    if options:
        raise ValueError(
            f"backend fast_backbones: unknown option {next(iter(options))!r}, there is 'fallback'"
        )
    if fallback not in FALLBACKS:
        raise ValueError(f"backend fast_backbones: fallback is {fallback!r}, expected one of {FALLBACKS}")
    fixed = [i for i, value in enumerate(inputs) if _is_fixed(value)]
    part = Part(graph, fixed, len(inputs), sizes_among(graph))
    reason = part.refusal([v.node.hint if isinstance(v, torch.SymInt) else v for v in inputs])
    if reason is None:
        return part
    log.info("a graph of %d calls goes to %s: %s", len(graph.graph.nodes), fallback, reason)
    if fallback == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, list(inputs))
    return graph.forward


def _is_fixed(value: Any) -> bool:
    """A parameter or buffer of a module: the same tensor in every call."""
    return isinstance(value, nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None


Sizes = dict[int, tuple[int, int]]  # an input that is a number: the input whose size it is, and the axis


def sizes_among(graph: torch.fx.GraphModule) -> Sizes:
    """By the examples that Dynamo leaves in its graph. It checks that its symbols are these sizes."""
    examples = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]
    axes: dict[Any, tuple[int, int]] = {}
    for i, value in enumerate(examples):
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                axes.setdefault(size.node.expr, (i, axis))
    symbols = {i: v.node.expr for i, v in enumerate(examples) if isinstance(v, torch.SymInt)}
    return {i: axes[symbol] for i, symbol in symbols.items() if symbol in axes}


class Part:
    """A compiled graph: called with all inputs, in their order. Keeps a module for each set of parameters."""

    def __init__(self, graph: torch.fx.GraphModule, fixed: list[int], count: int, sizes: Sizes) -> None:
        self.graph, self.fixed, self.sizes = graph, fixed, sizes
        self.free = [i for i in range(count) if i not in {*fixed, *sizes}]
        self.modules: dict[tuple[int, ...], Graph] = {}

    def refusal(self, inputs: Sequence[Any]) -> str | None:
        """Why these inputs have no plan; sizes as numbers."""
        found = self.call_of(inputs)
        if found is None:
            return "it has no image among its inputs, or several tensors"
        module, (x, plain) = found
        if torch.is_grad_enabled() and any(
            value.requires_grad for value in inputs if isinstance(value, Tensor)
        ):
            return "it records gradients"
        example = example_like(x)
        reason = call_refusal(module, example)
        if reason is not None:
            return reason
        state = EngineState.of(module)
        state.warned = True  # the log says it
        found = state.runner(module, plain, usual_strides(example))
        return found if isinstance(found, str) else None

    def call_of(self, inputs: Sequence[Any]) -> tuple[Graph, tuple[Tensor, Any]] | None:
        module = self.module([inputs[i] for i in self.fixed])
        found = call_of(module, tuple(inputs[i] for i in self.free), {})
        return None if found is None else (module, found)

    def module(self, tensors: list[Tensor]) -> Graph:
        key = tuple(map(id, tensors))
        module = self.modules.get(key)
        if module is None:
            if len(self.modules) >= MOST_MODULES:
                self.modules.pop(next(iter(self.modules)))
            module = self.modules[key] = Graph(self.graph, self.fixed, self.free, self.sizes, tensors)
        return module

    def __call__(self, *inputs: Any) -> Any:
        from . import forward

        found = self.call_of(inputs)
        return self.graph.forward(*inputs) if found is None else forward(found[0], *found[1])


class Graph(nn.Module):
    """A graph with its parameters, called with the image and with numbers that are not its sizes."""

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        fixed: list[int],
        free: list[int],
        sizes: Sizes,
        tensors: list[Tensor],
    ) -> None:
        super().__init__()
        self.graph, self.fixed, self.free, self.sizes = graph, fixed, free, sizes
        for i, tensor in zip(fixed, tensors, strict=True):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"input_{i}", tensor)
            else:
                self.register_buffer(f"input_{i}", tensor)
        self.eval()

    def forward(self, *free: Any) -> Any:
        inputs = dict(zip(self.free, free, strict=True))
        inputs |= {i: getattr(self, f"input_{i}") for i in self.fixed}
        inputs |= {i: inputs[image].shape[axis] for i, (image, axis) in self.sizes.items()}
        return self.graph(*(inputs[i] for i in range(len(inputs))))
