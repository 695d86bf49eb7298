"""Notices, on every call, whether a plan still describes its model.

Version counters alone do not: fused optimizers, `p.data.copy_()`, numpy views and batch norm's own statistics
change values without touching them. So a Guard compares, each time,

    structure   every module, child, parameter, buffer and plain attribute is the same object as before (that
                includes `training`, an overridden forward, parametrizations), inner hooks are absent, no
                class got another method
    weights     address, version counter and dtype of every tensor; a sampled fingerprint of its values;
                steps of optimizers that hold any of the parameters

A list, dict or set that a module keeps as an attribute is compared element by element, one level deep; what
changes deeper than that, or outside the module tree, is not seen: engine.refresh(model) is for that.

Cost for ResNet-50 (151 modules, 320 tensors), in cache: 0.13 ms; bench.first_call measures it.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .locks import ForkSafeLock
from .rules import named_tensors

_data_ptr = Tensor.data_ptr
_kind = attrgetter("dtype", "device", "layout")
_OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)
ATTRIBUTE = "_fb_engine"  # of the model: its EngineState
_FUNCTIONS = (FunctionType, staticmethod, classmethod, property)


def samples_per_tensor() -> int:
    """FB_WEIGHT_SAMPLES: values of each tensor that every call looks at; "full" looks at all of them."""
    text = os.environ.get("FB_WEIGHT_SAMPLES", "16")
    if text == "full":
        return 1 << 30
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"FB_WEIGHT_SAMPLES is {text!r}, expected a positive number or 'full'")
    return int(text)


class OptimizerSteps:
    """Which optimizers have stepped, and when: a fused one changes parameters without a trace.

    `epoch` counts the steps of all of them. One that is gone counts as holding anybody's parameters.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.lost = 0  # the epoch of the last step of any optimizer that no longer exists
        self.last: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.handle: Any = None
        self.lock = ForkSafeLock()  # reentrant: a weakref callback may come while it is held

    def watch(self) -> None:
        """Register the hook with torch.optim, once, when the first plan is made."""
        with self.lock:
            if self.handle is None:
                from torch.optim.optimizer import register_optimizer_step_post_hook

                self.handle = register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        with self.lock:
            key = id(optimizer)
            known = self.last.get(key)
            reference = known[0] if known else weakref.ref(optimizer, lambda _: self._gone(key))
            self.epoch += 1
            self.last[key] = (reference, self.epoch)

    def _gone(self, key: int) -> None:
        with self.lock:
            self.lost = max(self.lost, self.last.pop(key)[1])

    def touched(self, parameters: frozenset[int], since: int) -> bool:
        """Whether an optimizer that holds any of these (by id) has stepped after epoch `since`."""
        with self.lock:
            stepped = [ref() for ref, epoch in self.last.values() if epoch > since]
            lost = self.lost > since
        held = (id(p) for o in stepped if o is not None for group in o.param_groups for p in group["params"])
        return lost or not parameters.isdisjoint(held)


optimizer_steps = OptimizerSteps()


