"""Backbones whose features are one chain of child modules, each fed by the one before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._base import Backbone
from .layers import transform_input


class Chain(Backbone):
    """x -> stages[0] -> stages[1] -> ..., tapped behind some of them, with auxiliary heads behind others.

    A family registers its stages in order, and calls `finish_chain` once all modules exist.

    Args (besides those of `Backbone`):
        transform_input: the image is normalised as torchvision does and the weights want TensorFlow's
            normalisation: convert in front of the first stage (`layers.transform_input`).
    """

    def __init__(self, *, transform_input: bool = False, **common: Any):
        super().__init__(**common)
        if transform_input and self.in_chans != 3:
            raise ValueError(f"transform_input is defined for 3 image channels, not for {self.in_chans}")
        self.transform_input = bool(transform_input)
        self.stages: list[str] = []
        self.tapped: list[str] = []
        self.auxiliary_heads: dict[str, str] = {}  # stage -> the head that reads its output

    def finish_chain(
        self, stages: Sequence[str], taps: Sequence[dict[str, Any]], default_cfg: dict[str, Any]
    ) -> None:
        """`finish`, for a chain of the children called `stages`; `module` of a tap is one of them."""
        self.finish(taps, default_cfg)
        self.tapped = [tap["module"] for tap in taps]
        last = self.tapped[self.out_indices[-1]] if self.features_only else stages[-1]
        self.stages = list(stages[: list(stages).index(last) + 1])

    def prepare(self, x: Tensor) -> Tensor:
        """What the first stage reads."""
        return transform_input(x) if self.transform_input else x

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.prepare(x)
        for name, stage in self.named_children():
            if name in self.stages:
                x = stage(x)
        return x

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        taps = []
        x = self.prepare(x)
        for name, stage in self.named_children():
            if name in self.stages:
                x = stage(x)
                if name in self.tapped:
                    taps.append(x)
        return taps

    @torch.jit.unused
    def forward_auxiliary(self, x: Tensor) -> Any:
        auxiliary = []
        x = self.prepare(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
            if name in self.auxiliary_heads:
                auxiliary.append(self.get_submodule(self.auxiliary_heads[name])(x))
        return self.auxiliary_output(self.forward_head(x), auxiliary)

    @torch.jit.unused
    def auxiliary_output(self, logits: Tensor, auxiliary: list[Tensor]) -> Any:
        """The named tuple of `train()`; `auxiliary` has the logits of the heads in order of depth."""
        raise NotImplementedError(f"{type(self).__name__} does not define auxiliary_output")


def tap(channels: int, reduction: int, module: str) -> dict[str, Any]:
    return {"num_chs": channels, "reduction": reduction, "module": module}
