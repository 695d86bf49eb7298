"""What every backbone has in common: the engine door, feature taps, the classifier, preprocessing facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeatureInfo(list):  # type: ignore[type-arg]
    """The taps of a backbone: a list of dicts `{num_chs, reduction, module, index}`, in order of reduction.

    `out_indices` says which taps the model returns; `channels()`, `reduction()` and `module_name()` answer
    for those taps, or for the taps asked by index, as timm's class of the same name does.
    """

    def __init__(self, taps: Iterable[dict[str, Any]], out_indices: Iterable[int]):
        super().__init__(dict(tap, index=i) for i, tap in enumerate(taps))
        self.out_indices = tuple(out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        if isinstance(idx, int):
            return {key: self[idx][key] for key in (keys or self[idx])}
        chosen = [self[i] for i in (self.out_indices if idx is None else idx)]
        return [{key: tap[key] for key in (keys or tap)} for tap in chosen]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)


def classification_cfg(architecture: str, **changes: Any) -> dict[str, Any]:
    """Preprocessing and naming facts of an ImageNet classifier, under the keys timm uses in `default_cfg`.

    Resize the shorter side to input/crop_pct with `interpolation` (antialiased), centre crop, scale to
    [0, `value_range`], put the channels in `channel_order` ("rgb" or "bgr"), subtract `mean`, divide by
    `std`; mean and std are in that order and on that scale. Networks from Caffe take BGR from 0 to 255.
    `first_conv` and `classifier` name the modules that depend on the data.
    """
    cfg = {
        "architecture": architecture,
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "channel_order": "rgb",
        "value_range": 1.0,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    return {**cfg, **changes}


class Backbone(nn.Module):
    """A convolutional network that is plain PyTorch to everybody and one fused plan to the engine.

    A family subclasses it, builds its modules between `__init__` and `finish`, and writes three methods in
    plain PyTorch: `forward_features(x)`, `forward_taps(x)` (every tap, in order of reduction) and
    `forward_head(x, pre_logits)`. Calling the model goes through `engine.forward`, which runs the fused plan
    where that is allowed and `forward_modules`, the reference, where it is not.

    A family with auxiliary classifiers sets `aux_logits`, fills `auxiliary_classifiers` (name of the last
    linear layer of each head -> its input features) and writes `forward_auxiliary(x)`, which gives the named
    tuple that such a network returns in `train()`. In `eval()`, and in TorchScript, it returns the logits
    alone. `leave_out` names parts of the architecture that this model was built without. A family whose last
    layer is not linear overrides `new_classifier`.

    Args:
        num_classes: outputs of the classifier; 0 leaves it out and the model returns the pooled features.
        in_chans: channels of the image; only the first convolution depends on it.
        drop_rate: dropout in front of the classifier, active in `train()`.
        features_only: return a list of feature maps instead of logits; the classifier and the stages behind
            the last tap are left out.
        out_indices: which taps (default: all). Negative indices count from the last tap, an int asks for the
            last n taps. The result is always in order of reduction.
    Input: [N, in_chans, H, W], floating point, contiguous or channels_last.
    Returns: [N, num_classes] logits, [N, num_features] with num_classes=0, or a list of [N, C, H/r, W/r].
    """

    __constants__ = ("features_only",)  # lets TorchScript drop the branch that is not taken

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
    ):
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}")
        if out_indices is not None and not features_only:
            raise ValueError("out_indices chooses among feature maps: it needs features_only=True")
        self.num_classes = 0 if features_only else num_classes
        self.in_chans = in_chans
        self.drop_rate = float(drop_rate)
        self.features_only = bool(features_only)
        self._requested_taps = out_indices
        self.num_features = 0
        self.pruned: tuple[str, ...] = ()
        self.aux_logits = False
        self.auxiliary_classifiers: dict[str, int] = {}

    def finish(self, taps: Sequence[dict[str, Any]], default_cfg: dict[str, Any]) -> None:
        """For families, once the modules exist: set taps and preprocessing facts, remove unused stages.

        What is registered behind the module of the last tap is unused, or behind its "prune_after" where the
        tap is the activation that the next stage starts with.
        """
        indices = _tap_indices(self.__dict__.pop("_requested_taps"), len(taps))
        public = ({k: v for k, v in tap.items() if k != "prune_after"} for tap in taps)
        self.feature_info = FeatureInfo(public, indices)
        self.out_indices = indices
        channels, height, width = default_cfg["input_size"]
        self.default_cfg: dict[str, Any] = {
            **default_cfg,
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, height, width),
            "mean": _per_channel(default_cfg["mean"], self.in_chans, channels),
            "std": _per_channel(default_cfg["std"], self.in_chans, channels),
        }
        if self.features_only:
            last = taps[indices[-1]]
            self.num_features = last["num_chs"]
            self._prune_after(last.get("prune_after", last["module"]))

    def leave_out(self, *parts: str) -> None:
        """Note modules that checkpoints of this architecture may hold and this model was built without."""
        self.pruned += parts

    def _prune_after(self, last: str) -> None:
        """Put identities in place of what was registered behind the module `last`, along its whole path."""
        path = last.split(".")
        later: list[str] = []
        for depth, name in enumerate(path):
            parent = ".".join(path[:depth])
            children = [child for child, _ in self.get_submodule(parent).named_children()]
            later += [".".join([*path[:depth], child]) for child in children[children.index(name) + 1 :]]
        for name in later:
            self.set_submodule(name, nn.Identity())
        self.leave_out(*later)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """`default_cfg` under the name that `timm.data.resolve_model_data_config` looks for."""
        return self.default_cfg

    __jit_unused_properties__ = ("pretrained_cfg",)

    # These two have no return annotation: TorchScript infers Tensor or List[Tensor] from the branch taken.
    def forward(self, x: Tensor):
        if torch.jit.is_scripting():
            return self.forward_modules(x)
        else:
            # A proxy, a fake tensor of an export, a subclass: the modules. What other threads trace is
            # their own affair.
            if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
                return self.forward_modules(x)
            return engine.forward(self, x, self.forward_modules)

    def forward_modules(self, x: Tensor):
        """The network through its PyTorch modules, never a plan: the reference of engine and tests."""
        if self.features_only:
            taps = self.forward_taps(x)
            return [taps[i] for i in self.out_indices]
        else:
            if torch.jit.is_scripting():
                return self.forward_head(self.forward_features(x))
            else:
                if self.training and self.aux_logits and self.num_classes > 0:
                    return self.forward_auxiliary(x)
                return self.forward_head(self.forward_features(x))

    @torch.jit.unused
    def forward_auxiliary(self, x: Tensor) -> Any:
        """What the model returns in `train()` when it has auxiliary heads: a named tuple, `logits` first."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_auxiliary")

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, [N, num_features, H/32, W/32] by default; what `forward_head` takes."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_features")

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        """Every tap of `feature_info`, after its activation, in order of reduction."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_taps")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop out and classify what `forward_features` gave; `pre_logits=True` does not classify."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_head")

    def get_classifier(self) -> nn.Module:
        """The last linear layer; an `nn.Identity` when the model has none."""
        if self.features_only:
            return nn.Identity()
        return self.get_submodule(self.default_cfg["classifier"])

    def new_classifier(self, num_features: int, num_classes: int, **factory: Any) -> nn.Module:
        """A last layer, or an identity when there are no classes; `factory` may give device and dtype."""
        return make_classifier(num_features, num_classes, **factory)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a freshly initialised one with `num_classes` outputs, or by none (0).

        Those of auxiliary heads go the same way. The new layers have the dtype, device and train/eval mode of
        the model.
        """
        if self.features_only:
            raise RuntimeError("this model was built with features_only=True: it has no classifier to reset")
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        like = next(self.parameters())
        heads = {self.default_cfg["classifier"]: self.num_features, **self.auxiliary_classifiers}
        for name, features in heads.items():
            head = self.new_classifier(features, num_classes, device=like.device, dtype=like.dtype)
            self.set_submodule(name, head.train(self.training))
        self.num_classes = self.default_cfg["num_classes"] = num_classes