class Guard:
    """A snapshot of a model, and the questions whether it still holds.

    Aliases of the tensors keep their memory alive, so that the fingerprint of a tensor which another thread
    replaces at this moment reads old values, not freed memory. The model itself is not held, nor its
    __dict__: that holds the state that holds this guard, and in a cycle all of it, weights and plans, would
    outlive the model until the next garbage collection. Who asks about the structure hands in the model.
    """

    def __init__(self, model: nn.Module, native: Any) -> None:
        optimizer_steps.watch()
        self.native = native
        _, *self.inner = modules = list(model.modules())
        self.types = set(map(type, modules))
        self.methods = _methods(self.types)
        self.dicts = [d for m in self.inner for d in (m.__dict__, m._parameters, m._buffers, m._modules)]
        self.dicts += [model._parameters, model._buffers, model._modules]
        self.dicts += [d for m in self.inner for d in (m._forward_hooks, m._forward_pre_hooks)]
        containers = [
            value
            for m in modules
            for key, value in m.__dict__.items()
            if type(value) in (list, dict, set) and key not in _OWN_ATTRIBUTES
        ]
        self.dicts += [value for value in containers if type(value) is dict]
        self.containers = [value for value in containers if type(value) is not dict]
        # Held, as the types are, so that no other object can take their place.
        self.attributes = {key: value for key, value in model.__dict__.items() if key != ATTRIBUTE}
        self.items = [list(d.items()) for d in self.dicts] + [list(c) for c in self.containers]
        self.structure = native.Structure(
            model, model.__dict__, ATTRIBUTE, self.inner, self.dicts, self.containers, self.methods
        )
        self.named = list(named_tensors(model))
        self.every = list({id(tensor): tensor for _, tensor in self.named}.values())
        self.kinds = list(map(_kind, self.every))
        self.device = self.every[0].device if self.every else None

    def take_weights(self) -> None:
        """Look at the values too. Only for tensors that a plan can use: plain and strided.

        Values on a GPU are not sampled, that would make every call wait for it: there a change that PyTorch
        does not count is not seen.
        """
        self.tensors = [tensor for tensor in self.every if tensor.is_floating_point()]
        self.parameters = frozenset(map(id, self.tensors))
        self.epoch = optimizer_steps.epoch
        aliases = {id(tensor): tensor.detach() for tensor in self.every}
        self.aliases = {name: aliases[id(tensor)] for name, tensor in self.named}
        memory = [aliases[id(tensor)] for tensor in self.tensors if tensor.is_cpu]
        self.weights = self.native.Weights(
            self.every,
            _data_ptr,
            version=Tensor._version,
            dtype=Tensor.dtype,
            lines=[line for tensor in self.every for line in _lines(tensor)],
            addresses=list(map(_data_ptr, memory)),
            nbytes=[tensor.nbytes for tensor in memory],
            samples=samples_per_tensor(),
        )

    def same_structure(self, model: nn.Module) -> bool:
        return self.structure.same(model, model.__dict__)

    def same_kinds(self) -> bool:
        """Whether dtypes and devices are what they were: enough while a model is refused for them."""
        return list(map(_kind, self.every)) == self.kinds

    def same_weights(self) -> bool:
        return self.weights.same() and (optimizer_steps.epoch == self.epoch or not self._stepped_on())

    def _stepped_on(self) -> bool:
        epoch = optimizer_steps.epoch
        if optimizer_steps.touched(self.parameters, self.epoch):
            return True
        self.epoch = epoch  # other people's optimizers
        return False

    def wants_grad(self) -> bool:
        """Whether autograd would record this forward: a plan has no backward."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors)

    def geometry(self) -> list[Any]:
        """What a plan takes for granted about the tensors besides their values."""
        return [(name, tuple(t.shape), t.stride(), t.dtype, t.device) for name, t in self.aliases.items()]


def _methods(
    classes: set[type[nn.Module]],
) -> list[tuple[type, Mapping[str, Any], list[tuple[str, Any]]]]:
    """Functions that a forward may run: all of the user's classes, `forward` of PyTorch's own."""
    family = {base for cls in classes for base in cls.__mro__ if issubclass(base, nn.Module)} - {nn.Module}
    found = []
    for cls in family:
        theirs = cls.__module__.startswith("torch.")
        named = [
            (name, value)
            for name, value in vars(cls).items()
            if name == "forward" or (not theirs and isinstance(value, _FUNCTIONS))
        ]
        if named:
            found.append((cls, vars(cls), named))
    return found


def _lines(tensor: Tensor) -> tuple[int, ...]:
    """The cache lines of a tensor's Python object, TensorImpl and storage, which the checks will read."""
    impl, storage = tensor._cdata, tensor.untyped_storage()._cdata
    return (id(tensor), impl, impl + 64, impl + 128, storage, storage + 64)
