"""Put a checkpoint into a model: read it safely, check everything, then copy; or raise and change nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn

from ._base import _per_channel
from ._download import WeightsError
from ._files import Checkpoint, Weights, read_checkpoint
from ._remap import Target, remap, wants_transform_input
from .transforms import preprocessing_for

log = logging.getLogger("fast_backbones.weights")

Model = TypeVar("Model", bound=nn.Module)

_WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training scripts put the state dict
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HANDFUL = 5


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did; `sha256` is None where nothing was hashed."""

    source: str
    sha256: str | None
    loaded: int
    notes: tuple[str, ...]


def load_weights(
    model: nn.Module,
    source: Weights,
    *,
    sha256: str | None = None,
    head: str = "drop",
    cast: bool = False,
    progress: bool = True,
) -> WeightsReport:
    """Load a checkpoint into `model`, strictly.

    Args:
        source: a path to a .safetensors, PyTorch (read with `weights_only=True`), .npz or Keras .h5 file; an
            http(s) URL; a hub id, "hf-hub:user/repository" or with "@revision"; or a state dict.
            `{"state_dict": ...}`, `{"model": ...}` and the prefixes of DistributedDataParallel and
            torch.compile are unwrapped.
        sha256: expected digest, or at least its first 8 digits. A URL needs one: here, as `#sha256=...`, or
            in a torchvision-style file name (`resnet50-0676ba61.pth`).
        head: what to do when the checkpoint has another number of classes: "drop" keeps the classifier of
            the model as it is, "adopt" gives the model one of the checkpoint's size, "strict" refuses.
        cast: accept floating dtypes that must be narrowed (float64 to float32). Widening is always accepted.
        progress: report long downloads.
    The first convolution is adapted when the image has another number of channels (summed for one, repeated
    and scaled otherwise, as timm does). Entries of parts a `features_only` or `num_classes=0` model does not
    have are left out, and an absent `num_batches_tracked` keeps its value. Names and layouts of timm, Keras,
    Caffe and pretrained-models.pytorch are translated where `_remap.RULES` knows them. Mean, std, size and
    interpolation of a hub repository's config.json become those of `model.default_cfg`; torchvision's files
    of GoogLeNet and Inception v3 set `model.transform_input`. All of this is logged.

    Raises WeightsError (WeightsNotFoundError for a missing file): absent, truncated or damaged file, wrong
    digest, pickled code, not a state dict, missing or unexpected entries, other shapes, non-finite values,
    wrong dtypes. The model is then exactly as it was: everything is checked before anything is copied.
    """
    if head not in ("drop", "adopt", "strict"):
        raise ValueError(f"head must be 'drop', 'adopt' or 'strict', got {head!r}")
    checkpoint = read_checkpoint(source, sha256, progress)
    fit = _Fit(model, checkpoint, head, cast)
    fit.check()
    fit.apply()
    for note in fit.notes:
        log.info("%s: %s", checkpoint.label, note)
    for note in fit.warnings:
        log.warning("%s: %s", checkpoint.label, note)
    return WeightsReport(checkpoint.label, checkpoint.sha256, len(fit.tensors), (*fit.warnings, *fit.notes))


def build_with_weights(
    build: Callable[..., Model], weights: Weights | None, options: dict[str, Any], **architecture: Any
) -> Model:
    """`build(**architecture, **options)`, then `weights`; they decide `num_classes` where it is not given."""
    model = build(**architecture, **options)
    if weights is not None:
        load_weights(model, weights, head="drop" if "num_classes" in options else "adopt")
        if "transform_input" in options:  # what was asked for, whatever the file is known to want
            model.transform_input = options["transform_input"]  # type: ignore[assignment]
    return model


