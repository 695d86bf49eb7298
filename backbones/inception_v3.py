"""Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) and SE-Inception v3.

Names, shapes and initialisation are torchvision's (timm has the same names). Its average pools count the
padding, and the 5x5 branch of the first modules stays 5x5, as in the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._base import classification_cfg, make_classifier
from ._chain import Chain, tap
from ._registry import register_model
from ._weights import Weights, build_with_weights
from .layers import (
    ConvBNReLU,
    SqueezeExcite,
    drop,
    gates,
    he_normal_,
    no_gates,
    set_batch_norm,
    truncated_normal_,
)

PAPER = "arXiv 1512.00567"
MakeGate = Callable[[int], nn.Module]

# Image size of equal cost for (input_stride, stem_pool): the paper's study of low resolutions.
IMAGE_SIZES = {(2, True): 299, (1, True): 151, (2, False): 151, (1, False): 79}


class InceptionV3Output(NamedTuple):
    """What Inception v3 returns in `train()`."""

    logits: Tensor
    aux_logits: Tensor


class MixedA(nn.Module):
    """concat[1x1 | 1x1, 5x5 | 1x1, 3x3, 3x3 | average pool, 1x1], on 35x35 maps."""

    def __init__(self, inplanes: int, projection: int, se: MakeGate):
        super().__init__()
        self.branch1x1 = ConvBNReLU(inplanes, 64, 1)
        self.branch5x5_1 = ConvBNReLU(inplanes, 48, 1)
        self.branch5x5_2 = ConvBNReLU(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBNReLU(inplanes, 64, 1)
        self.branch3x3dbl_2 = ConvBNReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBNReLU(96, 96, 3, padding=1)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = ConvBNReLU(inplanes, projection, 1)
        self.se = se(224 + projection)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        projected = self.branch_pool(self.pool(x))
        return self.se(torch.cat([one, five, double, projected], 1))


class ReduceA(nn.Module):
    """concat[3x3/2 | 1x1, 3x3, 3x3/2 | max pool /2], from 35x35 to 17x17."""

    def __init__(self, inplanes: int, se: MakeGate):
        super().__init__()
        self.branch3x3 = ConvBNReLU(inplanes, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBNReLU(inplanes, 64, 1)
        self.branch3x3dbl_2 = ConvBNReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBNReLU(96, 96, 3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2)
        self.se = se(480 + inplanes)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3(x)
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return self.se(torch.cat([three, double, self.pool(x)], 1))


class MixedB(nn.Module):
    """concat[1x1 | 1x1, 1x7, 7x1 | 1x1, 7x1, 1x7, 7x1, 1x7 | average pool, 1x1], `inner` channels within."""

    def __init__(self, inplanes: int, inner: int, se: MakeGate):
        super().__init__()
        self.branch1x1 = ConvBNReLU(inplanes, 192, 1)
        self.branch7x7_1 = ConvBNReLU(inplanes, inner, 1)
        self.branch7x7_2 = ConvBNReLU(inner, inner, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvBNReLU(inner, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvBNReLU(inplanes, inner, 1)
        self.branch7x7dbl_2 = ConvBNReLU(inner, inner, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvBNReLU(inner, inner, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvBNReLU(inner, inner, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvBNReLU(inner, 192, (1, 7), padding=(0, 3))
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = ConvBNReLU(inplanes, 192, 1)
        self.se = se(768)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1x1(x)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        projected = self.branch_pool(self.pool(x))
        return self.se(torch.cat([one, seven, double, projected], 1))


class ReduceB(nn.Module):
    """concat[1x1, 3x3/2 | 1x1, 1x7, 7x1, 3x3/2 | max pool /2], from 17x17 to 8x8."""

    def __init__(self, inplanes: int, se: MakeGate):
        super().__init__()
        self.branch3x3_1 = ConvBNReLU(inplanes, 192, 1)
        self.branch3x3_2 = ConvBNReLU(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBNReLU(inplanes, 192, 1)
        self.branch7x7x3_2 = ConvBNReLU(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvBNReLU(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvBNReLU(192, 192, 3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2)
        self.se = se(512 + inplanes)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return self.se(torch.cat([three, seven, self.pool(x)], 1))


class MixedC(nn.Module):
    """concat[1x1 | 1x1, (1x3, 3x1) | 1x1, 3x3, (1x3, 3x1) | average pool, 1x1]; (a, b) are side by side."""

    def __init__(self, inplanes: int, se: MakeGate):
        super().__init__()
        self.branch1x1 = ConvBNReLU(inplanes, 320, 1)
        self.branch3x3_1 = ConvBNReLU(inplanes, 384, 1)
        self.branch3x3_2a = ConvBNReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvBNReLU(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvBNReLU(inplanes, 448, 1)
        self.branch3x3dbl_2 = ConvBNReLU(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvBNReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvBNReLU(384, 384, (3, 1), padding=(1, 0))
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = ConvBNReLU(inplanes, 192, 1)
        self.se = se(2048)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1x1(x)
        three = self.branch3x3_1(x)
        three_a, three_b = self.branch3x3_2a(three), self.branch3x3_2b(three)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double_a, double_b = self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)
        projected = self.branch_pool(self.pool(x))
        return self.se(torch.cat([one, three_a, three_b, double_a, double_b, projected], 1))


class AuxiliaryHead(nn.Module):
    """5x5/3 average pool, 1x1 to 128, 5x5 to 768 channels, global average pool, linear."""

    def __init__(self, inplanes: int, num_classes: int):
        super().__init__()
        self.pool = nn.AvgPool2d(5, stride=3)
        self.conv0 = ConvBNReLU(inplanes, 128, 1)
        self.conv1 = ConvBNReLU(128, 768, 5)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = make_classifier(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv0(self.pool(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InceptionV3(Chain):
    """Six-convolution stem, eleven mixed modules, global average pool, one linear layer. Images of 299.

    Args (besides those of `Backbone` and `Chain`):
        aux_logits: build the auxiliary head. In `train()` the model then returns `InceptionV3Output`; the
            usual weight of its loss is 0.4.
        input_stride, stem_pool: stride of the first convolution (2 or 1) and whether the first max pool is
            there. The paper's study at equal cost: 299 pixels with (2, True), 151 with (1, True), 79 with
            (1, False).
        se: makes the gate behind a module's concatenation.
        bn_eps, bn_momentum: of every batch norm; TensorFlow trained it with momentum 0.0003.
    """

    def __init__(
        self,
        *,
        aux_logits: bool = True,
        input_stride: int = 2,
        stem_pool: bool = True,
        se: MakeGate = no_gates,
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        drop_rate: float = 0.5,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(drop_rate=drop_rate, **common)
        if input_stride not in (1, 2):
            raise ValueError(f"input_stride must be 1 or 2, got {input_stride}")
        self.Conv2d_1a_3x3 = ConvBNReLU(self.in_chans, 32, 3, stride=input_stride)
        self.Conv2d_2a_3x3 = ConvBNReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBNReLU(32, 64, 3, padding=1)
        self.maxpool1 = nn.MaxPool2d(3, stride=2) if stem_pool else nn.Identity()
        self.Conv2d_3b_1x1 = ConvBNReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBNReLU(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = MixedA(192, 32, se)
        self.Mixed_5c = MixedA(256, 64, se)
        self.Mixed_5d = MixedA(288, 64, se)
        self.Mixed_6a = ReduceA(288, se)
        self.Mixed_6b = MixedB(768, 128, se)
        self.Mixed_6c = MixedB(768, 160, se)
        self.Mixed_6d = MixedB(768, 160, se)
        self.Mixed_6e = MixedB(768, 192, se)
        self.aux_logits = aux_logits and self.num_classes > 0
        if self.aux_logits:
            self.AuxLogits = AuxiliaryHead(768, self.num_classes)
            self.auxiliary_heads = {"Mixed_6e": "AuxLogits"}
            self.auxiliary_classifiers = {"AuxLogits.fc": 768}
        else:
            self.leave_out("AuxLogits")
        self.Mixed_7a = ReduceB(768, se)
        self.Mixed_7b = MixedC(1280, se)
        self.Mixed_7c = MixedC(2048, se)
        stages = [name for name, _ in self.named_children() if name != "AuxLogits"]

        self.num_features = 2048
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = make_classifier(2048, self.num_classes)
        self.init_weights()
        set_batch_norm(self, bn_eps, bn_momentum)
        first = input_stride
        second = first * 2 if stem_pool else first
        taps = [
            tap(64, first, "Conv2d_2b_3x3"),
            tap(192, second, "Conv2d_4a_3x3"),
            tap(288, second * 2, "Mixed_5d"),
            tap(768, second * 4, "Mixed_6e"),
            tap(2048, second * 8, "Mixed_7c"),
        ]
        cfg = default_cfg or inception_v3_cfg("inception_v3")
        size = IMAGE_SIZES[input_stride, bool(stem_pool)]
        self.finish_chain(stages, taps, {**cfg, "input_size": (3, size, size)})

    def init_weights(self) -> None:
        """Normal weights cut at +-2: std 0.1, in the auxiliary head 0.01 (5x5) and 0.001 (linear)."""
        special = {}
        if self.aux_logits:
            special = {self.AuxLogits.conv1.conv: 0.01, self.AuxLogits.fc: 0.001}
        for module in self.modules():
            truncated_normal_([module], std=special.get(module, 0.1))
        for module in self.modules():
            if isinstance(module, SqueezeExcite):
                he_normal_(module.modules())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = drop(torch.flatten(self.avgpool(x), 1), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    @torch.jit.unused
    def auxiliary_output(self, logits: Tensor, auxiliary: list[Tensor]) -> InceptionV3Output:
        return InceptionV3Output(logits, auxiliary[0])


def inception_v3_cfg(architecture: str) -> dict[str, Any]:
    facts = {"input_size": (3, 299, 299), "pool_size": (8, 8), "first_conv": "Conv2d_1a_3x3.conv"}
    return classification_cfg(architecture, **facts)


@register_model(family="Inception", paper=PAPER, compatible_with=("torchvision", "timm"))
def inception_v3(weights: Weights | None = None, **options: Any) -> InceptionV3:
    """Inception v3. `weights` as `load_weights`, options as `InceptionV3`.

    torchvision's weights want `transform_input=True` for images normalised by ImageNet's mean and std.
    """
    cfg = inception_v3_cfg("inception_v3")
    return build_with_weights(InceptionV3, weights, options, default_cfg=cfg)


@register_model(family="SE-Inception", paper="arXiv 1709.01507", compatible_with=("own",))
def se_inception_v3(
    weights: Weights | None = None,
    *,
    se_reduction: int = 16,
    se_bias: bool = True,
    se_squeeze: str = "avg",
    se_gate: str = "sigmoid",
    **options: Any,
) -> InceptionV3:
    """Inception v3 with a channel gate behind each of its eleven modules; the auxiliary head sees gated maps.

    `se_*` as `SqueezeExcite`, other options as `InceptionV3`.
    """
    se = gates(se_reduction, se_bias, se_squeeze, se_gate)
    cfg = inception_v3_cfg("se_inception_v3")
    return build_with_weights(InceptionV3, weights, options, se=se, default_cfg=cfg)
