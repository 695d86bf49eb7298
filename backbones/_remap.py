"""Other people's checkpoints under our names: one small function for each source, and a table of them.

A rule looks at the names in a checkpoint, and at the model where names alone do not tell. It returns the
checkpoint as it is, under new names, or raises a WeightsError with one sentence. Values change their shape or
layout, and nothing else, except where a rule says so. What a rule does not know keeps its name, so that the
check that follows reports it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._download import WeightsError, file_sha256
from ._files import Checkpoint

State = dict[str, Tensor]

_BATCH_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


@dataclass
class Target:
    """The model that a checkpoint is for: a label for messages, its own entries, notes for the user.

    `classes` is the number of classes that the source declares beside the file, where it does.
    """

    label: str
    model: nn.Module
    own: State
    notes: list[str] = field(default_factory=list)
    classes: int | None = None

    @property
    def cfg(self) -> dict[str, Any]:
        return getattr(self.model, "default_cfg", {})

    @property
    def architecture(self) -> str:
        return self.cfg.get("architecture", "")


def remap(state: State, target: Target) -> State:
    """The checkpoint under the names of the model, by every rule of RULES in turn."""
    for rule in RULES:
        state = rule(state, target)
    return state


def _renamed(state: State, prefixes: dict[str, str]) -> State:
    """Entries whose module is `old` become those of `new`."""
    names = {}
    for key in state:
        module = next((old for old in prefixes if key.startswith(f"{old}.")), None)
        names[key] = key if module is None else prefixes[module] + key[len(module) :]
    return {names[key]: value for key, value in state.items()}


# torchvision trained these two on images that were mapped to -1 .. 1 inside the network, from ImageNet's mean
# and std. The names in the files do not tell; file names do, and digests.
_MAPPED_INSIDE = re.compile(r"(googlenet|inception_v3_google)-[0-9a-f]{8,64}\.pth")
_MAPPED_DIGESTS = ("1378be20", "0cc3c7bd")


def wants_transform_input(checkpoint: Checkpoint, model: nn.Module) -> bool:
    """Whether this is torchvision's GoogLeNet or Inception v3 file and `model` does not map its input yet."""
    maps = getattr(model, "transform_input", None)
    if maps is not False or checkpoint.path is None or getattr(model, "in_chans", None) != 3:
        return False
    if checkpoint.name is not None and _MAPPED_INSIDE.fullmatch(checkpoint.name):
        return True
    return (checkpoint.sha256 or file_sha256(checkpoint.path)).startswith(_MAPPED_DIGESTS)


# PyTorch


def densenet_of_2017(state: State, target: Target) -> State:
    """torchvision's first DenseNet files: `denselayer1.norm.1.weight` is `denselayer1.norm1.weight` today."""
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", k): v for k, v in state.items()}


def timm_vgg(state: State, target: Target) -> State:
    """timm's VGG has the two hidden linear layers as convolutions: 7x7 and 1x1 filters, flattened here."""
    if "pre_logits.fc1.weight" not in state or "features.0.weight" not in target.own:
        return state
    names = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
    state = _renamed(state, names)
    for key in ("classifier.0.weight", "classifier.3.weight"):
        if key in state and state[key].dim() == 4:
            state[key] = state[key].flatten(1)  # [4096, 512, 7, 7] -> [4096, 25088]
    return state


def timm_senet(state: State, target: Target) -> State:
    """timm's seresnet50, senet154 and relatives are other networks with the same number of parameters."""
    theirs = any(re.match(r"layer\d+\.\d+\.se\.fc1\.", key) for key in state)
    ours = any(".se_module." in key for key in target.own)
    if theirs and ours:
        raise WeightsError(
            f"{target.label} is of a timm seresnet or senet without 'legacy_': it may have as many "
            "parameters as this model and is another network (stem, pooling, place of the stride); take the "
            f"weights of timm's {target.architecture}"
        )
    return state


def cadene_classifier(state: State, target: Target) -> State:
    """pretrained-models.pytorch calls every classifier `last_linear`; timm and we have `fc` or `classif`."""
    if "last_linear.weight" in target.own:
        return state
    return _renamed(state, {"last_linear": target.cfg.get("classifier", "last_linear")})


def background_class(state: State, target: Target) -> State:
    """TensorFlow's networks have 1001 classes, the first is "background": dropped for a model of 1000."""
    if target.architecture not in ("inception_v4", "inception_resnet_v2", "legacy_xception"):
        return state
    keys = [f"{target.cfg['classifier']}.{part}" for part in ("weight", "bias")]
    rows = {state[key].shape[0] for key in keys if key in state and state[key].dim() > 0}
    wanted = {getattr(target.model, "num_classes", None), target.classes or 1000}
    if rows != {1001} or wanted != {1000}:
        return state
    target.notes.append("class 0 of 1001, the background, left out; num_classes=1001 would keep it")
    return {**state, **{key: state[key][1:] for key in keys if key in state}}


# Keras


