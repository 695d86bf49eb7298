"""Runs a plan with the native kernels: one C++ call per run of kernel steps, which mostly is the network.

A Runner holds packed weights and does not change, but that a shortcut is added after the first call; several
threads may call it at once, each with an arena of its own. When weights change a new Runner is made, and
calls in flight finish on the old one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .guard import Guard
from .lower import Part
from .plan import OPERANDS, Instance, Plan, Step, Value
from .run_reference import evaluate, owned, shown, view
from .strides import in_strides, same_strides
from .weights import Packed, WeightStore, native_floats

STALE = object()  # what a call gives when its weights turned out to have changed
SPARE_ARENAS = 4  # kept for the next calls; more are made when more threads come at once


class ArenaPool:
    """Arenas between calls. A deque's append and pop are atomic, so there is no lock to hold in a fork."""

    def __init__(self) -> None:
        self.spare: deque[Tensor] = deque(maxlen=SPARE_ARENAS)

    def take(self, size: int, native: Any) -> Tensor:
        while True:
            try:
                arena = self.spare.pop()
            except IndexError:
                break
            if arena.numel() * 4 >= size:
                return arena
        return native_floats(native, -(-size // 4))

    def give(self, arena: Tensor) -> None:
        self.spare.append(arena)


@dataclass
class _Call:
    """What one forward has at hand."""

    x: Tensor
    arena: Tensor
    results: dict[int, Any]  # values that live outside the arena


class Runner:
    """plan(x) by native kernels. `guard` knows the model that the weights come from, if they come from one.
    `tensors` alias its parameters, for steps that run in PyTorch."""

    def __init__(self, plan: Plan, guard: Guard | None, store: WeightStore, arenas: ArenaPool) -> None:
        self.plan, self.guard, self.arenas, self.native = plan, guard, arenas, store.native
        self.tensors = store.tensors
        store.tensors.calls.update(plan.computed)
        self.weights: list[Packed] = []  # keeps the memory alive that the native plans point to
        self.parts: list[tuple[Part, Any]] = [(part, self.lower(part, store)) for part in plan.parts]
        self.external: list[Value] = [v for v in plan.values if v.is_external]
        self.fresh = [(v.id, torch.Size(v.shape or ()), v.stride or ()) for v in self.external]
        self.direct = directly_returned(plan)
        self.whole = self.parts[0][1] if len(self.parts) == 1 and self.parts[0][0].native else None
        self.shortcut: Any = None  # of calls like the last one; see shortcut.py

    def lower(self, part: Part, store: WeightStore) -> Any:
        """The native plan of a part; the step itself for a PyTorch call."""
        if not part.native:
            return self.plan.steps[self.plan.instances[part.begin].step]
        native = store.native.Plan()
        for instance, deps in zip(self.plan.instances[part.begin : part.end], part.deps):
            step = self.plan.steps[instance.step]
            params, operands = self.operands(step, instance)
            constants, kept = store.operands(step.recipes, step.kernel, step.params)
            self.weights += kept
            self.check(step, params, operands, constants)
            operands |= {name: (-1, tensor.data_ptr()) for name, tensor in constants.items()}
            native.add(step.kernel, params, operands, deps, step.name)
        native.finish()
        return native

    def check(
        self,
        step: Step,
        params: dict[str, Any],
        operands: dict[str, tuple[int, int]],
        constants: dict[str, Tensor],
    ) -> None:
        """For plans whose sizes nobody has vouched for: raises where a call would leave its memory."""

    def operands(self, step: Step, instance: Instance) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """Parameters with batch and strides, and where x, residual, gate and y of these images are."""
        places = self.plan.places
        params = {**step.params, "n": instance.last - instance.first}
        operands = {}
        for role, value in zip(step.roles, step.inputs):
            place = places[value]
            operands[role] = instance.address(place)
            params[OPERANDS[role]] = place.image_stride if role == "gate" else place.pixel_stride
        operands["y"] = instance.address(places[step.output])
        params["ldy"] = places[step.output].pixel_stride
        return params, operands

    def __call__(self, x: Tensor, check: Callable[[], bool] | None = None) -> Any:
        """plan(x), or STALE when check() is false.

        Where the plan is one native part, check runs on the calling thread while the others already compute.
        """
        if check is not None and self.whole is None and not check():
            return STALE
        call, addresses = self.prepare(x)
        if self.whole is not None:
            valid = self.whole.run(call.arena.data_ptr(), addresses, 0, check)
            outputs = self.outputs(call) if valid else STALE
            self.arenas.give(call.arena)
            return outputs
        for part, native in self.parts:
            if part.native:
                native.run(call.arena.data_ptr(), addresses, 0)
            else:
                self.run_step(native, call)
        outputs = self.outputs(call)
        self.arenas.give(call.arena)
        return outputs

    def prepare(self, x: Tensor) -> tuple[_Call, list[int]]:
        """An arena, fresh outputs with eager's strides, and the addresses of the external slots."""
        if self.plan.narrow:
            x = x.float()
        results: dict[int, Any] = {self.plan.input: x}
        addresses = [x.data_ptr()]
        for value, shape, stride in self.fresh:
            out = results[value] = torch.empty_strided(shape, stride, dtype=torch.float32, device="cpu")
            addresses.append(out.data_ptr())
        return _Call(x, self.arenas.take(self.plan.arena_bytes, self.native), results), addresses

    def outputs(self, call: _Call) -> Any:
        if self.direct is not None:
            return call.results[self.direct]
        if self.plan.narrow:  # once each: results that share memory go on sharing it
            for value in self.external:
                call.results[value.id] = call.results[value.id].to(torch.bfloat16)
        flat = [o.constant if o.value is None else self.returned(o.value, call) for o in self.plan.outputs]
        return pytree.tree_unflatten(flat, self.plan.out_spec)

    def returned(self, value: int, call: _Call) -> Any:
        """A value for the caller: never a view of the arena, always with eager's strides."""
        found = self.plan.values[value]
        result = self.read(value, call)
        if not isinstance(result, Tensor) or found.home == "input":
            return result
        if self.plan.narrow:
            result = result.to(torch.bfloat16)
        in_arena = self.plan.root(value).home == "arena"
        if found.stride is not None and (in_arena or not same_strides(result, found.stride)):
            return in_strides(result, found.stride)
        return result

    def read(self, value: int, call: _Call) -> Any:
        """A value of the whole batch as a logical tensor."""
        found, root = self.plan.values[value], self.plan.root(value)
        if root.home == "arena":
            return view(call.arena, found, self.plan.places[value], 0, self.plan.batch, 0)
        return shown(self.plan, value, call.results[root.id])

    def run_step(self, step: Step, call: _Call) -> None:
        """A PyTorch call."""
        result = evaluate(self.plan, step, lambda value: self.read(value, call), self.tensors)
        output = self.plan.values[step.output]
        if output.home == "arena" or output.same_as is not None:
            self.read(step.output, call).copy_(result)
            return
        call.results[step.output] = owned(result, call.arena)

    def profile(self, x: Tensor, repeats: int) -> list[tuple[Step, dict[str, Any]]]:
        """Every native instance run alone, `repeats` times, after one whole run that fills the arena."""
        call, addresses = self.prepare(x)
        rows: list[tuple[Step, dict[str, Any]]] = []
        for part, native in self.parts:
            if not part.native:
                rows.append((native, timed_step(self, native, call)))
                continue
            native.run(call.arena.data_ptr(), addresses, 0)
            measured = native.profile(call.arena.data_ptr(), addresses, repeats, 0)
            for offset, row in enumerate(measured):
                step = self.plan.steps[self.plan.instances[part.begin + offset].step]
                rows.append((step, {**row, **native.costs(offset)}))
        self.arenas.give(call.arena)
        return rows


def directly_returned(plan: Plan) -> int | None:
    """The value that is all the model returns, where that is a tensor of its own, just as steps leave it."""
    value = plan.outputs[0].value if len(plan.outputs) == 1 and plan.out_spec.is_leaf() else None
    if value is None or plan.narrow or not plan.values[value].is_external:
        return None
    return value


def timed_step(runner: Runner, step: Step, call: _Call) -> dict[str, Any]:
    from time import perf_counter

    start = perf_counter()
    runner.run_step(step, call)
    seconds = perf_counter() - start
    return {"ms": seconds * 1e3, "flops": 0.0, "bytes": 0.0, "tasks": 1, "detail": "PyTorch"}
