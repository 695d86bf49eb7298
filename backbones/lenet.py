"""LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998, Proceedings of the IEEE): today's form and the paper's.

`lenet5` is what the name means today: ReLU, max pool, dense C3, a linear output; 61,706 parameters.
`lenet5_1998` is the paper's network: scaled tanh, trainable subsampling, the connection table of C3 and
radial basis functions at the output; 60,000 parameters. Input: 32x32, the 28x28 digits padded by 2.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Backbone, classification_cfg, make_classifier
from ._registry import register_model
from ._weights import Weights, build_with_weights
from .layers import flatten_map

torch.fx.wrap("flatten_map")

PAPER = "LeCun et al. 1998, Proc. IEEE"

# Which maps of S2 each map of C3 sees (table I of the paper).
C3_TABLE = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip


class ScaledTanh(nn.Module):
    """f(a) = 1.7159 tanh(2a/3): f(1) = 1 and f(-1) = -1, where its curvature is largest."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(x * (2.0 / 3.0))


class Subsampling(nn.Module):
    """y[n,c,p,q] = f(weight[c] * (sum of the 2x2 window of x) + bias[c]), f the scaled tanh."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.act = ScaledTanh()

    def forward(self, x: Tensor) -> Tensor:
        total = F.avg_pool2d(x, 2) * 4.0
        return self.act(total * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1))


class TableConv2d(nn.Module):
    """A convolution whose output map k sees the input maps table[k] only.

    The kernels lie in `weight` [connections, R, S], by output map and then in the order of the table.
    """

    def __init__(self, inplanes: int, table: tuple[tuple[int, ...], ...], kernel_size: int):
        super().__init__()
        self.inplanes, self.planes = inplanes, len(table)
        slots = [k * inplanes + c for k, maps in enumerate(table) for c in maps]
        self.weight = nn.Parameter(torch.empty(len(slots), kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(len(table)))
        self.slots: Tensor
        self.register_buffer("slots", torch.tensor(slots), persistent=False)

    def dense_weight(self) -> Tensor:
        """[K, C, R, S], zero where the table has no connection."""
        r, s = self.weight.shape[1], self.weight.shape[2]
        empty = torch.zeros(
            self.planes * self.inplanes, r, s, dtype=self.weight.dtype, device=self.weight.device
        )
        return empty.index_copy(0, self.slots, self.weight).view(self.planes, self.inplanes, r, s)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.dense_weight(), self.bias)

    def macs(self, y: Tensor) -> int:
        return y.shape[0] * y.shape[2] * y.shape[3] * self.weight.numel()


class RadialBasis(nn.Module):
    """y[n,k] = sum_j (x[n,j] - centers[k,j])^2: the smallest output wins.

    The centres are fixed +-1 patterns, a buffer. The paper draws characters of 7x12 pixels; here they start
    as random bits, the same in every model, and are loaded like any other entry of a state dict.
    """

    def __init__(self, features: int, classes: int, **factory: Any):
        super().__init__()
        bits = random.Random(1998)
        rows = [[1.0 if bits.random() < 0.5 else -1.0 for _ in range(features)] for _ in range(classes)]
        self.centers: Tensor
        self.register_buffer("centers", torch.tensor(rows, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) - self.centers).square().sum(2)  # [N, 1, J] - [K, J]


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "scaled_tanh": ScaledTanh}
POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


class LeNet5(Backbone):
    """C1 5x5, S2, C3 5x5, S4, C5 5x5, F6, output; an activation after each convolution and after F6.

    Args (besides those of `Backbone`; ten classes and one input channel unless told otherwise):
        act: "relu", "tanh" or "scaled_tanh" (1.7159 tanh(2a/3)).
        pool: "max" or "avg", for S2 and S4.
        original: the paper's trainable subsampling, sparse C3 and radial basis output, which gives distances
            (the smallest wins). It goes with act="scaled_tanh" and pool="avg".
    Images have 32 to 35 pixels a side, so that C5 gives 1x1; `features_only` takes larger ones, too.
    Taps: C1, C3, C5 (strides 1, 2, 4), after their activation.
    """

    def __init__(
        self,
        *,
        act: str = "relu",
        pool: str = "max",
        original: bool = False,
        num_classes: int = 10,
        in_chans: int = 1,
        default_cfg: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(num_classes=num_classes, in_chans=in_chans, **common)
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(map(repr, ACTIVATIONS))}, got {act!r}")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(map(repr, POOLS))}, got {pool!r}")
        if original and (act, pool) != ("scaled_tanh", "avg"):
            raise ValueError(f"the original LeNet-5 has act='scaled_tanh', pool='avg', got {act!r}, {pool!r}")
        self.original = original
        self.c1 = nn.Conv2d(self.in_chans, 6, 5)
        self.act1 = ACTIVATIONS[act]()
        self.s2 = Subsampling(6) if original else POOLS[pool](2)
        self.c3 = TableConv2d(6, C3_TABLE, 5) if original else nn.Conv2d(6, 16, 5)
        self.act3 = ACTIVATIONS[act]()
        self.s4 = Subsampling(16) if original else POOLS[pool](2)
        self.c5 = nn.Conv2d(16, 120, 5)
        self.act5 = ACTIVATIONS[act]()
        self.f6 = nn.Linear(120, 84)
        self.act6 = ACTIVATIONS[act]()
        self.num_features = 84
        self.output = self.new_classifier(84, self.num_classes)
        if original:
            self.init_weights()
        taps = [
            {"num_chs": 6, "reduction": 1, "module": "act1"},
            {"num_chs": 16, "reduction": 2, "module": "act3"},
            {"num_chs": 120, "reduction": 4, "module": "act5"},
        ]
        self.finish(taps, default_cfg or lenet_cfg("lenet5"))

    def new_classifier(self, num_features: int, num_classes: int, **factory: Any) -> nn.Module:
        if self.original and num_classes > 0:
            return RadialBasis(num_features, num_classes, **factory)
        return make_classifier(num_features, num_classes, **factory)

    def init_weights(self) -> None:
        """The paper's: uniform between -2.4/F and 2.4/F, F the inputs of a unit, biases included."""
        inputs = {"c1": 25 * self.in_chans, "s2": 4, "s4": 4, "c5": 400, "f6": 120}
        for name, fan_in in inputs.items():
            for parameter in self.get_submodule(name).parameters():
                nn.init.uniform_(parameter, -2.4 / fan_in, 2.4 / fan_in)
        fan_ins = [25 * len(maps) for maps in C3_TABLE]
        with torch.no_grad():
            kernels = self.c3.weight.split([len(maps) for maps in C3_TABLE])
            for kernel, bias, fan_in in zip(kernels, self.c3.bias, fan_ins):
                kernel.uniform_(-2.4 / fan_in, 2.4 / fan_in)
                bias.uniform_(-2.4 / fan_in, 2.4 / fan_in)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.s2(self.act1(self.c1(x)))
        x = self.s4(self.act3(self.c3(x)))
        return self.act5(self.c5(x))

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        c1 = self.act1(self.c1(x))  # [N, 6, H-4, W-4]
        c3 = self.act3(self.c3(self.s2(c1)))
        c5 = self.act5(self.c5(self.s4(c3)))
        return [c1, c3, c5]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.act6(self.f6(flatten_map(x, 1, "LeNet-5 classifies images of 32 to 35 pixels")))
        if self.drop_rate > 0.0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.output(x)


