"""Small networks of the engine's tests, and the two questions most of them ask."""

import torch
from torch import nn

from fast_backbones import engine


def settled(model: nn.Module) -> nn.Module:
    """Eval mode, and norms that have seen something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


class Tiny(nn.Module):
    """Two convolutions, a norm, a residual and a classifier, run by the engine."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU())
        self.fc = nn.Linear(16, 5)
        self.scales = [1.0]

    def forward(self, x):
        return engine.forward(self, x, self.forward_modules)

    def forward_modules(self, x):
        x = self.relu(self.bn(self.conv(x)))
        for scale in self.scales:
            x = x + self.body(x) * scale
        return self.fc(x.mean((2, 3)))


class Tap(Tiny):
    """Returns a feature map, so that its strides show."""

    def forward_modules(self, x):
        return self.relu(self.bn(self.conv(x)))


def assert_current(model, x):
    """The model's answer is that of its modules as they are now."""
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward_modules(x), rtol=1e-4, atol=1e-5)


def assert_planned(model, x):
    with torch.no_grad():
        assert engine.why_not(model, x) is None
    assert_current(model, x)
