"""Read a checkpoint from wherever it is, in whatever container, without running anything that is in it."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor

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
from ._hub import HubConfig, fetch_from_hub, is_hub_id

Weights = Union[str, "os.PathLike[str]", Mapping[str, Tensor]]

_HDF5 = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Checkpoint:
    """What was read: a label for messages, the object in the file, its SHA-256 where one was computed.

    `name` is the published file name and `path` the local file, both absent for a state dict in memory;
    `config` is what the hub says about the file.
    """

    label: str
    content: Any
    sha256: str | None = None
    name: str | None = None
    path: Path | None = None
    config: HubConfig = field(default_factory=HubConfig)


def read_checkpoint(source: Weights, sha256: str | None, progress: bool) -> Checkpoint:
    """Read a state dict, a path, a URL or a hub id. Digests are checked before a file is interpreted."""
    if isinstance(source, Mapping):
        if sha256 is not None:
            raise TypeError("sha256 belongs to a file or a URL, the weights given are a state dict")
        return Checkpoint("state dict", source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"weights must be a path, a URL, a hub id or a state dict, got {type(source).__name__}"
        )
    text = os.fspath(source)
    if is_url(text):
        path, digest = fetch(text, sha256, progress=progress)
        name = os.path.basename(unquote(urlsplit(text).path))
        return Checkpoint(shown(text), _read_file(path, shown(text)), digest, name, path)
    if is_hub_id(text):
        found = fetch_from_hub(text)
        digest = found.sha256 if sha256 is None else _verify_local(found.path, text, sha256)
        content = _read_file(found.path, text)
        return Checkpoint(text, content, digest, found.path.name, found.path, found.config)
    path = Path(text).expanduser()
    if not path.exists():
        raise WeightsNotFoundError(f"there is no weights file {text}")
    if not path.is_file():
        raise WeightsError(f"{text} is not a file")
    digest = _verify_local(path, text, sha256)
    return Checkpoint(text, _read_file(path, text), digest, path.name, path)


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
    if path.suffix == ".npz":
        return _read_npz(path, label)
    if path.suffix in (".h5", ".hdf5") or start.startswith(_HDF5):
        return _read_hdf5(path, label)
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


def _read_npz(path: Path, label: str) -> dict[str, Any]:
    """Arrays by name; an array of Python objects would be pickled code and is refused."""
    import numpy

    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # so that no damaged header is interpreted
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        with numpy.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except MemoryError:
        raise
    except Exception as error:  # numpy and zipfile can raise anything too
        if "allow_pickle" in str(error):
            message = f"{label} holds pickled code and was refused: only plain arrays load"
        else:
            message = f"{label} is not a complete .npz file ({error})"
        raise WeightsError(message) from error


def _read_hdf5(path: Path, label: str) -> dict[str, Any]:
    """Every array of a Keras .h5 file, by its path inside the file."""
    try:
        import h5py
    except ImportError as error:
        raise WeightsError(f"{label}: reading .h5 needs `pip install h5py`") from error
    arrays: dict[str, Any] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(keep)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise WeightsError(f"{label} is not a complete .h5 file ({error})") from error
    return arrays


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
