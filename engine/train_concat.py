"""Concatenations that grow by a few channels, in one buffer: the dense blocks of DenseNet in train().

Layer i of a dense block reads cat(x, f1, ..., fi), layer i + 1 the same and one map more. PyTorch copies all
of it for each layer and keeps every copy for backward. Here the maps lie side by side in a buffer as wide as
the last concatenation: each step writes its new channels behind the others and shows the buffer up to there.

What a tensor shows is never written again: a step that finds the place behind its channels taken (a forward
that branches) begins a buffer of its own. So the moments of a channel are computed once, whoever norms it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import memory
from ..kernels._function import Function
from ..kernels.batch_norm import moments

_ATTRIBUTE = "_fb_room"


class Room:
    """A buffer [N, C, H, W], channels last, of which `used` channels are written."""

    def __init__(self, like: Tensor, channels: int) -> None:
        self.map = memory.empty_map(like, channels)
        self.used = 0
        self.known = 0  # channels whose moments are computed
        self.mean, self.var = torch.empty(2, channels, dtype=torch.float32, device=like.device)

    def append(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Write the parts behind what is there, and show everything."""
        for part in parts:
            end = self.used + part.shape[1]
            self.map.data[:, self.used : end].copy_(part)  # .data: what is shown has versions of its own
            self.used = end
        n, _, h, w = self.map.shape
        shown = torch.empty(0, dtype=self.map.dtype, device=self.map.device)
        return shown.set_(self.map.untyped_storage(), 0, (n, self.used, h, w), self.map.stride())

    def moments(self, channels: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each of the first channels."""
        if self.known < channels:
            new = self.map.data[:, self.known : channels]
            self.mean[self.known : channels], self.var[self.known : channels] = moments(new)
            self.known = channels
        return self.mean[:channels], self.var[:channels]


class _Append(Function):
    """shown = cat(parts). With `has_first` the first part is shown by the room already."""

    @staticmethod
    def forward(ctx, room, has_first, *parts):
        ctx.sizes = [part.shape[1] for part in parts]
        return room.append(parts[1:] if has_first else parts)

    @staticmethod
    def backward(ctx, grad):
        return None, None, *grad.split(ctx.sizes, 1)


class Chain:
    """The concatenations that continue each other. `channels`: how wide the last one is, as far as known."""

    def __init__(self) -> None:
        self.channels = 0


class Concat:
    """One of them. Called with the result of the one before, if there is one, and the maps that follow."""

    def __init__(self, chain: Chain, is_first: bool) -> None:
        self.chain, self.is_first = chain, is_first

    def __call__(self, *parts: Tensor) -> Tensor:
        if not all(_is_plain(part, parts[0]) for part in parts):
            return torch.cat(parts, 1)
        channels = sum(part.shape[1] for part in parts)
        self.chain.channels = max(self.chain.channels, channels)
        room = None if self.is_first else _room_behind(parts[0], channels)
        continues = room is not None
        if room is None:
            room = Room(parts[0], self.chain.channels)
        shown: Any = _Append.apply(room, continues, *parts)
        setattr(shown, _ATTRIBUTE, (room, room.used, shown._version))
        return shown


def moments_of(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and biased variance of each channel of a concatenation's result, unless somebody changed it."""
    room, used = _room_of(x)
    return None if room is None else room.moments(used)


def own(x: Tensor) -> Tensor:
    """A copy of what a room shows, for somebody who may change it or ask for its gradient; else x."""
    return x if _room_of(x)[0] is None else x.clone()


def hand_on(shown: Tensor, alias: Tensor) -> None:
    """The alias shows the same: let later steps know."""
    room, used = _room_of(shown)
    if room is not None and alias is not shown:
        setattr(alias, _ATTRIBUTE, (room, used, alias._version))


def _room_of(shown: Tensor) -> tuple[Room | None, int]:
    """The room that shows this tensor, unchanged, and of how many channels; None for another tensor."""
    room, used, version = getattr(shown, _ATTRIBUTE, (None, 0, 0))
    return (room, used) if room is not None and shown._version == version else (None, 0)


def _room_behind(shown: Tensor, channels: int) -> Room | None:
    """The room that shows this tensor, as its last, if so many channels fit."""
    room, used = _room_of(shown)
    if room is None or room.used != used or room.map.shape[1] < channels:
        return None
    return room


def _is_plain(x: Any, first: Any) -> bool:
    """A map of the type and on the device of the first one, channels side by side."""
    if type(x) is not Tensor or x.dim() != 4 or (x.dtype, x.device) != (first.dtype, first.device):
        return False
    return x.is_floating_point() and x.numel() > 0 and x.stride(1) == 1
