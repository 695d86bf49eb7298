"""Weights from the Hugging Face hub: "hf-hub:timm/resnet50.a1_in1k", optionally with "@revision".

huggingface_hub, an optional dependency, does the transfer and keeps the cache; we choose the file, verify it,
and read what config.json says about it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._download import WeightsError, WeightsNotFoundError, file_sha256, offline_switch

_FILES = ("model.safetensors", "pytorch_model.bin")  # best first
_PREPROCESSING = (
    "input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "channel_order", "value_range",
)  # fmt: skip
_PREFIX = re.compile(r"hf[-_]hub:", re.IGNORECASE)
_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repo>(?:{_PART}/)?{_PART})(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubConfig:
    """What config.json of a repository says, in timm's layout. None and {} where it says nothing."""

    architecture: str | None = None
    num_classes: int | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HubFile:
    path: Path
    sha256: str | None
    config: HubConfig


def is_hub_id(source: str) -> bool:
    return _PREFIX.match(source) is not None


def fetch_from_hub(source: str) -> HubFile:
    """The weights file behind a hub id, from the hub's cache or downloaded now, and its configuration.

    `model.safetensors` is taken where there is one, `pytorch_model.bin` otherwise. `FB_OFFLINE=1` and
    `HF_HUB_OFFLINE=1` allow the cache only; `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` work as everywhere.
    Raises WeightsNotFoundError for a repository, revision or file that does not exist, WeightsError for the
    rest: no huggingface_hub, no network, a damaged file.
    """
    parsed = _ID.fullmatch(_PREFIX.sub("", source, count=1))
    if parsed is None:
        raise WeightsError(f"{source} is not a hub id: hf-hub:user/repository, or with @revision at the end")
    repo, revision = parsed["repo"], parsed["revision"]
    config = _get(source, repo, revision, "config.json")
    path = next((p for name in _FILES if (p := _get(source, repo, revision, name)) is not None), None)
    if path is None:
        switch = offline_switch()
        where = f"in the hub's cache, and {switch} forbids downloads" if switch else "in that repository"
        raise WeightsNotFoundError(f"{source}: there is neither {' nor '.join(_FILES)} {where}")
    return HubFile(path, _verified(path, source), _read_config(config, source) if config else HubConfig())


def _get(source: str, repo: str, revision: str | None, name: str) -> Path | None:
    """One file of a repository; None when the repository, or the cache while offline, has no such file."""
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as absent:
        raise WeightsError(f"{source}: the hub needs `pip install huggingface_hub`") from absent

    offline = offline_switch() is not None
    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=offline))
    except errors.LocalEntryNotFoundError as missing:
        if offline:
            return None
        raise WeightsError(f"{source}: the hub cannot be reached and {name} is not in its cache") from missing
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as gated:
        raise WeightsError(f"{source}: the repository is gated, HF_TOKEN must give access to it") from gated
    except errors.RepositoryNotFoundError as missing:
        raise WeightsNotFoundError(
            f"{source}: the hub has no repository {repo}, or only for those whose HF_TOKEN opens it"
        ) from missing
    except errors.RevisionNotFoundError as missing:
        raise WeightsNotFoundError(f"{source}: {repo} has no revision {revision}") from missing
    except (OSError, errors.HFValidationError) as error:
        raise WeightsError(f"{source}: {name} could not be fetched from the hub: {error}") from error


def _verified(path: Path, source: str) -> str | None:
    """SHA-256 of a file whose cache entry is named by it, as large files are; raises if it is another."""
    expected = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", expected) is None:
        return None
    digest = file_sha256(path)
    if digest != expected:
        raise WeightsError(
            f"{source}: {path} is damaged (its SHA-256 is {digest}, not {expected}): delete it"
        )
    return digest


def _read_config(path: Path, source: str) -> HubConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{source}: config.json is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{source}: config.json holds a {type(content).__name__}, not an object")
    inner = content.get("pretrained_cfg")
    merged = {**(inner if isinstance(inner, dict) else {}), **content}
    architecture, classes = merged.get("architecture"), merged.get("num_classes")
    return HubConfig(
        architecture=architecture if isinstance(architecture, str) else None,
        num_classes=classes if type(classes) is int and classes >= 0 else None,
        preprocessing={key: merged[key] for key in _PREPROCESSING if merged.get(key) is not None},
    )
