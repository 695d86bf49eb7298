"""A running average of the weights, for evaluation (Polyak 1992; arXiv 1512.00567, section 8)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """average = decay * average + (1 - decay) * parameter, after every optimiser step.

    Buffers (the statistics of batch norms) are not averaged but copied as they are at the last update.
    Averages of 16-bit parameters are kept in float32, and all averages on the device that the model was on
    at the start. The model itself trains on undisturbed:

        average = ExponentialMovingAverage(model)
        ...
        optimizer.step()
        average.update()
        ...
        with average.applied():          # model holds the averages here, its own weights afterwards
            evaluate(model)

    Args:
        model: its parameters and buffers at this moment are the first average.
        decay: 0.9999 in the Inception papers.
        warmup: use min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that the start is forgotten
            sooner; what TensorFlow does when it is given the number of updates.
    Raises: ValueError for a decay outside [0, 1), RuntimeError when the model has other tensors than before.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = False):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.model = model
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._inside = False
        self.average: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            wide = torch.promote_types(p.dtype, torch.float32)
            self.average[name] = p.detach().to(wide, copy=True, memory_format=torch.preserve_format)
        for name, buffer in model.named_buffers():
            self.average[name] = buffer.detach().clone()

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        if self._inside:
            raise RuntimeError("update() inside applied(): the model holds the average there")
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        tensors = self._tensors()
        for name, _ in self.model.named_parameters():
            self.average[name].lerp_(tensors[name].to(self.average[name]), 1.0 - decay)
        for name, _ in self.model.named_buffers():
            self.average[name].copy_(tensors[name])
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module | None = None) -> None:
        """Overwrite the parameters and buffers of `model` (by default the one it follows) by the averages."""
        for name, tensor in self._tensors(model).items():
            tensor.copy_(self.average[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with the averages in it; its own weights come back at the end, to the bit."""
        if self._inside:
            raise RuntimeError("applied() inside applied(): the model already holds the average")
        tensors = self._tensors()
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._inside = True
        try:
            self.copy_to()
            yield self.model
        finally:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(own[name])
            self._inside = False

    def state_dict(self) -> dict[str, Any]:
        """Decay, warmup, number of updates, and the averages under the names of parameters and buffers.

        It is for `load_state_dict`. A checkpoint of the averaged model is `model.state_dict()` inside
        `applied()`: that has the second names of shared parameters and leaves out what is not persistent.
        """
        return {
            "decay": self.decay,
            "warmup": self.warmup,
            "updates": self.updates,
            "average": {name: tensor.clone() for name, tensor in self.average.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`. RuntimeError when it belongs to another model; nothing changes."""
        average, decay, warmup, updates = (state[k] for k in ("average", "decay", "warmup", "updates"))
        _check_match(average, self.average, "the state dict")
        for name, tensor in average.items():
            self.average[name].copy_(tensor)
        self.decay, self.warmup, self.updates = decay, warmup, updates

    def _tensors(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        model = self.model if model is None else model
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        tensors.update(model.named_buffers())
        _check_match(tensors, self.average, "the model")
        return tensors


def _check_match(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    for name in sorted(expected.keys() ^ found.keys()):
        raise RuntimeError(f"{what} and the average differ in {name}: one of them does not have it")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise RuntimeError(
                f"{name} is {list(found[name].shape)} in {what}, {list(tensor.shape)} in the average"
            )
