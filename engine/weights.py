"""Packed weights: the numbers of recipes, in the layout that a kernel wants, on memory of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .recipes import Filters, Tensors, fold, fold_apart

SIZES = ("c", "k", "r", "s", "groups")  # what the layout of packed weights depends on, besides the kernel
BLOCK_FLOATS = 2 << 20  # small weights share blocks of 8 MiB

# Which operands of a kernel the recipe of a step's part fills: weight, bias and scale of `Packed`.
OPERANDS: dict[str, tuple[str | None, str | None, str | None]] = {
    "weight": ("weight", "bias", "scale"),
    "bias": (None, "bias", None),
    "pre": ("pre_scale", "pre_shift", None),
    "depth": ("depth_weight", "depth_bias", "depth_scale"),
}
AS_THEY_ARE = ("affine", "layer_norm", "group_norm")  # kernels that read numbers per channel
WINDOW = (
    "h", "w", "c", "r", "s", "stride_h", "stride_w", "pad_h", "pad_w", "pad_bottom", "pad_right",
    "dilation_h", "dilation_w",
)  # fmt: skip


def packing(part: str, kernel: str, params: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Whose layout the filters of this part get, for which sizes. None: numbers per channel, as they are."""
    if part in ("pre", "bias") or kernel in AS_THEY_ARE:
        return None, {}
    if part == "depth":
        window = {key: params[key] for key in WINDOW if key in params}
        return "depthwise_conv2d", {**window, "n": 1, "k": params["c"], "groups": params["c"]}
    if kernel == "linear":  # a 1x1 convolution of the same weights shares them
        narrow = {"bf16": 1} if params.get("bf16") else {}
        return "conv2d", {"n": 1, "h": 1, "w": 1, "c": params["c"], "k": params["k"], **narrow}
    return kernel, {**params, "n": 1}


def filter_numbers(kernel: str, spec: Mapping[str, Any]) -> int:
    """How many numbers the library reads when it packs filters."""
    if kernel == "separable_conv2d":  # its 1x1 part: the depthwise one is packed for depthwise_conv2d
        return spec["k"] * spec["c"]
    return spec["k"] * (spec["c"] // spec.get("groups", 1)) * spec.get("r", 1) * spec.get("s", 1)


def native_floats(native: Any, floats: int) -> Tensor:
    """Uninitialised float32 memory of the native library: aligned, on huge pages when it is large."""
    with torch.inference_mode(False):
        return torch.frombuffer(native.Memory(max(16, floats)), dtype=torch.float32)


@dataclass
class Packed:
    weight: Tensor | None  # as the kernel wants it, 64-byte aligned
    bias: Tensor | None
    scale: Tensor | None = None  # of the output channels, where it is not folded into the weight

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.bias, self.scale) if t is not None)


@dataclass
class WeightStore:
    """Packed weights of one state of the model, shared by its plans for different input shapes."""

    native: Any
    tensors: Tensors
    packed: dict[tuple[Any, ...], Packed] = field(default_factory=dict)
    block: Tensor | None = None  # what room() cuts from
    used: int = 0
    on_gpu: dict[torch.dtype, Any] = field(default_factory=dict)  # launches.DeviceWeights

    def operands(
        self, recipes: Mapping[str, Filters], kernel: str, params: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], list[Packed]]:
        """Every constant operand of a step, by its name in the native plan; and what to keep alive."""
        found: dict[str, Tensor] = {}
        kept = [self.get(part, recipe, kernel, params) for part, recipe in recipes.items()]
        for part, packed in zip(recipes, kept):
            for name, tensor in zip(OPERANDS[part], (packed.weight, packed.bias, packed.scale)):
                if name is not None and tensor is not None:
                    found[name] = tensor
        return found, kept

    def get(self, part: str, recipe: Filters, kernel: str, params: Mapping[str, Any]) -> Packed:
        kernel, spec = packing(part, kernel, params)
        key = (
            part if kernel is None else kernel,
            recipe,
            *(spec.get(size, 1) for size in SIZES),
            spec.get("bf16", 0),
        )
        if kernel is not None:  # tells Winograd's two tiles apart, which the sizes of the map decide
            key += (self.native.packed_floats(kernel, spec),)
        if key not in self.packed:
            self.packed[key] = self._pack(part, recipe, kernel, spec)
        return self.packed[key]

    def _pack(self, part: str, recipe: Filters, kernel: str | None, spec: dict[str, Any]) -> Packed:
        scale = None
        if spec.get("bf16"):
            weight, scale, bias = fold_apart(recipe, self.tensors)
        else:
            weight, bias = fold(recipe, self.tensors)
        found = [t.dtype for t in (weight, scale, bias) if t is not None]
        if set(found) != {torch.float32}:  # the library reads addresses
            raise TypeError(f"{recipe}: {found}, expected torch.float32")
        if part == "bias":
            return Packed(None, bias)
        if part == "pre" and bias is None:
            bias = torch.zeros_like(weight)  # the kernel reads both
        if kernel is None:
            return Packed(weight, bias)
        if weight.numel() != (expected := filter_numbers(kernel, spec)):
            raise ValueError(f"{recipe}: {weight.numel()} numbers, {kernel} expects {expected}")
        room = self.room(self.native.packed_floats(kernel, spec))
        self.native.pack_weight(kernel, spec, weight.data_ptr(), room.data_ptr())
        return Packed(room, bias, scale)

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
        return sum(packed.bytes for packed in self.packed.values())
