"""Where the numbers of a step come from: which of the model's tensors, and what is folded into them.

    Recipe    filters of a convolution or linear layer, or a factor per channel, followed by maps y = a x + b
    Stack     the filters of several recipes, one after the other: convolutions that became one
    Product   the filters of two linear steps in a row as one matrix

    Norm      a batch norm in eval mode           the maps; each acts on the output channels
    Vector    parameters that scale and shift
    Fixed     numbers that scale and shift

A recipe names tensors and never holds them, so that a changed weight means the same recipe once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .graph import Live, leaves, map_leaves

Folded = tuple[Tensor, Tensor | None]
Apart = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Norm:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, by the names of the tensors."""

    mean: str
    var: str
    eps: float
    weight: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Vector:
    """y = x * scale + shift, each a tensor of the model with one number per channel."""

    scale: str | None = None
    shift: str | None = None


@dataclass(frozen=True)
class Fixed:
    """y = x * scale + shift, with one number for all channels or one for each."""

    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)


Map = Norm | Vector | Fixed


@dataclass(frozen=True)
class Recipe:
    """weight [K, ...] and bias [K] or none, with `norms` applied to the result in order.

    weight: None for a factor per channel that starts as 1; `channels` says how many.
    without_bias: only the filters; somebody else adds the bias, after a pool.
    spatial: (C, H, W) of the map whose flattened values [N, C*H*W] the weight was made for; the filters come
        out for the order in which the map lies in memory, [N, H*W*C].
    """

    weight: str | None
    bias: str | None = None
    norms: tuple[Map, ...] = ()
    channels: int = 0
    without_bias: bool = False
    spatial: tuple[int, int, int] | None = None

    def then(self, other: Recipe) -> Recipe:
        """This, followed by the maps of a recipe without a weight."""
        return replace(self, norms=self.norms + other.norms)

    @property
    def only_scales(self) -> bool:
        """Whether it surely adds nothing."""
        return self.bias is None and all(map(_only_scales, self.norms))

    def names(self) -> list[str]:
        """Every tensor of the model that goes into this recipe."""
        maps = [name for m in self.norms for name in _names(m)]
        return [name for name in (self.weight, self.bias, *maps) if name is not None]


@dataclass(frozen=True)
class Stack:
    """Filters of all parts, in order; a part without bias gets zeros where another one has a bias."""

    parts: tuple[Recipe, ...]

    def names(self) -> list[str]:
        return [name for part in self.parts for name in part.names()]


@dataclass(frozen=True)
class Product:
    """Two 1x1 convolutions or linear layers with nothing between them: W = W2 W1, b = W2 b1 + b2."""

    first: Recipe
    second: Recipe

    def then(self, other: Recipe) -> Product:
        return replace(self, second=self.second.then(other))

    def names(self) -> list[str]:
        return self.first.names() + self.second.names()


Filters = Recipe | Stack | Product


def scaling(channels: int, *maps: Map) -> Recipe:
    """The recipe of maps alone."""
    return Recipe(None, norms=maps, channels=channels)


class Tensors(Mapping[str, Tensor]):
    """The model's tensors, and those computed from them alone, each made when it is asked for first."""

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        self.own = own
        self.calls: dict[str, Any] = {}
        self.made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.own:
            return self.own[name]
        if name not in self.made:
            target, args, kwargs = map_leaves(list(self.calls[name]), self._value)
            with torch.no_grad():
                self.made[name] = target(*args, **kwargs)
        return self.made[name]

    def _value(self, leaf: Any) -> Any:
        return self[leaf.name].detach() if isinstance(leaf, Live) else leaf

    def __iter__(self) -> Iterator[str]:
        return iter({**self.own, **self.calls})

    def __len__(self) -> int:
        return len({**self.own, **self.calls})


def fold(recipe: Filters, tensors: Mapping[str, Tensor]) -> Folded:
    """Weight and bias of the recipe, contiguous; what is folded is computed in float64 and rounded once.

    Numbers in bfloat16 become float32, which holds the same values.

    scale = weight / sqrt(var + eps)      W' = W * scale      b' = (b - mean) * scale + bias

    Without a weight: the factors [C], and the shifts [C] or None.
    """
    if isinstance(recipe, Stack):
        return _stacked([fold(part, tensors) for part in recipe.parts])
    if isinstance(recipe, Product):
        return _product(recipe, tensors)
    bias = _wide(tensors[recipe.bias]) if recipe.bias is not None else None
    if recipe.weight is None:
        scale, shift = _folded_maps(recipe, tensors, recipe.channels, bias)
        dtype = _dtype(tensors)
        return scale.to(dtype), None if recipe.only_scales else shift.to(dtype)
    weight = _in_memory_order(_wide(tensors[recipe.weight]), recipe.spatial)
    if not recipe.norms:
        return weight, None if bias is None or recipe.without_bias else bias.contiguous()
    scale, shift = _folded_maps(recipe, tensors, weight.shape[0], bias)
    weight = (weight * scale.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype)
    return weight, None if recipe.without_bias or recipe.only_scales else shift.to(weight.dtype)


