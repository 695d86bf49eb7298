"""Put a checkpoint into a model: read it safely, check everything, then copy; or raise and change nothing."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union

import torch
from torch import Tensor, nn

from ._download import (
    WeightsError,
    WeightsNotFoundError,
    check_sha256_argument,
    fetch,
    file_sha256,
    is_url,
    name_hash,
    shown,
)

log = logging.getLogger("fast_backbones.weights")

Weights = Union[str, "os.PathLike[str]", Mapping[str, Tensor]]
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
        source: a path to a .safetensors or PyTorch file (read with `weights_only=True`), an http(s) URL, or
            a state dict. `{"state_dict": ...}`, `{"model": ...}` and the prefixes of DistributedDataParallel
            and torch.compile are unwrapped.
        sha256: expected digest, or at least its first 8 digits. A URL needs one: here, as `#sha256=...`, or
            in a torchvision-style file name (`resnet50-0676ba61.pth`).
        head: what to do when the checkpoint has another number of classes: "drop" keeps the classifier of
            the model as it is, "adopt" gives the model one of the checkpoint's size, "strict" refuses.
        cast: accept floating dtypes that must be narrowed (float64 to float32). Widening is always accepted.
        progress: report long downloads.
    The first convolution is adapted when the image has another number of channels (summed for one, repeated
    and scaled otherwise, as timm does). Entries of parts a `features_only` or `num_classes=0` model does not
    have are left out, and an absent `num_batches_tracked` keeps its value. All of this is logged.

    Raises WeightsError (WeightsNotFoundError for a missing file): absent, truncated or damaged file, wrong
    digest, pickled code, not a state dict, missing or unexpected entries, other shapes, non-finite values,
    wrong dtypes. The model is then exactly as it was: everything is checked before anything is copied.
    """
    if head not in ("drop", "adopt", "strict"):
        raise ValueError(f"head must be 'drop', 'adopt' or 'strict', got {head!r}")
    label, checkpoint, digest = _read(source, sha256, progress)
    state = _state_dict(checkpoint, label)
    fit = _Fit(model, state, label, head, cast)
    fit.check()
    fit.apply()
    for note in fit.notes:
        log.info("%s: %s", label, note)
    for note in fit.warnings:
        log.warning("%s: %s", label, note)
    return WeightsReport(label, digest, len(fit.tensors), (*fit.warnings, *fit.notes))


def build_with_weights(
    build: Callable[..., Model], weights: Weights | None, options: dict[str, Any], **architecture: Any
) -> Model:
    """`build(**architecture, **options)`, then `weights`; they decide `num_classes` where it is not given."""
    model = build(**architecture, **options)
    if weights is not None:
        load_weights(model, weights, head="drop" if "num_classes" in options else "adopt")
    return model


def _read(source: Weights, sha256: str | None, progress: bool) -> tuple[str, Any, str | None]:
    """Label for messages, the object in the file, and the digest where it was computed."""
    if isinstance(source, Mapping):
        if sha256 is not None:
            raise TypeError("sha256 belongs to a file or a URL, the weights given are a state dict")
        return "state dict", source, None
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"weights must be a path, a URL or a state dict, got {type(source).__name__}")
    text = os.fspath(source)
    if is_url(text):
        path, digest = fetch(text, sha256, progress=progress)
        return shown(text), _read_file(path, shown(text)), digest
    path = Path(text).expanduser()
    if not path.exists():
        raise WeightsNotFoundError(f"there is no weights file {text}")
    if not path.is_file():
        raise WeightsError(f"{text} is not a file")
    verified = _verify_local(path, text, sha256)  # before anything in the file is interpreted
    return text, _read_file(path, text), verified


def _verify_local(path: Path, label: str, sha256: str | None) -> str | None:
    """Digest of a local file where one is expected, by argument or by its name; raises if wrong."""
    expected = check_sha256_argument(sha256) if sha256 is not None else name_hash(path.name)
    if expected is None or (sha256 is None and expected.isdigit()):  # digits alone are more likely a date
        return None
    digest = file_sha256(path)
    if digest.startswith(expected):
        return digest
    if sha256 is not None:
        raise WeightsError(f"{label} has SHA-256 {digest}, expected {expected}")
    raise WeightsError(
        f"{label} has SHA-256 {digest}, its name promises {expected}: it is damaged; "
        "if it was changed on purpose, rename it"
    )


def _read_file(path: Path, label: str) -> Any:
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise WeightsError(f"{label} is empty")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path, label)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler of a damaged file can raise anything
        raise WeightsError(f"{label} {_why_unreadable(path, start, error)}") from error


