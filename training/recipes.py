"""How each paper trained its network: optimiser, schedule, batch, regularisation, as plain data.

A value of None means that the paper does not name one; what needs it then asks for it.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .auxiliary import GOOGLENET_AUX_WEIGHT, INCEPTION_V3_AUX_WEIGHT
from .label_smoothing import LabelSmoothingCrossEntropy
from .parameter_groups import TF_BATCH_NORM_MOMENTUM, parameter_groups
from .rmsprop_tf import RMSPropTF
from .schedules import (
    googlenet_schedule,
    inception_schedule,
    plateau_schedule,
    senet_schedule,
    step_schedule,
)
from .weight_average import ExponentialMovingAverage

INCEPTION_CLIP_NORM = 2.0  # threshold on the global norm of the gradient: arXiv 1512.00567, section 8
INCEPTION_AVERAGE_DECAY = 0.9999

_SCHEDULES = {
    "googlenet": googlenet_schedule,
    "inception": inception_schedule,
    "plateau": plateau_schedule,
    "senet": senet_schedule,
    "step": step_schedule,
}


@dataclass(frozen=True)
class Recipe:
    """What a paper says about training its network on ImageNet.

    Attributes:
        name, paper: family and where the values come from.
        optimizer: "sgd" or "rmsprop_tf", with learning_rate, momentum, nesterov; alpha and eps of RMSProp.
        batch_size: images of one step of one replica; `replicas` of them train the same weights at a time.
        schedule: "inception", "googlenet", "senet", "step" or "plateau", with schedule_options for the
            function of that name in `schedules.py`.
        weight_decay: of all parameters; depthwise_weight_decay of depthwise filters, None for the same.
        clip_norm: largest global norm of the gradient, for `torch.nn.utils.clip_grad_norm_`.
        label_smoothing, aux_weight: see `label_smoothing_cross_entropy` and `auxiliary_loss`.
        drop_rate: dropout in front of the classifier, the models' argument of that name.
        average_decay: of the running average of weights that is evaluated.
        batch_norm_momentum: for `set_batch_norm_momentum`, where it is not PyTorch's 0.1.
        notes: what does not fit a number.
    """

    name: str
    paper: str
    optimizer: str = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    alpha: float | None = None
    eps: float | None = None
    batch_size: int | None = None
    replicas: int = 1
    epochs: int | None = None
    schedule: str = "plateau"
    schedule_options: tuple[tuple[str, Any], ...] = ()
    weight_decay: float | None = None
    depthwise_weight_decay: float | None = None
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    aux_weight: float | None = None
    drop_rate: float = 0.0
    average_decay: float | None = None
    batch_norm_momentum: float | None = None
    notes: str = ""

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with other values, say `replace(learning_rate=0.01)` for a smaller batch."""
        return dataclasses.replace(self, **changes)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """`RMSPropTF` or `torch.optim.SGD` on the `parameter_groups` of the model."""
        lr = self._known("learning_rate")
        decay = self._known("weight_decay")
        groups = parameter_groups(model, decay, depthwise=self.depthwise_weight_decay)
        if self.optimizer == "rmsprop_tf":
            alpha, eps = self._known("alpha"), self._known("eps")
            return RMSPropTF(groups, lr, alpha=alpha, eps=eps, momentum=self.momentum)
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr, momentum=self.momentum, nesterov=self.nesterov)
        raise ValueError(f"optimizer must be 'sgd' or 'rmsprop_tf', got {self.optimizer!r}")

    def make_schedule(self, optimizer: Optimizer) -> Any:
        """The schedule, to be stepped once an epoch ("plateau": with the validation error)."""
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {sorted(_SCHEDULES)}, got {self.schedule!r}")
        return _SCHEDULES[self.schedule](optimizer, **dict(self.schedule_options))

    def make_loss(self) -> LabelSmoothingCrossEntropy:
        """Cross entropy with the recipe's label smoothing; a criterion for `auxiliary_loss` too."""
        return LabelSmoothingCrossEntropy(self.label_smoothing)

    def make_average(self, model: nn.Module) -> ExponentialMovingAverage | None:
        """The running average of weights, None where the paper has none."""
        return None if self.average_decay is None else ExponentialMovingAverage(model, self.average_decay)

    def _known(self, field: str) -> Any:
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"the {self.name} paper names no {field}: use recipe.replace({field}=...)")
        return value


_RMSPROP: dict[str, Any] = {
    "optimizer": "rmsprop_tf",
    "learning_rate": 0.045,
    "momentum": 0.9,
    "alpha": 0.9,
    "eps": 1.0,
    "schedule": "inception",
}
_INCEPTION: dict[str, Any] = {
    **_RMSPROP,
    "average_decay": INCEPTION_AVERAGE_DECAY,
    "batch_size": 32,
    "epochs": 100,
    "weight_decay": 4e-5,
    "clip_norm": INCEPTION_CLIP_NORM,
    "batch_norm_momentum": TF_BATCH_NORM_MOMENTUM,
}

