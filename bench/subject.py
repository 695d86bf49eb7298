"""What is measured: a model by name with plausible weights, and an input for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .peer import Plain

# The best-known member of every family and of every network with a paper of its own: what `--all` measures.
FLAGSHIPS = (
    "lenet5",
    "alexnet",
    "vgg16",
    "googlenet",
    "bninception",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v1",
    "inception_resnet_v2",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "legacy_xception",
    "densenet121",
    "mobilenetv1_100",
    "legacy_seresnet50",
    "legacy_seresnext50_32x4d",
    "legacy_senet154",
    "se_bninception",
    "se_mobilenetv1_100",
)


def make_model(name: str, *, trained_like: bool = True, seed: int = 0, **options: Any) -> nn.Module:
    """A registered model in eval mode with seeded random weights; with `trained_like` also `calibrate`d.

    options: of `create_model`. ValueError when there is no model of that name.
    """
    import fast_backbones as fb

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fb.create_model(name, **options)
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
    """Give an untrained model numbers as after training: activations neither grow nor vanish with depth.

    Batch norms get the statistics of real activations, from one training-mode pass of the plain modules on
    x, scales from 0.5 .. 1.5 and biases from a normal distribution of width 0.1. Untouched, the running
    statistics are 0 and 1, which no trained network has. In a model without batch norm the weights of every
    layer are scaled so that its output has unit variance on x (layer-sequential unit variance, arXiv
    1511.06422). Returns the model, in eval mode.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    draw = torch.Generator().manual_seed(seed)
    momenta = [m.momentum for m in norms]
    with torch.no_grad():
        if not norms:
            unit_variance(model.eval(), x)
            return model
        for norm in norms:
            norm.momentum = 1.0
            if norm.affine:
                norm.weight.copy_(torch.rand(norm.num_features, generator=draw) + 0.5)
                norm.bias.copy_(0.1 * torch.randn(norm.num_features, generator=draw))
        Plain(model).train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def unit_variance(model: nn.Module, x: Tensor) -> None:
    """Scale the weights of each convolution and linear layer, in order of use, to outputs of variance one."""

    def rescale(layer: nn.Module, _inputs: object, y: Tensor) -> Tensor:
        scale = 1.0 / y.std().clamp(min=1e-12)
        for parameter in layer.parameters():
            parameter.mul_(scale)
        return y * scale

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(rescale) for layer in layers]
    try:
        Plain(model)(x)
    finally:
        for hook in hooks:
            hook.remove()
