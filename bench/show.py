"""What people see while a benchmark runs and when it is done: progress, and one table per comparison
(rich)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .compare import BEST, Comparison
from .summary import HEAD, summary_cells

Tell = Callable[[float, str], None]


@contextlib.contextmanager
def progress(console: Console, title: str) -> Iterator[Tell]:
    """Yields tell(share, what). A bar with a running clock on a terminal; elsewhere one line per step.

    While candidates are timed nothing draws in the background: the bar then moves between turns only.
    """
    if not console.is_terminal:
        seen: set[str] = set()

        def line(share: float, what: str) -> None:
            step = "timing in turns" if what.startswith("timing") else what
            if step not in seen:
                seen.add(step)
                console.print(f"{title}: {step}", markup=False, highlight=False, soft_wrap=True)

        yield line
        return

    bars: list[Progress] = []

    def bar(share: float, what: str) -> None:
        timing = what.startswith("timing")
        if not bars or bars[-1].live.auto_refresh == timing:
            stop()
            columns = [
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
            ]
            bars.append(Progress(*columns, console=console, transient=True, auto_refresh=not timing))
            bars[-1].add_task(title, total=1.0)
            bars[-1].start()
        task = bars[-1].tasks[0].id
        bars[-1].update(task, completed=share, description=f"{escape(title)}: {escape(what)}", refresh=timing)

    def stop() -> None:
        if bars:
            bars.pop().stop()

    try:
        yield bar
    finally:
        stop()


def milliseconds(value: float) -> str:
    """Three to four significant digits: 0.0144, 2.58, 18.3, 287."""
    return (
        f"{value:.4f}"
        if value < 0.1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def comparison_table(comparison: Comparison, title: str) -> Table:
    """One row per peer: error against float64, time per forward and per image, how much faster ours is."""
    several = comparison.batch > 1
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stack", no_wrap=True)
    heads = [
        "max error",
        "rms error",
        "ms",
        "middle half",
        *(["ms/image"] if several else []),
        "ours is faster",
    ]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for e in comparison.entries:
        errors = (f"{e.error.max:.1e}", f"{e.error.rms:.1e}") if e.error else ("", "")
        if not e.timed:
            table.add_row(e.name, *errors, f"[yellow]{e.status}[/]")
            continue
        ms = comparison.median_ms(e.key)
        low, high = (milliseconds(q) for q in comparison.quartiles_ms(e.key))
        ratio = comparison.ratio(e.key) if e.key != "ours" else None
        cells = [*errors, milliseconds(ms), f"{low} .. {high}"]
        cells += [milliseconds(ms / comparison.batch)] if several else []
        cells += [f"{ratio:.2f}x"] if ratio is not None else []
        table.add_row(e.name, *cells, style="bold" if e.key == "ours" else None)
    return table


def summary_table(rows: list[dict]) -> Table:
    """Geometric means over the models, one row per batch size and opponent."""
    title = "how many times as fast ours is, over the models"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for head in HEAD:
        table.add_column(head, justify="left" if head == "against" else "right")
    for row in rows:
        table.add_row(*summary_cells(row), style="bold" if row["against"] == BEST else None)
    return table


def notes(comparison: Comparison) -> list[str]:
    """What the table alone does not say: missing peers, the ratios that matter, parity, how quiet the machine
    was."""
    lines = [f"{e.name} {e.status}: {e.sentence}" for e in comparison.entries if not e.timed]
    told = set()
    for label, (key, ratio) in comparison.claims().items():
        if key not in told or label != BEST:
            name = comparison.entry(key).name
            lines.append(f"{ratio:.2f}x as fast as {name if name.startswith(label) else f'{label}: {name}'}")
        told.add(key)
    if comparison.parity is not None:
        verdict = "within" if comparison.parity else "NOT within"
        ours = comparison.entry("ours").error
        lines.append(
            f"error against float64: {ours}; PyTorch eager: {comparison.own}: {verdict} twice PyTorch's own"
        )
    if comparison.session is not None:
        session = comparison.session
        flagged = sum(session.disturbed)
        line = (
            f"{len(session.rounds)} interleaved rounds, {flagged} disturbed ({session.disturbed_share:.0%})"
        )
        lines.append(line + (", counted all the same: too few quiet ones" if session.uses_disturbed else ""))
    return lines