RECIPES: dict[str, Recipe] = {
    made.name: made
    for made in (
        Recipe(
            "alexnet",
            "Krizhevsky 2012",
            learning_rate=0.01,
            batch_size=128,
            epochs=90,
            weight_decay=5e-4,
            drop_rate=0.5,
            notes="Divided by ten three times, on plateaus of the validation error.",
        ),
        Recipe(
            "vgg",
            "arXiv 1409.1556",
            learning_rate=0.01,
            batch_size=256,
            epochs=74,
            weight_decay=5e-4,
            drop_rate=0.5,
            notes="Divided by ten three times, on plateaus of the validation accuracy.",
        ),
        Recipe(
            "googlenet",
            "arXiv 1409.4842",
            schedule="googlenet",
            aux_weight=GOOGLENET_AUX_WEIGHT,
            drop_rate=0.4,
            average_decay=INCEPTION_AVERAGE_DECAY,
            notes="Crops of 8 to 100 % of the area, aspect 3/4 to 4/3. The paper averages weights but names "
            "no decay; this one is that of Inception v3.",
        ),
        Recipe(
            "inception_v3",
            "arXiv 1512.00567",
            **_INCEPTION,
            replicas=50,
            label_smoothing=0.1,
            aux_weight=INCEPTION_V3_AUX_WEIGHT,
            drop_rate=0.5,
            notes="The paper names no momentum for RMSProp; 0.9 is that of the published training code.",
        ),
        Recipe("inception_v4", "arXiv 1602.07261", **_INCEPTION, replicas=20, drop_rate=0.2),
        Recipe(
            "inception_resnet",
            "arXiv 1602.07261",
            **_INCEPTION,
            replicas=20,
            drop_rate=0.2,
            notes="Residuals scaled by 0.1 to 0.3 (the models' residual_scale).",
        ),
        Recipe(
            "resnet",
            "arXiv 1512.03385",
            learning_rate=0.1,
            batch_size=256,
            weight_decay=1e-4,
            schedule_options=(("times", None),),
            notes="Divided by ten on plateaus of the error; no dropout.",
        ),
        Recipe(
            "resnext",
            "arXiv 1611.05431",
            learning_rate=0.1,
            batch_size=256,
            weight_decay=1e-4,
            notes="Divided by ten three times; the paper names no epochs, so here it is on plateaus.",
        ),
        Recipe(
            "xception",
            "arXiv 1610.02357",
            learning_rate=0.045,
            schedule="inception",
            weight_decay=1e-5,
            drop_rate=0.5,
            average_decay=INCEPTION_AVERAGE_DECAY,
            notes="The paper averages weights but names no decay; this one is that of Inception v3.",
        ),
        Recipe(
            "densenet",
            "arXiv 1608.06993",
            learning_rate=0.1,
            nesterov=True,
            batch_size=256,
            epochs=90,
            schedule="step",
            schedule_options=(("milestones", (30, 60)),),
            weight_decay=1e-4,
            notes="On small data without augmentation: drop_rate=0.2.",
        ),
        Recipe(
            "mobilenet",
            "arXiv 1704.04861",
            **_RMSPROP,
            weight_decay=4e-5,
            depthwise_weight_decay=0.0,
            notes="Asynchronous updates, less augmentation, no label smoothing, no auxiliary heads. Learning "
            "rate, schedule and weight decay are those of Inception v3.",
        ),
        Recipe(
            "senet",
            "arXiv 1709.01507",
            learning_rate=0.6,
            batch_size=1024,
            epochs=100,
            schedule="senet",
            weight_decay=1e-4,
            notes="The paper names no weight decay; this one is that of ResNet.",
        ),
        Recipe(
            "senet154",
            "arXiv 1709.01507",
            learning_rate=0.6,
            batch_size=1024,
            epochs=100,
            schedule="senet",
            weight_decay=1e-4,
            label_smoothing=0.1,
            drop_rate=0.2,
            notes="The paper names no weight decay; this one is that of ResNet.",
        ),
    )
}

# Model name -> recipe: the first pattern that fits the start of the name.
_PATTERNS = (
    (r"(legacy_)?senet154", "senet154"),
    (r"(legacy_)?se(_|resnet|resnext|net)", "senet"),
    (r"(caffe_)?alexnet", "alexnet"),
    (r"vgg", "vgg"),
    (r"googlenet|inception_v1", "googlenet"),
    (r"inception_resnet", "inception_resnet"),
    (r"inception_v3", "inception_v3"),
    (r"inception_v4", "inception_v4"),
    (r"resnext", "resnext"),
    (r"resnet", "resnet"),
    (r"(legacy_)?xception", "xception"),
    (r"densenet", "densenet"),
    (r"mobilenet", "mobilenet"),
)


def recipe(name: str) -> Recipe:
    """The recipe of a family ("inception_v3") or of a model of it ("resnext50_32x4d").

    Raises ValueError where there is none: LeNet-5 (second-order learning rates for every weight) and
    BN-Inception (a speed-up of GoogLeNet's unpublished rates) have no recipe that an optimiser here could
    follow.
    """
    for pattern, family in _PATTERNS:
        if re.match(pattern, name):
            return RECIPES[family]
    raise ValueError(f"no recipe for {name!r}; there is one for {', '.join(sorted(RECIPES))}")
