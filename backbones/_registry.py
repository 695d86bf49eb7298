"""Models by name: registration, creation, listing, and facts that are counted (parameters, MACs, taps)."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from .transforms import Preprocessing, preprocessing_for

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class _Entry:
    name: str
    build: Callable[..., nn.Module]
    family: str
    paper: str
    compatible_with: tuple[str, ...]
    aliases: tuple[str, ...]


_entries: dict[str, _Entry] = {}
_aliases: dict[str, str] = {}


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a registered model as built without options.

    `params` counts all parameters; `aux_params` of them belong to auxiliary heads, which only training uses.
    `macs` counts convolutions and linear layers of one image of `input_size` (channels, height, width), bias
    excluded. `compatible_with` names the public implementations whose checkpoints load ("own": no PyTorch
    implementation has these names), and `preprocessing` says what such a checkpoint expects of an image.
    `tap_channels`, `tap_reductions` and `tap_modules` describe what `features_only=True` returns.
    """

    name: str
    aliases: tuple[str, ...]
    family: str
    paper: str
    compatible_with: tuple[str, ...]
    input_size: tuple[int, int, int]
    preprocessing: Preprocessing
    params: int
    aux_params: int
    macs: int
    num_features: int
    tap_channels: tuple[int, ...]
    tap_reductions: tuple[int, ...]
    tap_modules: tuple[str, ...]

    @property
    def gmacs(self) -> float:
        return self.macs / 1e9


@overload
def register_model(build: Builder, /) -> Builder: ...


@overload
def register_model(
    *, family: str = ..., paper: str = ..., compatible_with: Iterable[str] = ..., aliases: Iterable[str] = ...
) -> Callable[[Builder], Builder]: ...


def register_model(
    build: Any = None,
    /,
    *,
    family: str = "custom",
    paper: str = "",
    compatible_with: Iterable[str] = (),
    aliases: Iterable[str] = (),
) -> Any:
    """Make a function that builds a model known to `create_model` under the function's own name.

    Works bare (`@register_model`) and with facts (`@register_model(family=..., aliases=...)`). A name that
    is taken is an error, unless the same function of the same module is defined again (a notebook cell).
    """

    def register(function: Any) -> Any:
        entry = _Entry(function.__name__, function, family, paper, tuple(compatible_with), tuple(aliases))
        known = _entries.get(entry.name)
        if known is not None and _origin(known.build) != _origin(function):
            raise ValueError(f"model {entry.name!r} is already registered by {known.build.__module__}")
        for name in (entry.name, *entry.aliases):
            owner = _aliases.get(name, name if name in _entries else entry.name)
            if owner != entry.name:
                raise ValueError(f"model name {name!r} already belongs to {owner!r}")
        _entries[entry.name] = entry
        _aliases.update(dict.fromkeys(entry.aliases, entry.name))
        _measure.cache_clear()
        return function

    return register if build is None else register(build)


def _origin(function: Any) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _entry(name: str) -> _Entry:
    entry = _entries.get(_aliases.get(name, name))
    if entry is None:
        close = difflib.get_close_matches(name, [*_entries, *_aliases], n=4, cutoff=0.6)
        hint = f"did you mean {', '.join(close)}?" if close else "list_models() gives all names"
        raise ValueError(f"no model is called {name!r}: {hint}")
    return entry


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a registered model by name or alias; `options` are those of its function.

    Raises ValueError with the closest names when there is no such model.
    """
    return _entry(name).build(**options)


def list_models(filter: str = "*", *, family: str | None = None) -> list[str]:
    """Names that match a shell pattern (`"*resnext*"`) in natural order; an alias where only it matches."""
    chosen = {
        entry.name if fnmatch.fnmatchcase(entry.name, filter) else alias
        for entry in _entries.values()
        for alias in (entry.name, *entry.aliases)
        if fnmatch.fnmatchcase(alias, filter) and family in (None, entry.family)
    }
    return sorted(chosen, key=_natural)


def list_families() -> list[str]:
    """Families of the registered models, in the order of their registration."""
    return list(dict.fromkeys(entry.family for entry in _entries.values()))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def model_info(name: str) -> ModelInfo:
    """Parameters, MACs, taps and origin of a registered model, by name or alias, from shapes alone."""
    return _measure(_entry(name).name)


@cache
def _measure(name: str) -> ModelInfo:
    entry = _entries[name]
    with torch.device("meta"):
        model: Any = entry.build().eval()
        image = torch.empty(1, *model.default_cfg["input_size"])
    return ModelInfo(
        name=entry.name,
        aliases=entry.aliases,
        family=entry.family,
        paper=entry.paper,
        compatible_with=entry.compatible_with,
        input_size=model.default_cfg["input_size"],
        preprocessing=preprocessing_for(model),
        params=sum(p.numel() for p in model.parameters()),
        aux_params=_count_auxiliary(model),
        macs=count_macs(model, image),
        num_features=model.num_features,
        tap_channels=tuple(model.feature_info.channels()),
        tap_reductions=tuple(model.feature_info.reduction()),
        tap_modules=tuple(model.feature_info.module_name()),
    )


def _count_auxiliary(model: Any) -> int:
    """Parameters of the auxiliary heads, whose last layers `auxiliary_classifiers` names."""
    heads = {classifier.split(".")[0] for classifier in getattr(model, "auxiliary_classifiers", ())}
    return sum(p.numel() for head in heads for p in model.get_submodule(head).parameters())


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of the convolutions and linear layers: output elements x (in/groups x kh x kw).

    A layer of another class that has a method `macs(y)` is asked for its own. On meta tensors this only
    propagates shapes.
    """
    total = 0

    def count(module: Any, _inputs: Any, y: Tensor) -> None:
        nonlocal total
        total += module.macs(y) if hasattr(module, "macs") else y.numel() * module.weight[0].numel()

    def counted(module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv2d, nn.Linear)) or hasattr(module, "macs")

    hooks = [m.register_forward_hook(count) for m in model.modules() if counted(m)]
    try:
        with torch.no_grad():
            getattr(model, "forward_modules", model)(x)
    finally:
        for hook in hooks:
            hook.remove()
    return total