def keras_mobilenet(state: State, target: Target) -> State:
    """MobileNet of keras.applications: `conv_dw_3/depthwise_kernel` is `blocks.1.1.conv_dw.weight`."""
    layers = _keras_layers(state)
    if "conv_dw_1" not in layers or "conv_stem.weight" not in target.own:
        return state
    _check_tensorflow_options(target)
    names = {"conv1": "conv_stem", "conv1_bn": "bn1", "conv_preds": "classifier"}
    depths, number = (1, 2, 2, 6, 2), 0
    for stage, depth in enumerate(depths):
        for block in range(depth):
            number += 1
            ours = f"blocks.{stage}.{block}"
            names |= {f"conv_dw_{number}": f"{ours}.conv_dw", f"conv_dw_{number}_bn": f"{ours}.bn1"}
            names |= {f"conv_pw_{number}": f"{ours}.conv_pw", f"conv_pw_{number}_bn": f"{ours}.bn2"}
    depthwise = {f"conv_dw_{i}" for i in range(1, number + 1)}
    return _from_keras(layers, names, target, depthwise=depthwise, linear={"conv_preds"})


def keras_xception(state: State, target: Target) -> State:
    """Xception of keras.applications: its block N is our block N-1, its shortcuts have an order, no names."""
    layers = _keras_layers(state)
    if "block1_conv1" not in layers or target.architecture != "legacy_xception":
        return state
    _check_tensorflow_options(target)
    names = {"predictions": "fc"}
    for i in (1, 2):
        names |= {f"block1_conv{i}": f"conv{i}", f"block1_conv{i}_bn": f"bn{i}"}
        names |= {f"block14_sepconv{i}": f"conv{i + 2}", f"block14_sepconv{i}_bn": f"bn{i + 2}"}
    for number in range(2, 14):
        for i in range(1, 4):
            first = 3 * i - (3 if number == 2 else 2)  # all but the first block start with a ReLU
            theirs, ours = f"block{number}_sepconv{i}", f"block{number - 1}.rep"
            names |= {theirs: f"{ours}.{first}", f"{theirs}_bn": f"{ours}.{first + 1}"}
    for kind, part in (("conv2d", "skip"), ("batch_normalization", "skipbn")):
        unnamed = [layer for layer in layers if re.fullmatch(rf"{kind}(_\d+)?", layer)]
        unnamed.sort(key=lambda layer: int(layer[len(kind) + 1 :] or 0))
        names |= {theirs: f"block{i}.{part}" for theirs, i in zip(unnamed, (1, 2, 3, 12))}
    return _from_keras(layers, names, target, linear={"predictions"})


_KERAS_NAME = re.compile(
    r"(?:.*/)?(?P<layer>[^/]+)/(?P<variable>kernel|depthwise_kernel|pointwise_kernel|bias|gamma|beta"
    r"|moving_mean|moving_variance)(?::0)?"
)


def _keras_layers(state: State) -> dict[str, State]:
    """Layer -> variable -> tensor; empty when not every name is one of Keras."""
    layers: dict[str, State] = {}
    for key, value in state.items():
        name = _KERAS_NAME.fullmatch(key)
        if name is None:
            return {}
        layers.setdefault(name["layer"], {})[name["variable"]] = value
    return layers


def _check_tensorflow_options(target: Target) -> None:
    norm = next((m for m in target.model.modules() if isinstance(m, nn.BatchNorm2d)), None)
    if getattr(target.model, "pad_type", None) != "same" or norm is None or norm.eps != 1e-3:
        raise WeightsError(
            f"{target.label} comes from Keras, which pads and normalises in its own way: "
            "build the model with pad_type='same', bn_eps=1e-3"
        )


def _from_keras(
    layers: dict[str, State],
    names: dict[str, str],
    target: Target,
    *,
    depthwise: set[str] | None = None,
    linear: set[str] | None = None,
) -> State:
    """Layers under our names, kernels in PyTorch's order of axes."""
    state: State = {}
    for layer, variables in layers.items():
        for variable, value in variables.items():
            ours, what = names.get(layer), f"{target.label}: {layer}/{variable}"
            if ours is None:
                state[f"{layer}/{variable}"] = value
            elif variable in _BATCH_NORM:
                state[f"{ours}.{_BATCH_NORM[variable]}"] = value
            elif variable == "bias":
                state[f"{ours}.bias"] = value
            elif layer in (linear or ()):
                state[f"{ours}.weight"] = _linear_weight(value, what)
            elif layer in (depthwise or ()):
                state[f"{ours}.weight"] = _depthwise_weight(value, what)
            elif variable == "depthwise_kernel":
                state[f"{ours}.conv1.weight"] = _depthwise_weight(value, what)
            else:
                part = "pointwise.weight" if variable == "pointwise_kernel" else "weight"
                state[f"{ours}.{part}"] = _conv_weight(value, what)
    return state


def _conv_weight(kernel: Tensor, what: str) -> Tensor:
    """[R, S, I, O] -> [O, I, R, S]."""
    return _axes(kernel, 4, what).permute(3, 2, 0, 1).contiguous()


