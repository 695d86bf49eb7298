"""Inception-ResNet v1 and v2 (Szegedy et al. 2016, arXiv 1602.07261), and SE-Inception-ResNet v2.

v1 has the names of facenet-pytorch and is a face embedding unless asked for a classifier; v2 has timm's.
Both are the networks of TF-slim, whose v2 is not quite the one that the paper draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import classification_cfg, make_classifier
from ._chain import Chain, tap
from ._registry import register_model
from ._weights import Weights, build_with_weights
from .layers import (
    Concat,
    ConvBNReLU,
    SqueezeExcite,
    conv_branch,
    drop,
    gates,
    he_normal_,
    no_gates,
    set_batch_norm,
)

PAPER = "arXiv 1602.07261"
SCALES = (0.17, 0.10, 0.20)  # of the residual branches on 35x35, 17x17 and 8x8 maps
VGGFACE2_PEOPLE = 8631
Layer = tuple[Any, ...]  # planes, kernel_size, stride, padding: see conv_branch
Shape = tuple[int, int, list[list[Layer]]]  # inplanes, first, others: see ResidualInception


class ResidualInception(nn.Module):
    """y = relu(x + scale * se(conv2d(concat(branches(x))))); conv2d is a 1x1 with bias and nothing behind it.

    Args:
        inplanes: channels of x and y.
        first: planes of branch0, a single 1x1 convolution.
        others: the layers of branch1 and, where there is one, branch2.
        relu: False leaves out the ReLU, as the last block of each network does.
    """

    def __init__(
        self,
        inplanes: int,
        first: int,
        others: Sequence[Sequence[Layer]],
        scale: float,
        *,
        relu: bool = True,
        se: Callable[[int], nn.Module] = no_gates,
    ):
        super().__init__()
        self.scale = scale
        self.branch0 = ConvBNReLU(inplanes, first, 1)
        for number, layers in enumerate(others, start=1):
            self.add_module(f"branch{number}", conv_branch(inplanes, *layers))
        branch_planes = first + sum(layers[-1][0] for layers in others)
        self.conv2d = nn.Conv2d(branch_planes, inplanes, 1)
        self.se = se(inplanes)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for name, branch in self.named_children():
            if name.startswith("branch"):
                outputs.append(branch(x))
        y = self.se(self.conv2d(torch.cat(outputs, 1)))
        return self.relu(y * self.scale + x)


def block35(inplanes: int, double: tuple[int, int]) -> Shape:
    """1x1 | 1x1, 3x3 | 1x1, 3x3, 3x3, the last branch with `double` planes in its two 3x3."""
    one, two = double
    return inplanes, 32, [[(32, 1), (32, 3, 1, 1)], [(32, 1), (one, 3, 1, 1), (two, 3, 1, 1)]]


def block17(inplanes: int, first: int, planes: tuple[int, int, int]) -> Shape:
    """1x1 | 1x1, 1x7, 7x1."""
    reduce, wide, high = planes
    return inplanes, first, [[(reduce, 1), (wide, (1, 7), 1, (0, 3)), (high, (7, 1), 1, (3, 0))]]


def block8(inplanes: int, planes: tuple[int, int, int]) -> Shape:
    """1x1 | 1x1, 1x3, 3x1."""
    reduce, wide, high = planes
    return inplanes, 192, [[(reduce, 1), (wide, (1, 3), 1, (0, 1)), (high, (3, 1), 1, (1, 0))]]


def repeat(count: int, shape: Shape, scale: float, **options: Any) -> nn.Sequential:
    return nn.Sequential(*(ResidualInception(*shape, scale, **options) for _ in range(count)))


def reduction_6a(inplanes: int, planes: tuple[int, int, int]) -> Concat:
    """concat[3x3/2 | 1x1, 3x3, 3x3/2 | max pool /2], 35 to 17 pixels; `planes` of the long branch."""
    reduce, middle, last = planes
    return Concat(
        branch0=ConvBNReLU(inplanes, 384, 3, stride=2),
        branch1=conv_branch(inplanes, (reduce, 1), (middle, 3, 1, 1), (last, 3, 2)),
        branch2=nn.MaxPool2d(3, stride=2),
    )


def reduction_7a(inplanes: int, planes: tuple[int, int, int]) -> Concat:
    """concat[1x1, 3x3/2 | 1x1, 3x3/2 | 1x1, 3x3, 3x3/2 | max pool /2], 17 to 8 pixels.

    `planes` are the 3x3 of the second branch and the two of the third.
    """
    short, middle, last = planes
    return Concat(
        branch0=conv_branch(inplanes, (256, 1), (384, 3, 2)),
        branch1=conv_branch(inplanes, (256, 1), (short, 3, 2)),
        branch2=conv_branch(inplanes, (256, 1), (middle, 3, 1, 1), (last, 3, 2)),
        branch3=nn.MaxPool2d(3, stride=2),
    )


def mixed_5b() -> Concat:
    """concat[1x1 | 1x1, 5x5 | 1x1, 3x3, 3x3 | average pool, 1x1], 192 to 320 channels; v2 only."""
    pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return Concat(
        branch0=ConvBNReLU(192, 96, 1),
        branch1=conv_branch(192, (48, 1), (64, 5, 1, 2)),
        branch2=conv_branch(192, (64, 1), (96, 3, 1, 1), (96, 3, 1, 1)),
        branch3=nn.Sequential(pool, ConvBNReLU(192, 64, 1)),
    )


def three_scales(residual_scale: float | Sequence[float] | None) -> tuple[float, float, float]:
    """Scales of the three kinds of block: the usual ones, one for all, or one for each."""
    if residual_scale is None:
        return SCALES
    if isinstance(residual_scale, (int, float)):
        return (float(residual_scale),) * 3
    if len(residual_scale) != 3:
        raise ValueError(f"residual_scale must be one number or three, got {len(residual_scale)}")
    first, second, third = (float(scale) for scale in residual_scale)
    return first, second, third


class InceptionResNet(Chain):
    """What both versions share: the stem, and how they are tapped.

    Args (besides those of `Backbone` and `Chain`):
        residual_scale: factor of the residual branches, one number or one for each of the three kinds of
            block (default 0.17, 0.10, 0.20; the paper: 0.1 to 0.3 keep wide networks stable). The last block
            is not scaled.
        bn_eps, bn_momentum: of every batch norm; TensorFlow trained it with momentum 0.0003.
    """

    def add_stem(self) -> None:
        """Five convolutions and a max pool: 299 to 71 pixels, or 160 to 36; 192 channels."""
        self.conv2d_1a = ConvBNReLU(self.in_chans, 32, 3, stride=2)
        self.conv2d_2a = ConvBNReLU(32, 32, 3)
        self.conv2d_2b = ConvBNReLU(32, 64, 3, padding=1)
        self.maxpool_3a = nn.MaxPool2d(3, stride=2)
        self.conv2d_3b = ConvBNReLU(64, 80, 1)
        self.conv2d_4a = ConvBNReLU(80, 192, 3)


class InceptionResNetV1(InceptionResNet):
    """Inception-ResNet v1: 5, 10 and 5 residual blocks and one more. Faces of 160x160, or images of 299.

    Args (besides those of `InceptionResNet`):
        head: "embedding": dropout, a linear layer to 512 without bias, batch norm, and then either the vector
            divided by its L2 norm (num_classes=0, the default) or logits. "imagenet": dropout and logits.
        classify: the embedding head gives logits; `num_classes` is then 8631, the people of VGGFace2, unless
            it is given. The same as giving num_classes.
        drop_rate: 0.6 for "embedding" and 0.2 for "imagenet", unless it is given.
    Returns: [N, 512] of unit length, or [N, num_classes]. `forward_head(x, pre_logits=True)` gives the
        embedding before it is normalised.
    """

    __constants__ = ("embeds", "features_only")  # each head has modules that the other lacks

    def __init__(
        self,
        *,
        head: str = "embedding",
        classify: bool = False,
        num_classes: int | None = None,
        residual_scale: float | Sequence[float] | None = None,
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        drop_rate: float | None = None,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        if head not in ("embedding", "imagenet"):
            raise ValueError(f"head must be 'embedding' or 'imagenet', got {head!r}")
        if classify and head == "imagenet":
            raise ValueError("classify belongs to head='embedding'; head='imagenet' always classifies")
        if classify and num_classes == 0:
            raise ValueError("classify=True needs classes, got num_classes=0")
        embeds = head == "embedding"
        if num_classes is None:
            num_classes = (VGGFACE2_PEOPLE if classify else 0) if embeds else 1000
        if drop_rate is None:
            drop_rate = 0.6 if embeds else 0.2
        super().__init__(num_classes=num_classes, drop_rate=drop_rate, **common)
        self.embeds = embeds
        small, middle, large = three_scales(residual_scale)
        self.add_stem()
        self.conv2d_4b = ConvBNReLU(192, 256, 3, stride=2)
        self.repeat_1 = repeat(5, block35(256, (32, 32)), small)
        self.mixed_6a = reduction_6a(256, (192, 192, 256))
        self.repeat_2 = repeat(10, block17(896, 128, (128, 128, 128)), middle)
        self.mixed_7a = reduction_7a(896, (256, 256, 256))
        self.repeat_3 = repeat(5, block8(1792, (192, 192, 192)), large)
        self.block8 = ResidualInception(*block8(1792, (192, 192, 192)), 1.0, relu=False)
        stages = [name for name, _ in self.named_children()]

        self.avgpool_1a = nn.AdaptiveAvgPool2d((1, 1))
        if self.embeds:
            self.num_features = 512
            self.last_linear: nn.Module = nn.Linear(1792, 512, bias=False)
            self.last_bn = nn.BatchNorm1d(512)
            self.logits = make_classifier(512, self.num_classes)
        else:
            self.num_features = 1792
            self.last_linear = make_classifier(1792, self.num_classes)
        set_batch_norm(self, bn_eps, bn_momentum)
        taps = [
            tap(64, 2, "conv2d_2b"),
            tap(192, 4, "conv2d_4a"),
            tap(256, 8, "repeat_1"),
            tap(896, 16, "repeat_2"),
            tap(1792, 32, "block8"),
        ]
        self.finish_chain(stages, taps, default_cfg or inception_resnet_v1_cfg(head))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = drop(torch.flatten(self.avgpool_1a(x), 1), self.drop_rate, self.training)
        if self.embeds:
            x = self.last_bn(self.last_linear(x))
            if pre_logits:
                return x
            return self.logits(x) if self.num_classes > 0 else F.normalize(x, p=2.0, dim=1)
        else:
            return x if pre_logits else self.last_linear(x)


class InceptionResNetV2(InceptionResNet):
    """Inception-ResNet v2: 10, 20 and 9 residual blocks and one more. Images of 299 pixels.

    Args (besides those of `InceptionResNet`; the paper drops 0.2 before the classifier, the default is 0):
        se: makes the gate at the end of each residual branch.
    """

    def __init__(
        self,
        *,
        residual_scale: float | Sequence[float] | None = None,
        se: Callable[[int], nn.Module] = no_gates,
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        small, middle, large = three_scales(residual_scale)
        self.add_stem()
        self.maxpool_5a = nn.MaxPool2d(3, stride=2)
        self.mixed_5b = mixed_5b()
        self.repeat = repeat(10, block35(320, (48, 64)), small, se=se)
        self.mixed_6a = reduction_6a(320, (256, 256, 384))
        self.repeat_1 = repeat(20, block17(1088, 192, (128, 160, 192)), middle, se=se)
        self.mixed_7a = reduction_7a(1088, (288, 288, 320))
        self.repeat_2 = repeat(9, block8(2080, (192, 224, 256)), large, se=se)
        self.block8 = ResidualInception(*block8(2080, (192, 224, 256)), 1.0, relu=False, se=se)
        self.conv2d_7b = ConvBNReLU(2080, 1536, 1)
        stages = [name for name, _ in self.named_children()]

        self.num_features = 1536
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classif = make_classifier(1536, self.num_classes)
        for module in self.modules():
            if isinstance(module, SqueezeExcite):
                he_normal_(module.modules())
        set_batch_norm(self, bn_eps, bn_momentum)
        taps = [
            tap(64, 2, "conv2d_2b"),
            tap(192, 4, "conv2d_4a"),
            tap(320, 8, "repeat"),
            tap(1088, 16, "repeat_1"),
            tap(1536, 32, "conv2d_7b"),
        ]
        self.finish_chain(stages, taps, default_cfg or inception_resnet_v2_cfg("inception_resnet_v2"))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = drop(torch.flatten(self.avgpool(x), 1), self.drop_rate, self.training)
        return x if pre_logits else self.classif(x)


def inception_resnet_v1_cfg(head: str = "embedding") -> dict[str, Any]:
    """Aligned faces of 160x160 as (x - 127.5) / 128, or ImageNet as for v2."""
    if head == "imagenet":
        return inception_resnet_v2_cfg("inception_resnet_v1", classifier="last_linear")
    return classification_cfg(
        "inception_resnet_v1",
        input_size=(3, 160, 160),
        pool_size=(3, 3),
        crop_pct=1.0,
        interpolation="area",
        mean=(127.5, 127.5, 127.5),
        std=(128.0, 128.0, 128.0),
        value_range=255.0,
        first_conv="conv2d_1a.conv",
        classifier="logits",
    )


def inception_resnet_v2_cfg(architecture: str, classifier: str = "classif") -> dict[str, Any]:
    return classification_cfg(
        architecture,
        input_size=(3, 299, 299),
        pool_size=(8, 8),
        crop_pct=0.8975,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv="conv2d_1a.conv",
        classifier=classifier,
    )


@register_model(family="Inception-ResNet", paper=PAPER, compatible_with=("facenet-pytorch",))
def inception_resnet_v1(weights: Weights | None = None, **options: Any) -> InceptionResNetV1:
    """Inception-ResNet v1, by default the 512-number face embedding. `weights` as `load_weights`.

    Options as `InceptionResNetV1`. The classifier in facenet-pytorch's files is used where the model has one
    and left out where it has none.
    """
    return build_with_weights(InceptionResNetV1, weights, options)


@register_model(family="Inception-ResNet", paper=PAPER, compatible_with=("timm", "pretrained-models.pytorch"))
def inception_resnet_v2(weights: Weights | None = None, **options: Any) -> InceptionResNetV2:
    """Inception-ResNet v2. `weights` as `load_weights`, options as `InceptionResNetV2`."""
    return build_with_weights(InceptionResNetV2, weights, options)


@register_model(family="SE-Inception", paper="arXiv 1709.01507", compatible_with=("own",))
def se_inception_resnet_v2(
    weights: Weights | None = None,
    *,
    se_reduction: int = 16,
    se_bias: bool = True,
    se_squeeze: str = "avg",
    se_gate: str = "sigmoid",
    **options: Any,
) -> InceptionResNetV2:
    """Inception-ResNet v2 with a channel gate at the end of every residual branch: relu(x + scale * se(...)).

    `se_*` as `SqueezeExcite`, other options as `InceptionResNetV2`.
    """
    se = gates(se_reduction, se_bias, se_squeeze, se_gate)
    cfg = inception_resnet_v2_cfg("se_inception_resnet_v2")
    return build_with_weights(InceptionResNetV2, weights, options, se=se, default_cfg=cfg)