def _state_dict(checkpoint: Any, label: str) -> dict[str, Tensor]:
    """Names and tensors, out of the wrappers and without the prefixes that training scripts add."""
    for _ in range(2):
        wrapped = [checkpoint[k] for k in _WRAPPERS if isinstance(checkpoint, Mapping) and k in checkpoint]
        if wrapped and isinstance(wrapped[0], Mapping):
            checkpoint = wrapped[0]
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"{label} holds a {type(checkpoint).__name__}, not a state dict")
    if not checkpoint:
        raise WeightsError(f"{label} holds an empty state dict")
    flat = {name: value for key, entry in checkpoint.items() for name, value in _flat(key, entry)}
    others = [str(k) for k, v in flat.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if others:
        raise WeightsError(f"{label} is not a state dict: entries that are no tensors: {_some(others)}")
    strange = [f"{k} is not a plain dense tensor" for k, v in flat.items() if not _is_plain(v)]
    if strange:
        raise WeightsError(f"{label} has unusable values: {_some(strange)}")
    state = flat
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k[len(prefix) :]: v for k, v in state.items()}
    return state


def _flat(key: Any, entry: Any) -> Iterator[tuple[Any, Any]]:
    """The tensors of one entry: a numpy array becomes one, Caffe's list of blobs becomes key/0, key/1 ..."""
    if isinstance(entry, (list, tuple)) and entry and all(hasattr(blob, "__array__") for blob in entry):
        for i, blob in enumerate(entry):
            yield from _flat(f"{key}/{i}", blob)
    elif isinstance(entry, Tensor) or not isinstance(entry, numpy.ndarray):
        yield key, entry
    elif entry.dtype.kind in "fiub" and entry.dtype.itemsize <= 8:  # PyTorch has no wider numbers
        native = entry.astype(entry.dtype.newbyteorder("="), order="C", copy=False)
        yield key, torch.from_numpy(native if native.flags.writeable else native.copy())
    else:
        yield key, entry


def _is_plain(value: Tensor) -> bool:
    """Whether it has a shape and values as everybody expects."""
    strided = value.layout is torch.strided and not value.is_nested
    return strided and not value.is_quantized and not value.is_meta


def _holds(target: torch.dtype, source: torch.dtype) -> bool:
    """Whether every number of one kind is one of the other, and both are integers or both are not."""
    if source in _FLOATS and target in _FLOATS:
        return torch.promote_types(source, target) == target
    if any(d.is_floating_point or d.is_complex or d is torch.bool for d in (source, target)):
        return source is torch.bool and not (target.is_floating_point or target.is_complex)
    wide, narrow = torch.iinfo(target), torch.iinfo(source)
    return wide.min <= narrow.min and narrow.max <= wide.max


