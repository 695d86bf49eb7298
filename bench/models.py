"""Whole models against their peers: python -m bench.models resnet50 resnext50_32x4d --batch 1 16

For each model and batch size: a float64 reference, every peer's output checked against it, then interleaved
timing of those that are right. Tables appear on the terminal; a JSON file with all rounds and a Markdown
table go to --out, and are rewritten after each comparison, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import re
import shlex
import sys
from pathlib import Path

from rich.console import Console

from . import machine
from .compare import compare
from .first_call import measure_first_call
from .memory import measure_memory
from .peers import PEERS, make_peers
from .report import markdown
from .show import comparison_table, notes, progress
from .subject import make_input, make_model
from .timing import NoiseGuard

DEFAULT_OUT = "bench/results"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__.split("\n\n")[0])
    p.add_argument("models", nargs="+", help="names from fast_backbones.list_models()")
    p.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default 1)")
    p.add_argument(
        "--threads", type=int, default=None, help="threads of every peer (default: the CPUs, at most 2)"
    )
    p.add_argument(
        "--peers", nargs="+", default=None, metavar="PEER", help=f"some of: {', '.join(PEERS)} (default all)"
    )
    p.add_argument("--budget", type=float, default=30.0, help="seconds of timing per comparison (default 30)")
    p.add_argument(
        "--rounds", type=int, default=7, help="at least so many rounds, whatever the budget (default 7)"
    )
    p.add_argument(
        "--out", type=Path, default=Path(DEFAULT_OUT), help=f"folder for results (default {DEFAULT_OUT})"
    )
    p.add_argument("--memory", action="store_true", help="also peak memory of a forward, eager against ours")
    p.add_argument("--first-call", action="store_true", help="also the first call in a fresh process")
    p.add_argument(
        "--no-timing", action="store_true", help="leave the comparison out (with --memory or --first-call)"
    )
    p.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    return p


def check_options(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, as a sentence, before anything expensive starts."""
    import fast_backbones as fb

    if min(options.batch) < 1:
        return f"--batch {min(options.batch)}: batch sizes start at 1"
    if options.threads is not None and options.threads < 1:
        return f"--threads {options.threads}: at least 1"
    try:
        for name in options.models:
            fb.model_info(name)
        make_peers(options.peers)
    except ValueError as problem:
        return str(problem)
    return None


def stem(facts: dict, now: datetime.datetime) -> str:
    """File name without ending: models-amd-epyc-2t-20260131-0930."""
    cpu = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|cpu|processor|@.*", "", facts["cpu"].lower())).strip(
        "-"
    )
    return f"models-{cpu}-{facts['threads']}t-{now:%Y%m%d-%H%M%S}"


def write(results: dict, folder: Path, name: str) -> Path:
    """Both files, each by rename, so that a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".json", json.dumps(results, indent=1) + "\n"), (".md", markdown(results))):
        draft = folder / f".{name}{ending}.part"
        draft.write_text(text)
        os.replace(draft, folder / f"{name}{ending}")
    return folder / f"{name}.json"


def run(options: argparse.Namespace, command: str, console: Console) -> dict:
    """All comparisons that the options ask for; tables go to the console as they are ready."""
    threads = options.threads if options.threads is not None else min(2, machine.cpu_count())
    facts = machine.describe(threads)
    results = {"command": command, "machine": facts, "comparisons": [], "memory": [], "first_call": []}
    name = stem(facts, datetime.datetime.now())
    console.print(machine.headline(facts), highlight=False, soft_wrap=True)
    tables = table_console(options.json)

    for model_name in options.models:
        for batch in options.batch:
            title = f"{model_name}, batch {batch}"
            if not options.no_timing:
                with progress(console, title) as tell:
                    tell(0.0, "building the model")
                    model = make_model(model_name)
                    round_trip = [machine.core_round_trip_ns()]
                    comparison = compare(
                        model,
                        make_input(model, batch),
                        make_peers(options.peers, threads),
                        budget=options.budget,
                        min_rounds=options.rounds,
                        guard=NoiseGuard(),
                        tell=tell,
                    )
                tables.print(comparison_table(comparison, title))
                for line in notes(comparison):
                    tables.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
                round_trip.append(machine.core_round_trip_ns())
                found = {"model": model_name, **comparison.as_dict(), "core_round_trip_ns": round_trip}
                results["comparisons"].append(found)
                del model, comparison
                gc.collect()
            for wanted, section, measurement in (
                (options.memory, "memory", measure_memory),
                (options.first_call, "first_call", measure_first_call),
            ):
                if wanted:
                    with progress(console, title) as tell:
                        row = measurement(model_name, batch, threads, tell=tell)
                    results[section].append(row)
                    tables.print(
                        f"{section.replace('_', ' ')}: {summary_line(section, row)}",
                        highlight=False,
                        soft_wrap=True,
                    )
            path = write(results, options.out, name)
    console.print(f"results: {path} and .md", highlight=False, soft_wrap=True)
    return results


def table_console(quiet: bool = False) -> Console:
    """Standard output; wide enough for our tables where there is no terminal whose width counts."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(quiet=quiet, width=120)


def summary_line(section: str, row: dict) -> str:
    """One line for the terminal about a memory or first-call measurement."""
    head = f"{row['model']}, batch {row['batch']}: "
    if section == "memory":
        rows = ", ".join(f"{k} {r['forward_mib']:.0f} MiB" for k, r in row["peers"].items())
        share = row.get("ours_share_of_eager")
        return (
            head
            + f"a forward needs {rows}"
            + (f"; ours is {share:.0%} of eager's better layout" if share is not None else "")
        )
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in row["stages_s"].items())
    text = (
        head
        + f"first {row['first_s']:.2f} s"
        + (f" ({stages})" if stages else "")
        + f", later {row['later_s'] * 1e3:.1f} ms"
    )
    return text + (f"; runs the modules: {row['why_not']}" if row["why_not"] else "")


def main(argv: list[str] | None = None, prog: str = "python -m bench.models") -> int:
    """Exit code 0; 1 when an output of ours broke the 2x rule; 2 when the options make no sense."""
    argv = sys.argv[1:] if argv is None else argv
    p = parser()
    p.prog = prog
    options = p.parse_args(argv)
    console = Console(stderr=True)
    problem = check_options(options)
    if problem is not None:
        console.print(f"{prog}: {problem}", markup=False, highlight=False, soft_wrap=True)
        return 2
    results = run(options, f"{prog} {shlex.join(argv)}", console)
    if options.json:
        print(json.dumps(results))
    return 1 if any(c["parity_2x"] is False for c in results["comparisons"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
