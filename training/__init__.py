"""Training ideas of the papers behind the backbones, as small parts for any training loop.

recipe = training.recipe("inception_v3")
optimizer = recipe.make_optimizer(model)                        # RMSPropTF as published
schedule = recipe.make_schedule(optimizer)                      # 0.94 every two epochs
average = training.ExponentialMovingAverage(model, 0.9999)
loss = training.auxiliary_loss(model(images), labels, label_smoothing=recipe.label_smoothing)
"""

from .auxiliary import GOOGLENET_AUX_WEIGHT, INCEPTION_V3_AUX_WEIGHT, auxiliary_loss
from .label_smoothing import LabelSmoothingCrossEntropy, label_smoothing_cross_entropy
from .parameter_groups import TF_BATCH_NORM_MOMENTUM, parameter_groups, set_batch_norm_momentum
from .recipes import INCEPTION_AVERAGE_DECAY, INCEPTION_CLIP_NORM, RECIPES, Recipe, recipe
from .rmsprop_tf import RMSPropTF
from .schedules import (
    googlenet_schedule,
    inception_schedule,
    plateau_schedule,
    senet_schedule,
    step_schedule,
)
from .weight_average import ExponentialMovingAverage

__all__ = [
    "GOOGLENET_AUX_WEIGHT",
    "INCEPTION_AVERAGE_DECAY",
    "INCEPTION_CLIP_NORM",
    "INCEPTION_V3_AUX_WEIGHT",
    "RECIPES",
    "TF_BATCH_NORM_MOMENTUM",
    "ExponentialMovingAverage",
    "LabelSmoothingCrossEntropy",
    "RMSPropTF",
    "Recipe",
    "auxiliary_loss",
    "googlenet_schedule",
    "inception_schedule",
    "label_smoothing_cross_entropy",
    "parameter_groups",
    "plateau_schedule",
    "recipe",
    "senet_schedule",
    "set_batch_norm_momentum",
    "step_schedule",
]
