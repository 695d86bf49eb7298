"""Capture: the model's plain forward becomes a program of ATen operations, by torch.export.

What is exported is a shadow of the model: the same modules with parameters that share the live ones' memory.
Export swaps fake tensors into the module it traces; the live model never sees that, so other threads may go
on using it. Hooks of the root module do not belong to the graph (they run around the forward), so the plain
forward is called as a function, not as a module.

capture          for inputs like x
capture_batches  for any batch of such inputs, where the forward is the same for each

Cost for ResNet-50 on the development machine: 0.3 s warm; 1.1 s more the first time in a process, in which
PyTorch imports sympy, torch.fx.experimental and some 1,300 modules.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import nn

from .. import kernels
from .locks import ForkSafeLock
from .program import Program, Template, Uncapturable, program_of, template_of

_capturing: ContextVar[bool] = ContextVar("fast_backbones_capturing", default=False)
_export_lock = ForkSafeLock()  # torch.export changes global state while it traces


def capturing() -> bool:
    """Whether this thread is tracing a model, so that its forward must take the plain path."""
    return _capturing.get()


@contextlib.contextmanager
def plain_path() -> Iterator[None]:
    """Every engine and every fused kernel steps aside: models run as plain PyTorch."""
    token = _capturing.set(True)
    try:
        with kernels.backend("reference"):
            yield
    finally:
        _capturing.reset(token)


class _Root(nn.Module):
    """Holds the shadow, and calls its plain forward as a function."""

    def __init__(self, model: nn.Module, plain: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._plain = plain

    def forward(self, x: torch.Tensor) -> Any:
        return self._plain(x)


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers alias the live ones."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def example_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, with the sizes and strides of x: capture looks at nothing else."""
    with torch.inference_mode(False):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def capture(model: nn.Module, plain: MethodType, x: torch.Tensor) -> Program:
    """The program of `plain` (a bound method of `model`) for inputs like x.

    Its parameter and buffer targets are the model's names behind PREFIX.
    Raises Uncapturable with the first line of what torch.export said.
    """
    return program_of(_export(model, plain, x, None))


def capture_batches(model: nn.Module, plain: MethodType, x: torch.Tensor) -> Template:
    """The programs of `plain` for inputs like x in batches of any size. Takes 1.2 to 1.6 times as long.

    Raises Uncapturable where torch.export fails, or finds that the forward is made for this one batch.
    """
    import torch.export

    return template_of(_export(model, plain, x, ({0: torch.export.Dim.AUTO},)))


def _export(model: nn.Module, plain: MethodType, x: torch.Tensor, dynamic_shapes: Any) -> Any:
    """The ExportedProgram.

    What torch.export made lies about in reference cycles afterwards, until a garbage collection that may be
    far away. So the tensors that were lent to it let go of their memory, the model's weights, at the end.
    """
    import torch.export

    if getattr(plain, "__self__", None) is not model:
        raise TypeError("the plain forward must be a bound method of the model")
    with _export_lock, torch.inference_mode(False), torch.no_grad(), plain_path():
        shadow = shadow_of(model)
        root = _Root(shadow, MethodType(plain.__func__, shadow)).eval()
        example = example_like(x)
        lent = [example, *shadow.parameters(), *shadow.buffers()]
        try:
            with _in_silence():
                return torch.export.export(root, (example,), strict=False, dynamic_shapes=dynamic_shapes)
        except Exception as error:  # whatever a user's forward or the tracer raises: the modules still run
            raise Uncapturable(_sentence(error)) from error
        finally:
            for tensor in lent:
                tensor.data = tensor.new_empty(0)


NOISY = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Without what the tracer logs and prints about a graph that it gives up: the error says it. What anybody
    else prints meanwhile comes out late."""
    printed, graph = io.StringIO(), None
    before = [(logger, logger.disabled) for logger in map(logging.getLogger, NOISY)]
    for logger, _ in before:
        logger.disabled = True
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        raise
    finally:
        for logger, disabled in before:
            logger.disabled = disabled
        text = printed.getvalue()
        sys.stderr.write(text if graph is None else text.replace(f"{graph}\n", ""))


def _sentence(error: Exception) -> str:
    kind, text = type(error).__name__, str(error).strip()
    if kind in ("GuardOnDataDependentSymNode", "DynamicOutputShapeException"):
        return (
            f"the forward asks for values of tensors (an if, a loop or a size that depends on them): {kind}"
        )
    return f"torch.export: {kind}: {text.splitlines()[0] if text else 'no message'}"
