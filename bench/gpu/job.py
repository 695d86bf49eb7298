"""What the GPU tools share: a row for each model, batch and type, in a file that is written after every row.

A second call with the same file goes on where the first one ended, so a job may be cut into parts; --seconds
starts no row after that time. Every file says which GPU, driver, versions and commit it is from.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic

from ..files import write_results
from . import ahead
from .machine import DTYPES, facts

Case = tuple[str, int, str]  # model, batch, type


def parser(prog: str, about: str | None, models: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """models: the usual ones; None if they must be named."""
    found = argparse.ArgumentParser(
        prog=f"python -m {prog}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    how = {"nargs": "+"} if models is None else {"nargs": "*", "default": list(models)}
    found.add_argument("models", help="names from fast_backbones.list_models()", **how)
    found.add_argument("--batch", nargs="+", type=int, default=[256, 1, 32])
    found.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    found.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    found.add_argument("--dry-run", action="store_true", help="no GPU: the first row up to its launches")
    found.add_argument("--out", type=Path, required=True, help="the JSON file; a table lies beside it")
    return found


def rehearsal(name: str, batch: int, dtype: str) -> str:
    """A row without a GPU: the plan, every launch and every other way, on tensors without memory."""
    (found,) = ahead.launch_lists(name, batch, DTYPES[dtype])
    options = sum(len(found.options(bound.step)) for bound in found.bound)
    return f"{name} batch {batch} {dtype}: {len(found.bound)} launches ready, {options} ways to compute them"


class Job:
    """The rows of one file. table: makes Markdown of the results; rehearse: what a case says without GPU."""

    def __init__(
        self,
        options: argparse.Namespace,
        table: Callable[[dict], str],
        rehearse: Callable[[str, int, str], str] = rehearsal,
    ) -> None:
        self.options, self.table, self.started = options, table, monotonic()
        self.rehearse = rehearse
        out: Path = options.out
        self.results: dict = json.loads(out.read_text()) if out.is_file() else {"rows": []}
        self.results |= {"machine": facts(), "commit": commit()}

    def cases(self) -> Iterator[Case]:
        """Those that have no row yet, until the time is over; none in a rehearsal."""
        o = self.options
        if o.dry_run:
            print(self.rehearse(o.models[0], o.batch[0], o.dtype[0]))
            return
        done = {(row["model"], row["batch"], row["dtype"]) for row in self.results["rows"]}
        for dtype in o.dtype:
            for batch in o.batch:
                for name in o.models:
                    if (name, batch, dtype) in done:
                        continue
                    if monotonic() - self.started > o.seconds:
                        print(f"{o.seconds:.0f} s are over; the same command goes on from here")
                        return
                    yield name, batch, dtype

    def add(self, row: dict) -> None:
        self.results["rows"].append(row)
        out: Path = self.options.out
        write_results(self.results, self.table(self.results), out.parent, out.stem)


def heading(results: dict) -> str:
    devices = results["machine"]["devices"]
    device = devices[0]["name"] if devices else "no GPU"
    machine = results["machine"]
    versions = f"driver {machine['driver']}, torch {machine['build']['torch']}, Triton {machine['triton']}"
    return f"# {device}, {versions}, commit {results['commit']}\n\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
