"""How the cost of a model grows with the work: python -m bench.scaling resnet50 --threads 1 2

    batch      own input size, forwards of 1 .. 64 images
    size       one image of 64 .. 512 pixels a side; a size that the model refuses is a line that says so
    callers    one model object called by several Python threads at once, an image each, torch threads 1

For batch and size the peers are compared with the plain modules in float32, then timed in turns. Each caller
has an image of its own, and each output is compared bit for bit with that of a single call, inside the time.

A JSON file with all rounds and a Markdown file with the tables go to --out, rewritten after each cell
of batch and size and after all callers.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import math
import re
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fast_backbones as fb

from . import machine
from .compare import BEST, Comparison, Error, Tell, check
from .files import write_results
from .peer import Peer, as_list, plain
from .peers import PEERS, Eager, Ours, make_peers
from .precision import PRECISIONS
from .report import SHORT, drawing, round_trip
from .show import milliseconds, progress
from .subject import input_size, make_input, make_model
from .timing import Candidate, measure, wait_until_quiet

DEFAULTS = {"threads": [1, 2, 4], "batch": [1, 2, 4, 8, 16, 32, 64]}
DEFAULTS |= {"size": [64, 128, 224, 320, 512], "callers": [1, 2, 4]}
ROUNDS = 3  # at least so many for a cell; callers have just as many
FLOAT32 = PRECISIONS["highest"]
GROWTH = "- threads {threads}, {stack}: time per {unit} at {to} {unit}s is {ratio:.2f} times that at {from}"
ANY = Error(math.inf, math.inf)  # twice PyTorch's own error needs float64, which bench.models computes


def count_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """2 x multiply-adds of a forward of the plain modules; on the meta device nothing is computed."""
    module = plain(model).to("meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(torch.empty(*shape, device="meta"))
    return counter.get_total_flops()


def measure_cell(model: nn.Module, x: Tensor, peers: list[Peer], budget: float, tell: Tell) -> dict:
    """Check and time the peers on one input. Where the plain modules raise, `sentence` is the first line."""
    n, _, h, w = x.shape
    row = {"threads": torch.get_num_threads(), "batch": n, "height": h, "width": w, "pixels": h * w}
    tell(0.0, "plain modules")
    try:
        with torch.inference_mode():
            right = as_list(plain(model)(x))
    except (ValueError, RuntimeError) as problem:
        return row | {"peers": {}, "sentence": (str(problem) or repr(problem)).splitlines()[0]}
    flops, trip = count_flops(model, x.shape), machine.core_round_trip_ns()
    entries, calls, session = [], [], None
    for peer in peers:
        tell(0.0, f"preparing {peer.name}{peer.patience}")
        entry, call = check(peer, model, x, right, ANY, FLOAT32)
        entries.append(entry)
        calls += [Candidate(peer.key, call)] if call is not None else []
    if calls:
        session = measure(
            calls, budget=budget, min_rounds=ROUNDS, progress=lambda share, key: tell(share, f"timing {key}")
        )
    found = Comparison(n, entries, ANY, session).as_dict()
    for p in found["peers"].values():
        if p["status"] == "timed":
            p |= {"images_per_s": n * 1e3 / p["median_ms"], "gflops": flops * 1e-6 / p["median_ms"]}
    row |= {"sentence": "", "flops": flops, "peers": found["peers"], "best_other": found["claims"].get(BEST)}
    return row | {"timing": found["timing"], "core_round_trip_ns": [trip, machine.core_round_trip_ns()]}


def bits(outputs: object) -> list[Tensor]:
    """As integers: a NaN equals itself, 0 and -0 differ."""
    return [y.view(torch.int32) for y in as_list(outputs)]


def together(module: Callable, inputs: list, single: list, seconds: float) -> tuple[float, int, int]:
    """A thread per input calls the module for so long: (images/s of all, calls, those with other bits)."""
    start = threading.Barrier(len(inputs))

    def caller(x: Tensor, right: list[Tensor]) -> tuple[float, int, int]:
        torch.set_num_threads(1)  # OpenMP's number belongs to the calling thread
        calls, different, spent = 0, 0, 0.0
        with torch.inference_mode():
            start.wait()
            begin = time.perf_counter()
            while spent < seconds:
                different += not all(map(torch.equal, bits(module(x)), right))
                calls, spent = calls + 1, time.perf_counter() - begin
        return calls / spent, calls, different

    with ThreadPoolExecutor(len(inputs)) as pool:  # each caller's rate ends with its own last call
        rates, calls, different = zip(*pool.map(caller, inputs, single))
    return sum(rates), sum(calls), sum(different)


def measure_callers(model: nn.Module, peers: list[Peer], counts: list, budget: float, tell: Tell) -> list:
    """A row per peer and number of callers; the numbers hold 1, which the others are compared with."""
    images = [make_input(model, 1, seed) for seed in range(max(counts))]
    rows, ready = [], {}
    for peer in peers:
        tell(0.0, f"preparing {peer.name}")
        with torch.inference_mode():
            right = as_list(plain(model)(images[0]))
        entry, _ = check(peer, model, images[0], right, ANY, FLOAT32)
        row = {"peer": peer.key, "status": entry.status, "sentence": entry.sentence}
        rows += [row | {"callers": k, "rates": [], "calls": 0, "different": 0} for k in counts]
        module, layout = plain(model), getattr(peer, "memory_format", torch.contiguous_format)
        module = module.model if peer.key == "ours" else module.to(memory_format=layout)
        inputs = [x.clone(memory_format=layout) for x in images]
        with torch.inference_mode():
            ready[peer.key] = module, inputs, [bits(module(x)) for x in inputs]
    timed = [row for row in rows if row["status"] == "timed"]
    for i in range(ROUNDS):
        for row in timed[i:] + timed[:i]:
            k, (module, inputs, single) = row["callers"], ready[row["peer"]]
            tell(i / ROUNDS, f"timing {row['peer']}")
            wait_until_quiet()
            rate, calls, different = together(module, inputs[:k], single[:k], budget / ROUNDS)
            row["rates"].append(rate)
            row |= {"calls": row["calls"] + calls, "different": row["different"] + different}
    alone = {row["peer"]: row["rates"] for row in timed if row["callers"] == 1}
    for row in timed:
        ratios = [rate / one for rate, one in zip(row["rates"], alone[row["peer"]])]
        row |= {"images_per_s": statistics.median(row["rates"]), "speed_up": statistics.median(ratios)}
    return rows


def series(rows: list[dict], threads: int, key: str, work: str, value: str) -> dict[int, float]:
    """A peer's value by the amount of work, of the cells that were timed."""
    rows = [row for row in rows if row["threads"] == threads and value in row["peers"].get(key, {})]
    return {row[work]: row["peers"][key][value] for row in rows}


