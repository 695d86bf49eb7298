"""The shape AlexNet and VGG share: a sequence of layers, an adaptive pool, a classifier of three layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import Backbone


class SequentialBackbone(Backbone):
    """features -> adaptive average pool -> flatten -> classifier, as torchvision writes AlexNet and VGG.

    A family sets `features`, `avgpool`, `classifier` (whose last layer, number 6, gives the logits) and
    `tap_layers`, the indices in `features` whose outputs are the taps. `num_features` is the width of the
    hidden layers: a model without classes returns [N, 4096], as `forward_head(x, pre_logits=True)` does.
    """

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.tap_layers:
                taps.append(x)
        return taps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = torch.flatten(self.avgpool(x), 1)
        for index, layer in enumerate(self.classifier):
            if index < 6 or not pre_logits:
                x = layer(x)
        return x

    def tap_facts(self, channels: list[int], reductions: list[int]) -> list[dict[str, object]]:
        """What `finish` wants to know about the taps at `tap_layers`."""
        facts = zip(channels, reductions, self.tap_layers)
        return [{"num_chs": c, "reduction": r, "module": f"features.{i}"} for c, r, i in facts]
