"""SE-ResNet, SE-ResNeXt and SENet-154 (Hu et al. 2017, arXiv 1709.01507), with the names of Cadene's port.

These are the networks of the paper's Caffe models, which timm calls `legacy_*`. timm's `seresnet50` and
`senet154` are other networks that happen to have the same number of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._base import classification_cfg, make_classifier
from ._chain import Chain, tap
from ._registry import Builder, register_model
from ._weights import Weights, build_with_weights
from .layers import drop, gates, he_normal_

PAPER = "arXiv 1709.01507"
POSITIONS = ("standard", "pre", "identity", "post", "3x3")


class GatedBlock(nn.Module):
    """A residual block with a channel gate: y = relu(se(branch(x)) + shortcut(x)).

    Other positions of the gate, from the paper's ablation:

        "pre"       relu(branch(se(x)) + shortcut(x))
        "identity"  relu(branch(x) + se(shortcut(x)))
        "post"      se(relu(branch(x) + shortcut(x)))
        "3x3"       inside the branch, behind the 3x3 convolution of a bottleneck
    """

    def __init__(self, position: str):
        super().__init__()
        self.position = position

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define branch")

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        y = self.branch(self.se_module(x) if self.position == "pre" else x)
        if self.position == "standard":
            y = self.se_module(y)
        if self.position == "identity":
            shortcut = self.se_module(shortcut)
        y = self.relu(y + shortcut)
        return self.se_module(y) if self.position == "post" else y


class SEBasicBlock(GatedBlock):
    """Two 3x3 convolutions. The branch ends in a ReLU, in front of the gate."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int,
        downsample: nn.Module,
        se: Callable[[int], nn.Module],
        position: str,
    ):
        super().__init__(position)
        if position == "3x3":
            raise ValueError("se_position='3x3' is defined for bottlenecks")
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = se(inplanes if position == "pre" else planes)
        self.downsample = downsample

    def branch(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)))


