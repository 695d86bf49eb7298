"""What is measured: a model by name with plausible weights, and an input for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .peers import Plain


def make_model(name: str, *, trained_like: bool = True, seed: int = 0) -> nn.Module:
    """A registered model in eval mode with seeded random weights; with `trained_like` also `calibrate`d.

    ValueError when there is no model of that name.
    """
    import fast_backbones as fb

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fb.create_model(name)
        if trained_like:
            calibrate(model, make_input(model, 2, seed))
    return model.eval()


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that the model was made for."""
    config = getattr(model, "default_cfg", None) or {}
    return tuple(config.get("input_size", (3, 224, 224)))


def make_input(model: nn.Module, batch: int, seed: int = 0) -> Tensor:
    """Standard normal noise, [batch, C, H, W] float32: what normalised images look like to a first layer."""
    return torch.randn(batch, *input_size(model), generator=torch.Generator().manual_seed(seed))


def calibrate(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Give an untrained model batch norms as after training: statistics of real activations, scales near one.

    Untouched, the running statistics are 0 and 1 and activations grow from block to block, which no trained
    network does. The statistics come from one training-mode pass of the plain modules on x; scales are drawn
    from 0.5 .. 1.5, biases from a normal distribution of width 0.1. Returns the model, in eval mode.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    draw = torch.Generator().manual_seed(seed)
    momenta = [m.momentum for m in norms]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            if norm.affine:
                norm.weight.copy_(torch.rand(norm.num_features, generator=draw) + 0.5)
                norm.bias.copy_(0.1 * torch.randn(norm.num_features, generator=draw))
        if norms:
            Plain(model).train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
