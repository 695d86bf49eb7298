"""Checkpoints that are whole or not there, and the state of a run that goes on to the bit.

A file is written under another name, forced to disk and renamed: a kill or a power cut at any moment leaves
the earlier one. All of it loads with `weights_only=True`.
"""

from __future__ import annotations

import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from . import Refused

LAST, BEST = "last.pt", "best.safetensors"
FORMAT = 1


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def save_state(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refused(f"--resume: there is no file {path}") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
        raise Refused(f"--resume: {path} cannot be read: {problem}") from problem
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise Refused(f"--resume: {path} is no checkpoint of this program; --weights takes weights alone")
    return state


def check_same(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """The run that goes on must be the one that was saved; the first difference is named."""
    for name, value in present.items():
        if name == "classes" and saved[name] != value:
            had, has = len(saved[name]), len(value)
            what = f"{had} classes, DATA has {has}" if had != has else "classes of other names than DATA has"
            raise Refused(f"--resume: {path} was trained on {what}")
        if name == "images" and saved[name] != value:
            raise Refused(f"--resume: {path} was trained on other files than DATA/train holds now")
        if saved[name] != value:
            raise Refused(
                f"--resume: {path} was written with {name} {saved[name]}, this run has {name} {value}"
            )


def save_weights(path: Path, model: nn.Module, facts: dict[str, str]) -> None:
    """The state dict as a file that `weights=` takes."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(tensors, metadata=facts))


def seed_all(seed: int) -> None:
    """The generators that `random_state` holds."""
    torch.manual_seed(seed)
    random.seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators of this process: PyTorch's on the CPU and on its GPU, and Python's."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
