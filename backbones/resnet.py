"""ResNet (He et al. 2015, arXiv 1512.03385) and ResNeXt (Xie et al. 2016, arXiv 1611.05431).

Parameter names, shapes and the random numbers drawn by the constructors are those of torchvision, so its
checkpoints (and timm's) load unchanged. The stride sits in the 3x3 ("v1.5") unless `stride_in_1x1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Backbone, classification_cfg, make_classifier
from ._registry import register_model
from ._weights import Weights, build_with_weights

RESNET_PAPER = "arXiv 1512.03385"
RESNEXT_PAPER = "arXiv 1611.05431"

# Group widths that keep the cost of ResNet-50/101 at a given cardinality (ResNeXt paper, table 2).
CONSTANT_COMPLEXITY_WIDTH = {1: 64, 2: 40, 4: 24, 8: 14, 32: 4}


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class ZeroPadShortcut(nn.Module):
    """Shortcut A of the ResNet paper: every stride-th pixel, new channels zero. It has no parameters."""

    def __init__(self, extra_channels: int, stride: int):
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, [0, 0, 0, 0, 0, self.extra_channels])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
        cardinality: int = 1,
        group_width: int = 64,
        stride_in_1x1: bool = False,
        downsample: nn.Module | None = None,
    ):
        super().__init__()
        if cardinality != 1 or group_width != 64 or stride_in_1x1:
            raise ValueError("a basic block has no 1x1 convolution and no groups: use a depth of 50 or more")
        self.conv1 = conv3x3(inplanes, planes, stride, dilation=first_dilation)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """1x1 to w channels, 3x3 in `cardinality` groups, 1x1 to 4*planes: y = relu(branch(x) + shortcut(x)).

    w = planes * group_width / 64 * cardinality; cardinality 1 and group width 64 is ResNet's own block.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
        cardinality: int = 1,
        group_width: int = 64,
        stride_in_1x1: bool = False,
        downsample: nn.Module | None = None,
    ):
        super().__init__()
        width = int(planes * group_width / 64) * cardinality
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(inplanes, width, stride1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride2, cardinality, first_dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(Backbone):
    """Stem 7x7/2 and 3x3/2 max pool, four stages of residual blocks, global average pool, one linear layer.

    Args (besides those of `Backbone`):
        block, layers: block class and number of blocks in each stage.
        cardinality, group_width: groups of the 3x3 and channels of a group in the first stage (ResNeXt).
        stride_in_1x1: halve the resolution in the first 1x1 of a bottleneck, as the paper does ("v1"),
            instead of in the 3x3.
        output_stride: 32, 16 or 8; the stages that would go beyond it use dilation instead of stride.
        shortcut: "A" zero-padded identity, "B" projection where the shape changes, "C" projection in every
            block. Public checkpoints exist for "B" only.
        zero_init_residual: start each residual branch at zero (arXiv 1706.02677).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        *,
        cardinality: int = 1,
        group_width: int = 64,
        stride_in_1x1: bool = False,
        output_stride: int = 32,
        shortcut: str = "B",
        zero_init_residual: bool = False,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        if shortcut not in ("A", "B", "C"):
            raise ValueError(f"shortcut must be 'A', 'B' or 'C', got {shortcut!r}")
        self.conv1 = nn.Conv2d(self.in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        taps = [{"num_chs": 64, "reduction": 2, "module": "relu"}]

        inplanes, reduction, dilation = 64, 4, 1
        kind: dict[str, Any] = {
            "cardinality": cardinality,
            "group_width": group_width,
            "stride_in_1x1": stride_in_1x1,
        }
        for stage, depth in enumerate(layers):
            planes, stride, first_dilation = 64 << stage, 1 if stage == 0 else 2, dilation
            if reduction * stride > output_stride:
                stride, dilation = 1, dilation * stride
            reduction *= stride
            blocks = []
            for _ in range(depth):
                downsample = make_shortcut(shortcut, inplanes, planes * block.expansion, stride)
                size = {"stride": stride, "first_dilation": first_dilation, "dilation": dilation}
                blocks.append(block(inplanes, planes, downsample=downsample, **size, **kind))
                inplanes, stride, first_dilation = planes * block.expansion, 1, dilation
            name = f"layer{stage + 1}"
            self.add_module(name, nn.Sequential(*blocks))
            taps.append({"num_chs": inplanes, "reduction": reduction, "module": name})

        self.num_features = inplanes
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = make_classifier(inplanes, self.num_classes)
        self.init_weights(zero_init_residual)
        self.finish(taps, default_cfg or classification_cfg("resnet"))

    def init_weights(self, zero_init_residual: bool = False) -> None:
        """He normal (fan-out) convolutions, batch norm at 1 and 0, PyTorch's default for the classifier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    nn.init.zeros_(last.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        c1 = self.relu(self.bn1(self.conv1(x)))  # [N, 64, H/2, W/2]
        c2 = self.layer1(self.maxpool(c1))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        c5 = self.layer4(c4)
        return [c1, c2, c3, c4, c5]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = torch.flatten(self.avgpool(x), 1)
        if self.drop_rate > 0.0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)


def make_shortcut(kind: str, inplanes: int, planes: int, stride: int) -> nn.Module | None:
    """The module on the shortcut of a block, None for a plain identity."""
    if kind != "C" and stride == 1 and inplanes == planes:
        return None
    if kind == "A":
        return ZeroPadShortcut(planes - inplanes, stride)
    return nn.Sequential(conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))


