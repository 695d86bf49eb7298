"""What each step of a plan costs, what was fused into it, how near it comes to its bound, and what refused.

The bound of a step is the longer of two times: that of the products of its own algorithm (Winograd's are
fewer than the plain convolution's) at the measured peak of multiply-adds, and that of reading each operand
and writing the result once at the measured speed of copying. Maps that stay in caches are faster than that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import _ext
from . import explain_views, gpu_peaks
from .costs import costs, share_of_products
from .plan import Plan, Step
from .run_cpu import Runner
from .run_cuda import CudaRunner

MIB = float(1 << 20)


@dataclass
class Row:
    """One step, all chunks together.

    fused: the names of what became part of it. gflops: of the plain algorithm. gbps: of the least traffic.
    of_bound: its bound over its time; 0 where its work is not known, above 1 where it is beyond the bound.
    detail: the algorithm and its tasks. isa: the instruction set, "PyTorch" for a call of PyTorch.
    refusals: kernels that declined, and why. missed: rewrites that left this a step of its own, and why.
    """

    name: str
    kernel: str
    fused: list[str]
    ms: float
    gflops: float
    gbps: float
    of_bound: float
    detail: str = ""
    refusals: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    isa: str = ""

    @property
    def bound_ms(self) -> float:
        """At most the time it took; all of it where its work is not known."""
        return self.ms * (min(self.of_bound, 1.0) or 1.0)

    @property
    def sentences(self) -> list[str]:
        """Everything that said no."""
        return [*(f"not fused: {why}" for why in self.missed), *(f"declined: {why}" for why in self.refusals)]


@dataclass
class Explanation:
    """`str()` is plain text, rich prints a table. `reason` says why there is no plan and are no rows."""

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

    @property
    def bound_ms(self) -> float:
        """The sum of the bounds; a step beyond its own, or without a known one, counts with its time."""
        return sum(row.bound_ms for row in self.rows)

    def head(self) -> list[str]:
        """Plan, machine and first call, a line each; the reason where there is no plan."""
        if self.plan is None:
            return [f"no plan: {self.reason}"]
        seconds = self.plan.seconds
        narrow = f" ({self.peak_bf16_gflops:.0f} in bfloat16)" if self.peak_bf16_gflops else ""
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        return [
            plan_summary(self.plan),
            f"machine: {self.isa}{threads}, measured peak"
            f" {self.peak_gflops:.0f} GFLOP/s{narrow}, copy {self.copy_gbps:.0f} GB/s",
            f"first call: {sum(seconds.values()):.2f} s ({parts})",
        ]

    def foot(self) -> list[str]:
        """Sums over the steps."""
        if self.plan is None:
            return []
        flops = sum(r.gflops * r.ms for r in self.rows) * 1e6
        rate = flops / (self.ms * 1e6) if self.ms else 0.0
        share = f", {self.bound_ms / self.ms:.0%} of the bound" if self.ms else ""
        return [
            f"sum of the steps: {self.ms:.2f} ms, {flops / 1e9:.2f} GFLOP, {rate:.3g} GFLOP/s{share}",
            f"activation memory: arena {self.plan.arena_bytes / MIB:.1f} MiB; all feature maps together"
            f" {self.plan.activation_bytes / MIB:.1f} MiB; packed weights {self.weight_bytes / MIB:.1f} MiB",
        ]

    def __str__(self) -> str:
        return explain_views.text(self)

    def __rich__(self) -> Any:
        return explain_views.rich_table(self)

    def to_html(self, path: str | PathLike[str] | None = None, title: str = "fast_backbones plan") -> str:
        """The table as a page that needs nothing beside itself, with bars for shares of time and bound.

        path: where to write it, too. Returns the page. OSError where it cannot be written.
        """
        page = explain_views.html(self, title)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def to_png(self, path: str | PathLike[str], title: str = "fast_backbones plan") -> None:
        """A chart of the steps: time, and the part of it that the bound would take.

        RuntimeError without matplotlib (`pip install 'fast-backbones[plots]'`), ValueError where there is no
        plan, OSError where the file cannot be written.
        """
        if self.plan is None:
            raise ValueError(f"nothing to draw, no plan: {self.reason}")
        explain_views.png(self, path, title)


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
    chunks: dict[int, tuple[Step, list[dict[str, Any]]]] = {}
    for step, measured in runner.profile(x, repeats):
        chunks.setdefault(id(step), (step, []))[1].append(measured)
    for step, measurements in chunks.values():
        isa, detail = native.isa() if step.native else "PyTorch", str(measurements[0]["detail"])
        detail = detail.removeprefix(isa).lstrip()
        found.rows.append(_row(step, measurements, found, isa, detail))
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
        major, minor = torch.cuda.get_device_capability()
        for bound in launches.bound:
            steps = [step for step in (bound.first, bound.step) if step is not None]
            every = [costs(runner.plan, step, x.element_size()) for step in steps]
            flops, moved = (sum(numbers) for numbers in zip(*every))
            ms = gpu_peaks.usual(partial(launches.run_step, bound), calls=20, rounds=repeats)
            tiles = getattr(bound.launch, "constants", {})
            sizes = "x".join(str(value) for key, value in tiles.items() if key.startswith("BLOCK"))
            detail = bound.how if not sizes or sizes in bound.how else f"{bound.how} {sizes}"
            measured = {"ms": ms, "flops": flops, "bytes": moved}
            found.rows.append(_row(bound.step, [measured], found, f"sm_{major}{minor}", detail))
    return found


def _row(step: Step, measurements: list[dict[str, Any]], machine: Explanation, isa: str, detail: str) -> Row:
    ms = sum(m["ms"] for m in measurements)
    seconds = max(ms, 1e-9) * 1e-3
    gflops = sum(m["flops"] for m in measurements) / seconds * 1e-9
    gbps = sum(m["bytes"] for m in measurements) / seconds * 1e-9
    peak = machine.peak_bf16_gflops if step.params.get("bf16") else machine.peak_gflops
    of_bound = max(gflops * share_of_products(detail) / peak, gbps / machine.copy_gbps)
    name = step.name or step.attrs.get("label", step.op)
    kernel = f"{step.kernel} {step.op}" if step.kernel == "aten" and step.op != "aten" else _kernel_name(step)
    return Row(name, kernel, step.fused, ms, gflops, gbps, of_bound, detail, step.refusals, step.missed, isa)


def _kernel_name(step: Step) -> str:
    if step.call is None:
        return step.kernel
    target = step.call[0]
    return str(getattr(target, "__name__", target)) if "." not in str(target) else str(target)
