"""The container of a saved plan: a .safetensors file whose header also holds JSON and a digest of every byte.

    8 bytes     length of the header, little-endian
    header      {"__metadata__": {"sha256": ..., "format": ..., "plan": ...}, "<tensor>": {...}, ...}, spaces
    tensors     one after the other

As the format wants it, so that any of its readers shows what is inside. Beyond that:

    sha256      of the whole file with zeros in its place: whatever byte changes, the file is refused
    alignment   the tensors begin at a multiple of 64 bytes, those first whose sizes are multiples of 64: so
                packed weights are used where they lie. The file is read straight into memory of the library,
                and nothing is copied

`write` renames a finished file into place. `read` believes nothing before the digest is right, and no number
in the header after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import native_floats

FORMAT = "1"  # of the header's JSON: another one is refused
ALIGNMENT = 64
CHUNK = 8 << 20
LARGEST_HEADER = 1 << 28
_DIGEST = re.compile(rb'\{"__metadata__":\{"sha256":"([0-9a-f]{64})",')
_ZEROS = b"0" * 64
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class PlanFileError(RuntimeError):
    """A plan file cannot be read, is damaged, or is for something else than this library and machine."""


class PlanFileNotFoundError(PlanFileError, FileNotFoundError):
    """There is no plan file at this path."""


@dataclass
class Content:
    plan: dict[str, Any]
    tensors: dict[str, Tensor]


def write(path: str | os.PathLike[str], content: Content) -> int:
    """Write the file, whole or not at all. Returns its size in bytes. OSError where it cannot be written."""
    path = Path(path)
    tensors = dict(sorted(content.tensors.items(), key=lambda item: _order(item[1])))
    buffers = [_bytes_of(tensor) for tensor in tensors.values()]
    header = _header(content.plan, tensors)
    digest = hashlib.sha256(header)
    for buffer in buffers:
        digest.update(buffer)
    header = header.replace(_ZEROS, digest.hexdigest().encode(), 1)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(draft, "xb") as file:
            file.write(header)
            for buffer in buffers:
                file.write(buffer)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    return size


def _order(tensor: Tensor) -> tuple[bool, int]:
    """Without padding between them, every tensor begins at a multiple of its numbers' size."""
    return tensor.nbytes % ALIGNMENT != 0, -tensor.itemsize


def _header(plan: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON, with zeros for the digest."""
    text = json.dumps(plan, separators=(",", ":"), allow_nan=False)
    found: dict[str, Any] = {"__metadata__": {"sha256": _ZEROS.decode(), "format": FORMAT, "plan": text}}
    offset = 0
    for name, tensor in tensors.items():
        where = [offset, offset + tensor.nbytes]
        found[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": where}
        offset += tensor.nbytes
    header = json.dumps(found, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def _bytes_of(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor on the CPU."""
    assert tensor.is_contiguous() and tensor.is_cpu, "plan files hold contiguous tensors of the CPU"
    flat = tensor.detach().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def read(path: str | os.PathLike[str], native: Any) -> Content:
    """The content of a plan file, its tensors in memory of the native library. PlanFileError with a sentence
    where it is none, is damaged or of another format."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size, native)
    except FileNotFoundError as error:
        raise PlanFileNotFoundError(f"{path} does not exist, expected a file of fb.save_plan") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PlanFileError(f"{path} cannot be read ({reason}), expected a file of fb.save_plan") from error


def _read(path: Path, file: Any, size: int, native: Any) -> Content:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > LARGEST_HEADER:
        raise PlanFileError(f"{path} is no plan file: it does not begin as a file of fb.save_plan does")
    header = file.read(length)
    stated = _DIGEST.match(header)
    if stated is None:
        raise PlanFileError(f"{path} is no plan file: it does not begin as a file of fb.save_plan does")
    if len(header) < length:
        raise PlanFileError(f"{path} is damaged: it ends after {size} bytes, inside its header")
    begin, end = stated.span(1)
    digest = hashlib.sha256(start + header[:begin] + _ZEROS + header[end:])
    room = max(0, size - 8 - length)
    memory = native_floats(native, -(-room // 4)).view(torch.uint8)
    bytes_read = _fill(memoryview(memory.numpy())[:room], file, digest)
    if bytes_read != room or file.read(1) or digest.hexdigest().encode() != stated[1]:
        found = digest.hexdigest()
        raise PlanFileError(
            f"{path} is damaged: the SHA-256 of its content is {found}, expected {stated[1].decode()}"
        )
    return _content(path, header, memory[:room])


def _fill(buffer: memoryview, file: Any, digest: Any) -> int:
    """Read into the buffer and the digest, piece by piece while it is in cache. How many bytes there were."""
    at = 0
    while at < len(buffer):
        count = file.readinto(buffer[at : at + CHUNK])
        if not count:
            break
        digest.update(buffer[at : at + count])
        at += count
    return at


def _content(path: Path, header: bytes, memory: Tensor) -> Content:
    try:
        found = json.loads(header)
        metadata = found.pop("__metadata__")
        version, plan = metadata["format"], metadata["plan"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlanFileError(f"{path} is no plan file: its header is not that of fb.save_plan") from error
    if version != FORMAT:
        raise PlanFileError(f"{path} has format {version!r}, expected {FORMAT!r}: save it with this library")
    try:
        tensors = {name: _tensor(entry, memory) for name, entry in found.items()}
        return Content(json.loads(plan), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanFileError(f"{path} is no plan file: {error}") from error


def _tensor(entry: Any, memory: Tensor) -> Tensor:
    first, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    whole = all(type(number) is int and number >= 0 for number in (first, end, *shape))
    count = 1
    for axis in shape if whole else ():
        count *= axis
    within = whole and first <= end <= memory.numel() and first % dtype.itemsize == 0
    if not within or count * dtype.itemsize != end - first:
        raise ValueError(f"a tensor of sizes {list(shape)} lies at bytes {first} to {end}")
    return memory[first:end].view(dtype).view(shape)