def growth(found: dict, threads: int, key: str) -> list[dict]:
    """Time per image, largest batch to 1, and per pixel, largest size to own, where these were timed."""
    own, rows = math.prod(found["input_size"][1:]), []
    images = series(found["batch"], threads, key, "batch", "median_ms")
    pixels = series(found["size"], threads, key, "pixels", "median_ms")
    for unit, ms, base in (("image", images, 1), ("pixel", pixels, own)):
        one, most = ms.get(base, images.get(1)), max(ms, default=base)
        if one is not None and most != base:
            row = {"threads": threads, "peer": key, "unit": unit, "from": base, "to": most}
            rows.append(row | {"ratio": ms[most] / most / (one / base)})
    return rows


def start_model(name: str) -> dict:
    return {"model": name, "input_size": [], "batch": [], "size": [], "callers": [], "growth": []}


def measure_model(
    found: dict, options: argparse.Namespace, console: Console, save: Callable[[], object]
) -> None:
    """Fill the sections of what start_model made, saved after each cell. torch's threads are put back."""
    before, name, model = torch.get_num_threads(), found["model"], make_model(found["model"])
    own = found["input_size"] = list(input_size(model))
    plan = [("batch", t, (b, *own)) for t in options.threads for b in options.batch]
    plan += [("size", t, (1, own[0], s, s)) for t in options.threads for s in options.size]
    try:
        for i, (section, threads, shape) in enumerate(plan):
            torch.set_num_threads(threads)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            title = f"{name}, threads {threads}, {list(shape)} ({i + 1} of {len(plan)})"
            with progress(console, title) as tell:
                peers = make_peers(options.peers, threads)
                found[section].append(measure_cell(model, x, peers, options.budget, tell))
            save()
            gc.collect()
        torch.set_num_threads(1)
        peers = [p for p in make_peers(options.peers, 1) if isinstance(p, (Eager, Ours))]
        with progress(console, name) as tell:
            found["callers"] = measure_callers(model, peers, options.callers, options.budget, tell)
        gc.collect()
    finally:
        torch.set_num_threads(before)
    pairs = itertools.product(options.threads, [p.key for p in make_peers(options.peers)])
    found["growth"] = [row for t, key in pairs for row in growth(found, t, key)]
    save()


