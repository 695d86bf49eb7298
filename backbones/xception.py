"""Xception (Chollet 2016, arXiv 1610.02357).

Parameter names, shapes and the random numbers drawn by the constructor are those of timm's `legacy_xception`,
so its checkpoint loads unchanged. Weights from Keras want pad_type="same" and bn_eps=1e-3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Backbone, classification_cfg, make_classifier
from ._registry import register_model
from ._weights import Weights, build_with_weights
from .layers import check_pad_type, he_normal_, make_max_pool2d


class SeparableConv2d(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 with nothing between them."""

    def __init__(self, inplanes: int, planes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, inplanes, 3, padding=1, groups=inplanes, bias=False)
        self.pointwise = nn.Conv2d(inplanes, planes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.conv1(x))


class Block(nn.Module):
    """Two or three separable convolutions, ReLU before each, plus the shortcut; no ReLU after the sum.

    Args:
        widths: output channels of each separable convolution.
        stride: 2 ends with a max pool, and the shortcut is a strided 1x1; 1 has an identity shortcut.
        leading_relu: whether the first convolution has a ReLU in front. It never works in place: the shortcut
            needs what came in.
    """

    __constants__ = ("projected",)  # lets TorchScript leave out a shortcut that does not exist

    def __init__(
        self,
        inplanes: int,
        widths: tuple[int, ...],
        *,
        stride: int = 1,
        leading_relu: bool = True,
        pad_type: str = "symmetric",
        bn_eps: float = 1e-5,
    ):
        super().__init__()
        self.projected = stride != 1 or widths[-1] != inplanes
        if self.projected:
            self.skip = nn.Conv2d(inplanes, widths[-1], 1, stride=stride, bias=False)
            self.skipbn = nn.BatchNorm2d(widths[-1], eps=bn_eps)
        rep: list[nn.Module] = []
        for i, planes in enumerate(widths):
            if i > 0 or leading_relu:
                rep.append(nn.ReLU(inplace=i > 0))
            rep += [SeparableConv2d(inplanes, planes), nn.BatchNorm2d(planes, eps=bn_eps)]
            inplanes = planes
        if stride != 1:
            rep.append(make_max_pool2d(3, stride, pad_type))
        self.rep = nn.Sequential(*rep)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rep(x)
        if self.projected:
            x = self.skipbn(self.skip(x))
        y += x
        return y


class Xception(Backbone):
    """Stem of two 3x3, twelve blocks of separable convolutions, two more of them, average pool, linear.

    Args (besides those of `Backbone`):
        pad_type: "symmetric" (PyTorch's checkpoints) or "same" (TensorFlow's and Keras'), which differ in the
            max pools of images whose size is even there.
        bn_eps: 1e-5, or 1e-3 for weights from Keras.
    Taps: stem, the activated outputs of blocks 1, 2 and 11, the last feature map.
    """

    def __init__(
        self,
        *,
        pad_type: str = "symmetric",
        bn_eps: float = 1e-5,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        check_pad_type(pad_type)
        self.pad_type = pad_type
        common_block: dict[str, Any] = {"pad_type": pad_type, "bn_eps": bn_eps}
        self.conv1 = nn.Conv2d(self.in_chans, 32, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(32, eps=bn_eps)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(64, eps=bn_eps)
        self.act2 = nn.ReLU(inplace=True)
        self.block1 = Block(64, (128, 128), stride=2, leading_relu=False, **common_block)
        self.block2 = Block(128, (256, 256), stride=2, **common_block)
        self.block3 = Block(256, (728, 728), stride=2, **common_block)
        for i in range(4, 12):
            self.add_module(f"block{i}", Block(728, (728, 728, 728), **common_block))
        self.block12 = Block(728, (728, 1024), stride=2, **common_block)
        self.conv3 = SeparableConv2d(1024, 1536)
        self.bn3 = nn.BatchNorm2d(1536, eps=bn_eps)
        self.act3 = nn.ReLU(inplace=True)
        self.conv4 = SeparableConv2d(1536, 2048)
        self.bn4 = nn.BatchNorm2d(2048, eps=bn_eps)
        self.act4 = nn.ReLU(inplace=True)
        self.num_features = 2048
        self.fc = make_classifier(2048, self.num_classes)
        he_normal_(self.modules())
        taps = [  # blocks end without activation: the one that the next block starts with
            {"num_chs": 64, "reduction": 2, "module": "act2"},
            {"num_chs": 128, "reduction": 4, "module": "block2.rep.0", "prune_after": "block1"},
            {"num_chs": 256, "reduction": 8, "module": "block3.rep.0", "prune_after": "block2"},
            {"num_chs": 728, "reduction": 16, "module": "block12.rep.0", "prune_after": "block11"},
            {"num_chs": 2048, "reduction": 32, "module": "act4"},
        ]
        self.finish(taps, default_cfg or xception_cfg("legacy_xception"))

    def forward_stem(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)))  # [N, 64, H/2 - 2, W/2 - 2]

    def forward_middle(self, x: Tensor) -> Tensor:
        x = self.block6(self.block5(self.block4(self.block3(x))))
        x = self.block9(self.block8(self.block7(x)))
        return self.block11(self.block10(x))

    def forward_exit(self, x: Tensor) -> Tensor:
        x = self.act3(self.bn3(self.conv3(self.block12(x))))
        return self.act4(self.bn4(self.conv4(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.forward_stem(x)))
        return self.forward_exit(self.forward_middle(x))

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        c1 = self.forward_stem(x)
        b1 = self.block1(c1)
        b2 = self.block2(b1)
        b11 = self.forward_middle(b2)
        return [c1, F.relu(b1), F.relu(b2), F.relu(b11), self.forward_exit(b11)]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)
        if self.drop_rate > 0.0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)


def xception_cfg(name: str) -> dict[str, Any]:
    return classification_cfg(
        name,
        input_size=(3, 299, 299),
        pool_size=(10, 10),
        crop_pct=0.8975,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


@register_model(
    family="Xception",
    paper="arXiv 1610.02357",
    compatible_with=("timm", "pretrained-models.pytorch", "Keras"),
    aliases=("xception",),
)
def legacy_xception(weights: Weights | None = None, **options: Any) -> Xception:
    """Xception. `weights` as `load_weights`, options as `Xception`."""
    return build_with_weights(Xception, weights, options, default_cfg=xception_cfg("legacy_xception"))


xception = legacy_xception
