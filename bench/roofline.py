"""Each step of a plan on this machine's roofline: python -m bench.roofline resnet50 --batch 16

The roof is what `explain` measures: the peak of the arithmetic and the speed of copying memory, on the
threads that run the plan. A step does so many FLOPs with at least so many bytes of traffic; its bound is the
time that the slower of the two would take at these rates, its share of the bound is how near it comes. Two
kinds of points can lie above the roof: Winograd convolutions, as FLOPs are counted for the direct algorithm,
and steps whose data stays in the caches, which are faster than memory.

The table lists the steps by the milliseconds that a forward would gain if they ran at their bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import machine
from .report import drawing
from .show import milliseconds
from .subject import make_input, make_model

DEFAULT_OUT = "build/bench"
BUSY = 0.5  # load average of the last minute from which steps of microseconds wait for other processes


@dataclass(frozen=True)
class Point:
    """One step: what it does, how fast, and how far from its bound."""

    name: str
    kernel: str
    ms: float
    gflops: float
    gbps: float
    intensity: float  # FLOP per byte; 0 for steps that only move data
    limit: str  # "arithmetic" or "memory": which of the two its bound comes from
    share: float  # bound / time; above 1 for points above the roof

    @property
    def bound_ms(self) -> float:
        return self.ms * self.share

    @property
    def gain_ms(self) -> float:
        """What a forward would gain if this step ran at its bound; 0 where it is beyond it."""
        return max(self.ms - self.bound_ms, 0.0)


def points(explanation) -> list[Point]:
    """The steps of an `engine.explain` result in the plan's order. ValueError when there is no plan."""
    if explanation.plan is None:
        raise ValueError(f"no plan, so no steps to draw: {explanation.reason}")
    found = []
    for row in explanation.rows:
        arithmetic = row.gflops / explanation.peak_gflops
        memory = row.gbps / explanation.copy_gbps
        limit = "arithmetic" if arithmetic >= memory else "memory"
        intensity = row.gflops / row.gbps if row.gbps else 0.0
        found.append(
            Point(
                row.name, row.kernel, row.ms, row.gflops, row.gbps, intensity, limit, max(arithmetic, memory)
            )
        )
    return found


def by_gain(steps: list[Point]) -> list[Point]:
    """Those with most to gain first; steps whose traffic is not known are last."""
    return sorted(steps, key=lambda p: -(p.gain_ms if p.share > 0 else 0.0))


def summary(steps: list[Point]) -> dict[str, float]:
    """All steps together; steps that PyTorch runs have no known traffic and count with their whole time."""
    known = [p for p in steps if p.share > 0]
    return {
        "ms": sum(p.ms for p in steps),
        "bound_ms": sum(min(p.bound_ms, p.ms) for p in known) + sum(p.ms for p in steps if p.share == 0),
        "gain_ms": sum(p.gain_ms for p in known),
        "steps_beyond": sum(p.share > 1 for p in known),
    }


