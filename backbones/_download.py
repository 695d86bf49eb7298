"""Fetch a weights file once, verified by SHA-256, into the cache that torch.hub and torchvision use."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import unquote, urlsplit, urlunsplit

import torch.hub

log = logging.getLogger("fast_backbones.weights")

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0
_OFFLINE = ("FB_OFFLINE", "HF_HUB_OFFLINE")
_NAME_HASH = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z0-9]+$")  # torchvision: resnet50-0676ba61.pth


class WeightsError(RuntimeError):
    """Weights could not be had, read, or fitted to the model. The model is as it was before the call."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """There is no weights file at this path."""


def is_url(source: str) -> bool:
    return re.match(r"https?://", source, re.IGNORECASE) is not None


def offline_switch() -> str | None:
    """The environment variable that forbids downloads now, if one does."""
    return next((name for name in _OFFLINE if os.environ.get(name, "0") not in ("", "0")), None)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256_argument(sha256: str) -> str:
    """The expected digest in lower case: 64 hexadecimal digits or, as in torchvision's names, the first 8."""
    if re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256) is None:
        raise ValueError(f"sha256 must be 8 to 64 hexadecimal digits, got {sha256!r}")
    return sha256.lower()


def name_hash(name: str) -> str | None:
    """The digest prefix in a file name such as `resnet50-0676ba61.pth`, if there is one."""
    found = _NAME_HASH.search(name)
    return found[1] if found else None


def split_digest(url: str) -> tuple[str, str | None]:
    """`https://host/file.pth#sha256=<digits>` -> the URL and the digits."""
    parts = urlsplit(url)
    digest = re.fullmatch(r"sha256=(.*)", parts.fragment)
    return urlunsplit(parts._replace(fragment="")), digest[1] if digest else None


def shown(url: str) -> str:
    """A URL for messages: without password, query and fragment, which may carry secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch(url: str, sha256: str | None = None, *, progress: bool = True) -> tuple[Path, str]:
    """Path and SHA-256 of the file behind an http(s) URL, from the cache or downloaded now.

    The digest must be known: `sha256=`, a `#sha256=...` fragment, or a torchvision-style file name. The file
    is written beside its final place and renamed when its length and digest are right, so the cache
    (`torch.hub.get_dir()/checkpoints`, created with mode 0700) never holds a partial one; it is verified
    again on every use. `FB_OFFLINE=1` or `HF_HUB_OFFLINE=1` forbids the download.
    """
    url, fragment = split_digest(url)
    name = os.path.basename(unquote(urlsplit(url).path))
    if not re.fullmatch(r"[\w+=@,~-][\w.+=@,~ -]*", name):
        raise WeightsError(f"{shown(url)} does not end in a usable file name")
    expected = sha256 or fragment or name_hash(name)
    if expected is None:
        raise WeightsError(
            f"{shown(url)}: a download needs its SHA-256: pass sha256=..., or append #sha256=... to the URL"
        )
    expected = check_sha256_argument(expected)
    folder = _cache_folder()
    path = folder / _cache_name(name, expected)
    if path.is_file():
        digest = file_sha256(path)
        if digest.startswith(expected):
            return path, digest
        log.warning("cached %s has SHA-256 %s, expected %s: downloading it again", path, digest, expected)
    if switch := offline_switch():
        raise WeightsError(f"{shown(url)} is not in {folder}, and {switch} forbids downloads")
    return path, _download(url, path, expected, progress)


def _cache_name(name: str, expected: str) -> str:
    """Different files behind equal names must not meet in the cache: the name carries the digest, once."""
    carried = name_hash(name)
    if carried is not None and (expected.startswith(carried) or carried.startswith(expected)):
        return name
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{expected[:16]}{suffix}"


def _cache_folder() -> Path:
    folder = Path(torch.hub.get_dir()).expanduser() / "checkpoints"
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    for parent in reversed(missing):
        parent.mkdir(mode=0o700, exist_ok=True)
    if os.name == "posix" and folder.stat().st_mode & 0o002:
        log.warning("%s is writable by every user of this machine: chmod 700 it, or set TORCH_HOME", folder)
    return folder


def _download(url: str, path: Path, expected: str, progress: bool) -> str:
    """Write the file behind `url` to `path`, whole and verified or not at all; returns its SHA-256."""
    handle, temporary = tempfile.mkstemp(prefix=".download-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            found = _receive(url, file, _Progress(path.name, progress))
            file.flush()
            os.fsync(file.fileno())
        if not found.startswith(expected):
            raise WeightsError(f"{shown(url)} has SHA-256 {found}, expected {expected}: not used")
        os.replace(temporary, path)
        return found
    finally:
        Path(temporary).unlink(missing_ok=True)


def _receive(url: str, file: IO[bytes], progress: _Progress) -> str:
    import http.client
    import urllib.request

    digest, received, size = hashlib.sha256(), 0, None
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "fast_backbones"})
        with progress, urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            length = response.headers.get("Content-Length")
            size = int(length) if length is not None else None
            while chunk := response.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
                received += len(chunk)
                progress.show(received, size)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WeightsError(f"download of {shown(url)} failed: {error}") from error
    if size is not None and received != size:
        raise WeightsError(f"download of {shown(url)} broke off after {received} of {size} bytes")
    return digest.hexdigest()


class _Progress:
    """One redrawn line on a terminal, a log line every ten seconds elsewhere; silent in the first second."""

    def __init__(self, name: str, enabled: bool):
        self.name, self.enabled = name, enabled
        self.terminal = enabled and sys.stderr is not None and sys.stderr.isatty()
        self.next = time.monotonic() + 1.0
        self.drawn = False

    def __enter__(self) -> _Progress:
        return self

    def show(self, received: int, size: int | None) -> None:
        now = time.monotonic()
        if not self.enabled or now < self.next:
            return
        text = f"{self.name}: {received / 1e6:.1f} MB"
        if size:
            text += f" of {size / 1e6:.1f} MB ({100 * received // size}%)"
        if self.terminal:
            sys.stderr.write(f"\r{text}")
            sys.stderr.flush()
            self.drawn = True
        else:
            log.info("downloading %s", text)
        self.next = now + (0.2 if self.terminal else 10.0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.drawn:
            sys.stderr.write("\n")