def lenet_cfg(name: str) -> dict[str, Any]:
    """Digits as in MNIST, 0 the paper's white and 1 its ink: (x - mean) / std goes from -0.1 to 1.175."""
    return classification_cfg(
        name,
        input_size=(1, 32, 32),
        num_classes=10,
        pool_size=(1, 1),
        crop_pct=1.0,
        mean=(0.1 / 1.275,),
        std=(1 / 1.275,),
        first_conv="c1",
        classifier="output",
    )


_as_lenet = register_model(family="LeNet", paper=PAPER, compatible_with=("own",))


@_as_lenet
def lenet5(weights: Weights | None = None, **options: Any) -> LeNet5:
    """LeNet-5 as used today: ReLU, max pool, 61,706 parameters. Options as `LeNet5`."""
    return build_with_weights(LeNet5, weights, options, default_cfg=lenet_cfg("lenet5"))


@_as_lenet
def lenet5_1998(weights: Weights | None = None, **options: Any) -> LeNet5:
    """LeNet-5 as in the paper, 60,000 parameters; the smallest output wins. act and pool are given."""
    architecture = {"act": "scaled_tanh", "pool": "avg", "original": True}
    cfg = lenet_cfg("lenet5_1998")
    return build_with_weights(LeNet5, weights, options, default_cfg=cfg, **architecture)
