"""BN-Inception, also called Inception v2 (Ioffe and Szegedy 2015, arXiv 1502.03167), and SE-BN-Inception.

Names and numbers are those of the Caffe model and its PyTorch port in pretrained-models.pytorch: flat names,
batch norm behind every convolution, and in `bninception` a bias in front of it as well. Images are BGR from 0
to 255. "Inception v2" also names a TF-slim variant with narrower projections and a network of the v3 paper
without public weights; both are other networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._base import Backbone, classification_cfg, make_classifier
from ._chain import tap
from ._registry import register_model
from ._weights import Weights, build_with_weights
from .layers import SqueezeExcite, drop, gates, he_normal_, no_gates, set_batch_norm

PAPER = "arXiv 1502.03167"


class Widths(NamedTuple):
    """Output channels of a module's convolutions; `one` and `projection` are 0 where the map is halved."""

    one: int
    three_reduce: int
    three: int
    double_reduce: int
    double_1: int
    double_2: int
    projection: int
    pool: str = "avg"

    @property
    def halves(self) -> bool:
        return self.one == 0

    def out(self, inplanes: int) -> int:
        """Channels of the concatenation."""
        passed = inplanes if self.halves else self.projection
        return self.one + self.three + self.double_2 + passed


MODULES = {
    "3a": Widths(64, 64, 64, 64, 96, 96, 32),
    "3b": Widths(64, 64, 96, 64, 96, 96, 64),
    "3c": Widths(0, 128, 160, 64, 96, 96, 0, "max"),
    "4a": Widths(224, 64, 96, 96, 128, 128, 128),
    "4b": Widths(192, 96, 128, 96, 128, 128, 128),
    "4c": Widths(160, 128, 160, 128, 160, 160, 128),
    "4d": Widths(96, 128, 192, 160, 192, 192, 128),
    "4e": Widths(0, 128, 192, 192, 256, 256, 0, "max"),
    "5a": Widths(352, 192, 320, 160, 224, 224, 128),
    "5b": Widths(352, 192, 320, 192, 224, 224, 128, "max"),
}


