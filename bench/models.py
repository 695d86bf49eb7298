"""Whole models against their peers: python -m bench.models resnet50 resnext50_32x4d --batch 1 16

For each model and batch size: a float64 reference, every peer's output checked against it, then interleaved
timing of those that are right. Tables appear on the terminal; a JSON file with all rounds and a Markdown
table go to --out, and are rewritten after each comparison, so that an interrupted run keeps what it has and
`--resume FILE` goes on. Several models end with geometric means of the ratios.

    python -m bench.models --all                  one member of every family, batch 1 and 16
    python -m bench.models --resume bench/results/models-....json
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console

from . import machine
from .child import ChildFailed
from .compare import BEST, Comparison
from .files import write_results
from .first_call import measure_first_call
from .memory import measure_memory
from .peers import PEERS, make_peers
from .precision import PRECISIONS
from .report import markdown
from .rows import How, isolated, measure_here
from .show import comparison_table, notes, progress, summary_table
from .subject import FLAGSHIPS
from .summary import disturbed, disturbed_line, losses, summarise

DEFAULT_OUT = "bench/results"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__.split("\n\n")[0])
    p.add_argument("models", nargs="*", help="names from fast_backbones.list_models()")
    p.add_argument(
        "--all", action="store_true", help="the best-known member of every family; implies --isolate"
    )
    p.add_argument("--every", action="store_true", help="all registered models; implies --isolate")
    p.add_argument(
        "--resume", type=Path, metavar="FILE", help="go on with an interrupted run, from its JSON file"
    )
    p.add_argument(
        "--redo-disturbed",
        action="store_true",
        help="with --resume: measure rows again of whose rounds more than a third were disturbed",
    )
    p.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=None,
        help="batch sizes (default 1; with --all or --every 1 16)",
    )
    p.add_argument("--isolate", action="store_true", help="each model and batch size in a process of its own")
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
    p.add_argument(
        "--precision",
        default="highest",
        choices=PRECISIONS,
        help="highest: float32 (default); high: float32 under torch.set_float32_matmul_precision('high');"
        " bfloat16: weights and input in that type",
    )
    p.add_argument("--memory", action="store_true", help="also peak memory of a forward, eager against ours")
    p.add_argument("--first-call", action="store_true", help="also the first call in a fresh process")
    p.add_argument(
        "--no-timing", action="store_true", help="leave the comparison out (with --memory or --first-call)"
    )
    p.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    return p


# What a result file stores of the options, so that --resume measures the rest in the same way.
STORED = (
    "models",
    "batch",
    "threads",
    "peers",
    "budget",
    "rounds",
    "memory",
    "first_call",
    "no_timing",
    "isolate",
    "precision",
)


def check_options(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, as a sentence, before anything expensive starts."""
    import fast_backbones as fb

    ways = [bool(options.models), options.all, options.every, options.resume is not None]
    if sum(ways) != 1:
        return "give either names of models, or --all, or --every, or --resume FILE"
    if options.redo_disturbed and options.resume is None:
        return "--redo-disturbed goes with --resume FILE"
    if options.resume is not None:
        usual = parser().parse_args([])
        given = [key for key in STORED if getattr(options, key) != getattr(usual, key)]
        if given:
            named = ", ".join(f"--{key.replace('_', '-')}" for key in given)
            return f"--resume takes {named} from the file: leave it out here"
    if options.batch is not None and min(options.batch) < 1:
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


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """The options with every default and selection filled in."""
    import fast_backbones as fb

    many = options.all or options.every
    if many:
        options.models = list(FLAGSHIPS) if options.all else fb.list_models()
        options.isolate = True
    if options.batch is None:
        options.batch = [1, 16] if many else [1]
    if options.threads is None:
        options.threads = min(2, machine.cpu_count())
    return options


class CannotResume(ValueError):
    """Why the rest of a run cannot be measured into the same file."""


