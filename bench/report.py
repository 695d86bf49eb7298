"""Markdown tables and a bar chart from the JSON of `python -m bench.models`.

python -m bench.report bench/results/models-....json              the Markdown table
python -m bench.report ....json ....json                          one table of several runs of the same code
python -m bench.report ....json --brief                           our time and the ratios alone
python -m bench.report ....json --plot models.png                 also a bar chart (needs matplotlib)
python -m bench.report ....json --plot ratios.png --ratios        the best peer against ours, per model
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

from .compare import BEST
from .machine import SAME, headline
from .precision import PRECISIONS, Precision
from .summary import HEAD, disturbed_line, losses, summarise, summary_cells

SHORT = {
    "eager": "eager NCHW",
    "channels_last": "eager channels_last",
    "compile": "torch.compile",
    "autotune": "torch.compile, max-autotune",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ncnn": "ncnn",
    "mnn": "MNN",
    "ours": "fast_backbones",
}


def precision_of(results: dict) -> Precision:
    return PRECISIONS[results["options"].get("precision", "highest")]


def ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def peer_keys(results: dict) -> list[str]:
    """Peers that appear in any comparison, in table order."""
    present = {key for c in results["comparisons"] for key in c["peers"]}
    return [key for key in SHORT if key in present] + sorted(present - SHORT.keys())


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    return ms(row["median_ms"]) if row["status"] == "timed" else row["status"]


def speed_table(results: dict) -> list[str]:
    """Median ms per forward of each stack, and how many times as fast ours is."""
    keys = peer_keys(results)
    claims = list(dict.fromkeys(label for c in results["comparisons"] for label in c["claims"]))
    head = [
        "model",
        "batch",
        *(SHORT.get(k, k) for k in keys),
        *(f"vs {label}" for label in claims),
        "disturbed rounds",
        "core to core, ns",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for c in results["comparisons"]:
        ratios = [f"{c['claims'][label]['ratio']:.2f}x" if label in c["claims"] else "" for label in claims]
        timing = c["timing"]
        share = f"{timing['disturbed_share']:.0%} of {len(timing['rounds'])}" if timing else ""
        row = [
            c["model"],
            str(c["batch"]),
            *(cell(c["peers"].get(k)) for k in keys),
            *ratios,
            share,
            round_trip(c),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def brief_table(results: dict) -> list[str]:
    """Our milliseconds and how many times as fast ours is: what a reader wants first."""
    claims = list(dict.fromkeys(label for c in results["comparisons"] for label in c["claims"]))
    head = ["model", "batch", "ours, ms", *(f"vs {label}" for label in claims)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for c in results["comparisons"]:
        cells = [c["model"], str(c["batch"]), cell(c["peers"].get("ours"))]
        for label in claims:
            claim = c["claims"].get(label)
            name = f" {SHORT.get(claim['peer'], claim['peer'])}" if claim and label == BEST else ""
            cells.append(f"{claim['ratio']:.2f}x{name}" if claim else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def merged(runs: list[dict]) -> dict:
    """Several runs of the same code on the same kind of machine as one; a row measured twice counts once,
    as the last run has it. ValueError where machine, code, precision or the version of a stack differ;
    models, batch sizes, stacks and the time that was spent may."""
    first = runs[0]
    versions: dict[str, str] = {}
    for run in runs:
        for key in (*SAME, "threads"):
            if key not in run["machine"]:
                raise ValueError(f"one of them does not say its {key}")
            if run["machine"][key] != first["machine"][key]:
                raise ValueError(f"{key}: {first['machine'][key]} and {run['machine'][key]}")
        if precision_of(run) is not precision_of(first):
            raise ValueError("they were measured at different precisions")
        for key, peer in ((k, p) for row in run["comparisons"] for k, p in row["peers"].items()):
            if versions.setdefault(key, peer["version"]) != peer["version"]:
                raise ValueError(f"{key} {versions[key]} and {peer['version']}")
    found = {**first, "command": "`, `".join(run["command"] for run in runs)}
    for section in ("comparisons", "memory", "first_call"):
        rows = {(row["model"], row["batch"]): row for run in runs for row in run.get(section, [])}
        found[section] = list(rows.values())
    measured = {(row["model"], row["batch"]) for row in found["comparisons"]}
    failures = [row for run in runs for row in run.get("failures", [])]
    found["failures"] = [row for row in failures if (row["model"], row["batch"]) not in measured]
    return found | {"summary": summarise(found["comparisons"])}


def round_trip(comparison: dict) -> str:
    """A cache line's way to the other core and back, before and after the measurement."""
    return " .. ".join(str(ns) for ns in comparison.get("core_round_trip_ns", []) if ns is not None)


