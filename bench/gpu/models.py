"""Whole models on a GPU against PyTorch's ways to run them: python -m bench.gpu.models resnet50 --batch 1 32
256 --out FILE

Peers, each in both memory layouts: eager (cudnn.benchmark on), torch.compile in mode "max-autotune", which
replays CUDA graphs. Every result is checked against float64 first. All that run are timed in turns by CUDA
events: the ratio of a row is the median over rounds of peer / ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch
from fast_backbones.engine.gpu_peaks import milliseconds
from torch import Tensor, nn

from fast_backbones import engine

from ..compare import error
from ..exact import float64
from ..subject import input_size, make_model
from . import job
from .machine import DTYPES

# The most valuable first: what other stacks serve worst.
DEFAULT = (
    "mobilenetv1_100", "legacy_xception", "densenet121", "legacy_seresnet50", "legacy_seresnext50_32x4d",
    "resnext50_32x4d", "legacy_senet154", "resnet50", "resnet18", "inception_v3", "googlenet", "bninception",
    "inception_v4", "inception_resnet_v2", "vgg16_bn", "alexnet", "lenet5",
)  # fmt: skip
PEERS = ("eager nchw", "eager nhwc", "compile nchw", "compile nhwc")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
CALL_MS = 20.0  # of repeated calls in one measurement


@dataclass
class Row:
    """ms: median of a forward; ratio: peer / ours, the median over rounds; errors: rms against float64;
    failed: why."""

    model: str
    batch: int
    dtype: str
    ms: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """Of the peers whose results are right."""
        return min(self.ratio.values(), default=None)

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.batch / self.ms["ours"]


def peer(name: str, model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Any], Tensor]:
    """What to call, and its input in the peer's layout. `model` is the peer's own copy, in that layout."""
    how, _, layout = name.partition(" ")
    x = x.contiguous(memory_format=LAYOUTS[layout])
    forward = model.forward_modules
    if how == "compile":
        forward = torch.compile(forward, mode="max-autotune")
    return forward, x


@cache
def prepared(name: str, dtype: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, float32 on the CPU; a few images in the type; what the model makes of them in float64."""
    model = make_model(name)
    images = torch.randn(4, *input_size(model), generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    exact = float64(copy.deepcopy(model).to(DTYPES[dtype]).double().forward_modules, images)
    return model, images, exact


def measure(name: str, batch: int, dtype: str, peers: tuple[str, ...], rounds: int) -> Row:
    row = Row(name, batch, dtype)
    with torch.no_grad():
        model, images, truth = prepared(name, dtype)
    torch._dynamo.reset()
    copies = {key: copy.deepcopy(model).to("cuda", DTYPES[dtype]) for key in ("ours", *peers)}
    for key in peers:
        copies[key].to(memory_format=LAYOUTS[key.partition(" ")[2]])
    with torch.inference_mode():
        return compare(row, copies, images, truth, rounds)


def ours(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Any], Tensor]:
    x = x.contiguous(memory_format=torch.channels_last)
    if (reason := engine.why_not(model, x)) is not None:
        raise RuntimeError(f"no plan: {reason}")
    return model, x


def compare(row: Row, copies: dict[str, nn.Module], images: Tensor, truth: Tensor, rounds: int) -> Row:
    batch, dtype = row.batch, row.dtype
    few, exact = images[:batch], [truth[:batch]]
    x = few.repeat(-(-batch // len(few)), 1, 1, 1)[:batch].cuda()
    calls: dict[str, Callable[[], Any]] = {}
    for key, model in copies.items():
        try:
            call, image = ours(model, x) if key == "ours" else peer(key, model, x)
            outputs = [call(image)[: len(few)].float().cpu()]
            row.errors[key] = error(outputs, exact).rms
            calls[key] = lambda call=call, image=image: call(image)
        except Exception as trouble:  # a peer that cannot is a cell of the table, not the end of it
            row.failed[key] = (
                f"{type(trouble).__name__}: {str(trouble).splitlines()[0] if str(trouble) else ''}"
            )
    plain = max((row.errors[key] for key in row.errors if key.startswith("eager")), default=float("inf"))
    for key, found in row.errors.items():
        if found > 2 * plain + torch.finfo(DTYPES[dtype]).eps / 2:
            row.failed[key] = f"rms error {found:.3g}, eager {plain:.3g}"
            del calls[key]
    if not calls:
        return row
    repeats = {}
    for key, call in calls.items():
        milliseconds(call, 3)
        repeats[key] = max(1, round(CALL_MS / max(milliseconds(call, 3), 1e-3)))
    samples: dict[str, list[float]] = {key: [] for key in calls}
    for turn in range(rounds):
        order = list(calls)[turn % len(calls) :] + list(calls)[: turn % len(calls)]
        for key in order:
            samples[key].append(milliseconds(calls[key], repeats[key]))
    row.ms = {key: median(values) for key, values in samples.items()}
    if "ours" in samples:
        row.ratio = {
            key: median(a / b for a, b in zip(samples[key], samples["ours"]))
            for key in samples
            if key != "ours"
        }
    return row


def markdown(results: dict) -> str:
    rows = [Row(**row) for row in results["rows"]]
    heads = ("model", "batch", "type", *PEERS, "ours", "images/s", "vs the best")
    lines = []
    for row in rows:
        cells = [
            f"{row.ms[key]:.3f}" if key in row.ms else "failed" if key in row.failed else ""
            for key in (*PEERS, "ours")
        ]
        last = [
            f"{row.images_per_second:.0f}" if "ours" in row.ms else "",
            f"{row.best:.2f}x" if row.best else "",
        ]
        lines.append([row.model, row.batch, row.dtype, *cells, *last])
    about = "Median milliseconds of a forward; `vs the best`: the best peer's time over ours.\n\n"
    return job.heading(results) + about + job.table(heads, lines)


def main() -> None:
    parser = job.parser("bench.gpu.models", __doc__, DEFAULT)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    work = job.Job(options, markdown)
    for case in work.cases():
        row = measure(*case, tuple(options.peers), options.rounds)
        work.add(asdict(row))
        best = f"{row.best:.2f}x the best peer" if row.best else f"failed: {row.failed}"
        print("{} batch {} {}: ".format(*case) + best, flush=True)


if __name__ == "__main__":
    main()
