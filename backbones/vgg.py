"""VGG (Simonyan and Zisserman 2014, arXiv 1409.1556).

Parameter names, shapes and the random numbers drawn by the constructors are those of torchvision, so its
checkpoints load unchanged. Configurations C and A-LRN of the paper have the names of D and A.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ._base import classification_cfg, make_classifier
from ._registry import register_model
from ._sequential import SequentialBackbone
from ._weights import Weights, build_with_weights
from .layers import he_normal_

PAPER = "arXiv 1409.1556"

CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(SequentialBackbone):
    """Five blocks of 3x3 convolutions with bias and ReLU, 2x2 max pool after each; three linear layers.

    Args (besides those of `Backbone`, where `drop_rate` is 0.5 and acts behind both hidden layers):
        depth: 11, 13, 16 or 19 layers with weights.
        batch_norm: normalise between convolution and ReLU.
        lrn: local response normalisation behind the first ReLU ("A-LRN").
        third_1x1: the third convolution of a block is 1x1 ("C").
    Taps: the input of each max pool (strides 1 to 16), and the last pool's output (stride 32).
    """

    def __init__(
        self,
        depth: int,
        *,
        batch_norm: bool = False,
        lrn: bool = False,
        third_1x1: bool = False,
        drop_rate: float = 0.5,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(drop_rate=drop_rate, **common)
        if depth not in CONVOLUTIONS:
            raise ValueError(f"VGG depth must be one of {', '.join(map(str, CONVOLUTIONS))}, got {depth}")
        layers: list[nn.Module] = []
        tap_layers = []
        inplanes = self.in_chans
        for planes, count in zip(CHANNELS, CONVOLUTIONS[depth]):
            for position in range(count):
                size = 1 if third_1x1 and position == 2 else 3
                layers.append(nn.Conv2d(inplanes, planes, size, padding=size // 2))
                layers += [nn.BatchNorm2d(planes)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                inplanes = planes
            tap_layers.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2, stride=2))
        tap_layers.append(len(layers) - 1)
        if lrn:  # in the ReLU's place: it has no parameters and must not shift the numbers behind it
            first = tap_layers[0]
            norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
            layers[first] = nn.Sequential(layers[first], norm)
        self.features = nn.Sequential(*layers)
        self.tap_layers = tap_layers
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.num_features = 4096
        self.classifier = nn.Identity() if self.features_only else self._make_head()
        self.init_weights()
        taps = self.tap_facts([*CHANNELS, CHANNELS[-1]], [1, 2, 4, 8, 16, 32])
        self.finish(taps, default_cfg or vgg_cfg("vgg"))

    def _make_head(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(512 * 7 * 7, self.num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(self.drop_rate),
            nn.Linear(self.num_features, self.num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(self.drop_rate),
            make_classifier(self.num_features, self.num_classes),
        )

    def init_weights(self) -> None:
        """He normal (fan-out) convolutions, normal linear layers with deviation 0.01, biases 0."""
        he_normal_(self.features.modules())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def vgg_cfg(name: str) -> dict[str, Any]:
    return classification_cfg(name, first_conv="features.0", classifier="classifier.6")


def _vgg(name: str, weights: Weights | None, options: dict[str, Any], depth: int, **architecture: Any) -> VGG:
    cfg = vgg_cfg(name)
    return build_with_weights(VGG, weights, options, depth=depth, default_cfg=cfg, **architecture)


_as_vgg = register_model(family="VGG", paper=PAPER, compatible_with=("torchvision", "timm"))
_as_paper_only = register_model(family="VGG", paper=PAPER, compatible_with=("own",))


@_as_vgg
def vgg11(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-11, configuration A. `weights` as `load_weights`, options as `VGG`."""
    return _vgg("vgg11", weights, options, 11)


@_as_vgg
def vgg11_bn(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-11 with batch norm. Arguments as `vgg11`."""
    return _vgg("vgg11_bn", weights, options, 11, batch_norm=True)


@_as_vgg
def vgg13(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-13, configuration B. Arguments as `vgg11`."""
    return _vgg("vgg13", weights, options, 13)


@_as_vgg
def vgg13_bn(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-13 with batch norm. Arguments as `vgg11`."""
    return _vgg("vgg13_bn", weights, options, 13, batch_norm=True)


@_as_vgg
def vgg16(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-16, configuration D. Arguments as `vgg11`."""
    return _vgg("vgg16", weights, options, 16)


@_as_vgg
def vgg16_bn(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-16 with batch norm. Arguments as `vgg11`."""
    return _vgg("vgg16_bn", weights, options, 16, batch_norm=True)


@_as_vgg
def vgg19(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-19, configuration E. Arguments as `vgg11`."""
    return _vgg("vgg19", weights, options, 19)


@_as_vgg
def vgg19_bn(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-19 with batch norm. Arguments as `vgg11`."""
    return _vgg("vgg19_bn", weights, options, 19, batch_norm=True)


@_as_paper_only
def vgg11_lrn(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-11 with local response normalisation, configuration A-LRN; names of vgg11. Arguments as `vgg11`."""
    return _vgg("vgg11_lrn", weights, options, 11, lrn=True)


@_as_paper_only
def vgg16_c(weights: Weights | None = None, **options: Any) -> VGG:
    """VGG-16, configuration C: three of the convolutions are 1x1; names of vgg16. Arguments as `vgg11`."""
    return _vgg("vgg16_c", weights, options, 16, third_1x1=True)
