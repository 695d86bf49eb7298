"""The activations of the ops that take more than ReLU."""

import torch.nn.functional as F
from torch import Tensor

NAMES = ("none", "relu", "relu6")


def activated(y: Tensor, activation: str) -> Tensor:
    return F.relu(y) if activation == "relu" else F.relu6(y) if activation == "relu6" else y