BLOCKS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def _resnet(
    name: str, depth: int, weights: Weights | None, options: dict[str, Any], **architecture: Any
) -> ResNet:
    block, layers = BLOCKS[depth]
    cfg = classification_cfg(name, **architecture.pop("cfg", {}))
    return build_with_weights(
        ResNet, weights, options, block=block, layers=layers, default_cfg=cfg, **architecture
    )


def resnext(
    depth: int, cardinality: int, width: int | None = None, *, weights: Weights | None = None, **options: Any
) -> ResNet:
    """Any ResNeXt: `depth` 50, 101 or 152 and `cardinality` groups of `width` channels in the first stage.

    Without `width` the one of the paper's constant-complexity sweep is taken: cardinality 1, 2, 4, 8, 32 with
    64, 40, 24, 14, 4. Cardinality 1 with width 64 is ResNet. Options and weights as in `resnet50`.
    """
    if BLOCKS.get(depth, (BasicBlock,))[0] is BasicBlock:
        raise ValueError(f"resnext depth must be 50, 101 or 152, got {depth}")
    if cardinality < 1 or (width is not None and width < 1):
        raise ValueError(f"cardinality and width must be positive, got {cardinality} and {width}")
    if width is None:
        if cardinality not in CONSTANT_COMPLEXITY_WIDTH:
            known = ", ".join(map(str, CONSTANT_COMPLEXITY_WIDTH))
            raise ValueError(f"width has a default for cardinality {known}, not for {cardinality}: pass it")
        width = CONSTANT_COMPLEXITY_WIDTH[cardinality]
    name = f"resnext{depth}_{cardinality}x{width}d"
    return _resnet(name, depth, weights, options, cardinality=cardinality, group_width=width)


_as_resnet = register_model(family="ResNet", paper=RESNET_PAPER, compatible_with=("torchvision", "timm"))
_as_resnext = register_model(
    family="ResNeXt", paper=RESNEXT_PAPER, compatible_with=("torchvision ResNet class",)
)


@_as_resnet
def resnet18(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNet-18: basic blocks [2, 2, 2, 2]. `weights` as `load_weights`, options as `ResNet`."""
    return _resnet("resnet18", 18, weights, options)


@_as_resnet
def resnet34(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNet-34: basic blocks [3, 4, 6, 3]. `weights` as `load_weights`, options as `ResNet`."""
    return _resnet("resnet34", 34, weights, options)


@_as_resnet
def resnet50(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNet-50: bottlenecks [3, 4, 6, 3]. `weights` as `load_weights`, options as `ResNet`."""
    return _resnet("resnet50", 50, weights, options)


@_as_resnet
def resnet101(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNet-101: bottlenecks [3, 4, 23, 3]. `weights` as `load_weights`, options as `ResNet`."""
    return _resnet("resnet101", 101, weights, options)


@_as_resnet
def resnet152(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNet-152: bottlenecks [3, 8, 36, 3]. `weights` as `load_weights`, options as `ResNet`."""
    return _resnet("resnet152", 152, weights, options)


@register_model(
    family="ResNeXt", paper=RESNEXT_PAPER, compatible_with=("torchvision", "timm"), aliases=("resnext50",)
)
def resnext50_32x4d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-50, 32 groups of 4 channels. Arguments as `resnet50`."""
    return resnext(50, 32, 4, weights=weights, **options)


@_as_resnext
def resnext50_2x40d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-50, 2 groups of 40 channels. Arguments as `resnet50`."""
    return resnext(50, 2, 40, weights=weights, **options)


@_as_resnext
def resnext50_4x24d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-50, 4 groups of 24 channels. Arguments as `resnet50`."""
    return resnext(50, 4, 24, weights=weights, **options)


@_as_resnext
def resnext50_8x14d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-50, 8 groups of 14 channels. Arguments as `resnet50`."""
    return resnext(50, 8, 14, weights=weights, **options)


@register_model(family="ResNeXt", paper=RESNEXT_PAPER, compatible_with=("timm",))
def resnext101_32x4d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-101, 32 groups of 4 channels. Arguments as `resnet50`."""
    return resnext(101, 32, 4, weights=weights, **options)


@register_model(
    family="ResNeXt", paper=RESNEXT_PAPER, compatible_with=("torchvision", "timm"), aliases=("resnext101",)
)
def resnext101_32x8d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-101, 32 groups of 8 channels (not in the paper). Arguments as `resnet50`."""
    return resnext(101, 32, 8, weights=weights, **options)


@register_model(family="ResNeXt", paper=RESNEXT_PAPER, compatible_with=("torchvision", "timm"))
def resnext101_64x4d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-101, 64 groups of 4 channels. Arguments as `resnet50`."""
    cfg = {"crop_pct": 0.965}
    return _resnet("resnext101_64x4d", 101, weights, options, cardinality=64, group_width=4, cfg=cfg)


@_as_resnext
def resnext101_2x40d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-101, 2 groups of 40 channels. Arguments as `resnet50`."""
    return resnext(101, 2, 40, weights=weights, **options)


@_as_resnext
def resnext101_4x24d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-101, 4 groups of 24 channels. Arguments as `resnet50`."""
    return resnext(101, 4, 24, weights=weights, **options)


@_as_resnext
def resnext101_8x14d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-101, 8 groups of 14 channels. Arguments as `resnet50`."""
    return resnext(101, 8, 14, weights=weights, **options)


@_as_resnext
def resnext101_2x64d(weights: Weights | None = None, **options: Any) -> ResNet:
    """ResNeXt-101, 2 groups of 64 channels. Arguments as `resnet50`."""
    return resnext(101, 2, 64, weights=weights, **options)


resnext50 = resnext50_32x4d
resnext101 = resnext101_32x8d
