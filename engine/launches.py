"""A plan as a list of launches: the kernels of a GPU over one arena, in the plan's order.

    Bound        a step with its tensors: views of the arena, of the input and the outputs, and packed weights
    LaunchList   all of them, for one arena; `run` puts them on the current stream, or computes them

Nothing here needs a GPU: with `backend="reference"` every step is its formula in plain PyTorch on the same
views, and in Triton's interpreter the kernels themselves run on CPU tensors. run_cuda.py makes a CUDA graph
of the list.

Maps have the model's own type. Norms are a float32 scale and bias behind the sums of a 16-bit model: folded
into its weights they would be rounded once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import _gpu
from . import gpu_choices
from .lower import lower
from .plan import FLOAT, Loop, Plan, Step
from .recipes import Filters, Tensors, fold, fold_apart
from .run_reference import evaluate, owned, rebuild, shown, view
from .strides import in_strides, same_strides
from .weights import OPERANDS

COPIES = ("to_nhwc", "to_nchw")


def refusal(kind: str, params: Mapping[str, Any]) -> str:
    """What the library says on the CPU, kernels for GPUs say here; copies are PyTorch's."""
    from ..kernels._triton import ops

    return "" if kind in COPIES else ops.refusal(kind, params)


def lower_whole(plan: Plan) -> None:
    """Schedule and places for the whole batch at once: a GPU wants all the parallel work there is."""
    lower(plan, Loop(plan.batch, list(range(len(plan.steps)))))