class BNInception(Backbone):
    """A stem of three convolutions, ten Inception modules, global average pool, one linear layer.

    A module is concat[1x1 | 1x1, 3x3 | 1x1, 3x3, 3x3 | pool, 1x1]; 3c and 4e halve the map: no 1x1, stride 2
    in the last 3x3 of each branch, and the max pool is passed through. Stride-1 pools average and count the
    padding, except the one of 5b, which takes the maximum. The maps that 3c and 4e halve must have even sides
    (the convolutions round up, the pool rounds otherwise): sides of the image that are multiples of 32 do.

    Args (besides those of `Backbone`):
        conv_bias: a bias in every convolution, in front of its batch norm.
        se: makes the gate behind a module's concatenation.
        bn_eps, bn_momentum: of every batch norm.
    """

    def __init__(
        self,
        *,
        conv_bias: bool = True,
        se: Callable[[int], nn.Module] = no_gates,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.conv_bias = conv_bias
        self.relu = nn.ReLU(inplace=True)
        self.add_conv("conv1_7x7_s2", self.in_chans, 64, 7, stride=2)
        self.conv1_relu_7x7 = nn.ReLU(inplace=True)
        self.pool1_3x3_s2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.add_conv("conv2_3x3_reduce", 64, 64, 1)
        self.add_conv("conv2_3x3", 64, 192, 3)
        self.conv2_relu_3x3 = nn.ReLU(inplace=True)
        self.pool2_3x3_s2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        inplanes = 192
        for name, widths in MODULES.items():
            self.add_module_of(f"inception_{name}", inplanes, widths, se)
            inplanes = widths.out(inplanes)

        self.num_features = inplanes
        self.global_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.last_linear = make_classifier(inplanes, self.num_classes)
        for module in self.modules():
            if isinstance(module, SqueezeExcite):
                he_normal_(module.modules())
        set_batch_norm(self, bn_eps, bn_momentum)
        taps = [
            tap(64, 2, "conv1_relu_7x7"),
            tap(192, 4, "conv2_relu_3x3"),
            tap(320, 8, "inception_3b_output"),
            tap(608, 16, "inception_4d_output"),
            tap(1024, 32, "inception_5b_output"),
        ]
        self.finish(taps, default_cfg or bninception_cfg("bninception"))

    def add_conv(self, name: str, inplanes: int, planes: int, kernel_size: int, stride: int = 1) -> None:
        """Register the convolution `name` (padding keeps the size) and its batch norm `name_bn`."""
        padding = kernel_size // 2
        conv = nn.Conv2d(inplanes, planes, kernel_size, stride, padding, bias=self.conv_bias)
        self.add_module(name, conv)
        self.add_module(f"{name}_bn", nn.BatchNorm2d(planes))

    def add_module_of(self, name: str, inplanes: int, widths: Widths, se: Callable[[int], nn.Module]) -> None:
        """Register everything of one Inception module; `name_output` is where its result can be tapped."""
        stride = 2 if widths.halves else 1
        if not widths.halves:
            self.add_conv(f"{name}_1x1", inplanes, widths.one, 1)
        self.add_conv(f"{name}_3x3_reduce", inplanes, widths.three_reduce, 1)
        self.add_conv(f"{name}_3x3", widths.three_reduce, widths.three, 3, stride)
        self.add_conv(f"{name}_double_3x3_reduce", inplanes, widths.double_reduce, 1)
        self.add_conv(f"{name}_double_3x3_1", widths.double_reduce, widths.double_1, 3)
        self.add_conv(f"{name}_double_3x3_2", widths.double_1, widths.double_2, 3, stride)
        if widths.halves:
            pool: nn.Module = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        elif widths.pool == "max":
            pool = nn.MaxPool2d(3, stride=1, padding=1)
        else:
            pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.add_module(f"{name}_pool", pool)
        if not widths.halves:
            self.add_conv(f"{name}_pool_proj", inplanes, widths.projection, 1)
        self.add_module(f"{name}_se", se(widths.out(inplanes)))
        self.add_module(f"{name}_output", nn.Identity())

    def conv(self, name: str, x: Tensor) -> Tensor:
        return self.relu(getattr(self, f"{name}_bn")(getattr(self, name)(x)))

    def inception(self, name: str, x: Tensor) -> Tensor:
        three = self.conv(f"{name}_3x3", self.conv(f"{name}_3x3_reduce", x))
        double = self.conv(f"{name}_double_3x3_1", self.conv(f"{name}_double_3x3_reduce", x))
        double = self.conv(f"{name}_double_3x3_2", double)
        passed = getattr(self, f"{name}_pool")(x)
        if hasattr(self, f"{name}_1x1"):
            one, projected = self.conv(f"{name}_1x1", x), self.conv(f"{name}_pool_proj", passed)
            y = torch.cat([one, three, double, projected], 1)
        else:
            y = torch.cat([three, double, passed], 1)
        return getattr(self, f"{name}_output")(getattr(self, f"{name}_se")(y))

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        taps = [self.conv1_relu_7x7(self.conv1_7x7_s2_bn(self.conv1_7x7_s2(x)))]
        x = self.conv("conv2_3x3_reduce", self.pool1_3x3_s2(taps[0]))
        taps.append(self.conv2_relu_3x3(self.conv2_3x3_bn(self.conv2_3x3(x))))
        x = self.pool2_3x3_s2(taps[1])
        for name in MODULES:
            if self.features_only and len(taps) > self.out_indices[-1]:
                break
            x = self.inception(f"inception_{name}", x)
            if name in ("3b", "4d", "5b"):
                taps.append(x)
        return taps

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_taps(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = drop(torch.flatten(self.global_pool(x), 1), self.drop_rate, self.training)
        return x if pre_logits else self.last_linear(x)


def bninception_cfg(architecture: str, blue_green_red: tuple[float, ...] = (104.0, 117.0, 128.0)) -> dict:
    return classification_cfg(
        architecture,
        mean=blue_green_red,
        std=(1.0, 1.0, 1.0),
        channel_order="bgr",
        value_range=255.0,
        first_conv="conv1_7x7_s2",
        classifier="last_linear",
    )


@register_model(
    family="Inception",
    paper=PAPER,
    compatible_with=("pretrained-models.pytorch",),
    aliases=("inception_v2", "bn_inception"),
)
def bninception(weights: Weights | None = None, **options: Any) -> BNInception:
    """BN-Inception. `weights` as `load_weights`, options as `BNInception`."""
    cfg = bninception_cfg("bninception")
    return build_with_weights(BNInception, weights, options, default_cfg=cfg)


@register_model(
    family="SE-Inception",
    paper="arXiv 1709.01507",
    compatible_with=("own", "Caffe"),
    aliases=("se_inception",),
)
def se_bninception(
    weights: Weights | None = None,
    *,
    se_reduction: int = 16,
    se_bias: bool = True,
    se_squeeze: str = "avg",
    se_gate: str = "sigmoid",
    **options: Any,
) -> BNInception:
    """BN-Inception with a channel gate behind each of its ten modules and no convolution biases.

    `se_*` as `SqueezeExcite`, other options as `BNInception`.
    """
    se = gates(se_reduction, se_bias, se_squeeze, se_gate)
    cfg = bninception_cfg("se_bninception", (104.0, 117.0, 123.0))
    return build_with_weights(BNInception, weights, options, se=se, conv_bias=False, default_cfg=cfg)


inception_v2 = bninception
bn_inception = bninception
se_inception = se_bninception
