"""What tuning has measured and chosen, and the file that keeps it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MARGIN = 0.97  # of the usual algorithm's time: less is taken for noise
FORMAT = 1

Tell = Callable[[float, str], None]


@dataclass
class Layer:
    """A convolution that more than one algorithm can compute, and what each took, in seconds."""

    name: str
    key: str
    ways: list[str]  # its algorithms
    usual: str  # the one that the rules take
    steps: list[str]  # names of all layers that are alike, and so get the same answer
    seconds: dict[str, float] = field(default_factory=dict)  # empty: known from an earlier run
    chosen: str = ""


@dataclass
class Tuning:
    """What fb.tune found. `str()` is a table."""

    layers: list[Layer]
    path: Path | None  # where the choices are kept

    @property
    def changed(self) -> list[Layer]:
        """Layers that are not computed as they would be without tuning."""
        return [layer for layer in self.layers if layer.chosen != layer.usual]

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers with a choice, {len(self.changed)} of them changed"]
        for layer in self.changed:
            before, after = layer.seconds.get(layer.usual), layer.seconds.get(layer.chosen)
            times = (
                f": {before * 1e3:.3f} -> {after * 1e3:.3f} ms" if before and after else ", measured earlier"
            )
            lines.append(f"  {layer.name}: {layer.usual} -> {layer.chosen}{times}")
        if self.path is not None:
            lines.append(f"kept in {self.path}")
        return "\n".join(lines)


def cache_file(machine: str) -> Path:
    """Of this machine and version; in FB_CACHE_DIR, else where XDG wants caches."""
    from .. import __version__

    given = os.environ.get("FB_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(given) if given else Path(home) / "fast_backbones"
    return folder / f"tuning-{machine}-{__version__}.json"


def load(path: Path) -> dict[str, str]:
    """The choices of a file; none, with a warning, where it is damaged or of another format."""
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    try:
        stored = json.loads(text)
        choices = stored["choices"]
        whole = stored["format"] == FORMAT and stored["sha256"] == digest(choices)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        warnings.warn(f"{path} is damaged or of another version: layers are measured again", stacklevel=4)
        return {}
    return choices


def save(path: Path, choices: dict[str, str]) -> Path | None:
    """Write by rename, so that nobody reads half a file. None where the folder cannot be written."""
    stored = {"format": FORMAT, "sha256": digest(choices), "choices": choices}
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(stored, indent=1))
        os.replace(draft, path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            draft.unlink()
        warnings.warn(f"the choices are not kept for the next process: {problem}", stacklevel=4)
        return None
    return path


def digest(choices: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()
