"""Inception v4 (Szegedy et al. 2016, arXiv 1602.07261), with the names of timm.

Its average pools do not count the padding. The order of concatenation differs from module to module: the pool
comes first in the first stem module and last elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._base import Backbone, classification_cfg, make_classifier
from ._chain import tap
from ._registry import register_model
from ._weights import Weights, build_with_weights
from .layers import Concat, ConvBNReLU, conv_branch, drop, set_batch_norm

PAPER = "arXiv 1602.07261"


def pool_projection(inplanes: int, planes: int) -> nn.Sequential:
    """3x3 average pool that leaves the padding out of its count, then 1x1."""
    pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return nn.Sequential(pool, ConvBNReLU(inplanes, planes, 1))


def mixed_3a() -> Concat:
    """147 to 73 pixels, 64 to 160 channels; the pool comes first."""
    return Concat(maxpool=nn.MaxPool2d(3, stride=2), conv=ConvBNReLU(64, 96, 3, stride=2))


def mixed_4a() -> Concat:
    """73 to 71 pixels, 160 to 192 channels."""
    return Concat(
        branch0=conv_branch(160, (64, 1), (96, 3)),
        branch1=conv_branch(160, (64, 1), (64, (1, 7), 1, (0, 3)), (64, (7, 1), 1, (3, 0)), (96, 3)),
    )


def mixed_5a() -> Concat:
    """71 to 35 pixels, 192 to 384 channels; the convolution comes first."""
    return Concat(conv=ConvBNReLU(192, 192, 3, stride=2), maxpool=nn.MaxPool2d(3, stride=2))


def inception_a() -> Concat:
    """concat[1x1 | 1x1, 3x3 | 1x1, 3x3, 3x3 | average pool, 1x1], 384 channels on 35x35 maps."""
    return Concat(
        branch0=ConvBNReLU(384, 96, 1),
        branch1=conv_branch(384, (64, 1), (96, 3, 1, 1)),
        branch2=conv_branch(384, (64, 1), (96, 3, 1, 1), (96, 3, 1, 1)),
        branch3=pool_projection(384, 96),
    )


def reduction_a() -> Concat:
    """concat[3x3/2 | 1x1, 3x3, 3x3/2 | max pool /2], 35 to 17 pixels, 384 to 1024 channels."""
    return Concat(
        branch0=ConvBNReLU(384, 384, 3, stride=2),
        branch1=conv_branch(384, (192, 1), (224, 3, 1, 1), (256, 3, 2)),
        branch2=nn.MaxPool2d(3, stride=2),
    )


def inception_b() -> Concat:
    """concat[1x1 | 1x1, 1x7, 7x1 | 1x1, 7x1, 1x7, 7x1, 1x7 | average pool, 1x1], 1024 channels on 17x17."""
    wide, high = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return Concat(
        branch0=ConvBNReLU(1024, 384, 1),
        branch1=conv_branch(1024, (192, 1), (224, *wide), (256, *high)),
        branch2=conv_branch(1024, (192, 1), (192, *high), (224, *wide), (224, *high), (256, *wide)),
        branch3=pool_projection(1024, 128),
    )


def reduction_b() -> Concat:
    """concat[1x1, 3x3/2 | 1x1, 1x7, 7x1, 3x3/2 | max pool /2], 17 to 8 pixels, 1024 to 1536 channels."""
    return Concat(
        branch0=conv_branch(1024, (192, 1), (192, 3, 2)),
        branch1=conv_branch(1024, (256, 1), (256, (1, 7), 1, (0, 3)), (320, (7, 1), 1, (3, 0)), (320, 3, 2)),
        branch2=nn.MaxPool2d(3, stride=2),
    )


class InceptionC(nn.Module):
    """concat[1x1 | 1x1, (1x3, 3x1) | 1x1, 3x1, 1x3, (1x3, 3x1) | average pool, 1x1], 1536 channels on 8x8.

    (a, b) are side by side. The third branch starts with the 3x1, unlike the modules of Inception v3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branch0 = ConvBNReLU(1536, 256, 1)
        self.branch1_0 = ConvBNReLU(1536, 384, 1)
        self.branch1_1a = ConvBNReLU(384, 256, (1, 3), padding=(0, 1))
        self.branch1_1b = ConvBNReLU(384, 256, (3, 1), padding=(1, 0))
        self.branch2_0 = ConvBNReLU(1536, 384, 1)
        self.branch2_1 = ConvBNReLU(384, 448, (3, 1), padding=(1, 0))
        self.branch2_2 = ConvBNReLU(448, 512, (1, 3), padding=(0, 1))
        self.branch2_3a = ConvBNReLU(512, 256, (1, 3), padding=(0, 1))
        self.branch2_3b = ConvBNReLU(512, 256, (3, 1), padding=(1, 0))
        self.branch3 = pool_projection(1536, 256)

    def forward(self, x: Tensor) -> Tensor:
        zero = self.branch0(x)
        one = self.branch1_0(x)
        one_a, one_b = self.branch1_1a(one), self.branch1_1b(one)
        two = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        two_a, two_b = self.branch2_3a(two), self.branch2_3b(two)
        return torch.cat([zero, one_a, one_b, two_a, two_b, self.branch3(x)], 1)


class InceptionV4(Backbone):
    """A sequence `features` of 22 modules, global average pool, one linear layer. Images of 299 pixels.

    Args (besides those of `Backbone`; the paper drops 0.2 in front of the classifier, the default is 0):
        bn_eps, bn_momentum: of every batch norm; TensorFlow trained it with momentum 0.0003.
    """

    def __init__(
        self,
        *,
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        stem = [ConvBNReLU(self.in_chans, 32, 3, stride=2), ConvBNReLU(32, 32, 3)]
        stem += [ConvBNReLU(32, 64, 3, padding=1)]
        self.features = nn.Sequential(
            *stem,
            *(mixed_3a(), mixed_4a(), mixed_5a()),
            *(inception_a() for _ in range(4)),
            reduction_a(),
            *(inception_b() for _ in range(7)),
            reduction_b(),
            *(InceptionC() for _ in range(3)),
        )
        self.num_features = 1536
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.last_linear = make_classifier(1536, self.num_classes)
        set_batch_norm(self, bn_eps, bn_momentum)
        taps = [
            tap(64, 2, "features.2"),
            tap(160, 4, "features.3"),
            tap(384, 8, "features.9"),
            tap(1024, 16, "features.17"),
            tap(1536, 32, "features.21"),
        ]
        self.finish(taps, default_cfg or inception_v4_cfg())

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        taps = []
        for name, module in self.features.named_children():
            x = module(x)
            if name in ("2", "3", "9", "17", "21"):
                taps.append(x)
        return taps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = drop(torch.flatten(self.avgpool(x), 1), self.drop_rate, self.training)
        return x if pre_logits else self.last_linear(x)


def inception_v4_cfg() -> dict[str, Any]:
    return classification_cfg(
        "inception_v4",
        input_size=(3, 299, 299),
        pool_size=(8, 8),
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv="features.0.conv",
        classifier="last_linear",
    )


@register_model(family="Inception", paper=PAPER, compatible_with=("timm", "pretrained-models.pytorch"))
def inception_v4(weights: Weights | None = None, **options: Any) -> InceptionV4:
    """Inception v4. `weights` as `load_weights`, options as `InceptionV4`."""
    return build_with_weights(InceptionV4, weights, options, default_cfg=inception_v4_cfg())
