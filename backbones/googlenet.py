"""GoogLeNet, the first Inception network (Szegedy et al. 2014, arXiv 1409.4842), and SE-GoogLeNet.

`googlenet` is torchvision's network, to its checkpoint: batch norm behind every convolution, 3x3 where the
paper has 5x5, a 2x2 fourth pool. `googlenet_2014` is the paper's: no batch norm, local response
normalisation, real 5x5 branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import classification_cfg, make_classifier
from ._chain import Chain, tap
from ._registry import register_model
from ._weights import Weights, build_with_weights
from .layers import (
    ConvBNReLU,
    Size,
    SqueezeExcite,
    drop,
    flatten_map,
    gates,
    he_normal_,
    no_gates,
    set_batch_norm,
    truncated_normal_,
)

torch.fx.wrap("flatten_map")

PAPER = "arXiv 1409.4842"

# 1x1 | 3x3 reduce, 3x3 | 5x5 reduce, 5x5 | pool projection (table 1 of the paper)
MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNetOutput(NamedTuple):
    """What GoogLeNet returns in `train()`; the deeper auxiliary head comes first, as in torchvision."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class ConvReLU(nn.Module):
    """y = relu(conv(x)) with a bias; the parameters are `conv.weight` and `conv.bias`."""

    def __init__(self, inplanes: int, planes: int, kernel_size: Size, stride: Size = 1, padding: Size = 0):
        super().__init__()
        self.conv = nn.Conv2d(inplanes, planes, kernel_size, stride, padding)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Inception(nn.Module):
    """concat[1x1 | 1x1, 3x3 | 1x1, k x k | 3x3 max pool, 1x1], then the channel gate where there is one.

    Args:
        widths: output channels of the six convolutions, in that order.
        conv: `ConvBNReLU` or `ConvReLU`.
        third: k of the third branch, 5 in the paper.
        se: makes the gate for a number of channels.
    """

    def __init__(
        self,
        inplanes: int,
        widths: tuple[int, int, int, int, int, int],
        conv: Callable[..., nn.Module],
        third: int,
        se: Callable[[int], nn.Module],
    ):
        super().__init__()
        b1, r3, b3, r5, b5, projection = widths
        self.branch1 = conv(inplanes, b1, 1)
        self.branch2 = nn.Sequential(conv(inplanes, r3, 1), conv(r3, b3, 3, padding=1))
        self.branch3 = nn.Sequential(conv(inplanes, r5, 1), conv(r5, b5, third, padding=third // 2))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(inplanes, projection, 1))
        self.se = se(b1 + b3 + b5 + projection)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]
        return self.se(torch.cat(branches, 1))


class AuxiliaryHead(nn.Module):
    """pool to 4x4, 1x1 convolution to 128 channels, linear 2048 to 1024, ReLU, dropout 0.7, linear.

    `adaptive` pools any size to 4x4 (torchvision); otherwise the pool is 5x5/3 (the paper), which gives 4x4
    for maps of 14 to 16 pixels.
    """

    def __init__(self, inplanes: int, num_classes: int, conv: Callable[..., nn.Module], adaptive: bool):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((4, 4)) if adaptive else nn.AvgPool2d(5, stride=3)
        self.conv = conv(inplanes, 128, 1)
        self.fc1 = nn.Linear(2048, 1024)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = make_classifier(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        need = "the auxiliary heads are made for 224x224 images (or train with aux_logits=False)"
        x = flatten_map(self.conv(self.pool(x)), 4, need)
        x = F.dropout(self.relu(self.fc1(x)), 0.7, self.training)
        return self.fc2(x)


class GoogLeNet(Chain):
    """Nine Inception modules behind a three-convolution stem; global average pool, one linear layer.

    Args (besides those of `Backbone` and `Chain`):
        aux_logits: build the two auxiliary heads. In `train()` the model then returns `GoogLeNetOutput`;
            the paper adds their losses with weight 0.3.
        original: the network of the paper instead of torchvision's.
        se: makes the gate behind a module's concatenation.
        bn_eps, bn_momentum: of every batch norm; TensorFlow trained Inception with momentum 0.0003.
    """

    def __init__(
        self,
        *,
        aux_logits: bool = True,
        original: bool = False,
        se: Callable[[int], nn.Module] = no_gates,
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        drop_rate: float = 0.2,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(drop_rate=drop_rate, **common)
        conv = ConvReLU if original else ConvBNReLU
        self.conv1 = conv(self.in_chans, 64, 7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        if original:
            self.lrn1 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.conv2 = conv(64, 64, 1)
        self.conv3 = conv(64, 192, 3, padding=1)
        if original:
            self.lrn2 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        inplanes = 192
        for name, widths in MODULES.items():
            if name == "4a":
                self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
            if name == "5a":
                self.maxpool4 = nn.MaxPool2d(3 if original else 2, stride=2, ceil_mode=True)
            third = 5 if original else 3  # torchvision's 3x3 is a slip that its checkpoint made permanent
            self.add_module(f"inception{name}", Inception(inplanes, widths, conv, third, se))
            inplanes = widths[0] + widths[2] + widths[4] + widths[5]
        stages = [name for name, _ in self.named_children()]

        self.aux_logits = aux_logits and self.num_classes > 0
        if self.aux_logits:
            self.aux1 = AuxiliaryHead(512, self.num_classes, conv, adaptive=not original)
            self.aux2 = AuxiliaryHead(528, self.num_classes, conv, adaptive=not original)
            self.auxiliary_heads = {"inception4a": "aux1", "inception4d": "aux2"}
            self.auxiliary_classifiers = {"aux1.fc2": 1024, "aux2.fc2": 1024}
        else:
            self.leave_out("aux1", "aux2")
        self.num_features = inplanes
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = make_classifier(inplanes, self.num_classes)
        self.init_weights(original)
        set_batch_norm(self, bn_eps, bn_momentum)
        taps = [
            tap(64, 2, "conv1"),
            tap(192, 4, "lrn2" if original else "conv3"),
            tap(480, 8, "inception3b"),
            tap(832, 16, "inception4e"),
            tap(1024, 32, "inception5b"),
        ]
        self.finish_chain(stages, taps, default_cfg or googlenet_cfg("googlenet"))

    def init_weights(self, original: bool = False) -> None:
        """Normal weights of std 0.01, as torchvision; He normal in gates.

        The network of the paper has no batch norm and would not start from there: its convolutions and linear
        layers take Xavier's uniform weights, the convolutions a bias of 0.2, as the public Caffe model did.
        """
        if not original:
            truncated_normal_(self.modules(), std=0.01)
        for module in self.modules():
            if original and isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.constant_(module.bias, 0.2 if isinstance(module, nn.Conv2d) else 0.0)
            elif isinstance(module, SqueezeExcite):
                he_normal_(module.modules())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = drop(torch.flatten(self.avgpool(x), 1), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    @torch.jit.unused
    def auxiliary_output(self, logits: Tensor, auxiliary: list[Tensor]) -> GoogLeNetOutput:
        return GoogLeNetOutput(logits, auxiliary[1], auxiliary[0])


def googlenet_cfg(architecture: str, **changes: Any) -> dict[str, Any]:
    return classification_cfg(architecture, first_conv="conv1.conv", **changes)


@register_model(family="Inception", paper=PAPER, compatible_with=("torchvision",), aliases=("inception_v1",))
def googlenet(weights: Weights | None = None, **options: Any) -> GoogLeNet:
    """GoogLeNet as in torchvision. `weights` as `load_weights`, options as `GoogLeNet`.

    torchvision's weights want `transform_input=True` for images normalised by ImageNet's mean and std.
    """
    cfg = googlenet_cfg("googlenet")
    return build_with_weights(GoogLeNet, weights, options, default_cfg=cfg)


@register_model(family="Inception", paper=PAPER, compatible_with=("own", "Caffe"))
def googlenet_2014(weights: Weights | None = None, **options: Any) -> GoogLeNet:
    """GoogLeNet as in the paper and its Caffe model: BGR from 0 to 255. Options as `GoogLeNet`."""
    caffe = {"mean": (104.0, 117.0, 123.0), "std": (1.0, 1.0, 1.0)}
    cfg = googlenet_cfg("googlenet_2014", channel_order="bgr", value_range=255.0, **caffe)
    options.setdefault("drop_rate", 0.4)
    return build_with_weights(GoogLeNet, weights, options, original=True, default_cfg=cfg)


@register_model(family="SE-Inception", paper="arXiv 1709.01507", compatible_with=("own",))
def se_googlenet(
    weights: Weights | None = None,
    *,
    se_reduction: int = 16,
    se_bias: bool = True,
    se_squeeze: str = "avg",
    se_gate: str = "sigmoid",
    **options: Any,
) -> GoogLeNet:
    """GoogLeNet with a channel gate behind each of its nine modules; auxiliary heads see gated maps.

    `se_*` as `SqueezeExcite`, other options as `GoogLeNet`.
    """
    se = gates(se_reduction, se_bias, se_squeeze, se_gate)
    cfg = googlenet_cfg("se_googlenet")
    return build_with_weights(GoogLeNet, weights, options, se=se, default_cfg=cfg)


inception_v1 = googlenet
