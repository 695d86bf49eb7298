"""MobileNet (Howard et al. 2017, arXiv 1704.04861), also with squeeze-and-excitation (arXiv 1709.01507).

Parameter names, shapes and the initialisation are those of timm's `mobilenetv1_100`, so its checkpoint loads
unchanged. Weights from TensorFlow want pad_type="same" and bn_eps=1e-3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Backbone, classification_cfg, make_classifier
from ._registry import register_model
from ._weights import Weights, build_with_weights
from .layers import SqueezeExcite, check_pad_type, make_conv2d

PAPER = "arXiv 1704.04861"

STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))  # channels, blocks, first stride
ACTIVATIONS = {"relu6": nn.ReLU6, "relu": nn.ReLU}


def scaled_channels(channels: int, width: float) -> int:
    """channels * width to the nearest multiple of 8: at least 8, and at least 90 % of the exact number."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


class DepthwiseBlock(nn.Module):
    """Depthwise 3x3, BN, act, pointwise 1x1, BN, act, and a channel gate where `se_reduction` is given."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int = 1,
        act: str = "relu6",
        pad_type: str = "symmetric",
        bn_eps: float = 1e-5,
        se_reduction: int | None = None,
    ):
        super().__init__()
        self.conv_dw = make_conv2d(inplanes, inplanes, 3, stride, groups=inplanes, pad_type=pad_type)
        self.bn1 = nn.BatchNorm2d(inplanes, eps=bn_eps)
        self.act1 = ACTIVATIONS[act](inplace=True)
        self.conv_pw = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps=bn_eps)
        self.act2 = ACTIVATIONS[act](inplace=True)
        self.se_out = nn.Identity() if se_reduction is None else SqueezeExcite(planes, se_reduction)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_dw(x)))
        x = self.act2(self.bn2(self.conv_pw(x)))
        return self.se_out(x)


class MobileNetV1(Backbone):
    """Stem 3x3/2, thirteen depthwise-separable blocks in five stages, average pool, linear. No shortcuts.

    Args (besides those of `Backbone`):
        width: multiplier of all channel numbers, the paper's alpha; see `scaled_channels`. Its resolution
            multiplier is the size of the image.
        act: "relu6", as every implementation has it, or "relu", as the paper says.
        pad_type: "symmetric" (PyTorch's checkpoints) or "same" (TensorFlow's): where the stride is 2 and the
            size even, "same" pads behind only.
        bn_eps: 1e-5, or 1e-3 for weights from TensorFlow and Keras.
        se_reduction: reduction of a channel gate at the end of every block; None for none.
    Taps: the outputs of the five stages (strides 2 to 32).
    """

    def __init__(
        self,
        width: float = 1.0,
        *,
        act: str = "relu6",
        pad_type: str = "symmetric",
        bn_eps: float = 1e-5,
        se_reduction: int | None = None,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        check_pad_type(pad_type)
        self.pad_type = pad_type
        if not width > 0.0:
            raise ValueError(f"width must be positive, got {width}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(map(repr, ACTIVATIONS))}, got {act!r}")
        block: dict[str, Any] = {
            "act": act,
            "pad_type": pad_type,
            "bn_eps": bn_eps,
            "se_reduction": se_reduction,
        }
        inplanes, reduction, taps = scaled_channels(32, width), 2, []
        self.conv_stem = make_conv2d(self.in_chans, inplanes, 3, 2, pad_type=pad_type)
        self.bn1 = nn.BatchNorm2d(inplanes, eps=bn_eps)
        self.act1 = ACTIVATIONS[act](inplace=True)
        self.blocks = nn.Sequential()
        for stage, (channels, depth, stride) in enumerate(STAGES):
            planes, blocks = scaled_channels(channels, width), []
            reduction *= stride
            for _ in range(depth):
                blocks.append(DepthwiseBlock(inplanes, planes, stride=stride, **block))
                inplanes, stride = planes, 1
            self.blocks.append(nn.Sequential(*blocks))
            taps.append({"num_chs": planes, "reduction": reduction, "module": f"blocks.{stage}"})
        self.num_features = inplanes
        self.classifier = make_classifier(inplanes, self.num_classes)
        self.init_weights()
        self.finish(taps, default_cfg or mobilenet_cfg("mobilenetv1"))

    def init_weights(self) -> None:
        """Convolutions normal, variance 2/(k*k*out/groups); linear uniform, +-1/sqrt(classes); biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.out_features)
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.act1(self.bn1(self.conv_stem(x))))

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        x = self.act1(self.bn1(self.conv_stem(x)))
        taps = []
        for stage in self.blocks:
            x = stage(x)
            taps.append(x)
        return taps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)
        if self.drop_rate > 0.0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)


def mobilenet_cfg(name: str) -> dict[str, Any]:
    return classification_cfg(
        name,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv="conv_stem",
        classifier="classifier",
    )


def mobilenetv1(width: float = 1.0, *, weights: Weights | None = None, **options: Any) -> MobileNetV1:
    """MobileNet of any width. Options and weights as in `mobilenetv1_100`."""
    return _mobilenet(f"mobilenetv1_{round(100 * width):03d}", width, weights, options)


def _mobilenet(
    name: str, width: float, weights: Weights | None, options: dict[str, Any], **architecture: Any
) -> MobileNetV1:
    cfg = mobilenet_cfg(name)
    return build_with_weights(MobileNetV1, weights, options, width=width, default_cfg=cfg, **architecture)


_as_width = register_model(
    family="MobileNet", paper=PAPER, compatible_with=("timm's builder at this width", "Keras")
)


@register_model(family="MobileNet", paper=PAPER, compatible_with=("timm", "Keras"), aliases=("mobilenet_v1",))
def mobilenetv1_100(weights: Weights | None = None, **options: Any) -> MobileNetV1:
    """MobileNet v1. `weights` as `load_weights`, options as `MobileNetV1`."""
    return mobilenetv1(1.0, weights=weights, **options)


@_as_width
def mobilenetv1_075(weights: Weights | None = None, **options: Any) -> MobileNetV1:
    """MobileNet v1 of width 0.75. Arguments as `mobilenetv1_100`."""
    return mobilenetv1(0.75, weights=weights, **options)


@_as_width
def mobilenetv1_050(weights: Weights | None = None, **options: Any) -> MobileNetV1:
    """MobileNet v1 of width 0.5. Arguments as `mobilenetv1_100`."""
    return mobilenetv1(0.5, weights=weights, **options)


@_as_width
def mobilenetv1_025(weights: Weights | None = None, **options: Any) -> MobileNetV1:
    """MobileNet v1 of width 0.25. Arguments as `mobilenetv1_100`."""
    return mobilenetv1(0.25, weights=weights, **options)


@register_model(family="SE-MobileNet", paper="arXiv 1709.01507", compatible_with=("own",))
def se_mobilenetv1_100(weights: Weights | None = None, **options: Any) -> MobileNetV1:
    """MobileNet v1 with a channel gate after every block (reduction 16). Arguments as `mobilenetv1_100`."""
    reduction = options.pop("se_reduction", 16)
    return _mobilenet("se_mobilenetv1_100", 1.0, weights, options, se_reduction=reduction)


mobilenet_v1 = mobilenetv1_100
