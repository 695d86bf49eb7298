"""Networks of the tests of train(), and what a step of them gives: logits, gradients, statistics."""

import copy

import torch
import torch.nn.functional as F
from model_checks import image
from torch import nn

import fast_backbones as fb
from fast_backbones import backbones, kernels

FAMILIES = {  # name: pixels of the image
    "alexnet": 96,
    "bninception": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_resnet_v1": 96,
    "inception_v3": 128,
    "inception_v4": 140,
    "lenet5": 32,
    "mobilenetv1_025": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "legacy_seresnext26_32x4d": 64,
    "se_googlenet": 64,
    "se_mobilenetv1_100": 64,
    "vgg11_bn": 64,
    "xception": 48,
}


def built(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    options = {"aux_logits": False} if name == "inception_v3" else {}  # the head wants 299 pixels
    return fb.create_model(name, num_classes=10, **options).train().to(memory_format=torch.channels_last)


def picture(name: str, n: int = 2, seed: int = 0) -> torch.Tensor:
    x = image(n, 1 if name == "lenet5" else 3, FAMILIES[name], FAMILIES[name], seed)
    return x.to(memory_format=torch.channels_last)


def step(model: nn.Module, x: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, dict, dict]:
    """The logits, all gradients, all statistics of one forward and backward; dropout draws the same."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    out = model(x)
    logits = [out] if isinstance(out, torch.Tensor) else [part for part in out if part is not None]
    labels = torch.arange(len(x)) % 10
    sum(F.cross_entropy(part, labels) for part in logits).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits[0].detach(), gradients, dict(model.named_buffers())


def relative(a: torch.Tensor, exact: torch.Tensor) -> float:
    return ((a.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


class Net(backbones.Backbone):
    """Everything that can be fused, small."""

    __module__ = "fast_backbones.backbones.net"  # others' forwards are not traced

    def __init__(self, **norm):
        super().__init__(num_classes=5)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16, **norm)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(16, **norm)
        self.shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16, **norm))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(16, 5)
        taps = [{"num_chs": 16, "reduction": 1, "module": "shortcut"}]
        self.finish(taps, backbones._base.classification_cfg("net", classifier="fc"))

    def forward_features(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += self.shortcut(x)
        return self.relu(y)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)


def net(**norm) -> Net:
    torch.manual_seed(0)
    return Net(**norm).train()


def same_as_modules(model: nn.Module, x: torch.Tensor) -> None:
    """The rule of test_gradients..., for a net and an input that leave no doubt about a ReLU."""
    results = step(model, x)
    with kernels.backend("reference"):
        plain, exact = step(model, x), step(copy.deepcopy(model).double(), x.double())
    for fast, reference, truth in zip(results[1:], plain[1:], exact[1:]):
        for key, value in truth.items():
            if value.is_floating_point():
                error = relative(fast[key], value)
                assert error <= 2 * relative(reference[key], value) + 2e-6, (key, error)
            else:
                assert torch.equal(fast[key], reference[key]), key


X = image(4, 3, 9, 11)


class Dense(backbones.Backbone):
    """Concatenations that grow, and one place where two grow out of the same."""

    __module__ = "fast_backbones.backbones.dense"

    def __init__(self):
        super().__init__(num_classes=5)
        self.stem = nn.Conv2d(3, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (8, 12, 16, 16, 20))
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (8, 12, 12, 16))
        self.fc = nn.Linear(36, 5)
        taps = [{"num_chs": 36, "reduction": 1, "module": "convs"}]
        self.finish(taps, backbones._base.classification_cfg("dense", classifier="fc"))

    def forward_features(self, x):
        x = self.stem(x)
        a = self.convs[0](F.relu(self.norms[0](torch.cat([x], 1))))
        two = F.relu(self.norms[1](torch.cat([x, a], 1)))
        b, c = self.convs[1](two), self.convs[2](two)
        d = self.convs[3](F.relu(self.norms[2](torch.cat([x, a, b], 1))))
        left = self.norms[3](torch.cat([x, a, c], 1))
        right = self.norms[4](torch.cat([x, a, b, d], 1))
        return torch.cat([left, right], 1)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)


def dense_net() -> Dense:
    torch.manual_seed(0)
    return Dense().train()
