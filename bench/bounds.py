"""How far models are from what their plans allow: python -m bench.bounds resnext50_32x4d vgg16 --batch 1 16

The bound of a step is the longer of two times: that of the products which its own algorithm makes
(Winograd's are fewer than the plain convolution's), at the measured peak of multiply-adds, and that of
reading each operand and writing the result once, at the measured speed of copying. Maps that stay in caches
are faster than that: a step beyond its bound counts with its own time. A model's bound is the sum of them.

With --against FILE, results of `bench.models`, each line also has the ratio that was measured there (the best
peer's time over ours) and the ratio there would be if every step ran at its bound: what ideal kernels for the
same algorithms could reach. JSON and Markdown go to --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console

from . import machine
from .compare import BEST
from .files import write_results
from .show import milliseconds, progress
from .subject import FLAGSHIPS, make_input, make_model

LISTED = 3  # steps with most to gain in a line


def bounds_of(explanation) -> dict:
    """Times and bounds of the steps of an `engine.explain` result, and their sums.

    ValueError without a plan.
    """
    if explanation.plan is None:
        raise ValueError(f"no plan, so no bounds: {explanation.reason}")
    steps = [
        {"name": row.name, "kernel": row.kernel, "how": row.detail, "ms": row.ms, "bound_ms": row.bound_ms}
        for row in explanation.rows
    ]
    return {
        "ms": explanation.ms,
        "bound_ms": explanation.bound_ms,
        "share": explanation.bound_ms / explanation.ms,
        "peak_gflops": explanation.peak_gflops,
        "copy_gbps": explanation.copy_gbps,
        "steps": steps,
    }


def measured_ratios(files: list[Path]) -> dict[tuple[str, int], tuple[float, str]]:
    """(model, batch) -> (the best peer's time over ours, its name), of the last file that has it.

    ValueError for a file that is none of `bench.models`.
    """
    found = {}
    for file in files:
        try:
            for c in json.loads(file.read_text())["comparisons"]:
                if BEST in c["claims"]:
                    claim = c["claims"][BEST]
                    name = c["peers"][claim["peer"]]["name"]
                    found[c["model"], c["batch"]] = (claim["ratio"], name)
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as problem:
            raise ValueError(f"--against {file}: no result file of bench.models ({problem!r})") from problem
    return found


def line(row: dict) -> list[str]:
    gains = sorted(row["steps"], key=lambda s: s["bound_ms"] - s["ms"])[:LISTED]
    far = "; ".join(
        f"{s['name']} ({s['how'] or s['kernel']}) {s['bound_ms'] / s['ms']:.0%} of {milliseconds(s['ms'])} ms"
        for s in gains
    )
    ratio, best = row.get("ratio"), row.get("ratio_at_bound")
    ratios = [f"{ratio:.2f}x {row['peer']}", f"{best:.2f}x"] if ratio else ["", ""]
    cells = [row["model"], str(row["batch"]), milliseconds(row["ms"]), milliseconds(row["bound_ms"])]
    return [*cells, f"{row['share']:.0%}", *ratios, far]


def markdown(results: dict) -> str:
    """The whole file."""
    head = [
        "model",
        "batch",
        "ms",
        "ms at the bound",
        "share",
        "vs the best peer",
        "at the bound",
        "furthest",
    ]
    rows = [head, ["---"] * len(head), *map(line, results["rows"])]
    how = (
        "Sums over the steps of a plan, each run alone, float32; the bound of a step is its own algorithm's"
        " products at the peak, or its operands and result at the speed of copying, whichever takes longer."
    )
    lines = ["# Bounds", "", machine.headline(results["machine"]), "", f"`{results['command']}`", "", how, ""]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.bounds", description=__doc__.split("\n\n")[0])
    p.add_argument("models", nargs="*", help="registered models (default: the best-known of every family)")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="default 1 16")
    p.add_argument("--threads", type=int, default=None, help="default: the CPUs, at most 2")
    p.add_argument("--repeats", type=int, default=5, help="runs of each step (default 5)")
    p.add_argument("--against", type=Path, nargs="+", default=[], metavar="FILE", help="of bench.models")
    p.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default bench/results)")
    return p


def run(options: argparse.Namespace, command: str, console: Console) -> Path:
    """Every row; the files are written after each."""
    import fast_backbones as fb

    names = [fb.model_info(name).name for name in options.models] or list(FLAGSHIPS)
    ratios = measured_ratios(options.against)
    facts, date = machine.describe(options.threads), datetime.datetime.now()
    stem = f"bounds-{machine.short_cpu(facts)}-{options.threads}t-{date:%Y%m%d-%H%M%S}"
    results, path = {"command": command, "machine": facts, "rows": []}, None
    torch.set_num_threads(options.threads)
    with progress(console, f"{len(names)} models") as tell:
        for i, name in enumerate(names):
            model = make_model(name)
            for batch in options.batch:
                tell(i / len(names), f"{name}, batch {batch}")
                x = make_input(model, batch)
                with torch.inference_mode():
                    model(x)  # caches and clock are warm
                    row = bounds_of(fb.explain(model, x, repeats=options.repeats))
                row = {"model": name, "batch": batch} | row
                if (name, batch) in ratios:
                    ratio, peer = ratios[name, batch]
                    row |= {"ratio": ratio, "peer": peer, "ratio_at_bound": ratio / row["share"]}
                results["rows"].append(row)
                path = write_results(results, markdown(results), options.out, stem)
    return path


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 when the options make no sense or a model has no plan."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    options.threads = min(2, machine.cpu_count()) if options.threads is None else options.threads
    before = torch.get_num_threads()
    try:
        given = {"threads": options.threads, "repeats": options.repeats, "batch": min(options.batch)}
        for key, value in given.items():
            if value < 1:
                raise ValueError(f"--{key} {value}: at least 1")
        path = run(options, f"python -m bench.bounds {shlex.join(argv)}", Console(stderr=True))
    except ValueError as problem:
        print(f"python -m bench.bounds: {problem}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    print(path.with_suffix(".md").read_text(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
