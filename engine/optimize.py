"""Any module gets the engine in place: optimize_(model), and revert_(model) takes it back.

An optimized model has a class of its own, derived from the one it had, whose forward asks the engine first.
Nothing else differs: attributes, parameters, state_dict, hooks, signature and the class's name stay, and
isinstance says what it said. revert_ puts the old class back; weights are never touched.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .guard import ATTRIBUTE

PLAIN = "_fb_plain_class"  # of an optimized class: the one it was made from
DYNAMIC = "_fb_dynamic_batch"  # of an optimized class: whether one capture may serve all batches
# Constants of a call are part of a plan's key: by value, so only those that cannot change.
_FIXED = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
_KEPT_WAYS = 1024  # combinations of constants; one that comes back later gets another plan

# From the plain class, and whether one capture may serve all batches, to the optimized class.
_classes: weakref.WeakValueDictionary[tuple[type, bool], type] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The class of a model before optimize_."""
    return getattr(type(model), PLAIN, type(model))


def is_optimized(model: nn.Module) -> bool:
    return PLAIN in vars(type(model))


def has_dynamic_batch(model: nn.Module) -> bool:
    """Whether one capture may serve all batches."""
    return getattr(type(model), DYNAMIC, True)


def swap_class(model: nn.Module, forward: Callable[..., Any], dynamic_batch: bool = True) -> None:
    """Give the model the class whose forward is `forward(model, *args, **kwargs)` around that of its own."""
    if is_optimized(model) and has_dynamic_batch(model) != dynamic_batch:
        swap_back(model)
    if not is_optimized(model):
        model.__class__ = _class_of(type(model), forward, dynamic_batch)


def swap_back(model: nn.Module) -> None:
    """RuntimeError where somebody has derived another class from the optimized one since."""
    if is_optimized(model):
        model.__class__ = plain_class(model)
        model.__dict__.pop(ATTRIBUTE, None)
    elif hasattr(type(model), PLAIN):
        raise RuntimeError(
            f"revert_: {type(model).__name__} was given another class after optimize_; undo that first"
        )


def _class_of(cls: type[nn.Module], around: Callable[..., Any], dynamic_batch: bool) -> type[nn.Module]:
    with _lock:
        found = _classes.get((cls, dynamic_batch))
        if found is None:

            @functools.wraps(cls.forward)
            def forward(self, *args, **kwargs):
                return around(self, *args, **kwargs)

            own = {PLAIN: cls, DYNAMIC: dynamic_batch, "forward": forward, "__doc__": cls.__doc__}
            own |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
            own |= {"__reduce_ex__": _reduce, "__copy__": _copy, "__deepcopy__": _deepcopy}
            found = _classes[cls, dynamic_batch] = type.__new__(type(cls), cls.__name__, (cls,), own)
        return found


def _reduce(self: nn.Module, protocol: int) -> Any:
    """A pickle holds the plain class, so it loads where this library is not."""
    plain = plain_class(self)
    function, arguments, *rest = plain.__reduce_ex__(self, protocol)
    if function is copyreg.__newobj__:  # whose class pickle compares with that of the object
        function, arguments = copyreg._reconstructor, (plain, object, None)
    return (function, arguments, *rest)


def _copy(self: nn.Module) -> nn.Module:
    """Optimized, as deep copies are."""
    other = copy._reconstruct(self, None, *_reduce(self, 4))
    other.__class__ = type(self)
    return other


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    own = getattr(plain_class(self), "__deepcopy__", None)
    other = own(self, memo) if own is not None else copy._reconstruct(self, memo, *_reduce(self, 4))
    other.__class__ = type(self)
    return other


def call_of(model: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, MethodType] | None:
    """The one tensor among the arguments, and the model's forward as a method of that tensor alone.

    None where there is no such tensor, or more than one, or something else than constants beside it.
    """
    plain = plain_class(model).forward
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return args[0], MethodType(plain, model)
    leaves, nesting = pytree.tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        return None
    x = leaves[tensors[0]]
    constants = tuple(None if leaf is x else leaf for leaf in leaves)
    if not all(isinstance(constant, _FIXED) for constant in constants):
        return None
    kinds = tuple(map(type, constants))  # 1, 1.0 and True are equal
    return x, MethodType(_method(plain, nesting, tensors[0], constants, kinds), model)


@functools.lru_cache(_KEPT_WAYS)
def _method(plain: Callable[..., Any], nesting: Any, place: int, constants: tuple, kinds: tuple) -> Any:
    """forward(model, x) with the constants; the same function for the same ones, as plans are kept by it."""

    def forward(self: nn.Module, x: Tensor) -> Any:
        leaves = [*constants[:place], x, *constants[place + 1 :]]
        args, kwargs = pytree.tree_unflatten(leaves, nesting)
        return plain(self, *args, **kwargs)

    return forward