def _read_safetensors(path: Path, label: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise WeightsError(f"{label}: reading .safetensors needs `pip install safetensors`") from error
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise WeightsError(f"{label} is not a complete .safetensors file ({error})") from error


def _why_unreadable(path: Path, start: bytes, error: Exception) -> str:
    text = str(error)
    if "TorchScript" in text:
        return "is a TorchScript archive, not a state dict: save `module.state_dict()` from it"
    if isinstance(error, pickle.UnpicklingError):
        names = re.findall(r"unsupported GLOBAL (\S+)|Unsupported global: GLOBAL (\S+)", text)
        found = ", ".join(a or b for a, b in names)
        if found or (start[:1] == b"\x80" and start[:2] != b"\x80\x02"):
            what = f"pickled code ({found})" if found else "a general pickle"
            return f"holds {what} and was refused: only tensors in plain containers load; save a state_dict()"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "is truncated or damaged"
    return "is not a checkpoint (neither a PyTorch file nor safetensors)"


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
    others = [str(k) for k, v in checkpoint.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if others:
        raise WeightsError(f"{label} is not a state dict: entries that are no tensors: {_some(others)}")
    state = dict(checkpoint)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k[len(prefix) :]: v for k, v in state.items()}
    return state


class _Fit:
    """A checkpoint against a model: what can be copied, what was adapted or left out, what is wrong."""

    def __init__(self, model: nn.Module, state: dict[str, Tensor], label: str, head: str, cast: bool):
        self.model, self.label, self.cast = model, label, cast
        self.own: dict[str, Tensor] = model.state_dict()
        self.cfg: dict[str, Any] = getattr(model, "default_cfg", {})
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.adopt: int | None = None
        self.dropped: tuple[str, ...] = ()
        state = self._without_absent_parts(state)
        state = self._with_first_conv(state)
        self.tensors = self._with_heads(state, head)

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
        plain = theirs.layout is torch.strided and theirs.dtype in _FLOATS
        if not plain or channels in (0, ours.shape[1]) or theirs[:, :1].shape != ours[:, :1].shape:
            return state
        self.warnings.append(f"{key} adapted from {channels} to {ours.shape[1]} input channels")
        return {**state, key: adapt_input_channels(theirs, ours.shape[1])}

    def _with_heads(self, state: dict[str, Tensor], head: str) -> dict[str, Tensor]:
        for name in (self.cfg.get("classifier"), *getattr(self.model, "auxiliary_classifiers", ())):
            state = self._with_head(state, head, name)
        return state

    def _with_head(self, state: dict[str, Tensor], head: str, name: str | None) -> dict[str, Tensor]:
        keys = tuple(f"{name}.{part}" for part in ("weight", "bias"))
        if head == "strict" or not all(k in state and k in self.own for k in keys):
            return state
        theirs, ours = state[keys[0]], self.own[keys[0]]
        classes = theirs.shape[0] if theirs.dim() == 2 else 0
        fits = theirs.shape[1:] == ours.shape[1:] and state[keys[1]].shape == (classes,)
        if classes in (0, ours.shape[0]) or not fits:
            return state
        if head == "adopt":
            self.adopt = classes
            self.own = {**self.own, keys[0]: torch.empty_like(theirs, dtype=ours.dtype, device="meta")}
            self.own[keys[1]] = torch.empty(classes, dtype=self.own[keys[1]].dtype, device="meta")
            self.notes.append(f"classifier {name} resized to the checkpoint's {classes} classes")
            return state
        self.dropped += keys
        self.warnings.append(
            f"classifier {name} not loaded: {classes} classes in the checkpoint, {ours.shape[0]} in the model"
        )
        return {k: v for k, v in state.items() if k not in keys}

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
            raise WeightsError(f"{self.label} does not fit {name}: {'; '.join(problems)}{hint}")
        if any(self.own[k].is_meta for k in self.dropped):
            raise WeightsError(f"{self.label}: a meta model has no classifier to keep: use head='adopt'")
        unfit = [reason for k, v in self.tensors.items() if (reason := self._unfit(k, v))]
        if unfit:
            raise WeightsError(f"{self.label} has unusable values: {_some(unfit)}")
        self._note_dtypes()

    def _unfit(self, key: str, value: Tensor) -> str | None:
        """Why this value must not be copied, or None."""
        target = self.own[key].dtype
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            return f"{key} is not a plain dense tensor"
        if value.dtype != target:
            floats = value.dtype in _FLOATS and target in _FLOATS
            integers = not any(d.is_floating_point or d.is_complex for d in (value.dtype, target))
            wider = (floats or integers) and torch.promote_types(value.dtype, target) == target
            if not wider and not (floats and self.cast):
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