def fold_apart(recipe: Filters, tensors: Mapping[str, Tensor]) -> Apart:
    """(weight, scale, shift) of y = conv(x, weight) * scale + shift, with the model's own weight.

    For kernels that round their weights: what was exact in bfloat16 stays so, and the maps stay float32.
    """
    if isinstance(recipe, Stack):
        return _stacked_apart([fold_apart(part, tensors) for part in recipe.parts])
    if isinstance(recipe, Product):
        weight, bias = _product(recipe, tensors)
        largest = weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(weight.dtype).tiny)
        scale = torch.exp2(torch.ceil(torch.log2(largest)))  # exact, and float16 can hold what is left
        return weight / scale.view(-1, *(1,) * (weight.dim() - 1)), scale, bias
    assert recipe.weight is not None
    weight = _in_memory_order(_wide(tensors[recipe.weight]), recipe.spatial)
    bias = _wide(tensors[recipe.bias]) if recipe.bias is not None else None
    if not recipe.norms:
        return weight, None, None if bias is None or recipe.without_bias else bias.contiguous()
    scale, shift = _folded_maps(recipe, tensors, weight.shape[0], bias)
    adds_nothing = recipe.without_bias or recipe.only_scales
    return weight, scale.to(weight.dtype), None if adds_nothing else shift.to(weight.dtype)


def filter_names(recipe: Filters, computed: Mapping[str, Any]) -> set[str]:
    """The model's tensors in filters and biases; of what is computed, its arguments."""
    if isinstance(recipe, Stack):
        return set().union(*(filter_names(part, computed) for part in recipe.parts))
    if isinstance(recipe, Product):
        return filter_names(recipe.first, computed) | filter_names(recipe.second, computed)

    def own(names: set[str]) -> set[str]:
        found = {name for name in names if name not in computed}
        for name in names - found:
            found |= own({leaf.name for leaf in leaves(list(computed[name])) if isinstance(leaf, Live)})
        return found

    return own({name for name in (recipe.weight, recipe.bias) if name is not None})


def _product(recipe: Product, tensors: Mapping[str, Tensor]) -> Folded:
    def matrix(part: Recipe) -> tuple[Tensor, Tensor]:
        weight = _in_memory_order(tensors[part.weight or ""].detach().double(), part.spatial).flatten(1)
        bias = None if part.bias is None else tensors[part.bias].detach()
        scale, shift = _folded_maps(part, tensors, weight.shape[0], bias)
        return weight * scale[:, None], shift

    (w1, b1), (w2, b2) = matrix(recipe.first), matrix(recipe.second)
    dtype, ones = _dtype(tensors), (1,) * (tensors[recipe.second.weight or ""].dim() - 2)
    return (w2 @ w1).to(dtype).view(len(w2), -1, *ones), (w2 @ b1 + b2).to(dtype)


def _folded_maps(
    recipe: Recipe, tensors: Mapping[str, Tensor], channels: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All maps in a row as one, y = scale * x + shift, in float64."""
    scale = torch.ones(channels, dtype=torch.float64)
    shift = torch.zeros_like(scale) if bias is None else bias.double()
    for each in recipe.norms:
        a, b = _map(each, tensors)
        if isinstance(each, Norm):
            shift = (shift - tensors[each.mean].detach().double()) * a
            shift = shift if b is None else shift + b
        else:
            shift = shift * a if b is None else shift * a + b
        scale = scale * a
    return scale, shift


def _map(each: Map, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Factor and shift in float64; of a norm, the shift that comes after the mean has gone."""

    def read(name: str | None) -> Tensor | None:
        return None if name is None else tensors[name].detach().double().flatten()

    if isinstance(each, Norm):
        factor, weight = torch.rsqrt(tensors[each.var].detach().double() + each.eps), read(each.weight)
        return factor if weight is None else factor * weight, read(each.bias)
    if isinstance(each, Vector):
        scale = read(each.scale)
        return torch.ones((), dtype=torch.float64) if scale is None else scale, read(each.shift)
    return torch.tensor(each.scale, dtype=torch.float64), torch.tensor(each.shift, dtype=torch.float64)


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _only_scales(each: Map) -> bool:
    if isinstance(each, Fixed):
        return not any(each.shift)
    return isinstance(each, Vector) and each.shift is None


def _names(each: Map) -> tuple[str | None, ...]:
    if isinstance(each, Norm):
        return (each.mean, each.var, each.weight, each.bias)
    return (each.scale, each.shift) if isinstance(each, Vector) else ()


def _in_memory_order(weight: Tensor, spatial: tuple[int, int, int] | None) -> Tensor:
    if spatial is None:
        return weight.contiguous()
    return weight.view(-1, *spatial).permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _stacked(parts: list[Folded]) -> Folded:
    weight = torch.cat([weight for weight, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    return weight, torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in parts])


def _stacked_apart(parts: list[Apart]) -> Apart:
    def together(vectors: list[Tensor | None], absent: float) -> Tensor | None:
        if all(vector is None for vector in vectors):
            return None
        whole = [w.new_full((len(w),), absent) if v is None else v for v, (w, _, _) in zip(vectors, parts)]
        return torch.cat(whole)

    scale = together([scale for _, scale, _ in parts], 1.0)
    return (
        torch.cat([weight for weight, _, _ in parts]),
        scale,
        together([shift for _, _, shift in parts], 0.0),
    )


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """What the model computes in; fold is asked for float64 only by tests."""
    own = tensors.own if isinstance(tensors, Tensors) else tensors
    dtype = next((t.dtype for t in own.values() if t.is_floating_point()), torch.float32)
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