def table(steps: list[Point], most: int) -> Table:
    """The steps with most to gain."""
    shown = by_gain(steps)[:most]
    found = Table(title="furthest from their bound", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for head in ("step", "kernel"):
        found.add_column(head, overflow="fold")
    for head in ("ms", "FLOP/byte", "GFLOP/s", "GB/s"):
        found.add_column(head, justify="right", no_wrap=True)
    found.add_column("limit")
    for head in ("of bound", "ms to gain"):
        found.add_column(head, justify="right", no_wrap=True)
    for p in shown:
        rates = (f"{p.intensity:.1f}", f"{p.gflops:.1f}", f"{p.gbps:.1f}")
        share = f"{p.share:.0%}" if p.share else "unknown"
        gain = milliseconds(p.gain_ms) if p.share else ""
        found.add_row(p.name, p.kernel, milliseconds(p.ms), *rates, p.limit if p.share else "", share, gain)
    return found


def draw(
    steps: list[Point], peak_gflops: float, copy_gbps: float, title: str, path: Path, named: int = 6
) -> None:
    """Points with the area of their time under the roof; names beside those with most to gain.

    Steps without arithmetic have no place on a logarithmic axis; the legend counts them.
    """
    pyplot = drawing()
    figure, axes = pyplot.subplots(figsize=(8.5, 5.2), layout="constrained")
    drawn = [p for p in steps if p.intensity > 0]
    ridge = peak_gflops / copy_gbps
    left = min([ridge / 8, *(p.intensity / 1.5 for p in drawn)])
    right = max([ridge * 8, *(p.intensity * 1.5 for p in drawn)])
    axes.plot([left, ridge, right], [left * copy_gbps, peak_gflops, peak_gflops], color="black", linewidth=1)
    axes.annotate(f"copy {copy_gbps:.0f} GB/s", (left, left * copy_gbps), fontsize=7, va="bottom")
    axes.annotate(
        f"peak {peak_gflops:.0f} GFLOP/s", (right, peak_gflops), fontsize=7, ha="right", va="bottom"
    )
    longest = max((p.ms for p in drawn), default=1.0)
    for i, kernel in enumerate(dict.fromkeys(p.kernel for p in drawn)):
        mine = [p for p in drawn if p.kernel == kernel]
        axes.scatter(
            [p.intensity for p in mine],
            [p.gflops for p in mine],
            s=[12 + 240 * p.ms / longest for p in mine],
            alpha=0.65,
            color=f"C{i}" if i < 10 else None,
            label=f"{kernel} ({len(mine)}, {milliseconds(sum(p.ms for p in mine))} ms)",
        )
    for i, p in enumerate(by_gain(drawn)[:named]):
        place, beside = (p.intensity, p.gflops), (6, 5 if i % 2 else -9)
        axes.annotate(p.name, place, fontsize=6, xytext=beside, textcoords="offset points")
    without = [p for p in steps if p.intensity == 0]
    if without:
        label = f"no arithmetic ({len(without)}, {milliseconds(sum(p.ms for p in without))} ms)"
        axes.plot([], [], " ", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity, FLOP per byte of least traffic")
    axes.set_ylabel("GFLOP/s (Winograd: of the direct algorithm)")
    axes.set_title(title, fontsize=8)
    legend = axes.legend(fontsize=6, loc="lower right")
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([20])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 when the options make no sense, there is no plan, or nothing to draw with."""
    import fast_backbones as fb

    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a name from fast_backbones.list_models()")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="default: the CPUs, at most 2")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each step (default 20)")
    parser.add_argument("--most", type=int, default=12, help="rows of the table (default 12)")
    parser.add_argument(
        "--out", type=Path, default=None, help=f"PNG or SVG (default {DEFAULT_OUT}/roofline-MODEL-bBATCH.png)"
    )
    parser.add_argument("--json", action="store_true", help="print all steps as JSON instead of the table")
    options = parser.parse_args(argv)
    for name in ("batch", "repeats", "most"):
        if getattr(options, name) < 1:
            return refuse(f"--{name} {getattr(options, name)}: at least 1")
    if options.threads is not None and options.threads < 1:
        return refuse(f"--threads {options.threads}: at least 1")
    threads = options.threads if options.threads is not None else min(2, machine.cpu_count())
    facts = machine.describe(threads)  # with the load that was there before ours
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        drawing()  # before anything is measured
        model = make_model(options.model)
        x = make_input(model, options.batch)
        with torch.inference_mode():
            found = fb.explain(model, x, repeats=options.repeats)
        steps = points(found)
    except (ValueError, RuntimeError) as problem:
        return refuse(str(problem))
    finally:
        torch.set_num_threads(before)
    title = f"{options.model}, batch {options.batch}: {machine.headline(facts)}"
    path = options.out or Path(DEFAULT_OUT) / f"roofline-{options.model}-b{options.batch}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(steps, found.peak_gflops, found.copy_gbps, title, path)
    total = summary(steps)
    if options.json:
        roof = {"peak_gflops": found.peak_gflops, "copy_gbps": found.copy_gbps}
        rows = [asdict(p) | {"bound_ms": p.bound_ms, "gain_ms": p.gain_ms} for p in steps]
        print(
            json.dumps(
                {"machine": facts, "model": options.model, "batch": options.batch}
                | roof
                | total
                | {"steps": rows}
            )
        )
        return 0
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table(steps, options.most))
    console.print(
        f"all {len(steps)} steps: {milliseconds(total['ms'])} ms, each run alone; at their bounds"
        f" {milliseconds(total['bound_ms'])} ms ({total['bound_ms'] / total['ms']:.0%});"
        f" {total['steps_beyond']} beyond the roof of {found.peak_gflops:.0f} GFLOP/s and"
        f" {found.copy_gbps:.0f} GB/s\nchart: {path}",
        highlight=False,
        soft_wrap=True,
    )
    if facts["load_average"][0] > BUSY:
        console.print(
            f"load average {facts['load_average'][0]}: the machine was busy, do not trust peaks and times",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def refuse(sentence: str) -> int:
    print(f"python -m bench.roofline: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