def lines_of(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, or nothing without rows."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows) if rows] + [""]


def cell_table(rows: list[dict], section: str) -> list[str]:
    """One row per cell, then a line for each reason why something has no time."""
    keys = list(dict.fromkeys(key for row in rows for key in row["peers"]))
    rates = [h for key in keys for h in (f"{SHORT.get(key, key)}, ms", "images/s", "GFLOP/s")]
    cells, said = [], []
    for row in rows:
        what = str(row["batch"]) if section == "batch" else f"{row['height']}x{row['width']}"
        if row["sentence"]:
            said.append(f"- {section} {what}: not taken by the model: {row['sentence']}")
            continue
        line = [str(row["threads"]), what, f"{row['flops'] * 1e-9:.4g}"]
        for p in (row["peers"][key] for key in keys):
            values = [milliseconds(p[k]) if k in p else "" for k in ("median_ms", "images_per_s", "gflops")]
            line += values if p["status"] == "timed" else [p["status"], "", ""]
            if p["status"] != "timed":
                at = f"threads {row['threads']}, {section} {what}"
                said.append(f"- {at}: {p['name']} {p['status']}: {p['sentence']}")
        best, timing = row["best_other"], row["timing"]
        line.append(f"{best['ratio']:.2f}x {SHORT.get(best['peer'], best['peer'])}" if best else "")
        line.append(f"{timing['disturbed_share']:.0%} of {len(timing['rounds'])}" if timing else "")
        cells.append([*line, round_trip(row)])
    head = ["threads", section, "GFLOP", *rates, "ours against best other", "disturbed", "core to core, ns"]
    return [*lines_of(head, cells), *dict.fromkeys(said), ""]


def caller_table(rows: list[dict]) -> list[str]:
    cells = []
    for row in rows:
        line = [f"{row['status']}: {row['sentence']}", "", ""]
        if row["status"] == "timed":
            same = "NO: {different} of {calls} differ" if row["different"] else "yes, all {calls}"
            line = [milliseconds(row["images_per_s"]), f"{row['speed_up']:.2f}x", same.format(**row)]
        cells.append([SHORT[row["peer"]], str(row["callers"]), *line])
    return lines_of(["stack", "callers", "images/s together", "over one caller", "same bits"], cells)


def markdown(results: dict) -> str:
    """The whole report of one result file."""
    facts = results["machine"] | {"threads": ", ".join(map(str, results["options"]["threads"]))}
    lines = [f"# {machine.headline(facts)}", "", f"`{results['command']}`", ""]
    lines += ["Median milliseconds of a forward, float32; ratios are medians over interleaved rounds."]
    lines += ["GFLOP: 2 x multiply-adds of convolutions and matrix products, of the direct algorithm."]
    lines += [f"More threads or callers than {facts['cpus']} CPUs share these.", ""]
    for found in results["models"]:
        lines += [f"## {found['model']}", "", f"Batch, images of {found['input_size']}:", ""]
        lines += [*cell_table(found["batch"], "batch"), "Size, batch 1:", ""]
        lines += cell_table(found["size"], "size")
        lines += ["Callers of one model object at once, batch 1, torch threads 1:", ""]
        lines += [*caller_table(found["callers"]), "Growth; 1 where time grows as the work does:", ""]
        lines += [*(GROWTH.format(**row, stack=SHORT.get(row["peer"])) for row in found["growth"]), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def draw(results: dict, path: Path) -> None:
    """Ours, two panels a model: images/s over the batch, ms over pixels; a line per number of threads."""
    pyplot, models = drawing(), results["models"]
    size = (9, 3.6 * len(models))
    figure, panels = pyplot.subplots(len(models), 2, figsize=size, layout="constrained", squeeze=False)
    kinds = (("batch", "batch", "images_per_s"), ("size", "pixels", "median_ms"))
    for axes, (found, (section, work, y)) in zip(panels.flat, itertools.product(models, kinds)):
        for threads in results["options"]["threads"]:
            points = series(found[section], threads, "ours", work, y)
            if points:
                axes.plot(*zip(*points.items()), marker="o", label=f"threads {threads}")
                axes.legend(fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel=work, ylabel=y.replace("_", " "), title=found["model"])
        marks = sorted({row[work] for row in found[section]})
        axes.set_xticks([], minor=True)
        axes.set_xticks(marks, list(map(str, marks)), fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n\n")[0])
    p.add_argument("models", nargs="+", help="names from fast_backbones.list_models()")
    for name, numbers in DEFAULTS.items():
        said = f"default {' '.join(map(str, numbers))}" + ("; 1 is always added" if name == "callers" else "")
        p.add_argument(f"--{name}", type=int, nargs="+", default=numbers, help=said)
    known = f"ours and any of: {', '.join(PEERS)} (default ours channels_last)"
    p.add_argument("--peers", nargs="+", default=["ours", "channels_last"], metavar="PEER", help=known)
    p.add_argument("--budget", type=float, default=2.0, help="seconds of timing per cell (default 2)")
    p.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default bench/results)")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw to this PNG or SVG (needs matplotlib)")
    return p


def check_options(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, as a sentence, before anything expensive starts."""
    for name in DEFAULTS:
        if min(getattr(options, name)) < 1:
            return f"--{name} {min(getattr(options, name))}: at least 1"
    if not 0 < options.budget < math.inf:
        return f"--budget {options.budget:g}: seconds above 0"
    if "ours" not in options.peers:
        return f"--peers {' '.join(options.peers)}: ours must be among them"
    if options.plot and options.plot.suffix.lower() not in (".png", ".svg"):
        return f"--plot {options.plot}: a name that ends in .png or .svg"
    try:
        for name in options.models:
            fb.model_info(name)
        missing = next(p for p in make_peers(options.peers) if p.key == "ours").missing()
        for path in (options.out, *([options.plot.parent] if options.plot else [])):
            path.mkdir(parents=True, exist_ok=True)
        _ = drawing() if options.plot else None
    except (ValueError, RuntimeError) as problem:
        return str(problem)
    except OSError as problem:
        return f"--out or --plot: {problem}"
    return f"--peers ours: {missing}" if missing else None


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when ours was wrong or had other bits; 2 for bad options; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    problem = check_options(options)
    if problem is not None:
        print(f"python -m bench.scaling: {problem}", file=sys.stderr)
        return 2
    options.callers = [1, *options.callers]
    for key in DEFAULTS:
        setattr(options, key, sorted(set(getattr(options, key))))
    console, facts = Console(stderr=True), machine.describe(max(options.threads))
    results = {"command": f"python -m bench.scaling {shlex.join(argv)}", "machine": facts, "models": []}
    results["options"] = {key: getattr(options, key) for key in (*DEFAULTS, "peers", "budget")}
    name = f"scaling-{machine.short_cpu(facts)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    try:
        for model in dict.fromkeys(options.models):
            results["models"].append(start_model(model))
            measure_model(
                results["models"][-1],
                options,
                console,
                lambda: write_results(results, markdown(results), options.out, name),
            )
            console.print(f"{options.out / name}.json and .md", markup=False, highlight=False, soft_wrap=True)
            if options.plot:
                draw(results, options.plot)
    except KeyboardInterrupt:
        return 130
    print(markdown(results), end="")
    ours = [row["peers"].get("ours", {}) for m in results["models"] for row in (*m["batch"], *m["size"])]
    ours += [row for m in results["models"] for row in m["callers"] if row["peer"] == "ours"]
    return int(any(p.get("status") == "wrong" or p.get("different") for p in ours))


if __name__ == "__main__":
    raise SystemExit(main())
