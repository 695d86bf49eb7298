"""Packed weights in a plan file: which machine and library they are for, and how they come back.

The layout of packed weights belongs to the kernels: it differs between instruction sets and may change with
every version of the library. So a file says for which it was packed, and holds the digest of small weights
packed the same way (`probe`): a library that packs otherwise gives another digest, whatever it calls itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import Live, leaves
from .plain_data import NotPlain, decode_recipe, encode_recipe
from .recipes import Filters, Product, Recipe, Stack, Tensors
from .weights import Packed, WeightStore

PARTS = ("weight", "bias", "scale")
_WINDOW = {"n": 1, "h": 12, "w": 12, "r": 3, "s": 3, "pad_h": 1, "pad_w": 1}
_PROBES: tuple[tuple[str, dict[str, int], int], ...] = (  # kernel, sizes, numbers
    ("conv2d", {**_WINDOW, "c": 24, "k": 40}, 24 * 40 * 9),
    ("conv2d", {"n": 1, "h": 1, "w": 1, "c": 200, "k": 72}, 200 * 72),
    ("winograd_conv2d", {**_WINDOW, "c": 32, "k": 48}, 32 * 48 * 9),
    ("winograd_conv2d", {**_WINDOW, "c": 32, "k": 48, "tile": 2}, 32 * 48 * 9),
    ("winograd_conv2d", {**_WINDOW, "c": 32, "k": 48, "real_points": 1}, 32 * 48 * 9),
    ("grouped_conv2d", {**_WINDOW, "c": 64, "k": 64, "groups": 8}, 64 * 8 * 9),
    ("depthwise_conv2d", {**_WINDOW, "c": 40, "k": 40, "groups": 40}, 40 * 9),
    ("separable_conv2d", {**_WINDOW, "c": 40, "k": 56}, 40 * 56),
    ("conv2d", {"n": 1, "h": 1, "w": 1, "c": 64, "k": 48, "bf16": 1}, 64 * 48),
)


def probe(native: Any) -> str:
    """The SHA-256 of small weights, packed for this machine by every kernel that packs."""
    digest = hashlib.sha256()
    for kernel, params, numbers in _PROBES:
        refusal = native.refusal(kernel, params)
        digest.update(f"{kernel} {sorted(params.items())} {refusal}".encode())
        if not refusal:
            weight = torch.arange(1, numbers + 1, dtype=torch.float32) / 64
            packed = torch.zeros(native.packed_floats(kernel, params))
            native.pack_weight(kernel, params, weight.data_ptr(), packed.data_ptr())
            digest.update(packed.numpy())
    return digest.hexdigest()


def made_for(native: Any) -> dict[str, Any]:
    """What has to agree for packed weights to be used as they are."""
    from .. import __version__

    facts = {"library": __version__, "interface": native.interface, "instruction set": native.isa()}
    return {**facts, "bfloat16": bool(native.has_bf16()), "probe": probe(native)}


def difference(stated: Any, native: Any) -> str | None:
    """Why packed weights that were made for `stated` are not for this process; None when they are."""
    here = made_for(native)
    if not isinstance(stated, dict) or stated.keys() != here.keys():
        return "they do not say what they were packed for"
    differing = [key for key in here if stated[key] != here[key]]
    if not differing:
        return None
    key = differing[0]
    if key == "probe":
        return "this build of the library packs them in another way"
    return f"they were packed for {key} {stated[key]}, and this process has {here[key]}"


class FileStore(WeightStore):
    """Packed weights from a file, and those packed from its plain weights because it has no others."""

    def __init__(self, native: Any, plain: Mapping[str, Tensor], label: str) -> None:
        super().__init__(native, Tensors(plain))
        self.label = label

    def take(self, rows: Any, tensors: Mapping[str, Tensor]) -> None:
        """What `packed_rows` has written. NotPlain where it has not."""
        if not isinstance(rows, list):
            raise NotPlain("the packed weights are no list")
        for row in rows:
            if not isinstance(row, dict) or not row.keys() <= {"key", *PARTS}:
                raise NotPlain(f"packed weights have the keys {list(row)}")
            key = decode_recipe(row["key"])
            self.packed[key] = Packed(*(_cut(tensors, *row[part]) if part in row else None for part in PARTS))

    def _pack(self, part: str, recipe: Filters, kernel: str | None, spec: dict[str, Any]) -> Packed:
        missing = [name for name in names_of(recipe, self.tensors.calls) if name not in self.tensors.own]
        if missing:
            raise NotPlain(
                f"{missing[0]} is not among its plain weights, and those that are packed are for other"
                ' kernels or sizes: save it with weights="both"'
            )
        return super()._pack(part, recipe, kernel, spec)


def packed_rows(store: WeightStore) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Every packed weight of a store, and the tensors that the rows name."""
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, (key, packed) in enumerate(store.packed.items()):
        row: dict[str, Any] = {"key": encode_recipe(key)}
        for part in PARTS:
            tensor = getattr(packed, part)
            if tensor is not None:
                name = f"packed.{number}.{part}"
                row[part] = [name, tensor.numel()]
                tensors[name] = padded(tensor)
        rows.append(row)
    return rows, tensors


def padded(tensor: Tensor) -> Tensor:
    """With zeros up to a multiple of 64 bytes, so that in the file all of them begin at one."""
    return F.pad(tensor.detach().flatten(), (0, -tensor.numel() % 16)).contiguous()


def _cut(tensors: Mapping[str, Tensor], name: str, numbers: int) -> Tensor:
    found = tensors[name]
    if found.dtype is not torch.float32 or type(numbers) is not int or not 0 <= numbers <= found.numel():
        raise NotPlain(f"{name} has {found.numel()} numbers of {found.dtype}, expected {numbers} float32")
    return found.flatten()[:numbers]


def names_of(recipe: Filters, calls: Mapping[str, Any]) -> list[str]:
    """The model's tensors that a recipe reads, through what is computed from them."""
    assert isinstance(recipe, Recipe | Stack | Product)
    return own_names(recipe.names(), calls)


def own_names(names: list[str], calls: Mapping[str, Any]) -> list[str]:
    """Of the model; what is computed is replaced by its arguments."""
    found: list[str] = []
    for name in names:
        if name in calls:
            inner = [leaf.name for leaf in leaves(list(calls[name])) if isinstance(leaf, Live)]
            found += own_names(inner, calls)
        else:
            found.append(name)
    return found
