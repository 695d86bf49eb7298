"""Building blocks that several families share, with the parameter names of the public implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

Size = int | tuple[int, int]

GATES: Mapping[str, Callable[[], nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
SQUEEZES = ("avg", "max")


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


def he_normal_(modules: Iterable[nn.Module], mode: str = "fan_out") -> None:
    """He normal weights for the convolutions among `modules`; batch norm at 1 and 0; the rest as it is."""
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def transform_input(x: Tensor) -> Tensor:
    """From torchvision's normalisation of [0, 1] images to the one of TensorFlow's Inception nets.

    x * (std / 0.5) + (mean - 0.5) / 0.5 per channel: (p - mean) / std becomes (p - 0.5) / 0.5.

    x: [N, 3, H, W], RGB, normalised with mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225).
    """
    red = x[:, 0:1] * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
    green = x[:, 1:2] * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
    blue = x[:, 2:3] * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
    return torch.cat([red, green, blue], 1)