@dataclass
class DeviceWeights:
    """Packed weights of one state of the model on a device, shared by its plans."""

    tensors: Tensors  # on the CPU
    dtype: torch.dtype
    device: torch.device
    packed: dict[tuple[Any, ...], dict[str, Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> DeviceWeights:
        own = tensors.own if isinstance(tensors, Tensors) else tensors
        return DeviceWeights(Tensors({name: t.detach().cpu() for name, t in own.items()}), dtype, device)

    def all(self) -> list[Tensor]:
        return [tensor for part in self.packed.values() for tensor in part.values()]

    def operands(self, step: Step, way: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part, recipe in step.recipes.items():
            found |= self.get(part, recipe, step, way)
        return found

    def get(self, part: str, recipe: Filters, step: Step, way: str) -> dict[str, Tensor]:
        geometry = tuple(
            (key, step.params[key]) for key in ("c", "k", "r", "s", "groups") if key in step.params
        )
        key = (part, step.kernel, way, recipe, geometry, step.params.get("nchw_in", 0))
        if key not in self.packed:
            self.packed[key] = {
                name: moved(t, self.device) for name, t in self.pack(part, recipe, step, way).items()
            }
        return self.packed[key]

    def pack(self, part: str, recipe: Filters, step: Step, way: str) -> dict[str, Tensor]:
        filters = part == "depth" or (part == "weight" and step.kernel != "affine")
        if filters and self.dtype is not torch.float32:
            weight, scale, bias = fold_apart(recipe, self.tensors)
        else:
            (weight, bias), scale = fold(recipe, self.tensors), None
        if part == "pre" and bias is None:
            bias = torch.zeros_like(weight)  # the kernels read both
        if filters:
            kind = "depthwise_conv2d" if part == "depth" else step.kernel
            weight = _gpu.packed(way, kind, step.params, weight.to(self.dtype))
        names = OPERANDS[part]
        return {
            name: t for name, t in zip(names, (weight, bias, scale)) if name is not None and t is not None
        }


@dataclass(frozen=True)
class Arithmetic:
    """What PyTorch's switches allow on a GPU."""

    convolutions: bool = False  # their float32 products may be TF32
    linear: bool = False  # so may those of linear layers
    same_bits: bool = False  # for a sample in every batch: deterministic algorithms are asked for


EXACT = Arithmetic()


@dataclass
class Bound:
    """One step: a kernel's launch, a copy between tensors, or neither: then PyTorch computes it."""

    step: Step
    launch: Any = None
    copy: tuple[Tensor, Tensor] | None = None
    how: str = "PyTorch"  # way and tile
    first: Step | None = None  # computed by the same launch, before the step


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On another device, the distance between rows kept."""
    if tensor.dim() != 2 or tensor.stride(0) <= tensor.shape[1]:
        return tensor.to(device)
    rows = torch.zeros(tensor.shape[0], tensor.stride(0), dtype=tensor.dtype, device=device)
    return rows[:, : tensor.shape[1]].copy_(tensor)


class LaunchList:
    """A plan bound to memory: `run()` computes everything from `x` into the outputs.

    x, arena and outputs stay the same tensors for as long as the list lives, as a CUDA graph wants it.
    backend: "triton", or "reference" for the formulas."""

    def __init__(
        self,
        plan: Plan,
        weights: DeviceWeights,
        x: Tensor,
        tensors: Tensors,
        *,
        allowed: Arithmetic = EXACT,
        backend: str = "triton",
        choices: gpu_choices.Choices | None = None,
    ) -> None:
        self.plan, self.weights, self.x, self.tensors = plan, weights, x, tensors
        self.allowed, self.backend = allowed, backend
        self.choices = choices or {}
        tensors.calls.update(plan.computed)
        for name in plan.computed:  # their constants say which device they are on
            weights.tensors.made.setdefault(name, tensors[name].detach().cpu())
        self.arena = torch.empty(plan.arena_bytes // FLOAT, dtype=x.dtype, device=x.device)
        self.results: dict[int, Any] = {plan.input: x}
        for value in plan.values:
            if value.is_external:
                assert value.shape is not None and value.stride is not None
                out = torch.empty_strided(value.shape, value.stride, dtype=x.dtype, device=x.device)
                self.results[value.id] = out
        self.bound = [self.bind(step) for step in plan.steps]
        if backend == "triton":
            self.bound = joined(self)

    def compile(self) -> None:
        """Triton's kernels, which the first run would compile step by step, on all cores."""
        _gpu.compile_all(bound.launch for bound in self.bound)

    def run(self) -> None:
        for bound in self.bound:
            self.run_step(bound)

    def run_step(self, bound: Bound) -> None:
        if bound.launch is not None:
            bound.launch()
        elif bound.copy is not None:
            source, target = bound.copy
            target.copy_(source)
        else:
            self.compute(bound.step)

    def outputs(self) -> Any:
        """The model's return value with eager PyTorch's strides, on this list's own memory."""
        return rebuild(self.plan, self.returned)

    def returned(self, value: int) -> Any:
        found, result = self.plan.values[value], self.read(value)
        if not isinstance(result, Tensor) or found.home == "input" or found.stride is None:
            return result
        return result if same_strides(result, found.stride) else in_strides(result, found.stride)

    def read(self, value: int) -> Any:
        found, root = self.plan.values[value], self.plan.root(value)
        if root.home == "arena":
            return view(self.arena, found, self.plan.places[value], 0, self.plan.batch, 0)
        return shown(self.plan, value, self.results[root.id])

    def bind(self, step: Step, way: str = "", tile: str = "") -> Bound:
        """way, tile: "" for what the choices or the rules say."""
        if not step.native:
            return Bound(step)
        if step.kernel in COPIES:
            return Bound(step, copy=(self.read(step.inputs[0]), self.read(step.output)))
        if self.backend == "reference":
            return Bound(step)
        if not way:
            way, tile = self.option(step, self.choices)
        operands = {role: self.read(value) for role, value in zip(step.roles, step.inputs)}
        operands |= {"y": self.read(step.output), **self.weights.operands(step, way)}
        launch = _gpu.launch(way, step.kernel, step.params, operands, self.precision(step), tile)
        return Bound(step, launch, how=gpu_choices.described(way, tile))

    def precision(self, step: Step) -> str:
        """Of float32 products."""
        allowed = self.allowed.linear if step.kernel == "linear" else self.allowed.convolutions
        return "tf32" if allowed else "ieee"

    def key(self, step: Step) -> str:
        found = gpu_choices.key(step, self.x.dtype, self.precision(step))
        return f"{found} same" if self.allowed.same_bits else found  # chosen among fewer ways

    def ways(self, step: Step) -> list[str]:
        maps = [self.read(value) for value in (step.inputs[0], step.output)]
        others = {role: 1 for role in step.roles if role != "x"}
        found = _gpu.ways(step.kernel, {**step.params, **others}, self.x.dtype, maps)
        if self.allowed.same_bits and len(found) > 1:  # cuDNN and cuBLAS look at the batch
            return [way for way in found if way != _gpu.LIBRARY]
        return found

    def option(self, step: Step, choices: gpu_choices.Choices) -> tuple[str, str]:
        """Way and tile by the choices, else by the rules."""
        ways, key = self.ways(step), self.key(step)
        way = choices.get(key, ways[0])
        if way not in ways:
            return ways[0], ""
        return way, choices.get(gpu_choices.with_batch(key, self.plan.batch), "")

    def options(self, step: Step) -> list[tuple[str, str]]:
        """Every way and tile, the rules' own first; none for what is no kernel."""
        if not step.native or step.kernel in COPIES:
            return []
        return [
            (way, tile)
            for way in self.ways(step)
            for tile in ("", *_gpu.tiles(way, step.kernel, step.params, self.x.dtype))
        ]

    def compute(self, step: Step) -> None:
        """In PyTorch: a call of the model's own, or the formula of a kernel's step."""
        result = evaluate(self.plan, step, self.read, self.tensors, self.x.dtype)
        output = self.plan.values[step.output]
        if output.home == "object" and output.same_as is None:
            self.results[step.output] = owned(result, self.arena)
        else:
            target = self.read(step.output)
            target.copy_(result.reshape(target.shape))


def joined(launches: LaunchList) -> list[Bound]:
    """The list with the two layers of each excitation as one launch, at the place of the second."""
    from ..kernels._triton import excitation

    found: list[Bound] = []
    for bound in launches.bound:
        first = found[-1] if found else None
        if first is not None and is_excitation(launches, first.step, bound.step):
            one, two = (launches.weights.operands(step, _gpu.TRITON) for step in (first.step, bound.step))
            x, y = launches.read(first.step.inputs[0]), launches.read(bound.step.output)
            launch = excitation.launch(
                x.flatten(1), one["weight"], two["weight"], y.flatten(1), scale1=one.get("scale"),
                bias1=one.get("bias"), scale2=two.get("scale"), bias2=two.get("bias"),
                activation1=first.step.params.get("activation", 0),
                activation2=bound.step.params.get("activation", 0), precision=launches.precision(bound.step),
            )  # fmt: skip
            found[-1] = Bound(bound.step, launch, how="triton", first=first.step)
        else:
            found.append(bound)
    return found


def is_excitation(launches: LaunchList, first: Step, second: Step) -> bool:
    """Two small layers of rows in a row, whose first result nobody else reads. LeNet's head has them, too."""
    from ..kernels._triton import excitation

    plan, steps = launches.plan, (first, second)
    if any(step.kernel != "linear" or step.roles != ("x",) or not bare(step.params) for step in steps):
        return False
    if second.inputs != [first.output] or first.params["k"] > excitation.MOST_HIDDEN:
        return False
    between = plan.root(first.output)
    readers = [step for step in plan.steps for value in step.inputs if plan.root(value) is between]
    shown = any(output.value is not None and plan.root(output.value) is between for output in plan.outputs)
    alone = len(readers) == 1 and not shown
    return alone and apart(launches.read(first.inputs[0]), launches.read(second.output))


def bare(params: Mapping[str, Any]) -> bool:
    """Nothing before the product, and one activation for all channels behind it."""
    return not any(params.get(name) for name in ("pre", "pre_activation", "act_from"))


def apart(a: Tensor, b: Tensor) -> bool:
    """Whether no byte lies in the ranges of both."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return True
    (a0, a1), (b0, b1) = (
        (t.storage_offset(), t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride())))
        for t in (a, b)
    )
    return a1 < b0 or b1 < a0
