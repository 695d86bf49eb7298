"""Building blocks that several families share, with the parameter names of the public implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

Size = int | tuple[int, int]

GATES: Mapping[str, Callable[[], nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
SQUEEZES = ("avg", "max")
PAD_TYPES = ("symmetric", "same")


class ConvBNReLU(nn.Module):
    """y = relu(bn(conv(x))). Parameters are called `conv.weight` (and `conv.bias`) and `bn.*`.

    Args:
        inplanes, planes: channels of x and y.
        kernel_size, stride, padding, dilation, groups, bias: those of the convolution.
        bn_eps, bn_momentum: added to the variance; weight of the newest batch in the running statistics.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        *,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inplanes, planes, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = nn.BatchNorm2d(planes, eps=bn_eps, momentum=bn_momentum)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


def conv_branch(inplanes: int, *convs: Sequence[Any]) -> nn.Sequential:
    """A sequence of `ConvBNReLU`, each given as (planes, kernel_size, stride, padding); the latter two may
    be absent."""
    layers = []
    for planes, *window in convs:
        layers.append(ConvBNReLU(inplanes, planes, *window))
        inplanes = planes
    return nn.Sequential(*layers)


class Concat(nn.Module):
    """Concatenation of the branches along the channels, in the order and under the names given."""

    def __init__(self, **branches: nn.Module):
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.children():
            outputs.append(branch(x))
        return torch.cat(outputs, 1)


class SqueezeExcite(nn.Module):
    """Channel gate of "Squeeze-and-Excitation Networks" (Hu et al. 2017, arXiv 1709.01507).

    y[n,c,h,w] = x[n,c,h,w] * s[n,c],  s = sigmoid(fc2(relu(fc1(squeeze(x))))),  squeeze = mean over h and w

    fc1 and fc2 are 1x1 convolutions, as in the public checkpoints: `fc1.weight` is [C/r, C, 1, 1].

    Args:
        channels: C of x.
        reduction: r; the bottleneck has C // r channels, at least one.
        bias: biases of fc1 and fc2 (the paper's ablations and Caffe models have none).
        squeeze: "avg" or "max" over the image.
        gate: "sigmoid", "tanh" or "relu".
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        bias: bool = True,
        squeeze: str = "avg",
        gate: str = "sigmoid",
    ):
        super().__init__()
        if reduction < 1:
            raise ValueError(f"SE reduction must be at least 1, got {reduction}")
        if squeeze not in SQUEEZES:
            raise ValueError(f"SE squeeze must be one of {', '.join(SQUEEZES)}, got {squeeze!r}")
        if gate not in GATES:
            raise ValueError(f"SE gate must be one of {', '.join(GATES)}, got {gate!r}")
        self.squeeze = squeeze
        self.fc1 = nn.Conv2d(channels, max(channels // reduction, 1), 1, bias=bias)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(max(channels // reduction, 1), channels, 1, bias=bias)
        self.gate = GATES[gate]()

    def forward(self, x: Tensor) -> Tensor:
        if self.squeeze == "max":
            squeezed = x.amax((2, 3), keepdim=True)
        else:
            squeezed = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.relu(self.fc1(squeezed))))  # [N, C, H, W] * [N, C, 1, 1]


@torch.fx.wrap
def flatten_map(x: Tensor, size: int, why: str) -> Tensor:
    """[N, C, size, size] -> [N, C*size*size]; another size raises ValueError, which says `why`."""
    if x.shape[2] != size or x.shape[3] != size:
        raise ValueError(f"{why}; the feature map has {x.shape[2]}x{x.shape[3]} pixels, not {size}x{size}")
    return torch.flatten(x, 1)


@torch.fx.wrap
def pad_same(x: Tensor, kernel_size: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad the image as TensorFlow's "same" does, so that a window of stride s gives ceil(H/s) x ceil(W/s).

    total = max((ceil(n/s) - 1)*s + k - n, 0), of which total // 2 in front and the rest behind.
    """
    height = max((-(-x.shape[2] // stride) - 1) * stride + kernel_size - x.shape[2], 0)
    width = max((-(-x.shape[3] // stride) - 1) * stride + kernel_size - x.shape[3], 0)
    if height == 0 and width == 0:
        return x
    return F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2], value=value)


class Conv2dSame(nn.Conv2d):
    """A convolution behind `pad_same`; parameters as `nn.Conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(pad_same(x, self.kernel_size[0], self.stride[0]), self.weight, self.bias)


class MaxPool2dSame(nn.Module):
    """A max pool behind `pad_same`; padded pixels never win."""

    def __init__(self, kernel_size: int, stride: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        padded = pad_same(x, self.kernel_size, self.stride, float("-inf"))
        return F.max_pool2d(padded, self.kernel_size, self.stride)


def check_pad_type(pad_type: str) -> None:
    if pad_type not in PAD_TYPES:
        raise ValueError(f"pad_type must be one of {', '.join(map(repr, PAD_TYPES))}, got {pad_type!r}")


def make_conv2d(
    inplanes: int, planes: int, kernel_size: int, stride: int, *, groups: int = 1, pad_type: str = "symmetric"
) -> nn.Conv2d:
    """A convolution without bias, padded by kernel_size // 2 ("symmetric") or as TensorFlow does ("same").

    The two agree at stride 1, and at stride 2 on odd sizes. The kernel size is odd.
    """
    if pad_type == "same" and stride > 1:
        return Conv2dSame(inplanes, planes, kernel_size, stride, groups=groups, bias=False)
    return nn.Conv2d(inplanes, planes, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)


def make_max_pool2d(kernel_size: int, stride: int, pad_type: str = "symmetric") -> nn.Module:
    """A max pool padded like `make_conv2d`."""
    if pad_type == "same" and stride > 1:
        return MaxPool2dSame(kernel_size, stride)
    return nn.MaxPool2d(kernel_size, stride, kernel_size // 2)


def gates(
    reduction: int | None, bias: bool = True, squeeze: str = "avg", gate: str = "sigmoid"
) -> Callable[[int], nn.Module]:
    """What makes the channel gate of a module with that many channels; with reduction None, an identity."""
    if reduction is None:
        return lambda channels: nn.Identity()
    return partial(SqueezeExcite, reduction=reduction, bias=bias, squeeze=squeeze, gate=gate)


no_gates = gates(None)


def set_batch_norm(model: nn.Module, eps: float, momentum: float) -> None:
    """Give every batch norm of the model this epsilon and this weight of the newest batch."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eps, module.momentum = eps, momentum


def he_normal_(modules: Iterable[nn.Module], mode: str = "fan_out") -> None:
    """He normal weights for the convolutions among `modules`; batch norm at 1 and 0; the rest as it is."""
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def truncated_normal_(modules: Iterable[nn.Module], std: float) -> None:
    """Weights of convolutions and linear layers normal with `std`, cut at +-2 (absolute, not in sigmas)."""
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=std, a=-2.0, b=2.0)


def drop(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout; without a rate it is nothing at all and draws no random numbers."""
    return F.dropout(x, rate, training) if rate > 0.0 else x


def transform_input(x: Tensor) -> Tensor:
    """From torchvision's normalisation of [0, 1] images to the one of TensorFlow's Inception nets.

    x * (std / 0.5) + (mean - 0.5) / 0.5 per channel: (p - mean) / std becomes (p - 0.5) / 0.5.

    x: [N, 3, H, W], RGB, normalised with mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225).
    """
    red = x[:, 0:1] * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
    green = x[:, 1:2] * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
    blue = x[:, 2:3] * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
    return torch.cat([red, green, blue], 1)
