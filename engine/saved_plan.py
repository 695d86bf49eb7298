"""save_plan: the captured program of a model and its weights go into a file that runs without the model.

What is stored is the program of the forward, as plain data (plain_data.py), its weights, and the same weights
packed for the kernels; plan_file.py has the container. loaded_plan.py makes plans of that by the code that
makes them for a model: another instruction set gets its own kernels, a template serves any batch, and the
bits are the model's. A file is tried before it is written: the packed weights in it are those that its own
plans have asked for.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import _ext
from . import rules
from .batches import Family
from .convert import convert
from .graph import Live, Node, leaves
from .loaded_plan import LAYOUTS, WEIGHTS, LoadedPlan
from .optimize import has_dynamic_batch
from .packing import made_for, names_of, own_names, packed_rows
from .plain_data import NotPlain, encode_program, encode_template, short
from .plan import Plan
from .plan_file import Content, write
from .program import LEAST, PREFIX, Program, Template, Uncapturable
from .state import EngineState, allowed_precision, trace
from .strides import in_doubt, usual_strides

MOST_TRIED = 4096  # batches
Images = Tensor | Sequence[Any]


def save_plan(
    model: nn.Module,
    images: Images,
    path: str | os.PathLike[str],
    plain: MethodType,
    weights: str,
    dynamic_batch: bool,
) -> None:
    """fb.save_plan, which has the words; plain: the model's forward."""
    if weights not in WEIGHTS:
        raise ValueError(f"save_plan: weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
    native = _ext.require()
    with torch.no_grad():
        every = examples(model, images)
        check_model(model, every)
        state, tensors = EngineState.of(model), dict(rules.named_tensors(model))
        kinds, used = [], dict[str, Tensor]()
        for same in by_kind(every):
            try:
                kind = Kind(model, plain, same, dynamic_batch and has_dynamic_batch(model))
                kinds.append(kind.row())
            except Uncapturable as error:
                raise RuntimeError(f"save_plan: there is no plan: {error}") from error
            except NotPlain as error:
                raise ValueError(f"save_plan: the plan cannot be saved: {error}") from error
            used |= {name: tensors[name] for name in kind.names()}
            if kind.dynamic and not kind.templates:
                warn_of_batches(model, kind)
        stored = {
            "facts": facts_of(model, native),
            "precision": allowed_precision(every[0]),
            "choices": dict(state.choices),
            "weights": "plain",
            "plain": {},
            "kinds": kinds,
        }
        content = with_plain(stored, used)
        loaded = LoadedPlan(content, native, os.fspath(path))
        loaded.make_usual()
        if weights != "plain":
            content = with_packed(content, loaded, weights, native)
        write(path, content)


def examples(model: nn.Module, images: Images) -> list[Tensor]:
    """An image for each that is wanted, as plans read them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_plan: model is a {type(model).__name__}, expected an nn.Module")
    sequence = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else []
    one = isinstance(images, Tensor) or (len(sequence) > 0 and all(type(size) is int for size in sequence))
    wanted = [images] if one else sequence
    if not wanted:
        raise TypeError(
            f"save_plan: images is {images!r}, expected an image, its sizes (N, C, H, W), or a list of these"
        )
    dtype = next((t.dtype for _, t in rules.named_tensors(model) if t.is_floating_point()), torch.float32)
    return [_example(image, dtype) for image in wanted]


def _example(image: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(image, Tensor):
        return usual_strides(image) if image.dim() == 4 and image.layout is torch.strided else image
    sizes = list(image) if isinstance(image, Sequence) and not isinstance(image, str) else None
    if sizes is None or len(sizes) != 4 or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(
            f"save_plan: an image has sizes {image!r}, expected four positive numbers, N, C, H, W"
        )
    return torch.empty(sizes, dtype=dtype)


def check_model(model: nn.Module, every: Sequence[Tensor]) -> None:
    """Raises RuntimeError where there is no plan, ValueError for what a plan would leave out."""
    for x in every:
        reason = rules.call_refusal(model, x) or rules.structure_refusal(model)
        places = {tensor.device for _, tensor in rules.named_tensors(model)} - {x.device}
        if reason is None and not x.is_cpu:
            reason = f"the image is on {x.device}, and plan files hold plans for the CPU"
        if reason is None and places:
            reason = f"the image is on {x.device}, the model on {places.pop()}"
        if reason is not None:
            raise RuntimeError(f"save_plan: there is no plan: {reason}")
    hooks = model._forward_hooks or model._forward_pre_hooks
    if hooks:
        raise ValueError("save_plan: the model has forward hooks, which a plan file cannot hold: remove them")


def by_kind(every: Sequence[Tensor]) -> list[list[Tensor]]:
    """Images that differ in their batch alone, together."""
    found: dict[Any, list[Tensor]] = {}
    for x in every:
        found.setdefault((tuple(x.shape[1:]), layout_of(x), x.dtype), []).append(x)
    return list(found.values())


def layout_of(x: Tensor) -> str:
    return next(name for name, layout in LAYOUTS.items() if x.is_contiguous(memory_format=layout))


class Kind:
    """What the file holds about images that differ in their batch alone."""

    def __init__(self, model: nn.Module, plain: MethodType, same: Sequence[Tensor], dynamic: bool) -> None:
        self.model, self.plain, self.dynamic = model, plain, dynamic
        self.size, self.dtype, self.layout = tuple(same[0].shape[1:]), same[0].dtype, layout_of(same[0])
        self.wanted = sorted({x.shape[0] for x in same})
        family = Family(dynamic)
        self.programs = self.captured(family)
        self.templates: list[tuple[Template, Any]] = []  # and the strides of what it returns
        for template in family.templates:
            known, strides = self.strides_for_all(template)
            if known:
                self.templates.append((template, strides))
        for batch in list(self.programs):
            if any(template.fits(batch) for template, _ in self.templates):
                del self.programs[batch]

    def captured(self, family: Family) -> dict[int, Program]:
        """By batch: those that are wanted, and those that stand for all. Raises Uncapturable."""
        found: dict[int, Program] = {}
        more = {1, max(LEAST, self.wanted[-1])} if self.dynamic else set()
        for batch in sorted({*self.wanted, *more}):
            try:
                found[batch] = family.program(self.model, self.plain, self.image(batch))
            except Uncapturable:
                if batch in self.wanted:
                    raise
        return found

    def image(self, batch: int) -> Tensor:
        image = torch.empty((batch, *self.size), dtype=self.dtype)
        return image.contiguous(memory_format=LAYOUTS[self.layout])

    def strides(self, batch: int, program: Program) -> list[list[int] | None]:
        """Eager's, of what it returns; None for what is no tensor."""
        graph = trace(self.model, self.plain, self.image(batch), family=_Known(program)).graph
        return [list(o.stride) if isinstance(o, Node) and o.stride else None for o in graph.outputs]

    def strides_for_all(self, template: Template) -> tuple[bool, Any]:
        """Whether the strides of its results are known, and what they are if the captured ones are in doubt.

        For two images and more eager's rules are the same: what they give for two batches, they give for all.
        """
        batches = (batch for batch in range(LEAST, (template.most or MOST_TRIED) + 1) if template.fits(batch))
        two = list(itertools.islice(batches, 2))
        if not in_doubt(convert(template.at(two[0])), self.layout == "nhwc"):
            return True, None
        first, *others = (self.strides(batch, template.at(batch)) for batch in two)
        return all(other == first for other in others), first

    def row(self) -> dict[str, Any]:
        """As JSON. Raises NotPlain."""
        return {
            "size": list(self.size),
            "layout": self.layout,
            "dtype": short(self.dtype),
            "programs": [[batch, encode_program(program)] for batch, program in self.programs.items()],
            "templates": [encode_template(template) for template, _ in self.templates],
            "strides": [[batch, self.strides(batch, program)] for batch, program in self.programs.items()],
            "template strides": [strides for _, strides in self.templates],
            "ready": sorted({*self.wanted, *self.programs}),
        }

    def names(self) -> set[str]:
        """Parameters and buffers that something reads."""
        every = [*self.programs.values(), *(template.program for template, _ in self.templates)]
        return {
            one.target.removeprefix(PREFIX)
            for program in every
            for one, users in zip(program.instructions, program.users)
            if one.op == "placeholder" and one.kind in ("PARAMETER", "BUFFER") and users
        }


def warn_of_batches(model: nn.Module, kind: Kind) -> None:
    sizes = ", ".join(map(str, sorted(kind.programs)))
    warnings.warn(
        f"save_plan: the plan takes batches of {sizes} images and no others: {type(model).__name__} does"
        " not do the same with every batch",
        stacklevel=4,
    )


class _Known(Family):
    """Of a program that is there already."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.found = program

    def program(self, model: nn.Module, plain: MethodType, x: Tensor) -> Program:
        return self.found


def facts_of(model: nn.Module, native: Any) -> dict[str, Any]:
    from .. import __version__

    made = {"library": __version__, "torch": torch.__version__, "instruction set": native.isa()}
    return {"model": type(model).__name__, **made}


def with_plain(stored: dict[str, Any], used: dict[str, Tensor]) -> Content:
    """Tied weights are stored once."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    known: dict[Any, str] = {}
    for name, tensor in used.items():
        same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        names[name] = known.setdefault(same, f"weights.{name}")
        tensors.setdefault(names[name], tensor.detach().contiguous())
    return Content({**stored, "plain": names}, tensors)


def with_packed(content: Content, loaded: LoadedPlan, weights: str, native: Any) -> Content:
    """The same with what its plans have packed; of the plain weights, where they are not wanted, only those
    that PyTorch's steps read."""
    rows, packed = packed_rows(loaded.store)
    names = content.plan["plain"]
    if weights == "packed":
        plans = [runner.plan for kind in loaded.kinds for runner in kind.runners.values()]
        kept = {name for plan in plans for name in read_by_pytorch(plan)}
        names = {name: stored for name, stored in names.items() if name in kept}
    plain = {stored: content.tensors[stored] for stored in names.values()}
    more = {"weights": weights, "plain": names, "packed": rows, "packed for": made_for(native)}
    return Content({**content.plan, **more}, {**packed, **plain})


def read_by_pytorch(plan: Plan) -> list[str]:
    """The model's tensors that steps without a kernel read."""
    found: list[str] = []
    for step in plan.steps:
        if not step.native:
            live = [leaf.name for leaf in leaves(list(step.call or ())) if isinstance(leaf, Live)]
            found += own_names(live, plan.computed)
            for recipe in step.recipes.values():
                found += names_of(recipe, plan.computed)
    return found