class SEBottleneck(GatedBlock):
    """1x1 to the first width, 3x3 in groups to the second, 1x1 to 4*planes.

    Args:
        widths: output channels of the first two convolutions.
        stride_in_1x1: the stride sits in the first 1x1 (SE-ResNet) instead of in the 3x3.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int,
        downsample: nn.Module,
        se: Callable[[int], nn.Module],
        position: str,
        widths: tuple[int, int],
        groups: int,
        stride_in_1x1: bool,
    ):
        super().__init__(position)
        first, second = widths
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(inplanes, first, 1, stride1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, stride2, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = se({"pre": inplanes, "3x3": second}.get(position, planes * 4))
        self.downsample = downsample

    def branch(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        if self.position == "3x3":
            y = self.se_module(y)
        return self.bn3(self.conv3(y))


def make_stem(in_chans: int, planes: int, deep: bool) -> nn.Sequential:
    """7x7/2, or three 3x3 of which the first has stride 2; batch norm and ReLU behind each convolution."""
    stem = nn.Sequential()
    sizes = [(in_chans, 64, 3, 2), (64, 64, 3, 1), (64, planes, 3, 1)] if deep else [(in_chans, planes, 7, 2)]
    for number, (inplanes, outplanes, kernel_size, stride) in enumerate(sizes, start=1):
        conv = nn.Conv2d(inplanes, outplanes, kernel_size, stride, kernel_size // 2, bias=False)
        stem.add_module(f"conv{number}", conv)
        stem.add_module(f"bn{number}", nn.BatchNorm2d(outplanes))
        stem.add_module(f"relu{number}", nn.ReLU(inplace=True))
    return stem


def make_shortcut(inplanes: int, planes: int, stride: int, kernel_size: int) -> nn.Module:
    """An identity, or a projection where the shape changes."""
    if stride == 1 and inplanes == planes:
        return nn.Identity()
    conv = nn.Conv2d(inplanes, planes, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(planes))


class SENet(Chain):
    """Stem, 3x3/2 max pool (rounded up, no padding), four stages of gated blocks, pool, one linear layer.

    Args (besides those of `Backbone`):
        kind: "basic" (two 3x3), "resnet" (bottleneck with the stride in its first 1x1), "resnext" (32 groups
            of 4 channels in the first stage, stride in the 3x3) or "senet" (64 groups, half as wide in front
            of the 3x3, three 3x3 in the stem, 3x3 projections).
        layers: blocks in each stage.
        se_reduction: channels of a gate's bottleneck are divided by it; None builds no gates.
        se_bias, se_squeeze, se_gate: as `SqueezeExcite`.
        se_position: where the gate sits, see `GatedBlock`; checkpoints exist for "standard" only.
        zero_init_residual: start each residual branch at zero (arXiv 1706.02677).
    """

    def __init__(
        self,
        kind: str,
        layers: Sequence[int],
        *,
        se_reduction: int | None = 16,
        se_bias: bool = True,
        se_squeeze: str = "avg",
        se_gate: str = "sigmoid",
        se_position: str = "standard",
        zero_init_residual: bool = False,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        if kind not in ("basic", "resnet", "resnext", "senet"):
            raise ValueError(f"kind must be 'basic', 'resnet', 'resnext' or 'senet', got {kind!r}")
        if se_position not in POSITIONS:
            raise ValueError(f"se_position must be one of {', '.join(POSITIONS)}, got {se_position!r}")
        se = gates(se_reduction, se_bias, se_squeeze, se_gate)
        position = se_position if se_reduction is not None else "standard"
        deep = kind == "senet"
        inplanes = 128 if deep else 64
        self.layer0 = make_stem(self.in_chans, inplanes, deep)
        self.pool0 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        taps = [tap(inplanes, 2, "layer0")]
        for stage, depth in enumerate(layers):
            planes, stride = 64 << stage, 1 if stage == 0 else 2
            blocks = []
            for _ in range(depth):
                block, outplanes = SEBasicBlock, planes
                options: dict[str, Any] = {"stride": stride, "se": se, "position": position}
                if kind != "basic":
                    block, outplanes = SEBottleneck, planes * 4
                    options.update(bottleneck_options(kind, planes))
                kernel_size = 3 if deep and stage > 0 else 1
                downsample = make_shortcut(inplanes, outplanes, stride, kernel_size)
                blocks.append(block(inplanes, planes, downsample=downsample, **options))
                inplanes, stride = outplanes, 1
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            taps.append(tap(inplanes, 4 << stage, f"layer{stage + 1}"))
        stages = [name for name, _ in self.named_children()]

        self.num_features = inplanes
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.last_linear = make_classifier(inplanes, self.num_classes)
        self.init_weights(zero_init_residual)
        self.finish_chain(stages, taps, default_cfg or senet_cfg("senet"))

    def init_weights(self, zero_init_residual: bool = False) -> None:
        """He normal (fan-out) convolutions, also those of the gates; PyTorch's default for the classifier."""
        he_normal_(self.modules())
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (SEBasicBlock, SEBottleneck)):
                    last = module.bn3 if isinstance(module, SEBottleneck) else module.bn2
                    nn.init.zeros_(last.weight)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = drop(torch.flatten(self.avgpool(x), 1), self.drop_rate, self.training)
        return x if pre_logits else self.last_linear(x)


def bottleneck_options(kind: str, planes: int) -> dict[str, Any]:
    """Widths and groups of the bottlenecks of a stage, and where their stride is."""
    if kind == "resnet":
        return {"widths": (planes, planes), "groups": 1, "stride_in_1x1": True}
    if kind == "resnext":
        width = planes * 4 // 64 * 32
        return {"widths": (width, width), "groups": 32, "stride_in_1x1": False}
    return {"widths": (planes * 2, planes * 4), "groups": 64, "stride_in_1x1": False}


def senet_cfg(architecture: str, **changes: Any) -> dict[str, Any]:
    facts = {"first_conv": "layer0.conv1", "classifier": "last_linear"}
    return classification_cfg(architecture, **facts, **changes)


def _senet(
    name: str,
    kind: str,
    layers: tuple[int, ...],
    weights: Weights | None,
    options: dict[str, Any],
    **cfg: Any,
) -> SENet:
    cfg = senet_cfg(name, **cfg)
    return build_with_weights(SENet, weights, options, kind=kind, layers=layers, default_cfg=cfg)


