"""The activations of the ops that take more than ReLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("none", "relu", "relu6")


def activated(y: Tensor, activation: str) -> Tensor:
    return F.relu(y) if activation == "relu" else F.relu6(y) if activation == "relu6" else y


def unpacked(mask: Tensor, x: Tensor) -> Tensor:
    """The bits that say where an activation passed, [pixels, bytes], as booleans like x."""
    n, c, h, w = x.shape
    bits = mask.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten(1)[:, :c].reshape(n, h, w, c).permute(0, 3, 1, 2).bool()