def error_table(results: dict) -> list[str]:
    """Error against float64 (max / rms, relative to the rms of the output); is ours exact enough?"""
    keys = peer_keys(results)
    head = ["model", "batch", *(SHORT.get(k, k) for k in keys), precision_of(results).rule]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for c in results["comparisons"]:
        errors = [(c["peers"].get(k) or {}).get("error") for k in keys]
        cells = [f"{e['max']:.1e} / {e['rms']:.1e}" if e else "" for e in errors]
        verdict = {True: "yes", False: "NO", None: "ours did not run"}[c["parity_2x"]]
        lines.append("| " + " | ".join([c["model"], str(c["batch"]), *cells, verdict]) + " |")
    return lines


def memory_table(rows: list[dict]) -> list[str]:
    """Peak extra MiB of a forward; the last column compares ours with eager's better layout."""
    head = [
        "model",
        "batch",
        "stack",
        "a forward, MiB",
        "first forward",
        "kept after it",
        "share of eager's better",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        for key, r in row["peers"].items():
            share = (
                f"{row['ours_share_of_eager']:.0%}" if key == "ours" and "ours_share_of_eager" in row else ""
            )
            sizes = [f"{r[k]:.0f}" for k in ("forward_mib", "first_mib", "kept_mib")]
            lines.append(
                "| " + " | ".join([row["model"], str(row["batch"]), SHORT[key], *sizes, share]) + " |"
            )
    return lines


def first_call_table(rows: list[dict]) -> list[str]:
    stages = list(dict.fromkeys(s for r in rows for s in r["stages_s"]))
    head = ["model", "batch", "first call, s", *(f"of it {s}" for s in stages), "later calls, ms"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [f"{r['stages_s'][s]:.2f}" if s in r["stages_s"] else "" for s in stages]
        line = [r["model"], str(r["batch"]), f"{r['first_s']:.2f}", *cells, f"{r['later_s'] * 1e3:.1f}"]
        lines.append("| " + " | ".join(line) + " |")
    return lines


def peers_without_time(results: dict) -> list[str]:
    """One line for each reason why a stack has no time."""
    seen = dict.fromkeys(
        f"- {p['name']} {p['status']}: {p['sentence']}"
        for c in results["comparisons"]
        for p in c["peers"].values()
        if p["status"] != "timed"
    )
    return list(seen)


def failures(results: dict) -> list[str]:
    """One line for each model and batch size that could not be measured at all."""
    return [
        f"- {f['model']}, batch {f['batch']} failed: {' / '.join(f['sentence'].splitlines())}"
        for f in results.get("failures", [])
    ]


def summary_lines(results: dict) -> list[str]:
    """Geometric means over the models, wins and losses; nothing for a single model."""
    rows = results.get("summary") or []
    if max((row["models"] for row in rows), default=0) < 2:
        return []
    lines = ["How many times as fast ours is, over the models:", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(summary_cells(row)) + " |" for row in rows]
    return [*lines, "", *(f"- {line}" for line in losses(rows, BEST)), ""]


def settings_lines(results: dict) -> list[str]:
    peers = {k: p for c in results["comparisons"] for k, p in c["peers"].items()}
    return [
        f"- {p['name']} {p['version']}: " + ", ".join(f"{k}={v}" for k, v in p["settings"].items())
        for p in peers.values()
    ]


def brief(results: dict) -> str:
    """The short report: our times, ratios and their means."""
    return "\n".join([*brief_table(results), "", *summary_lines(results)]).rstrip() + "\n"


def markdown(results: dict) -> str:
    """The whole report of one result file."""
    lines = [f"# {headline(results['machine'])}", "", f"`{results['command']}`", ""]
    if results["comparisons"]:
        lines += [
            f"Median milliseconds of a forward, {precision_of(results).words};"
            " ratios are medians over interleaved rounds.",
            "",
        ]
        lines += [*speed_table(results), "", *peers_without_time(results), ""]
        lines += [*failures(results), ""]
        lines += summary_lines(results)
        lines += [disturbed_line(results["comparisons"]) or "", ""]
        lines += [
            "Error against float64, max / rms, relative to the rms of the output:",
            "",
            *error_table(results),
            "",
        ]
    if results.get("memory"):
        lines += [
            "Peak extra memory:",
            "",
            *memory_table(results["memory"]),
            "",
            results["memory"][0]["method"],
            "",
        ]
    if results.get("first_call"):
        lines += ["First call in a fresh process:", "", *first_call_table(results["first_call"]), ""]
    if results["comparisons"]:
        lines += ["Settings:", "", *settings_lines(results), ""]
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


def kernel_table(results: dict) -> list[str]:
    """One row per layer and candidate of a pytest-benchmark file: time, rates, share of measured peaks."""
    head = [
        "op",
        "layer",
        "candidate",
        "median ms",
        "middle half",
        "GFLOP/s",
        "GB/s",
        "of peak",
        "vs reference",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    rows = [(b["extra_info"], b["stats"]) for b in results["benchmarks"] if "candidate" in b["extra_info"]]
    reference = {(i["op"], i["layer"]): s["median"] for i, s in rows if i["candidate"] == "reference"}
    for info, stats in rows:
        rates = (("gflops", "peak_gflops"), ("gbps", "copy_gbps"))
        shares = [info[rate] / info[limit] for rate, limit in rates if info.get(limit)]
        against = reference.get((info["op"], info["layer"]))
        cells = [info["op"], info["layer"], info["candidate"], f"{stats['median'] * 1e3:.4g}"]
        cells += [
            f"{stats['q1'] * 1e3:.4g} .. {stats['q3'] * 1e3:.4g}",
            f"{info['gflops']:.0f}",
            f"{info['gbps']:.1f}",
        ]
        cells += [f"{max(shares):.0%}" if shares else ""]
        cells += [f"{against / stats['median']:.2f}x" if against else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def kernel_markdown(results: dict) -> str:
    """The report of a kernel microbenchmark file."""
    intro = "Batch {batch}, float32; packed: weights packed beforehand, as the engine runs it."
    batches = sorted({b["extra_info"]["batch"] for b in results["benchmarks"] if "batch" in b["extra_info"]})
    intro = intro.format(batch=", ".join(map(str, batches)))
    return "\n".join([f"# {headline(results['machine'])}", "", intro, "", *kernel_table(results)]) + "\n"


def drawing():
    """matplotlib's pyplot, without a display. RuntimeError when matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        raise RuntimeError("drawing needs matplotlib: pip install matplotlib") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(results: dict, path: Path) -> None:
    """Bars of images per second, one group per model and batch."""
    pyplot = drawing()
    keys = peer_keys(results)
    groups = results["comparisons"]
    width = 0.8 / len(keys)
    figure, axes = pyplot.subplots(figsize=(2.5 + 2.4 * len(groups), 4.2), layout="constrained")
    for i, key in enumerate(keys):
        heights = []
        for c in groups:
            row = c["peers"].get(key)
            heights.append(c["batch"] * 1e3 / row["median_ms"] if row and row["status"] == "timed" else 0.0)
        places = [g - 0.4 + width * (i + 0.5) for g in range(len(groups))]
        bars = axes.bar(
            places,
            heights,
            width,
            label=SHORT.get(key, key),
            color="#d1495b" if key == "ours" else f"{0.82 - 0.6 * i / len(keys):.2f}",
        )
        axes.bar_label(bars, fmt=lambda v: f"{v:.0f}" if v else "", fontsize=7)
    axes.set_xticks(range(len(groups)), [f"{c['model']}\nbatch {c['batch']}" for c in groups])
    axes.set_ylabel("images per second (higher is better)")
    finish(pyplot, figure, axes, results, path)


def plot_ratios(results: dict, path: Path) -> None:
    """Bars of the best peer's time over ours, a group per model, a bar per batch size, the peer's name on it.

    Above the line at 1 ours is faster. A model without a ratio keeps its place, empty.
    """
    pyplot = drawing()
    models = list(dict.fromkeys(c["model"] for c in results["comparisons"]))
    batches = sorted({c["batch"] for c in results["comparisons"]})
    claims = {(c["model"], c["batch"]): c["claims"].get(BEST) for c in results["comparisons"]}
    width = 0.8 / len(batches)
    figure, axes = pyplot.subplots(
        figsize=(2.5 + 0.45 * len(models) * len(batches), 4.2), layout="constrained"
    )
    for i, batch in enumerate(batches):
        found = [claims.get((model, batch)) for model in models]
        places = [g - 0.4 + width * (i + 0.5) for g in range(len(models))]
        bars = axes.bar(
            places,
            [claim["ratio"] if claim else 0.0 for claim in found],
            width,
            label=f"batch {batch}",
            color=f"C{i}",
        )
        labels = [f"{c['ratio']:.2f} {SHORT.get(c['peer'], c['peer'])}" if c else "" for c in found]
        axes.bar_label(bars, labels=labels, rotation=90, padding=2, fontsize=6)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylim(top=1.45 * max([claim["ratio"] for claim in claims.values() if claim], default=1.0))
    axes.set_xticks(range(len(models)), models, rotation=35, ha="right", fontsize=7)
    axes.set_ylabel("best peer's time / ours")
    finish(pyplot, figure, axes, results, path)


def finish(pyplot, figure, axes, results: dict, path: Path) -> None:
    """Title, legend and file of a chart."""
    axes.set_title(textwrap.fill(headline(results["machine"]), round(12 * figure.get_figwidth())), fontsize=8)
    axes.legend(fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files written by bench.models")
    parser.add_argument("--brief", action="store_true", help="only our time and the ratios, and their means")
    parser.add_argument("--markdown", type=Path, help="write the table to this file instead of the terminal")
    parser.add_argument("--plot", type=Path, help="draw a bar chart to this PNG or SVG")
    parser.add_argument(
        "--ratios", action="store_true", help="the chart shows the best peer's time over ours, per model"
    )
    options = parser.parse_args(argv)
    runs = []
    for path in options.results:
        try:
            runs.append(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as problem:
            print(f"cannot read {path}: {problem}", file=sys.stderr)
            return 2
    results = runs[0]
    if options.ratios and not options.plot:
        print("--ratios says what --plot draws: give --plot FILE too", file=sys.stderr)
        return 2
    kernels = any("benchmarks" in run for run in runs)
    if kernels and (options.plot or options.brief or len(runs) > 1):
        print("--plot, --brief and several files are for whole models; here are kernels", file=sys.stderr)
        return 2
    if len(runs) > 1:
        try:
            results = merged(runs)
        except ValueError as problem:
            print(f"these files do not belong into one table: {problem}", file=sys.stderr)
            return 2
    text = kernel_markdown(results) if kernels else brief(results) if options.brief else markdown(results)
    if options.markdown:
        options.markdown.write_text(text)
    else:
        print(text, end="")
    if options.plot:
        try:
            (plot_ratios if options.ratios else plot)(results, options.plot)
        except RuntimeError as problem:
            print(problem, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
