"""Training steps on a GPU against PyTorch's ways to run them: python -m bench.gpu.train resnet50 --out FILE

A step is forward, cross entropy, backward and SGD with momentum. --dtype: float32, or float16 and bfloat16
under autocast (float16 with a gradient scaler). Peers: the plain modules in both memory layouts
(cudnn.benchmark on) and torch.compile of them. The first step of each, on a few images, is compared with
float64: what is further off than twice the plain modules gets no time. All that run are timed in turns by
CUDA events: the ratio of a row is the median over rounds of peer / ours. Memory:
torch.cuda.max_memory_allocated of a step above what is allocated before it, that is gradients and what is
kept for backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median

import torch
from fast_backbones.engine.gpu_peaks import milliseconds
from torch import Tensor, nn

from fast_backbones import engine
from fast_backbones.kernels import backend

from ..exact import depthwise_by_taps
from ..subject import make_model
from ..train_worker import (
    LEARNING_RATE,
    MOMENTUM,
    autocast,
    differences,
    left_by_a_step,
    loss_of,
    make_batch,
    without_dropout,
)
from . import ahead, job
from .machine import DTYPES

# The most valuable first: what other stacks serve worst.
DEFAULT = (
    "resnext50_32x4d", "mobilenetv1_100", "densenet121", "legacy_seresnet50", "resnet50", "legacy_xception",
    "legacy_seresnext50_32x4d", "legacy_senet154", "resnet18", "inception_v3",
)  # fmt: skip
PEERS = ("eager nchw", "eager nhwc", "compile nhwc")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
CHECKED = 8  # images of the step that is compared with float64
TURN_MS = 200.0  # of repeated steps in one measurement
FLOOR = 1e-6  # of an error that counts, for what is exact but for rounding


@dataclass
class Row:
    """ms: median of a step; ratio: peer / ours, the median over rounds; mib: memory of a step; errors: of
    gradients against float64, the middle one; failed: why."""

    model: str
    batch: int
    dtype: str
    ms: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    mib: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """Of the peers whose gradients are right."""
        return min(self.ratio.values(), default=None)

    @property
    def memory(self) -> float | None:
        """Ours over the smaller of the plain layouts'."""
        plain = [self.mib[key] for key in self.mib if key.startswith("eager")]
        return self.mib["ours"] / min(plain) if plain and "ours" in self.mib else None


class Stack:
    """One way to train: its own copy of the model, in its layout."""

    def __init__(self, key: str, model: nn.Module, x: Tensor, labels: Tensor, dtype: str) -> None:
        how, _, layout = key.partition(" ")
        self.reference = key != "ours"
        self.model = copy.deepcopy(model).to(x.device, memory_format=LAYOUTS[layout or "nhwc"])
        self.x, self.labels = x.contiguous(memory_format=LAYOUTS[layout or "nhwc"]), labels
        self.dtype = DTYPES[dtype]
        self.call: Callable[[Tensor], object] = torch.compile(self.model) if how == "compile" else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        self.scaler = torch.amp.GradScaler(x.device.type, enabled=self.dtype is torch.float16)

    def forward(self, x: Tensor) -> object:
        with backend("reference" if self.reference else "auto"), autocast(self.x.device.type, self.dtype):
            return self.call(x)

    def check(self, exact: dict) -> float:
        """The error of the middle tensor of gradients of a first step; leaves the model as it was."""
        start = copy.deepcopy(self.model.state_dict())
        with torch.random.fork_rng(devices=[self.x.device] if self.x.is_cuda else []):
            found = left_by_a_step(self.model, self.x[:CHECKED], self.labels[:CHECKED], self.forward)
        self.model.load_state_dict(start)
        self.optimizer.zero_grad()
        wrong = differences(found, exact)
        if "sentence" in wrong:
            raise RuntimeError(wrong["sentence"])
        return wrong["gradients_middle"]

    def step(self) -> None:
        self.optimizer.zero_grad()
        with backend("reference" if self.reference else "auto"):
            with autocast(self.x.device.type, self.dtype):
                loss = loss_of(self.call(self.x), self.labels)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def step_mib(self) -> float:
        """Of one step, after others."""
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def truth(model: nn.Module, x: Tensor, labels: Tensor) -> dict:
    """The same step of the plain modules in float64."""
    exact = copy.deepcopy(model).to(x.device).double()
    with backend("reference"), depthwise_by_taps():
        return left_by_a_step(exact, x[:CHECKED].double(), labels[:CHECKED])