def _depthwise_weight(kernel: Tensor, what: str) -> Tensor:
    """[R, S, C, 1] -> [C, 1, R, S]."""
    return _axes(kernel, 4, what).permute(2, 3, 0, 1).contiguous()


def _linear_weight(kernel: Tensor, what: str) -> Tensor:
    """[I, O], or [1, 1, I, O] where the classifier is a convolution -> [O, I]."""
    if kernel.dim() == 4 and kernel.shape[:2] == (1, 1):
        kernel = kernel[0, 0]
    return _axes(kernel, 2, what).t().contiguous()


def _axes(value: Tensor, count: int, what: str) -> Tensor:
    if value.dim() != count:
        raise WeightsError(f"{what} is {list(value.shape)}, expected {count} axes")
    return value


# Caffe


def caffe(state: State, target: Target) -> State:
    """Blobs of Caffe, named `layer/0`, `layer/1` ...: weight and bias, or statistics of a batch norm."""
    layers = _caffe_layers(state)
    if not layers:
        return state
    names: dict[str, Callable[[str], str | None]] = {
        "alexnet_2012": str,
        "googlenet_2014": _GOOGLENET.get,
        "se_bninception": _se_bninception_name,
    }
    name_of = names.get(target.architecture)
    return state if name_of is None else _from_caffe(layers, name_of, target)


def _caffe_layers(state: State) -> dict[str, dict[int, Tensor]]:
    """Layer -> number of the blob -> tensor; empty when not every name is one of Caffe."""
    layers: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        name = re.fullmatch(r"(.+)/(\d)", key)
        if name is None:
            return {}
        layers.setdefault(name[1], {})[int(name[2])] = value
    return layers


def _from_caffe(
    layers: dict[str, dict[int, Tensor]], name_of: Callable[[str], str | None], target: Target
) -> State:
    state: State = {}
    for layer, blobs in layers.items():
        ours = name_of(layer)
        if ours is None:
            state.update({f"{layer}/{i}": blob for i, blob in blobs.items()})
        elif set(blobs) == {0, 1, 2}:
            mean, variance = _statistics(blobs)
            state |= {f"{ours}.running_mean": mean, f"{ours}.running_var": variance}
        else:
            for i, blob in blobs.items():
                key = f"{ours}.{('weight', 'bias')[i]}" if i < 2 else f"{layer}/{i}"
                state[key] = _without_leading_ones(blob, target.own.get(key))
    return state


def _statistics(blobs: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of Caffe's BatchNorm, which keeps sums and, in its third blob, their weight."""
    weight = blobs[2].flatten()[:1]
    scale = torch.where(weight == 0, torch.zeros_like(weight), 1 / weight)
    return blobs[0].flatten() * scale, blobs[1].flatten() * scale


def _without_leading_ones(blob: Tensor, like: Tensor | None) -> Tensor:
    """Old Caffe writes four axes everywhere: [1, 1, O, I] for a linear layer, [1, 1, 1, O] for a bias."""
    while like is not None and blob.dim() > like.dim() and blob.shape[0] == 1:
        blob = blob[0]
    return blob


def _googlenet_names() -> dict[str, str]:
    """Layers of BVLC's GoogLeNet -> modules of googlenet_2014."""
    names = {"conv1/7x7_s2": "conv1.conv", "conv2/3x3_reduce": "conv2.conv", "conv2/3x3": "conv3.conv"}
    branches = {
        "1x1": "branch1",
        "3x3_reduce": "branch2.0",
        "3x3": "branch2.1",
        "5x5_reduce": "branch3.0",
        "5x5": "branch3.1",
        "pool_proj": "branch4.1",
    }
    for module in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        for theirs, ours in branches.items():
            names[f"inception_{module}/{theirs}"] = f"inception{module}.{ours}.conv"
    for i in (1, 2):
        for theirs, ours in {"conv": "conv.conv", "fc": "fc1", "classifier": "fc2"}.items():
            names[f"loss{i}/{theirs}"] = f"aux{i}.{ours}"
    return {**names, "loss3/classifier": "fc"}


_GOOGLENET = _googlenet_names()


def _se_bninception_name(layer: str) -> str:
    """Layer of the published SE-BN-Inception -> module of se_bninception.

    `inception_3a/double3x3a/bn/scale` -> `inception_3a_double_3x3_1_bn`
    `inception_3a_1x1_down` -> `inception_3a_se.fc1`
    """
    if layer == "classifier":
        return "last_linear"
    gate = re.fullmatch(r"(inception_\w\w)_1x1_(down|up)", layer)
    if gate is not None:
        return f"{gate[1]}_se.{'fc1' if gate[2] == 'down' else 'fc2'}"
    name = layer.removesuffix("/scale").replace("double3x3_reduce", "double_3x3_reduce")
    name = name.replace("double3x3a", "double_3x3_1").replace("double3x3b", "double_3x3_2")
    return name.replace("/", "_")


RULES: tuple[Callable[[State, Target], State], ...] = (
    densenet_of_2017,
    timm_vgg,
    timm_senet,
    keras_mobilenet,
    keras_xception,
    caffe,
    cadene_classifier,
    background_class,
)
