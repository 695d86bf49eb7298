"""What the stacks that we compare with (peers.py) have in common, and what preparing them takes.

    peer = OnnxRuntime(threads=2)
    if peer.missing() is None:
        call = peer.prepare(model, x)      # capture, compile, pack: everything that is done once
        outputs = call()                   # one forward of exactly x; a list of tensors

Every peer runs the same plain PyTorch modules (`plain`), float32, one request at a time, with `threads`
threads. Input and weights are laid out beforehand as the peer likes them best, and nobody is charged for a
conversion of the input. The returned tensors may be views of buffers that the next call overwrites.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from .timing import Candidate, measure

Call = Callable[[], list[Tensor]]


class Refused(RuntimeError):
    """This peer cannot run this model; the message is the sentence for the table."""


class Plain(nn.Module):
    """A model's ordinary modules, without the engine: what other stacks capture and PyTorch eager runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor):
        return getattr(self.model, "forward_modules", self.model)(x)


def plain(model: nn.Module) -> nn.Module:
    """A private copy of the model that never enters the engine, in eval mode."""
    return Plain(copy.deepcopy(model)).eval()


def as_list(outputs: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """A model returns one tensor (logits) or several (feature levels); the benchmarks always see a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def package_version(name: str) -> str:
    """The installed version of a distribution, or a sentence that says it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def fastest(ways: dict[str, Call]) -> str:
    """The key of the quickest of several ways to do the same, timed in turns for about a second."""
    if len(ways) == 1:
        return next(iter(ways))
    candidates = [Candidate(key, call) for key, call in ways.items()]
    return measure(candidates, budget=1.0, min_rounds=3, turn=0.05).fastest(list(ways))


@contextlib.contextmanager
def printed() -> Iterator[Callable[[], str]]:
    """Keep what libraries print, from C++ too, off the terminal; yields a function that returns its end.

    Some stacks report why they fail on standard output alone, where it would also spoil `--json`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        saved = [os.dup(stream) for stream in (1, 2)]

        def tail() -> str:
            file.seek(0)
            lines = file.read().decode(errors="replace").strip().splitlines()
            return " / ".join(line.strip() for line in lines[-3:])

        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield tail
        finally:
            for stream, copied in zip((1, 2), saved, strict=True):
                os.dup2(copied, stream)
                os.close(copied)


def run_tool(command: list[str], folder: Path, product: Path) -> None:
    """Run a converter in `folder`. Refused, with the end of what it said, unless it leaves `product`."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not product.is_file():
        said = " / ".join((done.stdout + "\n" + done.stderr).strip().splitlines()[-3:])
        raise Refused(f"{Path(command[0]).name} could not convert it (exit {done.returncode}): {said}")


def export_onnx(
    module: nn.Module, image: Tensor, path: Path, external_data: bool
) -> tuple[list[str], list[str]]:
    """Write the ONNX file of torch.onnx.export; returns the names of inputs and outputs, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own about itself
        program = torch.onnx.export(
            module, (image,), path, dynamo=True, external_data=external_data, verbose=False
        )
    graph = program.model.graph
    return [v.name for v in graph.inputs], [v.name for v in graph.outputs]


class Peer:
    """One way to run a model. `key` names it on command lines, `name` in tables."""

    key = ""
    name = ""
    patience = ""  # what to tell people who wait for `prepare`
    packages: tuple[tuple[str, str], ...] = ()  # (module to look for, distribution that brings it)

    def __init__(self, threads: int = 2):
        self.threads = threads

    def missing(self) -> str | None:
        """None when the peer can run here, otherwise the sentence for the table."""
        absent = [dist for module, dist in self.packages if importlib.util.find_spec(module) is None]
        return f"not installed: pip install {' '.join(absent)}" if absent else None

    def version(self) -> str:
        return torch.__version__

    def settings(self) -> dict[str, str]:
        """What was set, as it goes into the results."""
        return {}

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        """Do all one-off work for inputs like x, and return the call to time."""
        raise NotImplementedError(f"{type(self).__name__}.prepare")