def load(path: Path) -> dict:
    """The results of an interrupted run; CannotResume when this is another machine, code or stack."""
    try:
        results = json.loads(path.read_text())
        stored, facts = results["options"], results["machine"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as problem:
        raise CannotResume(f"--resume {path}: not a result file of this program ({problem!r})") from problem
    missing = [key for key in STORED if key not in stored]
    if missing:
        raise CannotResume(f"--resume {path}: its options lack {', '.join(missing)}")
    now = json.loads(json.dumps(machine.describe(stored["threads"])))
    for key in machine.SAME:
        if facts.get(key) != now[key]:
            raise CannotResume(f"--resume {path}: {key} was {facts.get(key)}, here it is {now[key]}")
    for row in results["comparisons"]:
        for key, entry in row["peers"].items():
            version = PEERS[key](stored["threads"]).version()
            if entry["version"] != version:
                raise CannotResume(f"--resume {path}: {key} was {entry['version']}, here it is {version}")
    return results


def stem(facts: dict, precision: str, now: datetime.datetime) -> str:
    """File name without ending: models-amd-epyc-2t-20260131-093000, models-bfloat16-amd-epyc-2t-...."""
    cpu = machine.short_cpu(facts)
    kind = "" if precision == "highest" else f"{precision}-"
    return f"models-{kind}{cpu}-{facts['threads']}t-{now:%Y%m%d-%H%M%S}"


def run(options: argparse.Namespace, command: str, console: Console) -> dict:
    """All comparisons that the options ask for; tables go to the console as they are ready.

    The files are written after each row. A row that fails is noted under `failures`, and the others go on;
    --resume tries it again.
    """
    if options.resume is not None:
        results = load(options.resume)
        vars(options).update(results["options"])
        folder, name = options.resume.parent, options.resume.stem
        results["failures"] = []
        results.setdefault("resumed", []).append(machine.describe(options.threads)["date"])
    else:
        settle(options)
        facts = machine.describe(options.threads)
        folder, name = options.out, stem(facts, options.precision, datetime.datetime.now())
        results = {"command": command, "machine": facts}
        results["options"] = {key: getattr(options, key) for key in STORED}
        results |= {"comparisons": [], "memory": [], "first_call": [], "failures": []}
    console.print(machine.headline(results["machine"]), highlight=False, soft_wrap=True)
    tables = table_console(options.json)
    path = write_results(results, markdown(results), folder, name)
    try:
        path = measure_all(options, results, folder, name, console, tables)
    except KeyboardInterrupt:
        console.print(f"interrupted; --resume {path} goes on", highlight=False, soft_wrap=True)
        raise
    if len(options.models) > 1 and results["summary"]:
        tables.print(summary_table(results["summary"]))
        for line in losses(results["summary"], BEST):
            tables.print(line, markup=False, highlight=False, soft_wrap=True)
    unquiet = disturbed_line(results["comparisons"])
    if unquiet is not None:
        tables.print(unquiet, markup=False, highlight=False, soft_wrap=True)
    for failure in results["failures"]:
        tables.print(f"failed: {failure['model']}, batch {failure['batch']}", markup=False, highlight=False)
    console.print(f"results: {path} and .md", highlight=False, soft_wrap=True)
    return results


def measure_all(
    options: argparse.Namespace, results: dict, folder: Path, name: str, console: Console, tables: Console
) -> Path:
    """Measure and write every row that the results lack; returns the JSON file."""
    how = How(options.peers, options.threads, options.budget, options.rounds, options.precision)
    plan = [(model_name, batch) for model_name in options.models for batch in options.batch]
    path = folder / f"{name}.json"
    again = set(disturbed(results["comparisons"])) if options.redo_disturbed else set()

    def say(line: str) -> None:
        tables.print(line, markup=False, highlight=False, soft_wrap=True)

    def is_done(section: str, model_name: str, batch: int) -> bool:
        return any((row["model"], row["batch"]) == (model_name, batch) for row in results[section])

    for i, (model_name, batch) in enumerate(plan):
        label = f"{model_name}, batch {batch}"
        title = f"{label} ({i + 1} of {len(plan)})" if len(plan) > 1 else label
        row_is_good = is_done("comparisons", model_name, batch) and (model_name, batch) not in again
        if not options.no_timing and not row_is_good:
            measure = isolated if options.isolate else measure_here
            try:
                with progress(console, title) as tell:
                    found = measure(model_name, batch, how, tell)
            except ChildFailed as failure:
                results["failures"].append({"model": model_name, "batch": batch, "sentence": str(failure)})
                say(f"{label} failed: {failure}")
            else:
                comparison = Comparison.from_dict(found)
                tables.print(comparison_table(comparison, label))
                for line in notes(comparison):
                    say(f"  {line}")
                rows = {(row["model"], row["batch"]): row for row in results["comparisons"]}
                rows[model_name, batch] = found
                results["comparisons"] = [rows[key] for key in plan if key in rows]
            gc.collect()
        for wanted, section, measurement in (
            (options.memory, "memory", measure_memory),
            (options.first_call, "first_call", measure_first_call),
        ):
            if wanted and not is_done(section, model_name, batch):
                with progress(console, title) as tell:
                    row = measurement(model_name, batch, options.threads, tell=tell)
                results[section].append(row)
                say(f"{section.replace('_', ' ')}: {summary_line(section, row)}")
        results["summary"] = summarise(results["comparisons"])
        path = write_results(results, markdown(results), folder, name)
    return path


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
    """Exit code 0; 1 when an output of ours broke the 2x rule or a row failed; 2 when the options make no
    sense; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    p = parser()
    p.prog = prog
    options = p.parse_args(argv)
    console = Console(stderr=True)
    problem = check_options(options)
    if problem is not None:
        console.print(f"{prog}: {problem}", markup=False, highlight=False, soft_wrap=True)
        return 2
    try:
        results = run(options, f"{prog} {shlex.join(argv)}", console)
    except CannotResume as problem:
        console.print(f"{prog}: {problem}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(results))
    return 1 if results["failures"] or any(c["parity_2x"] is False for c in results["comparisons"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
