"""What each step of a plan costs, and what share of the machine's peak it reaches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..kernels import _ext
from . import gpu_peaks
from .costs import costs
from .plan import Plan, Step
from .run_cpu import Runner
from .run_cuda import CudaRunner

MIB = float(1 << 20)


@dataclass
class Row:
    """One step, all chunks together. `peak`: the larger of its shares of peak arithmetic and copy speed."""

    name: str
    kernel: str
    fused: list[str]
    ms: float
    gflops: float
    gbps: float
    peak: float
    detail: str = ""
    refusals: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        numbers = (f"{self.ms:.3f}", _number(self.gflops), f"{self.gbps:.1f}", f"{self.peak:.0%}")
        return (self.name, self.kernel, " + ".join(self.fused), *numbers, self.detail)


@dataclass
class Explanation:
    """`str()` prints a table. `reason` says why there is no plan; then there are no rows."""

    reason: str | None = None
    plan: Plan | None = None
    rows: list[Row] = field(default_factory=list)
    isa: str = ""
    threads: int = 0
    peak_gflops: float = 0.0
    peak_bf16_gflops: float = 0.0  # of products of bfloat16; 0: the plan has none
    copy_gbps: float = 0.0
    weight_bytes: int = 0

    @property
    def ms(self) -> float:
        """The sum over the steps, each run alone; a forward overlaps them and is a little faster."""
        return sum(row.ms for row in self.rows)

    def __str__(self) -> str:
        if self.plan is None:
            return f"no plan: {self.reason}"
        return "\n".join([*self._head(), "", *self._table(), "", *self._foot()])

    def _head(self) -> list[str]:
        plan, seconds = self.plan, self.plan.seconds if self.plan else {}
        assert plan is not None
        narrow = f" ({self.peak_bf16_gflops:.0f} in bfloat16)" if self.peak_bf16_gflops else ""
        parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        return [
            plan_summary(plan),
            f"machine: {self.isa}{f', {self.threads} threads' if self.threads else ''}, measured peak"
            f" {self.peak_gflops:.0f} GFLOP/s{narrow}, copy {self.copy_gbps:.0f} GB/s",
            f"first call: {sum(seconds.values()):.2f} s ({parts})",
        ]

    def _table(self) -> list[str]:
        heads = ("step", "kernel", "fused", "ms", "GFLOP/s", "GB/s", "peak", "how")
        lines = [row.cells() for row in self.rows]
        widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
        rule = tuple("-" * width for width in widths)
        return [_aligned(line, widths) for line in [heads, rule, *lines]]

    def _foot(self) -> list[str]:
        plan = self.plan
        assert plan is not None
        flops = sum(r.gflops * r.ms for r in self.rows) * 1e6
        rate = flops / (self.ms * 1e6) if self.ms else 0.0
        foot = [
            f"sum of the steps: {self.ms:.2f} ms, {flops / 1e9:.2f} GFLOP, {_number(rate)} GFLOP/s",
            f"activation memory: arena {plan.arena_bytes / MIB:.1f} MiB; all feature maps together"
            f" {plan.activation_bytes / MIB:.1f} MiB; packed weights {self.weight_bytes / MIB:.1f} MiB",
        ]
        said = [f"  {row.name}: {sentence}" for row in self.rows for sentence in row.refusals]
        return [*foot, "", "declined:", *said] if said else foot


def plan_summary(plan: Plan) -> str:
    """The plan in a line: steps by kernel, rewrites, arena."""
    kinds: dict[str, int] = {}
    for step in plan.steps:
        kinds[step.kernel] = kinds.get(step.kernel, 0) + 1
    steps = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))
    fused = sum(plan.rewrites.values())
    return (
        f"batch {plan.batch}: {len(plan.steps)} steps ({steps}), {fused} operations fused away,"
        f" arena {plan.arena_bytes / MIB:.1f} MiB instead of {plan.activation_bytes / MIB:.1f} MiB"
    )


def explain(runner: Runner | CudaRunner | str, x: Tensor, repeats: int) -> Explanation:
    """Profile a runner on x; a sentence instead of a runner becomes an Explanation without rows."""
    if isinstance(runner, str):
        return Explanation(reason=runner)
    if isinstance(runner, CudaRunner):
        return explain_on_gpu(runner, x, repeats)
    native = _ext.require()
    narrow = any(step.params.get("bf16") for step in runner.plan.steps)
    found = Explanation(
        plan=runner.plan,
        isa=native.isa(),
        threads=torch.get_num_threads(),
        peak_gflops=native.peak_gflops(),
        copy_gbps=native.copy_gbps(),
        peak_bf16_gflops=native.peak_gflops(bf16=True) if narrow else 0.0,
        weight_bytes=sum({id(p): p.bytes for p in runner.weights}.values()),
    )
    chunks: dict[int, tuple[Step, list[dict[str, float]]]] = {}
    for step, measured in runner.profile(x, repeats):
        chunks.setdefault(id(step), (step, []))[1].append(measured)
    for step, measurements in chunks.values():
        found.rows.append(_row(step, measurements, found))
    return found


def explain_on_gpu(runner: CudaRunner, x: Tensor, repeats: int) -> Explanation:
    """Every launch timed alone, on the maps that it has in the network; the graph of a forward saves the gaps
    between."""
    with torch.cuda.device(x.device), torch.no_grad():
        device = torch.cuda.current_device()
        found = Explanation(
            plan=runner.plan,
            isa=torch.cuda.get_device_name(),
            peak_gflops=gpu_peaks.matrix_rate(device, x.dtype) * 1e-9,
            copy_gbps=gpu_peaks.copy_bandwidth(device) * 1e-9,
            weight_bytes=sum(tensor.nbytes for tensor in runner.weights.all()),
        )
        launches = runner.launch_list(x)
        launches.compile()
        launches.run()
        for bound in launches.bound:
            steps = [step for step in (bound.first, bound.step) if step is not None]
            every = [costs(runner.plan, step, x.element_size()) for step in steps]
            flops, moved = (sum(numbers) for numbers in zip(*every))
            ms = gpu_peaks.usual(partial(launches.run_step, bound), calls=20, rounds=repeats)
            tiles = getattr(bound.launch, "constants", {})
            sizes = "x".join(str(value) for key, value in tiles.items() if key.startswith("BLOCK"))
            detail = bound.how if not sizes or sizes in bound.how else f"{bound.how} {sizes}"
            measured = {"ms": ms, "flops": flops, "bytes": moved, "detail": detail}
            found.rows.append(_row(bound.step, [measured], found))
    return found


def _row(step: Step, measurements: list[dict[str, float]], machine: Explanation) -> Row:
    ms = sum(m["ms"] for m in measurements)
    seconds = max(ms, 1e-9) * 1e-3
    gflops = sum(m["flops"] for m in measurements) / seconds * 1e-9
    gbps = sum(m["bytes"] for m in measurements) / seconds * 1e-9
    peak = machine.peak_bf16_gflops if step.params.get("bf16") else machine.peak_gflops
    share = max(gflops / peak, gbps / machine.copy_gbps)
    detail = str(measurements[0]["detail"])
    name = step.name or step.op
    kernel = f"{step.kernel} {step.op}" if step.kernel == "aten" and step.op != "aten" else _kernel_name(step)
    return Row(name, kernel, step.fused, ms, gflops, gbps, share, detail, step.refusals)


def _kernel_name(step: Step) -> str:
    if step.call is None:
        return step.kernel
    target = step.call[0]
    return str(getattr(target, "__name__", target)) if "." not in str(target) else str(target)


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    """Words to the left, numbers to the right."""
    numbers = range(3, len(cells) - 1)
    padded = [
        cell.rjust(w) if i in numbers else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths))
    ]
    return "  ".join(padded).rstrip()


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