def _as_senet(alias: str) -> Callable[[Builder], Builder]:
    origin = ("timm", "pretrained-models.pytorch")
    return register_model(family="SENet", paper=PAPER, compatible_with=origin, aliases=(alias,))


@_as_senet("seresnet18")
def legacy_seresnet18(weights: Weights | None = None, **options: Any) -> SENet:
    """SE-ResNet-18: basic blocks [2, 2, 2, 2]. `weights` as `load_weights`, options as `SENet`."""
    bicubic = {"interpolation": "bicubic"}
    return _senet("legacy_seresnet18", "basic", (2, 2, 2, 2), weights, options, **bicubic)


@_as_senet("seresnet34")
def legacy_seresnet34(weights: Weights | None = None, **options: Any) -> SENet:
    """SE-ResNet-34: basic blocks [3, 4, 6, 3]. `weights` as `load_weights`, options as `SENet`."""
    return _senet("legacy_seresnet34", "basic", (3, 4, 6, 3), weights, options)


@_as_senet("seresnet50")
def legacy_seresnet50(weights: Weights | None = None, **options: Any) -> SENet:
    """SE-ResNet-50: bottlenecks [3, 4, 6, 3]. `weights` as `load_weights`, options as `SENet`."""
    return _senet("legacy_seresnet50", "resnet", (3, 4, 6, 3), weights, options)


@_as_senet("seresnet101")
def legacy_seresnet101(weights: Weights | None = None, **options: Any) -> SENet:
    """SE-ResNet-101: bottlenecks [3, 4, 23, 3]. `weights` as `load_weights`, options as `SENet`."""
    return _senet("legacy_seresnet101", "resnet", (3, 4, 23, 3), weights, options)


@_as_senet("seresnet152")
def legacy_seresnet152(weights: Weights | None = None, **options: Any) -> SENet:
    """SE-ResNet-152: bottlenecks [3, 8, 36, 3]. `weights` as `load_weights`, options as `SENet`."""
    return _senet("legacy_seresnet152", "resnet", (3, 8, 36, 3), weights, options)


@_as_senet("seresnext26_32x4d")
def legacy_seresnext26_32x4d(weights: Weights | None = None, **options: Any) -> SENet:
    """SE-ResNeXt-26, 32 groups of 4: blocks [2, 2, 2, 2]. Arguments as `legacy_seresnet50`."""
    bicubic = {"interpolation": "bicubic"}
    return _senet("legacy_seresnext26_32x4d", "resnext", (2, 2, 2, 2), weights, options, **bicubic)


@_as_senet("seresnext50_32x4d")
def legacy_seresnext50_32x4d(weights: Weights | None = None, **options: Any) -> SENet:
    """SE-ResNeXt-50, 32 groups of 4: blocks [3, 4, 6, 3]. Arguments as `legacy_seresnet50`."""
    return _senet("legacy_seresnext50_32x4d", "resnext", (3, 4, 6, 3), weights, options)


@_as_senet("seresnext101_32x4d")
def legacy_seresnext101_32x4d(weights: Weights | None = None, **options: Any) -> SENet:
    """SE-ResNeXt-101, 32 groups of 4: blocks [3, 4, 23, 3]. Arguments as `legacy_seresnet50`."""
    return _senet("legacy_seresnext101_32x4d", "resnext", (3, 4, 23, 3), weights, options)


@_as_senet("senet154")
def legacy_senet154(weights: Weights | None = None, **options: Any) -> SENet:
    """SENet-154: blocks [3, 8, 36, 3] of 64 groups, dropout 0.2. Arguments as `legacy_seresnet50`."""
    options.setdefault("drop_rate", 0.2)
    return _senet("legacy_senet154", "senet", (3, 8, 36, 3), weights, options)


seresnet18 = legacy_seresnet18
seresnet34 = legacy_seresnet34
seresnet50 = legacy_seresnet50
seresnet101 = legacy_seresnet101
seresnet152 = legacy_seresnet152
seresnext26_32x4d = legacy_seresnext26_32x4d
seresnext50_32x4d = legacy_seresnext50_32x4d
seresnext101_32x4d = legacy_seresnext101_32x4d
senet154 = legacy_senet154
