"""fast-backbones bench, selftest: how fast and how right the kernels are here."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import typer

from .common import AsJson, say


def bench(context: typer.Context) -> None:
    """Time whole models against their peers, as `python -m bench.models` does (--help lists the options)."""
    from ..bench.models import main as models

    raise typer.Exit(models(context.args, prog="fast-backbones bench"))


def selftest(as_json: AsJson = False) -> None:
    """Check the numbers on this machine: kernels, models, a training step, by every instruction set it has.

    Whole numbers must come out equal, real ones with at most twice PyTorch's error against float64, and the
    same bits whatever the threads and the batch. Takes less than a minute on two quiet cores. Exit code 1
    when a check fails.
    """
    from rich.console import Console
    from rich.markup import escape

    from .. import selftest as tests

    console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False, soft_wrap=True)

    def tell(number: int, total: int, result: tests.Result) -> None:
        verdict = "[green]ok[/]" if result.ok else "[bold red]FAILED[/]"
        words = escape(result.words)
        console.print(
            f"{f'{number}/{total}':>7}  {verdict}  {result.isa} {escape(result.name)}: {words}"
            f" ({result.seconds:.1f} s)"
        )

    start = time.perf_counter()
    found = tests.run(tell)
    facts = {**tests.summary(found), "seconds": time.perf_counter() - start}
    if as_json:
        say(json.dumps({**facts, "results": [dataclasses.asdict(result) for result in found]}))
    sets, failed = ", ".join(facts["instruction_sets"]) or "none", facts["failed"]
    console.print(
        f"\n{facts['checks']} checks by {sets} in {facts['seconds']:.0f} s, "
        + (f"{len(failed)} FAILED: {escape(', '.join(failed))}" if failed else "all passed")
    )
    if failed:
        console.print(
            "Please report this with what `fast-backbones selftest --json` and `fast-backbones env` print."
        )
        raise typer.Exit(1)
