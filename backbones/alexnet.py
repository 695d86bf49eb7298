"""AlexNet, twice: "One weird trick" (Krizhevsky 2014, arXiv 1404.5997) and the network of NeurIPS 2012.

`alexnet` is torchvision's: one tower, no groups, no normalisation. `alexnet_2012` is the network of
"ImageNet Classification with Deep Convolutional Neural Networks" (Krizhevsky, Sutskever, Hinton) with the
names and the order of layers of the public Caffe model.
"""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from ._base import Backbone, classification_cfg, make_classifier
from ._registry import register_model
from ._sequential import SequentialBackbone
from ._weights import Weights, build_with_weights
from .layers import flatten_map

torch.fx.wrap("flatten_map")

# LocalResponseNorm divides alpha by the window, as Caffe does; the paper does not: 1e-4 there is 5e-4 here.
LRN = {"caffe": {"alpha": 1e-4, "beta": 0.75, "k": 1.0}, "paper": {"alpha": 5e-4, "beta": 0.75, "k": 2.0}}
LRN_SIZE = 5


class AlexNet(SequentialBackbone):
    """Five convolutions with bias and ReLU, three max pools, three linear layers. Smallest image: 63 pixels.

    Options are those of `Backbone`; `drop_rate` is 0.5 and acts in front of both hidden layers.
    Taps: the inputs of the three max pools (strides 4, 8, 16) and the last pool's output (stride 32).
    """

    def __init__(self, *, drop_rate: float = 0.5, default_cfg: dict[str, Any] | None = None, **common: Any):
        super().__init__(drop_rate=drop_rate, **common)
        self.features = nn.Sequential(
            nn.Conv2d(self.in_chans, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.tap_layers = [1, 4, 11, 12]
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.num_features = 4096
        self.classifier = nn.Identity() if self.features_only else self._make_head()
        taps = self.tap_facts([64, 192, 256, 256], [4, 8, 16, 32])
        self.finish(taps, default_cfg or alexnet_cfg("alexnet"))

    def _make_head(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Dropout(self.drop_rate),
            nn.Linear(256 * 6 * 6, self.num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(self.drop_rate),
            nn.Linear(self.num_features, self.num_features),
            nn.ReLU(inplace=True),
            make_classifier(self.num_features, self.num_classes),
        )


class AlexNet2012(Backbone):
    """Convolutions in two groups, local response normalisation after the first two, three linear layers.

    x / (k + alpha/5 * sum of x^2 over 5 neighbouring channels)^0.75

    Args (besides those of `Backbone`, where `drop_rate` is 0.5 and acts behind both hidden layers):
        lrn: "caffe" (alpha 1e-4, k 1; what the checkpoints were trained with) or "paper" (alpha 5e-4, k 2).
    The classifier wants 6x6 at its input: images of 227 to 258 pixels; `features_only` has no such limit.
    Taps: the inputs of the three max pools (strides 4, 8, 16) and the last pool's output (stride 32).
    """

    def __init__(
        self,
        *,
        lrn: str = "caffe",
        drop_rate: float = 0.5,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(drop_rate=drop_rate, **common)
        if lrn not in LRN:
            raise ValueError(f"lrn must be one of {', '.join(map(repr, LRN))}, got {lrn!r}")
        self.conv1 = nn.Conv2d(self.in_chans, 96, 11, stride=4)
        self.relu1 = nn.ReLU(inplace=True)
        self.norm1 = nn.LocalResponseNorm(LRN_SIZE, **LRN[lrn])
        self.pool1 = nn.MaxPool2d(3, stride=2)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.relu2 = nn.ReLU(inplace=True)
        self.norm2 = nn.LocalResponseNorm(LRN_SIZE, **LRN[lrn])
        self.pool2 = nn.MaxPool2d(3, stride=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.relu3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.relu4 = nn.ReLU(inplace=True)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        self.relu5 = nn.ReLU(inplace=True)
        self.pool5 = nn.MaxPool2d(3, stride=2)
        self.num_features = 4096
        self._make_head()
        self.init_weights()
        taps = [
            {"num_chs": 96, "reduction": 4, "module": "norm1"},
            {"num_chs": 256, "reduction": 8, "module": "norm2"},
            {"num_chs": 256, "reduction": 16, "module": "relu5"},
            {"num_chs": 256, "reduction": 32, "module": "pool5"},
        ]
        self.finish(taps, default_cfg or alexnet_2012_cfg("alexnet_2012"))

    def _make_head(self) -> None:
        features = 0 if self.features_only else self.num_features
        self.fc6 = make_classifier(256 * 6 * 6, features)
        self.relu6 = nn.ReLU(inplace=True)
        self.drop6 = nn.Dropout(self.drop_rate)
        self.fc7 = make_classifier(self.num_features, features)
        self.relu7 = nn.ReLU(inplace=True)
        self.drop7 = nn.Dropout(self.drop_rate)
        self.fc8 = make_classifier(self.num_features, self.num_classes)

    def init_weights(self) -> None:
        """The paper's: normal, deviation 0.01 (fc6 and fc7 0.005); biases 0 in conv1, conv3, fc8, else 1."""
        for name, module in self.named_children():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, 0.0, 0.005 if name in ("fc6", "fc7") else 0.01)
                one = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
                nn.init.constant_(module.bias, 1.0 if one else 0.0)  # type: ignore[arg-type]

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.pool1(self.norm1(self.relu1(self.conv1(x))))
        x = self.pool2(self.norm2(self.relu2(self.conv2(x))))
        x = self.relu4(self.conv4(self.relu3(self.conv3(x))))
        return self.pool5(self.relu5(self.conv5(x)))

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        c1 = self.norm1(self.relu1(self.conv1(x)))  # [N, 96, H/4, W/4]
        c2 = self.norm2(self.relu2(self.conv2(self.pool1(c1))))
        c4 = self.relu4(self.conv4(self.relu3(self.conv3(self.pool2(c2)))))
        c5 = self.relu5(self.conv5(c4))
        return [c1, c2, c5, self.pool5(c5)]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = flatten_map(x, 6, "alexnet_2012 classifies images of 227 to 258 pixels")
        x = self.drop6(self.relu6(self.fc6(x)))
        x = self.drop7(self.relu7(self.fc7(x)))
        return x if pre_logits else self.fc8(x)


def alexnet_cfg(name: str) -> dict[str, Any]:
    return classification_cfg(name, pool_size=(6, 6), first_conv="features.0", classifier="classifier.6")


def alexnet_2012_cfg(name: str) -> dict[str, Any]:
    """BGR from 0 to 255 minus Caffe's mean of ImageNet, not divided; resize to 256, crop 227."""
    return classification_cfg(
        name,
        input_size=(3, 227, 227),
        pool_size=(6, 6),
        crop_pct=227 / 256,
        mean=(104.0, 117.0, 123.0),
        std=(1.0, 1.0, 1.0),
        channel_order="bgr",
        value_range=255.0,
        classifier="fc8",
    )


@register_model(family="AlexNet", paper="arXiv 1404.5997", compatible_with=("torchvision",))
def alexnet(weights: Weights | None = None, **options: Any) -> AlexNet:
    """AlexNet as in torchvision, one tower. `weights` as `load_weights`, options as `AlexNet`."""
    return build_with_weights(AlexNet, weights, options, default_cfg=alexnet_cfg("alexnet"))


@register_model(
    family="AlexNet",
    paper="Krizhevsky et al. 2012, NeurIPS",
    compatible_with=("Caffe",),
    aliases=("caffe_alexnet",),
)
def alexnet_2012(weights: Weights | None = None, **options: Any) -> AlexNet2012:
    """AlexNet of 2012, with groups and LRN, Caffe's names. Options as `AlexNet2012`."""
    return build_with_weights(AlexNet2012, weights, options, default_cfg=alexnet_2012_cfg("alexnet_2012"))


caffe_alexnet = alexnet_2012
