"""Somebody else's networks: python -m bench.zoo --no-speed

For each CNN of timm and torchvision in zoo_models.py: does fb.optimize_ keep the 2x rule, how much of its
plan runs in kernels, what is left to PyTorch, and how fast is it against PyTorch eager and torch.compile.
Each network has a process of its own; one that fails is a row that says so. JSON and Markdown go to --out
and are rewritten after each row.

    python -m bench.zoo --no-speed                          parity and coverage alone: half an hour
    python -m bench.zoo timm/resnet50d torchvision/shufflenet_v2_x1_0
    python -m bench.zoo --resume bench/results/zoo-....json
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console

from . import machine
from .child import ChildFailed, run_child
from .files import write_results
from .models import DEFAULT_OUT, CannotResume
from .peer import package_version
from .rows import PROGRESS
from .show import Tell, progress
from .zoo_models import ZOO
from .zoo_report import counted, markdown

PATIENCE = 1800  # seconds for one row
STORED = ("models", "batch", "threads", "budget", "rounds", "no_speed")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__.split("\n\n")[0])
    p.add_argument("models", nargs="*", help="library/name, as in timm/resnet50d (default: the whole list)")
    p.add_argument("--no-speed", action="store_true", help="parity and coverage alone")
    p.add_argument("--resume", type=Path, metavar="FILE", help="go on with an interrupted run")
    p.add_argument("--batch", type=int, default=1, help="images (default 1)")
    p.add_argument(
        "--threads", type=int, default=min(2, machine.cpu_count()), help="(default: CPUs, at most 2)"
    )
    p.add_argument("--budget", type=float, default=15.0, help="seconds of timing per network (default 15)")
    p.add_argument("--rounds", type=int, default=7, help="at least so many rounds (default 7)")
    p.add_argument("--out", type=Path, default=Path(DEFAULT_OUT), help=f"(default {DEFAULT_OUT})")
    return p


def check_options(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, as a sentence."""
    if options.resume is not None and options.models:
        return "--resume takes the networks from the file: name none"
    bad = [name for name in options.models if name.split("/")[0] not in ("timm", "torchvision")]
    if bad:
        return f"{bad[0]}: expected timm/NAME or torchvision/NAME"
    if min(options.batch, options.threads) < 1:
        return "--batch and --threads start at 1"
    return None


def load(path: Path) -> dict:
    """An interrupted run; CannotResume when this is another machine, code or library."""
    try:
        results = json.loads(path.read_text())
        facts, stored = results["machine"], results["options"]
        now = json.loads(json.dumps(machine.describe(stored["threads"]))) | {"libraries": libraries()}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as problem:
        raise CannotResume(f"--resume {path}: not a result file of this program ({problem!r})") from problem
    for key in (*machine.SAME, "libraries"):
        before = results.get(key) if key == "libraries" else facts.get(key)
        if before != now[key]:
            raise CannotResume(f"--resume {path}: {key} was {before}, here it is {now[key]}")
    return results


def libraries() -> dict[str, str]:
    return {name: package_version(name) for name in ("timm", "torchvision")}


def start(options: argparse.Namespace, command: str) -> tuple[dict, Path, str]:
    """The results so far, and the folder and stem of their files."""
    if options.resume is not None:
        results = load(options.resume)
        vars(options).update(results["options"])
        results["failures"] = []
        return results, options.resume.parent, options.resume.stem
    options.models = options.models or list(ZOO)
    facts = machine.describe(options.threads)
    stem = f"zoo-{machine.short_cpu(facts)}-{facts['threads']}t-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    results = {"command": command, "machine": facts, "libraries": libraries()}
    results["options"] = {key: getattr(options, key) for key in STORED}
    return results | {"rows": [], "failures": []}, options.out, stem


def measure(name: str, options: argparse.Namespace, tell: Tell) -> dict:
    """One row, from a process of its own."""

    def listen(line: str) -> bool:
        if line.startswith(PROGRESS):
            tell(*json.loads(line.removeprefix(PROGRESS)))
        return line.startswith(PROGRESS)

    arguments = ["-m", "{bench}.zoo_row", name, "--batch", str(options.batch)]
    arguments += ["--threads", str(options.threads), "--budget", str(options.budget)]
    arguments += ["--rounds", str(options.rounds), *(["--no-speed"] if options.no_speed else [])]
    return run_child(arguments, timeout=PATIENCE, listen=listen)


def run(options: argparse.Namespace, command: str, console: Console) -> dict:
    """Every row that is still missing; the files are written after each."""
    results, folder, stem = start(options, command)
    done = {row["model"] for row in results["rows"]}
    for number, name in enumerate(options.models):
        if name in done:
            continue
        title = f"{name} ({number + 1} of {len(options.models)})"
        try:
            with progress(console, title) as tell:
                row = measure(name, options, tell)
        except ChildFailed as failure:
            results["failures"].append({"model": name, "sentence": str(failure)})
            console.print(f"{title} failed: {failure}", markup=False, highlight=False, soft_wrap=True)
        else:
            results["rows"].append(row)
            console.print(f"{title}: {line_of(row)}", markup=False, highlight=False, soft_wrap=True)
        path = write_results(results, markdown(results), folder, stem)
    path = write_results(results, markdown(results), folder, stem)
    console.print(f"results: {path} and .md", highlight=False, soft_wrap=True)
    return results


def line_of(row: dict) -> str:
    """A row for the terminal."""
    parity = "within twice PyTorch's error" if row["parity_2x"] else "NOT within twice PyTorch's error"
    if row["why_not"] is not None:
        return f"no plan: {row['why_not']}; {parity}"
    left = counted(row["left"]) or "nothing"
    return f"{row['native_steps']} of {row['steps']} steps native; {parity}; left to PyTorch: {left}"


def main(argv: list[str] | None = None, prog: str = "python -m bench.zoo") -> int:
    """Exit code 0; 1 when a row failed or broke the 2x rule; 2 when the options make no sense; 130 after
    Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    console = Console(stderr=True)
    problem = check_options(options)
    try:
        if problem is not None:
            raise CannotResume(problem)
        results = run(options, f"{prog} {shlex.join(argv)}", console)
    except CannotResume as refused:
        console.print(f"{prog}: {refused}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if results["failures"] or not all(row["parity_2x"] for row in results["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