def stacks_of(row: Row, keys: tuple[str, ...], device: str) -> dict[str, Stack]:
    """Those whose first step is right; the others are in row.failed."""
    model = without_dropout(make_model(row.model))
    x, labels = (t.to(device) for t in make_batch(model, row.batch, None))
    exact = truth(model, x, labels)
    found: dict[str, Stack] = {}
    for key in keys:
        try:
            stack = Stack(key, model, x, labels, row.dtype)
            if key == "ours" and (reason := engine.why_not_fused(stack.model, stack.x)) is not None:
                raise RuntimeError(f"not fused: {reason}")
            row.errors[key] = stack.check(exact)
            found[key] = stack
        except Exception as trouble:  # a peer that cannot is a cell of the table, not the end of it
            row.failed[key] = f"{type(trouble).__name__}: {(str(trouble).splitlines() or [''])[0]}"
    plain = max((error for key, error in row.errors.items() if key.startswith("eager")), default=float("inf"))
    for key in list(found):
        if not row.errors[key] <= 2 * plain + FLOOR:
            row.failed[key] = f"gradients are off by {row.errors[key]:.3g}, the plain modules' by {plain:.3g}"
            del found[key]
    return found


def measure(name: str, batch: int, dtype: str, peers: tuple[str, ...], rounds: int) -> Row:
    row = Row(name, batch, dtype)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    stacks = stacks_of(row, ("ours", *peers), "cuda")
    repeats = {}
    for key, stack in list(stacks.items()):
        try:
            milliseconds(stack.step, 3)
            row.mib[key] = stack.step_mib()
            repeats[key] = max(1, round(TURN_MS / milliseconds(stack.step, 3)))
        except torch.cuda.OutOfMemoryError as trouble:
            row.failed[key] = f"OutOfMemoryError: {str(trouble).splitlines()[0]}"
            del stacks[key]
    samples: dict[str, list[float]] = {key: [] for key in stacks}
    for turn in range(rounds):
        keys = list(stacks)
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)] if keys else []:
            samples[key].append(milliseconds(stacks[key].step, repeats[key]))
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
    heads = (
        "model",
        "batch",
        "type",
        *PEERS,
        "ours",
        "images/s",
        "vs the best",
        "MiB of a step",
        "over the plain",
    )
    lines = []
    for row in rows:
        cells = [
            f"{row.ms[key]:.2f}" if key in row.ms else "failed" if key in row.failed else ""
            for key in (*PEERS, "ours")
        ]
        last = [
            f"{1e3 * row.batch / row.ms['ours']:.0f}" if "ours" in row.ms else "",
            f"{row.best:.2f}x" if row.best else "",
            f"{row.mib['ours']:.0f}" if "ours" in row.mib else "",
            f"{row.memory:.2f}" if row.memory else "",
        ]
        lines.append([row.model, row.batch, row.dtype, *cells, *last])
    about = (
        "Median milliseconds of a training step; `vs the best`: the best peer's time over ours; memory of a "
        "step: gradients and what is kept for backward, ours, and over the smaller of the plain layouts'.\n\n"
    )
    return job.heading(results) + about + job.table(heads, lines)


def rehearsal(name: str, batch: int, dtype: str) -> str:
    """A row without a GPU: the launches of a step, on tensors without memory."""
    found = ahead.training_launches_of(name, batch, DTYPES[dtype])
    return f"{name} batch {batch} {dtype}: {len(found)} launches of a training step ready"


def main() -> None:
    parser = job.parser("bench.gpu.train", __doc__, DEFAULT)
    parser.set_defaults(batch=[128], dtype=["bfloat16", "float32", "float16"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    work = job.Job(options, markdown, rehearsal)
    for case in work.cases():
        row = measure(*case, tuple(options.peers), options.rounds)
        work.add(asdict(row))
        best = f"{row.best:.2f}x the best peer" if row.best else f"failed: {row.failed}"
        print("{} batch {} {}: ".format(*case) + best, flush=True)


if __name__ == "__main__":
    main()
