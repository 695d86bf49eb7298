"""DenseNet (Huang, Liu, van der Maaten, Weinberger 2016, arXiv 1608.06993).

Parameter names, shapes and the random numbers drawn by the constructors are those of torchvision, so its
checkpoints (and timm's) load unchanged. `memory_efficient` is the idea of "Memory-Efficient Implementation of
DenseNets" (arXiv 1707.06990): recompute the concatenations in backward instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._base import Backbone, classification_cfg, make_classifier
from ._registry import register_model
from ._weights import Weights, build_with_weights
from .layers import he_normal_

PAPER = "arXiv 1608.06993"


class SecondPass:
    """A context in which `norm` works as in its forward of mode `training` and its statistics stay untouched.

    It writes to copies of them. It can be entered again: backward may go through a graph more than once.
    """

    def __init__(self, norm: nn.Module, training: bool):
        self.norm = norm
        self.training = training

    def __enter__(self) -> None:
        self.before = self.norm.training, dict(self.norm.named_buffers(recurse=False))
        self.norm.training = self.training
        for name, buffer in self.before[1].items():
            setattr(self.norm, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        self.norm.training, statistics = self.before
        for name, buffer in statistics.items():
            setattr(self.norm, name, buffer)


class DenseLayer(nn.Module):
    """k new channels from all earlier ones: conv2(relu(norm2(conv1(relu(norm1(cat(features)))))).

    conv1 is 1x1 to bn_size*k channels and conv2 3x3 to k. Without the bottleneck conv1 is 3x3 to k, and
    norm2 and conv2 do not exist. Dropout acts on the new channels.

    With `memory_efficient` the concatenation, norm1 and ReLU are not kept for backward but computed again
    there: the same bits, and the running statistics of norm1 see each batch once. Under `torch.compile`,
    whose compiler decides itself what to recompute, in TorchScript, and in the fused steps of `train()`,
    where all concatenations of a block share one buffer, the option has no effect.
    """

    __constants__ = ("bottleneck",)  # lets TorchScript leave out the layers that do not exist

    def __init__(
        self,
        inplanes: int,
        growth_rate: int,
        *,
        bn_size: int = 4,
        bottleneck: bool = True,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inplanes)
        self.relu1 = nn.ReLU(inplace=True)
        self.bottleneck = bottleneck
        if bottleneck:
            planes = bn_size * growth_rate
            self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(planes)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(planes, growth_rate, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(inplanes, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.memory_efficient = memory_efficient

    def first_half(self, features: list[Tensor]) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    @torch.jit.unused
    def first_half_recomputed(self, features: list[Tensor]) -> Tensor:
        """`first_half`, whose intermediate tensors backward computes again."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.first_half(features)
        training = self.norm1.training
        return checkpoint(
            lambda *tensors: self.first_half(list(tensors)),
            *features,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in it is random
            context_fn=lambda: (nullcontext(), SecondPass(self.norm1, training)),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.memory_efficient and not torch.jit.is_scripting():
            x = self.first_half_recomputed(features)
        else:
            x = self.first_half(features)
        if self.bottleneck:
            x = self.conv2(self.relu2(self.norm2(x)))
        if self.drop_rate > 0.0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x


class DenseBlock(nn.ModuleDict):
    """Layers that each append `growth_rate` channels to what all layers before them gave."""

    def __init__(self, depth: int, inplanes: int, growth_rate: int, **layer: Any):
        super().__init__()
        for i in range(depth):
            self[f"denselayer{i + 1}"] = DenseLayer(inplanes + i * growth_rate, growth_rate, **layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Between two blocks: pool2x2(conv1x1(relu(norm(x)))), with fewer channels and half the resolution."""

    def __init__(self, inplanes: int, planes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.pool = nn.AvgPool2d(2, stride=2)


class DenseNet(Backbone):
    """Stem 7x7/2 and 3x3/2 max pool, four dense blocks with transitions between them, average pool, linear.

    Args (besides those of `Backbone`):
        growth_rate: k, the channels each layer adds.
        block_config: layers in each of the four blocks.
        num_init_features: channels of the stem.
        bn_size: width of the bottleneck in units of k.
        bottleneck: False leaves the 1x1 convolutions out (with compression 1: the paper's plain DenseNet).
        compression: theta, the share of channels that a transition keeps, in (0, 1].
        drop_rate: dropout behind every layer of the blocks, not in front of the classifier (paper: 0.2 on
            small data sets without augmentation, else none).
        memory_efficient: keep less for backward and recompute it there; see `DenseLayer`.
    Images have at least 29 pixels a side. Taps: stem, the outputs of blocks 1 to 3, relu(norm5).
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        *,
        bn_size: int = 4,
        bottleneck: bool = True,
        compression: float = 0.5,
        memory_efficient: bool = False,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        if len(block_config) != 4 or min(block_config) < 1:
            raise ValueError(f"block_config must be four positive numbers of layers, got {block_config}")
        if min(growth_rate, num_init_features, bn_size) < 1:
            raise ValueError(
                f"growth_rate, num_init_features and bn_size must be positive, "
                f"got {growth_rate}, {num_init_features} and {bn_size}"
            )
        if not 0.0 < compression <= 1.0:
            raise ValueError(f"compression must be in (0, 1], got {compression}")
        self.features = nn.Sequential()
        self.features.conv0 = nn.Conv2d(self.in_chans, num_init_features, 7, stride=2, padding=3, bias=False)
        self.features.norm0 = nn.BatchNorm2d(num_init_features)
        self.features.relu0 = nn.ReLU(inplace=True)
        self.features.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
        taps = [{"num_chs": num_init_features, "reduction": 2, "module": "features.relu0"}]
        layer = {
            "bn_size": bn_size,
            "bottleneck": bottleneck,
            "drop_rate": self.drop_rate,
            "memory_efficient": memory_efficient,
        }
        planes = num_init_features
        for i, depth in enumerate(block_config, 1):
            self.features.add_module(f"denseblock{i}", DenseBlock(depth, planes, growth_rate, **layer))
            planes += depth * growth_rate
            if i < 4:
                taps.append({"num_chs": planes, "reduction": 2 << i, "module": f"features.denseblock{i}"})
                kept = int(planes * compression)
                self.features.add_module(f"transition{i}", Transition(planes, kept))
                planes = kept
        self.features.norm5 = nn.BatchNorm2d(planes)
        taps.append({"num_chs": planes, "reduction": 32, "module": "features.norm5"})
        self.num_features = planes
        self.classifier = make_classifier(planes, self.num_classes)
        self.init_weights()
        self.finish(taps, default_cfg or densenet_cfg("densenet"))

    def init_weights(self) -> None:
        """He normal (fan-in) convolutions, batch norm at 1 and 0, classifier with bias 0."""
        he_normal_(self.modules(), "fan_in")
        if isinstance(self.classifier, nn.Linear):
            nn.init.zeros_(self.classifier.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.features(x), inplace=True)

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        stages = self.features
        c1 = stages.relu0(stages.norm0(stages.conv0(x)))  # [N, num_init_features, H/2, W/2]
        c2 = stages.denseblock1(stages.pool0(c1))
        c3 = stages.denseblock2(stages.transition1(c2))
        c4 = stages.denseblock3(stages.transition2(c3))
        c5 = stages.norm5(stages.denseblock4(stages.transition3(c4)))
        return [c1, c2, c3, c4, F.relu(c5)]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)
        return x if pre_logits else self.classifier(x)


def densenet_cfg(name: str) -> dict[str, Any]:
    return classification_cfg(name, first_conv="features.conv0", classifier="classifier")


def densenet(
    growth_rate: int = 32,
    block_config: Sequence[int] = (6, 12, 24, 16),
    num_init_features: int = 64,
    *,
    weights: Weights | None = None,
    **options: Any,
) -> DenseNet:
    """Any DenseNet. Options as `DenseNet`: bn_size, bottleneck, compression, memory_efficient, ..."""
    depth = 2 * sum(block_config) + 5 if options.get("bottleneck", True) else sum(block_config) + 5
    return _densenet(f"densenet{depth}", weights, options, growth_rate, block_config, num_init_features)


def _densenet(
    name: str,
    weights: Weights | None,
    options: dict[str, Any],
    growth_rate: int,
    block_config: Sequence[int],
    num_init_features: int,
) -> DenseNet:
    shape = {
        "growth_rate": growth_rate,
        "block_config": block_config,
        "num_init_features": num_init_features,
    }
    cfg = densenet_cfg(name)
    return build_with_weights(DenseNet, weights, {**shape, **options}, default_cfg=cfg)


_as_densenet = register_model(family="DenseNet", paper=PAPER, compatible_with=("torchvision", "timm"))


@_as_densenet
def densenet121(weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-121: blocks [6, 12, 24, 16], k = 32. `weights` as `load_weights`, options as `DenseNet`."""
    return _densenet("densenet121", weights, options, 32, (6, 12, 24, 16), 64)


@_as_densenet
def densenet161(weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-161: blocks [6, 12, 36, 24], k = 48, stem of 96 channels. Arguments as `densenet121`."""
    return _densenet("densenet161", weights, options, 48, (6, 12, 36, 24), 96)


@_as_densenet
def densenet169(weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-169: blocks [6, 12, 32, 32], k = 32. Arguments as `densenet121`."""
    return _densenet("densenet169", weights, options, 32, (6, 12, 32, 32), 64)


@_as_densenet
def densenet201(weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-201: blocks [6, 12, 48, 32], k = 32. Arguments as `densenet121`."""
    return _densenet("densenet201", weights, options, 32, (6, 12, 48, 32), 64)


@register_model(family="DenseNet", paper=PAPER, compatible_with=("torchvision DenseNet class",))
def densenet264(weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-264: blocks [6, 12, 64, 48], k = 32. Arguments as `densenet121`."""
    return _densenet("densenet264", weights, options, 32, (6, 12, 64, 48), 64)
