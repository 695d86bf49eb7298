"""Where the numbers of a step come from: which parameters, which batch norms folded into them, packed how.

A recipe names tensors of the model and never holds them, so that a changed weight means the same recipe once
more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode, y = (x - mean) / sqrt(var + eps) * weight + bias, by its tensors' names."""

    mean: str
    var: str
    eps: float
    weight: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Recipe:
    """weight [K, ...] and bias [K] or none, with `norms` applied to the result in order."""

    weight: str
    bias: str | None = None
    norms: tuple[Norm, ...] = ()

    def names(self) -> list[str]:
        """Every tensor of the model that goes into this recipe."""
        norms = [name for n in self.norms for name in (n.mean, n.var, n.weight, n.bias)]
        return [name for name in (self.weight, self.bias, *norms) if name is not None]


def fold(recipe: Recipe, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the recipe, contiguous; batch norms are folded in float64 and rounded once.

    scale = weight / sqrt(var + eps)      W' = W * scale      b' = (b - mean) * scale + bias
    """
    weight = tensors[recipe.weight].detach()
    bias = tensors[recipe.bias].detach() if recipe.bias is not None else None
    if not recipe.norms:
        return weight.contiguous(), None if bias is None else bias.contiguous()
    scale = torch.ones(weight.shape[0], dtype=torch.float64)
    shift = torch.zeros_like(scale) if bias is None else bias.double()
    for norm in recipe.norms:
        step = torch.rsqrt(tensors[norm.var].double() + norm.eps)
        if norm.weight is not None:
            step = step * tensors[norm.weight].detach().double()
        shift = (shift - tensors[norm.mean].double()) * step
        if norm.bias is not None:
            shift = shift + tensors[norm.bias].detach().double()
        scale = scale * step
    per_filter = scale.view(-1, *(1,) * (weight.dim() - 1))
    return (weight.contiguous() * per_filter).to(weight.dtype), shift.to(weight.dtype)


PACKING = ("c", "k", "r", "s", "groups")  # what the layout of packed weights depends on, besides the kernel


BLOCK_FLOATS = 2 << 20  # small weights share blocks of 8 MiB


def native_floats(native: Any, floats: int) -> Tensor:
    """Uninitialised float32 memory of the native library: aligned, on huge pages when it is large."""
    with torch.inference_mode(False):
        return torch.frombuffer(native.Memory(max(16, floats)), dtype=torch.float32)


@dataclass
class Packed:
    weight: Tensor  # as the kernel wants it, 64-byte aligned
    bias: Tensor | None


@dataclass
class WeightStore:
    """Packed weights of one state of the model, shared by its plans for different input shapes."""

    native: Any
    tensors: Mapping[str, Tensor]
    packed: dict[tuple[Any, ...], Packed] = field(default_factory=dict)
    block: Tensor | None = None  # what room() cuts from
    used: int = 0

    def get(self, recipe: Recipe, kernel: str, params: Mapping[str, int]) -> Packed:
        sizes = {key: params[key] for key in PACKING if key in params}
        key = (recipe, kernel, *sizes.items())
        if key not in self.packed:
            weight, bias = fold(recipe, self.tensors)
            spec = {**params, "n": 1}
            room = self.room(self.native.packed_floats(kernel, spec))
            self.native.pack_weight(kernel, spec, weight.data_ptr(), room.data_ptr())
            self.packed[key] = Packed(room, bias)
        return self.packed[key]

    def room(self, floats: int) -> Tensor:
        """Uninitialised floats, 64-byte aligned, cut from blocks that lie on huge pages."""
        wanted = -(-floats // 16) * 16
        if self.block is None or self.used + wanted > self.block.numel():
            self.block, self.used = native_floats(self.native, max(wanted, BLOCK_FLOATS)), 0
        found = self.block[self.used : self.used + floats]
        self.used += wanted
        return found

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for p in self.packed.values() for t in (p.weight, p.bias) if t is not None)