class _Fit:
    """A checkpoint against a model: what can be copied, what was adapted or left out, what is wrong."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, head: str, cast: bool):
        self.model, self.label, self.cast = model, checkpoint.label, cast
        self.config = checkpoint.config
        self.own: dict[str, Tensor] = model.state_dict()
        self.cfg: dict[str, Any] = getattr(model, "default_cfg", {})
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.adopt: int | None = None
        self.dropped: tuple[str, ...] = ()
        target = Target(self.label, model, self.own, self.notes, self.config.num_classes)
        state = remap(_state_dict(checkpoint.content, self.label), target)
        self.transform_input = wants_transform_input(checkpoint, model)
        state = self._without_absent_parts(state)
        state = self._with_first_conv(state)
        self.tensors = self._with_heads(state, head)
        self.preprocessing = self._with_preprocessing()

    def _without_absent_parts(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        absent = list(getattr(self.model, "pruned", ()))
        if getattr(self.model, "num_classes", None) == 0 and "classifier" in self.cfg:
            absent.append(self.cfg["classifier"])
        left_out = sorted({part for part in absent for k in state if k.startswith(f"{part}.")})
        if left_out:
            self.notes.append(f"left out {', '.join(left_out)}, which this model does not have")
        return {k: v for k, v in state.items() if not k.startswith(tuple(f"{part}." for part in left_out))}

    def _with_first_conv(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        key = f"{self.cfg.get('first_conv')}.weight"
        if key not in state or key not in self.own:
            return state
        theirs, ours = state[key], self.own[key]
        channels = theirs.shape[1] if theirs.dim() == 4 else 0
        if (
            theirs.dtype not in _FLOATS
            or channels in (0, ours.shape[1])
            or theirs[:, :1].shape != ours[:, :1].shape
        ):
            return state
        self.warnings.append(f"{key} adapted from {channels} to {ours.shape[1]} input channels")
        return {**state, key: adapt_input_channels(theirs, ours.shape[1])}

    def _with_heads(self, state: dict[str, Tensor], head: str) -> dict[str, Tensor]:
        """Classifiers: the main one may decide the number of classes, auxiliary ones must then agree."""
        main = self.cfg.get("classifier")
        state = self._with_head(state, head, main)
        if self.config.num_classes is not None:
            self._follow_config(state, head, main)
        for name in getattr(self.model, "auxiliary_classifiers", ()):
            state = self._with_head(state, "follow" if head == "adopt" else head, name)
        return state

    def _with_head(self, state: dict[str, Tensor], head: str, name: str | None) -> dict[str, Tensor]:
        keys = tuple(f"{name}.{part}" for part in ("weight", "bias"))
        if head == "strict" or not all(k in state and k in self.own for k in keys):
            return state
        theirs, ours = state[keys[0]], self.own[keys[0]]
        classes = theirs.shape[0] if theirs.dim() == 2 else 0
        wanted = ours.shape[0] if self.adopt is None else self.adopt
        if classes == 0 or theirs.shape[1:] != ours.shape[1:] or state[keys[1]].shape != (classes,):
            return state
        if head == "adopt" and classes != wanted:
            self.adopt = wanted = classes
            self.notes.append(f"classifier {name} resized to the checkpoint's {classes} classes")
        if classes == wanted:
            like = {k: torch.empty(state[k].shape, dtype=self.own[k].dtype, device="meta") for k in keys}
            self.own = {**self.own, **(like if self.adopt is not None else {})}
            return state
        self.dropped += keys
        self.warnings.append(
            f"classifier {name} not loaded: {classes} classes in the checkpoint, {wanted} in the model"
        )
        return {k: v for k, v in state.items() if k not in keys}

    def _follow_config(self, state: dict[str, Tensor], head: str, name: str | None) -> None:
        """Hold config.json's number of classes against the classifier; 0 says that the file has none."""
        declared, key = self.config.num_classes, f"{name}.weight"
        if key in state and state[key].shape[:1] != (declared,):
            raise WeightsError(
                f"{self.label}: config.json says {declared} classes, {key} is {list(state[key].shape)}"
            )
        heads = (name, *getattr(self.model, "auxiliary_classifiers", ()))
        ours = tuple(k for k in self.own if k.startswith(tuple(f"{part}." for part in heads)))
        if declared != 0 or not ours or head == "strict":
            return
        if head == "adopt":
            self.adopt = 0
            self.own = {k: v for k, v in self.own.items() if k not in ours}
            self.notes.append(f"classifier {name} removed: config.json says 0 classes")
        else:
            self.dropped += ours
            self.warnings.append(f"classifier {name} not loaded: the checkpoint has none")

    def _with_preprocessing(self) -> dict[str, Any]:
        """What config.json says about images, as entries of `default_cfg`."""
        said = {k: tuple(v) if isinstance(v, list) else v for k, v in self.config.preprocessing.items()}
        if not said or not self.cfg:
            return {}
        try:
            channels = self.cfg["input_size"][0]
            for key in ("mean", "std"):
                if key in said:
                    said[key] = _per_channel(said[key], channels, len(said[key]))
            if "input_size" in said:
                said["input_size"] = (channels, *map(int, said["input_size"][1:]))
            preprocessing_for({**self.cfg, **said})
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            self.warnings.append(f"preprocessing of config.json not taken over: {error}")
            return {}
        changed = {k: v for k, v in said.items() if self.cfg.get(k) != v}
        if changed:
            self.notes.append(f"preprocessing of config.json: {changed}")
        return changed

    def check(self) -> None:
        """Raise one WeightsError with everything wrong about names and shapes, then about values."""
        optional = {k for k in self.own if k.endswith("num_batches_tracked")}
        optional.update(self.dropped)
        missing = [k for k in self.own if k not in self.tensors and k not in optional]
        unexpected = [k for k in self.tensors if k not in self.own]
        reshaped = [
            f"{k} {list(v.shape)}, expected {list(self.own[k].shape)}"
            for k, v in self.tensors.items()
            if k in self.own and v.shape != self.own[k].shape
        ]
        problems = []
        if missing:
            problems.append(f"{len(missing)} of {len(self.own)} entries are missing ({_some(missing)})")
        if unexpected:
            problems.append(f"{len(unexpected)} are unexpected ({_some(unexpected)})")
        if reshaped:
            problems.append(f"{len(reshaped)} have another shape ({_some(reshaped)})")
        if problems:
            name = self.cfg.get("architecture", type(self.model).__name__)
            hint = ""
            if missing and all(k.startswith(f"{self.cfg.get('classifier')}.") for k in missing):
                hint = "; it has no classifier: build the model with num_classes=0 or features_only=True"
            elif missing and all(k.startswith(self._auxiliary()) for k in missing):
                hint = "; it has no auxiliary heads: build the model with aux_logits=False"
            if self.config.architecture not in (None, name):
                hint += f"; config.json says that it is a {self.config.architecture}"
            raise WeightsError(f"{self.label} does not fit {name}: {'; '.join(problems)}{hint}")
        if any(self.own[k].is_meta for k in self.dropped):
            raise WeightsError(f"{self.label}: a meta model has no classifier to keep: use head='adopt'")
        unfit = [reason for k, v in self.tensors.items() if (reason := self._unfit(k, v))]
        if unfit:
            raise WeightsError(f"{self.label} has unusable values: {_some(unfit)}")
        self._note_dtypes()

    def _auxiliary(self) -> tuple[str, ...]:
        heads = getattr(self.model, "auxiliary_classifiers", ())
        return tuple(f"{name.split('.')[0]}." for name in heads)

    def _unfit(self, key: str, value: Tensor) -> str | None:
        """Why this value must not be copied, or None."""
        target = self.own[key].dtype
        if value.dtype != target:
            floats = value.dtype in _FLOATS and target in _FLOATS
            if not _holds(target, value.dtype) and not (floats and self.cast):
                more = ", cast=True would narrow it" if floats else ""
                return f"{key} is {_short(value.dtype)}, the model has {_short(target)}{more}"
        if value.is_floating_point():
            bad = value.numel() - int(torch.isfinite(value.to(target)).sum())
            if bad:
                return f"{key} has {bad} non-finite of {value.numel()} values"
        return None

    def _note_dtypes(self) -> None:
        pairs = {(v.dtype, self.own[k].dtype) for k, v in self.tensors.items()}
        for source, target in sorted((p for p in pairs if p[0] != p[1]), key=str):
            self.notes.append(f"{_short(source)} values stored as {_short(target)}")

    def apply(self) -> None:
        if self.adopt is not None:
            self.model.reset_classifier(self.adopt)  # type: ignore[operator]
        current = self.model.state_dict()
        meta = any(v.is_meta for v in current.values())
        tensors = self.tensors
        kept = {k: v for k, v in current.items() if k not in tensors}
        if meta:  # nothing to copy into: the tensors become the parameters, absent counters start at zero
            tensors = {k: v.to(current[k].dtype, copy=True) for k, v in tensors.items()}
            kept = {k: torch.zeros_like(v, device="cpu") if v.is_meta else v for k, v in kept.items()}
        self.model.load_state_dict({**kept, **tensors}, strict=True, assign=meta)
        if self.preprocessing:
            self.cfg.update(self.preprocessing)
        if self.transform_input:
            self.model.transform_input = True


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Filters [K, C, R, S] for images of `in_chans` channels instead of C.

    One channel: the sum over C (a grey image is R = G = B). Otherwise C repeated and cut to `in_chans`, times
    C / in_chans, so that the response to equal channels keeps its size. Computed in float32 or wider.
    """
    channels = weight.shape[1]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if in_chans == 1:
        wide = wide.sum(dim=1, keepdim=True)
    else:
        wide = wide.repeat(1, -(-in_chans // channels), 1, 1)[:, :in_chans] * (channels / in_chans)
    return wide.to(weight.dtype)


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _HANDFUL} more" if len(names) > _HANDFUL else ""
    return ", ".join(names[:_HANDFUL]) + more


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
