"""Backbones as plain PyTorch, one file per family, and the ways to find and fill them.

model = backbones.resnext50(weights="resnext50_32x4d-7cdf4587.pth").eval()
model = backbones.create_model("resnet18", num_classes=10, in_chans=1)
pyramid = backbones.resnet50(features_only=True, out_indices=(1, 2, 3, 4)).eval()
"""

from ._base import Backbone, FeatureInfo
from ._download import WeightsError, WeightsNotFoundError
from ._registry import ModelInfo, create_model, list_families, list_models, model_info, register_model
from ._weights import WeightsReport, load_weights
from .alexnet import AlexNet, AlexNet2012, alexnet, alexnet_2012, caffe_alexnet
from .densenet import DenseNet, densenet, densenet121, densenet161, densenet169, densenet201, densenet264
from .lenet import LeNet5, lenet5, lenet5_1998
from .mobilenet import (
    MobileNetV1,
    mobilenet_v1,
    mobilenetv1,
    mobilenetv1_025,
    mobilenetv1_050,
    mobilenetv1_075,
    mobilenetv1_100,
    se_mobilenetv1_100,
)
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
from .vgg import VGG, vgg11, vgg11_bn, vgg11_lrn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg16_c, vgg19, vgg19_bn
from .xception import Xception, legacy_xception, xception

__all__ = [
    "AlexNet",
    "AlexNet2012",
    "Backbone",
    "DenseNet",
    "FeatureInfo",
    "LeNet5",
    "MobileNetV1",
    "ModelInfo",
    "Preprocessing",
    "ResNet",
    "VGG",
    "WeightsError",
    "WeightsNotFoundError",
    "WeightsReport",
    "Xception",
    "alexnet",
    "alexnet_2012",
    "caffe_alexnet",
    "create_model",
    "densenet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "legacy_xception",
    "lenet5",
    "lenet5_1998",
    "list_families",
    "list_models",
    "load_weights",
    "mobilenet_v1",
    "mobilenetv1",
    "mobilenetv1_025",
    "mobilenetv1_050",
    "mobilenetv1_075",
    "mobilenetv1_100",
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
    "se_mobilenetv1_100",
    "transforms_for",
    "vgg11",
    "vgg11_bn",
    "vgg11_lrn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg16_c",
    "vgg19",
    "vgg19_bn",
    "xception",
]