def make_classifier(num_features: int, num_classes: int, **factory: Any) -> nn.Module:
    """A linear layer, or an identity when there are no classes; `factory` may give device and dtype."""
    return nn.Linear(num_features, num_classes, **factory) if num_classes > 0 else nn.Identity()


def _tap_indices(requested: int | Sequence[int] | None, count: int) -> list[int]:
    """Absolute tap indices in order of reduction: None is all, n the last n, negatives count from the end."""
    if requested is None:
        return list(range(count))
    if isinstance(requested, int):
        if not 0 < requested <= count:
            raise ValueError(f"out_indices={requested} asks for the last {requested} taps, there are {count}")
        return list(range(count - requested, count))
    indices = sorted(i + count if i < 0 else i for i in requested)
    if not indices or indices[0] < 0 or indices[-1] >= count or len(set(indices)) != len(indices):
        raise ValueError(
            f"out_indices={tuple(requested)} must name at least one of the {count} taps, "
            f"each once and between {-count} and {count - 1}"
        )
    return indices


def _per_channel(values: Sequence[float], in_chans: int, channels: int) -> tuple[float, ...]:
    """Mean or std for `in_chans` channels: the average for grey, the known ones repeated otherwise."""
    if in_chans == channels:
        return tuple(values)
    if in_chans == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(in_chans))
