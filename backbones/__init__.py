"""Backbones as plain PyTorch, one file per family, and the ways to find and fill them.

model = backbones.resnext50(weights="resnext50_32x4d-7cdf4587.pth").eval()
model = backbones.create_model("resnet18", num_classes=10, in_chans=1)
pyramid = backbones.resnet50(features_only=True, out_indices=(1, 2, 3, 4)).eval()
"""

from ._base import Backbone, FeatureInfo
from ._download import WeightsError, WeightsNotFoundError
from ._registry import ModelInfo, create_model, list_families, list_models, model_info, register_model
from ._weights import WeightsReport, load_weights
from .resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext,
    resnext50,
    resnext50_2x40d,
    resnext50_4x24d,
    resnext50_8x14d,
    resnext50_32x4d,
    resnext101,
    resnext101_2x40d,
    resnext101_2x64d,
    resnext101_4x24d,
    resnext101_8x14d,
    resnext101_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
)
from .transforms import Preprocessing, preprocessing_for, transforms_for

__all__ = [
    "Backbone",
    "FeatureInfo",
    "ModelInfo",
    "Preprocessing",
    "ResNet",
    "WeightsError",
    "WeightsNotFoundError",
    "WeightsReport",
    "create_model",
    "list_families",
    "list_models",
    "load_weights",
    "model_info",
    "preprocessing_for",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext",
    "resnext50",
    "resnext50_2x40d",
    "resnext50_4x24d",
    "resnext50_8x14d",
    "resnext50_32x4d",
    "resnext101",
    "resnext101_2x40d",
    "resnext101_2x64d",
    "resnext101_4x24d",
    "resnext101_8x14d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "transforms_for",
]
