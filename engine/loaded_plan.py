"""A plan from a file: something to call that needs neither the model nor its class.

load_plan(path)       the file's LoadedPlan
LoadedPlan            plan(image) -> what the model returns
Kind                  the images of one size that it takes, and the programs for their batches
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..kernels import _ext
from . import rules
from .footprint import OutOfBounds, check_call, check_sizes, memory_of
from .graph import Graph, Node
from .locks import ForkSafeLock
from .packing import FileStore, difference
from .plain_data import DTYPES, NotPlain, decode_program, decode_template, short
from .plan import Plan, Step
from .plan_file import Content, PlanFileError, read
from .program import PREFIX, Program, Template, Uncapturable
from .run_cpu import ArenaPool, Runner
from .state import fused, make
from .weights import WeightStore

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
PRECISIONS = ("highest", "high", "medium")
WEIGHTS = ("both", "plain", "packed")
MAX_RUNNERS = 32  # of one kind: a plan is less than 1 MB, beside the weights that all share

# What the plan of a model asks of its surroundings, but for the hooks of modules, of which there are none.
SURROUNDINGS = tuple(rule for rule in rules.SURROUNDINGS if rule[0] is not rules._global_hooks)


def load_plan(path: str | os.PathLike[str]) -> LoadedPlan:
    """The plan in a file of fb.save_plan, ready to run.

    Nothing in the file is executed: it names operations of PyTorch and of this library, whose arguments are
    tensors and plain data, and every address that a kernel gets is checked against the memory behind it.

    Args:
        path: of the file. It is read into memory, whole; what happens to it afterwards does not matter.
    Returns: LoadedPlan; call it with an image [N, C, H, W].
    Raises:
        PlanFileNotFoundError: there is no such file.
        PlanFileError: a sentence with the path. It is no plan file, is damaged (its SHA-256 differs), has
            another format, or holds packed weights alone, for another instruction set or version.
        RuntimeError: the compiled library is absent.
    """
    native = _ext.require()
    content = read(path, native)
    try:
        return LoadedPlan(content, native, os.fspath(path))
    except (NotPlain, OutOfBounds, Uncapturable) as error:
        raise PlanFileError(f"{os.fspath(path)} cannot be used: {error}") from error
    except Exception as error:  # the digest is right, and what it covers makes no sense
        what = f"{type(error).__name__}: {error}"
        raise PlanFileError(f"{os.fspath(path)} is not what fb.save_plan writes: {what}") from error


class LoadedPlan:
    """plan(image): what the model returned when it was saved, for an image [N, C, H, W] on the CPU.

    Results are those of the model's own plan, to the bit, with the same nesting, types and strides; a named
    tuple has the same name and fields and a class of its own. Several threads may call it at once.

    images: which images it takes, a line each.
    facts: of the file: the model's class, versions, instruction set, precision.
    """

    def __init__(self, content: Content, native: Any, label: str) -> None:
        stored = content.plan
        self.label, self.native = label, native
        self.facts: dict[str, Any] = dict(stored["facts"])
        self.precision = _one_of(stored["precision"], PRECISIONS, "precision")
        self.weights = _one_of(stored["weights"], WEIGHTS, "kind of weights")
        self.choices = {str(key): str(way) for key, way in stored["choices"].items()}
        plain = {name: content.tensors[stored_as] for name, stored_as in stored["plain"].items()}
        self.store = FileStore(native, plain, label)
        if self.weights != "plain":
            reason = difference(stored["packed for"], native)
            if reason is None:
                self.store.take(stored["packed"], content.tensors)
            elif self.weights == "packed":
                raise NotPlain(f'{reason}; save it there, or with weights="both", to run it here')
        self.arenas = ArenaPool()
        self.lock = ForkSafeLock()
        self.kinds = [Kind(row) for row in stored["kinds"]]
        for kind in self.kinds:
            for batch in kind.ready:
                self._make(kind, batch)

    def __call__(self, image: Tensor) -> Any:
        """What the model returns for the image.

        Args:
            image: [N, C, H, W] as `images` says, on the CPU. In another memory layout than the plan was saved
                for, it is copied first; the strides of results are those for the layout that was saved.
        Raises TypeError for what is no tensor, ValueError for another shape, type or device, and RuntimeError
        under autocast, torch.jit.trace and other surroundings that a plan cannot follow.
        """
        for ask, answer, reason in SURROUNDINGS:
            if ask() != answer:
                raise RuntimeError(f"the plan cannot run: {reason}")
        kind = self._kind(image)
        runner = kind.runners.get(image.shape[0])
        if runner is None:
            runner = self._runner(kind, image.shape[0])
        return runner(kind.laid_out(image))

    @property
    def images(self) -> list[str]:
        return [str(kind) for kind in self.kinds]

    def __repr__(self) -> str:
        return f"LoadedPlan({self.label!r}, {self.facts.get('model')}: {'; '.join(self.images)})"

    def bound(self, image: Tensor) -> tuple[Runner, Tensor]:
        """What runs for an image like this, whose `plan` is plain data; and the image as it reads it."""
        kind = self._kind(image)
        return self._runner(kind, image.shape[0]), kind.laid_out(image)

    def make_usual(self) -> None:
        """The plans for one image and for two, which stand for all others, where there are any."""
        for kind in self.kinds:
            for batch in filter(kind.has, (1, 2)):
                self._runner(kind, batch)

    def _kind(self, image: Tensor) -> Kind:
        """The first kind that takes the image, if there is one in its layout."""
        if type(image) is not Tensor:
            raise TypeError(f"plan: image is a {type(image).__name__}, expected a torch.Tensor")
        fitting = [kind for kind in self.kinds if kind.takes(image)]
        if not fitting or (reason := rules._input_refusal(image)) is not None:
            got = f"[{', '.join(map(str, image.shape))}] {short(image.dtype)} on {image.device}"
            said = "" if not fitting else f" ({reason})"
            raise ValueError(f"plan: image is {got}{said}, expected {' or '.join(self.images)}")
        return next((kind for kind in fitting if kind.lies(image)), fitting[0])

    def _runner(self, kind: Kind, batch: int) -> Runner:
        with self.lock:
            runner = kind.runners.get(batch)
            if runner is None:
                try:
                    runner = self._make(kind, batch)
                except Exception as error:
                    raise PlanFileError(f"{self.label}: no plan for a batch of {batch}: {error}") from error
            else:
                kind.runners.move_to_end(batch)
            return runner

    def _make(self, kind: Kind, batch: int) -> Runner:
        start = perf_counter()
        program, strides = kind.program(batch)
        found = perf_counter() - start
        x = torch.empty((batch, *kind.size), dtype=kind.dtype).contiguous(memory_format=LAYOUTS[kind.layout])
        declared = declared_tensors(program)
        check_input(program, x)

        def see_strides(graph: Graph) -> None:
            set_strides(graph, strides)

        traced = fused(program, x, declared, see_strides)
        plan = make(traced, self.precision, self.choices)
        plan.seconds["capture"] = found
        start = perf_counter()
        runner = kind.runners[batch] = CheckedRunner(plan, None, self.store, self.arenas)
        plan.seconds["pack"] = perf_counter() - start
        while len(kind.runners) > MAX_RUNNERS:
            kind.runners.popitem(last=False)
        return runner


@dataclass(init=False)
class Kind:
    """Images of one size, layout and type.

    programs: for one batch each. templates: for any that fits. strides and template_strides: of what they
    return, where PyTorch's capture may have them wrong.
    """

    size: tuple[int, int, int]
    layout: str
    dtype: torch.dtype
    ready: list[int]  # batches whose plans are made at once
    programs: dict[int, Program] = field(default_factory=dict)
    templates: list[Template] = field(default_factory=list)
    strides: dict[int, Any] = field(default_factory=dict)
    template_strides: list[Any] = field(default_factory=list)
    runners: OrderedDict[int, Runner] = field(default_factory=OrderedDict)

    def __init__(self, row: Mapping[str, Any]) -> None:
        sizes = row["size"]
        if len(sizes) != 3 or any(type(size) is not int or not 0 < size < 1 << 31 for size in sizes):
            raise NotPlain(f"its images have sizes {sizes}, expected three positive numbers")
        self.size = (sizes[0], sizes[1], sizes[2])
        self.layout = _one_of(row["layout"], tuple(LAYOUTS), "layout")
        self.dtype = DTYPES[_one_of(row["dtype"], ("float32", "bfloat16"), "type of image")]
        self.programs = {batch: decode_program(program) for batch, program in row["programs"]}
        self.templates = [decode_template(template) for template in row["templates"]]
        self.strides = dict(map(tuple, row["strides"]))
        self.template_strides = list(row["template strides"])
        self.ready = list(row["ready"])
        self.runners = OrderedDict()
        if any(type(batch) is not int or batch < 1 or not self.has(batch) for batch in self.ready):
            raise NotPlain(f"it has no programs for batches of {self.ready}")

    def has(self, batch: int) -> bool:
        return batch in self.programs or any(template.fits(batch) for template in self.templates)

    def takes(self, image: Tensor) -> bool:
        alike = image.dtype is self.dtype and image.dim() == 4 and tuple(image.shape[1:]) == self.size
        return alike and (image.shape[0] in self.runners or self.has(image.shape[0]))

    def lies(self, image: Tensor) -> bool:
        return image.is_contiguous(memory_format=LAYOUTS[self.layout])

    def laid_out(self, image: Tensor) -> Tensor:
        return image if self.lies(image) else image.contiguous(memory_format=LAYOUTS[self.layout])

    def program(self, batch: int) -> tuple[Program, Any]:
        """And the strides of what it returns, None where those captured are right."""
        if batch in self.programs:
            return self.programs[batch], self.strides.get(batch)
        number = next(i for i, template in enumerate(self.templates) if template.fits(batch))
        return self.templates[number].at(batch), self.template_strides[number]

    def __str__(self) -> str:
        fixed = sorted(self.programs)
        if self.templates:
            most = max(t.most or 0 for t in self.templates) if all(t.most for t in self.templates) else 0
            any_batch = f"2 to {most}" if most else "2 and more"
            asked = ", as its conditions allow," if any(t.guards for t in self.templates) else ""
            batches = ", ".join([*map(str, fixed), any_batch]) + asked
        else:
            batches = ", ".join(map(str, fixed))
        sizes = ", ".join(map(str, self.size))
        return f"[N, {sizes}] {short(self.dtype)} {self.layout.upper()} with N of {batches}"


class CheckedRunner(Runner):
    """A Runner whose every kernel call is measured against its memory before it is made."""

    def __init__(self, plan: Plan, guard: None, store: WeightStore, arenas: ArenaPool) -> None:
        self.memory = memory_of(plan)
        super().__init__(plan, guard, store, arenas)

    def check(
        self,
        step: Step,
        params: dict[str, Any],
        operands: dict[str, tuple[int, int]],
        constants: dict[str, Tensor],
    ) -> None:
        try:
            check_sizes(step.kernel, params, self.plan.values[step.inputs[0]], self.plan.values[step.output])
            check_call(step.kernel, params, operands, constants, self.memory, self.native)
        except OutOfBounds as error:
            raise OutOfBounds(f"step {step.name or step.op}: {error}") from error


def declared_tensors(program: Program) -> dict[str, Tensor]:
    """The model's tensors as the program knows them: sizes and types, no numbers."""
    placeholders = (one for one in program.instructions if one.op == "placeholder")
    return {
        one.target.removeprefix(PREFIX): torch.empty(one.result.shape, dtype=one.result.dtype, device="meta")
        for one in placeholders
        if one.kind in ("PARAMETER", "BUFFER")
    }


def check_input(program: Program, x: Tensor) -> None:
    """The program is for images like x."""
    for one in program.instructions:
        if one.op == "placeholder" and one.kind == "USER_INPUT":
            facts = one.result
            if facts.shape != tuple(x.shape) or facts.dtype is not x.dtype:
                raise NotPlain(f"a program for {facts.shape} stands where one for {tuple(x.shape)} belongs")


def set_strides(graph: Graph, strides: Any) -> None:
    """Of what is returned."""
    for output, stride in zip(graph.outputs, strides or ()):
        if isinstance(output, Node) and stride is not None:
            if len(stride) != len(output.shape or ()) or any(type(s) is not int or s < 0 for s in stride):
                raise NotPlain(f"{output.label} of sizes {output.shape} has the strides {stride}")
            output.stride = tuple(stride)


def _one_of(found: Any, known: tuple[str, ...], what: str) -> Any:
    if found not in known:
        raise NotPlain(f"it has the {what} {found!r}, expected one of {', '.join(known)}")
    return found
