"""Whole networks whose arithmetic is exact: float32 must give what float64 gives, to the bit.

Filters have one tap of +-1, a few have two; batch norms shift by whole numbers; a branch that is added to a
sum passes a quarter of its channels, so that sums grow slowly with depth; average pools divide by 8; gates
of squeeze-and-excitation are 0, 1/2 or 1, decided by the data; residual scales are 1/8. Every number on its
way has few bits, `assert_exactly_representable` makes sure of it, and one wrong index shows in the result.
"""

import torch
from torch import Tensor, nn

SHARP = 2.0**20  # a gate's argument is a multiple of this (or 0): its sigmoid is exactly 0, 1/2 or 1
EXACT = 2.0**24


def integers_in(model: nn.Module, seed: int) -> nn.Module:
    """The model in eval mode with such numbers."""
    draw = torch.Generator().manual_seed(seed)
    closing = closing_layers(model)
    gates = {id(layer): kind for module in model.modules() for kind, layer in gate_layers(module).items()}
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    with torch.no_grad():
        for module in model.modules():
            if id(module) in gates:
                fill_gate(module, gates[id(module)], draw)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                fill_taps(module, min(1.0, 10 / max(1, convolutions)), draw)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                fill_norm(module, draw)
            elif isinstance(module, nn.LocalResponseNorm):
                module.alpha, module.k = 0.0, 1.0
            elif isinstance(module, nn.AvgPool2d):
                module.divisor_override = 8
            if id(module) in closing:
                keep = torch.rand(module.weight.shape[0], generator=draw) < 0.25
                module.weight.mul_(keep.float().view(-1, *(1,) * (module.weight.dim() - 1)))
        for module in model.modules():
            if isinstance(getattr(module, "scale", None), float) and module.scale != 1.0:
                module.scale = 0.125
                for parameter in module.conv2d.parameters():
                    parameter.mul_(8.0)
    return model.eval()


def whole(draw: torch.Generator, *shape: int, limit: int = 1) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=draw).float()


def fill_taps(layer: nn.Module, second: float, draw: torch.Generator) -> None:
    """One tap of +-1 in every filter, and a second one in this share of them."""
    flat = torch.zeros_like(layer.weight).flatten(1)
    filters, length = flat.shape
    for share in (1.0, second):
        taps = torch.randint(0, length, (filters, 1), generator=draw)
        signs = torch.randint(0, 2, (filters, 1), generator=draw) * 2.0 - 1.0
        flat.scatter_(1, taps, signs * (torch.rand(filters, 1, generator=draw) < share))
    layer.weight.copy_(flat.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(whole(draw, *layer.bias.shape))


def fill_norm(norm: nn.Module, draw: torch.Generator) -> None:
    norm.eps = 0.0
    norm.running_mean.copy_(whole(draw, norm.num_features))
    norm.running_var.fill_(4.0)
    if norm.affine:
        norm.weight.copy_((torch.randint(0, 2, (norm.num_features,), generator=draw) * 2.0 - 1.0) * 2.0)
        norm.bias.copy_(whole(draw, norm.num_features))


def gate_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The two convolutions of a squeeze-and-excitation module."""
    layers = {kind: getattr(module, kind, None) for kind in ("fc1", "fc2")}
    both = all(isinstance(layer, nn.Conv2d) for layer in layers.values())
    return layers if both else {}


def fill_gate(layer: nn.Conv2d, kind: str, draw: torch.Generator) -> None:
    fill_taps(layer, 0.0, draw)
    if layer.bias is not None:
        layer.bias.copy_(
            torch.ones_like(layer.bias) if kind == "fc1" else torch.full_like(layer.bias, SHARP / 2)
        )
    if kind == "fc2":
        layer.weight.mul_(SHARP)


def closing_layers(model: nn.Module) -> set[int]:
    """The last layer with weights of every branch that is added to a sum."""
    found: set[int] = set()
    for module in model.modules():
        if hasattr(module, "downsample"):
            found.add(id(getattr(module, "bn3", None) or module.bn2))
        elif hasattr(module, "rep"):
            found.add(id([m for m in module.rep if isinstance(m, nn.BatchNorm2d)][-1]))
        elif isinstance(getattr(module, "conv2d", None), nn.Conv2d):
            found.add(id(module.conv2d))
    return found


def integer_image(batch: int, channels: int, height: int, width: int, seed: int = 3) -> Tensor:
    return whole(torch.Generator().manual_seed(seed), batch, channels, height, width, limit=4)


def assert_exactly_representable(values: Tensor, what: str) -> None:
    """Few enough bits that float32 holds every value and the sums around it."""
    assert (values.float().double() == values).all(), f"{what}: more bits than float32 has"
    assert values.abs().max() < EXACT / 64, f"{what}: values up to {values.abs().max().item():.3g}"
