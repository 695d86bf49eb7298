"""An `Explanation` to look at: plain text, a table of rich, a page, a chart, with the same cells."""

from __future__ import annotations

from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .explain import Explanation, Row

HEADS = ("step", "kernel", "runs on", "fused into it", "ms", "of time", "GFLOP/s", "GB/s", "of bound", "how")
NUMBERS = range(4, 9)
INCHES_PER_STEP = 0.19


def cells(row: Row, total_ms: float) -> tuple[str, ...]:
    """What stands under HEADS."""
    time = f"{row.ms / total_ms:.1%}" if total_ms else ""
    bound = f"{row.of_bound:.0%}" if row.of_bound else "unknown"
    rates = (_number(row.gflops), f"{row.gbps:.1f}")
    return (
        row.name, row.kernel, row.isa, " + ".join(row.fused), _ms(row.ms), time, *rates, bound, row.detail,
    )  # fmt: skip


def text(found: Explanation) -> str:
    """Aligned lines; what refused stands below its step."""
    if found.plan is None:
        return found.head()[0]
    lines = [cells(row, found.ms) for row in found.rows]
    widths = [max(len(line[i]) for line in [HEADS, *lines]) for i in range(len(HEADS))]
    table = [_aligned(HEADS, widths), _aligned(tuple("-" * width for width in widths), widths)]
    for row, line in zip(found.rows, lines, strict=True):
        table += [_aligned(line, widths), *(f"    {sentence}" for sentence in row.sentences)]
    return "\n".join([*found.head(), "", *table, "", *found.foot()])


def rich_table(found: Explanation) -> Any:
    """For `rich.print` and consoles; sentences stand in the last column."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head, foot = ([Text(line) for line in lines] for lines in (found.head(), found.foot()))
    if found.plan is None:
        return head[0]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(HEADS):
        fixed = i in NUMBERS or name == "runs on"
        table.add_column(name, justify="right" if i in NUMBERS else "left", no_wrap=fixed, overflow="fold")
    for row in found.rows:
        *front, detail = cells(row, found.ms)
        how = Text("\n".join([detail, *row.sentences]).strip())
        how.stylize("yellow", len(detail))
        *front, bound = map(Text, front)
        bound.stylize("green" if row.of_bound >= 0.8 else "red" if row.of_bound < 0.4 else "")
        table.add_row(*front, bound, how)
    return Group(*head, table, *foot)


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    """Words to the left, numbers to the right."""
    padded = [
        cell.rjust(width) if i in NUMBERS else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(line, widths))
    ]
    return "  ".join(padded).rstrip()


def _ms(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


# ---- a page ----

# A template instead of rich's export_html: that prints the characters of a terminal, which neither wrap nor
# hold bars.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; }}
h1 {{ font-size: 1.3em; }}
table {{ border-collapse: collapse; }}
th {{ position: sticky; top: 0; background: Canvas; text-align: left; border-bottom: 2px solid; }}
th, td {{ padding: 2px 8px; vertical-align: top; }}
tbody tr:nth-child(odd) {{ background: #8882; }}
.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
.name {{ font-family: ui-monospace, monospace; overflow-wrap: anywhere; }}
.bar {{ background: linear-gradient(90deg, var(--ink) var(--share), #0000 0) no-repeat 0 3px / 100% 1em; }}
.no {{ color: #b36b00; }}
</style>
</head>
<body>
<h1>{title}</h1>
{head}
{table}
{foot}
</body>
</html>
"""


def html(found: Explanation, title: str) -> str:
    """Bars: a step's share of the time, as a part of the longest one's, and its share of its bound."""
    longest = max((row.ms for row in found.rows), default=0.0)
    kinds = ["number" if i in NUMBERS else "word" for i in range(len(HEADS))]
    heads = "".join(f'<th class="{kind}">{head}</th>' for kind, head in zip(kinds, HEADS))
    rows = "\n".join(_html_row(row, found.ms, longest) for row in found.rows)
    table = f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    head, foot = (
        "\n".join(f"<p>{escape(line)}</p>" for line in lines) for lines in (found.head(), found.foot())
    )
    return PAGE.format(
        title=escape(title), head=head, table=table if found.plan is not None else "", foot=foot
    )


def _html_row(row: Row, total_ms: float, longest_ms: float) -> str:
    bars = {
        "of time": (row.ms / longest_ms if longest_ms else 0.0, "#4a90d980"),
        "of bound": (min(row.of_bound, 1.0), "#3a9d5d80"),
    }
    found = []
    for i, (head, cell) in enumerate(zip(HEADS, cells(row, total_ms), strict=True)):
        kind, style, content = "number" if i in NUMBERS else "word", "", escape(cell)
        if head in bars:
            share, ink = bars[head]
            kind, style = "number bar", f' style="--share: {share:.1%}; --ink: {ink}"'
        if head in ("step", "kernel", "fused into it"):
            kind = "name"
        if head == "how":
            content += "".join(f'<div class="no">{escape(sentence)}</div>' for sentence in row.sentences)
        found.append(f'<td class="{kind}"{style}>{content}</td>')
    return f"<tr>{''.join(found)}</tr>"


# ---- a chart ----


def png(found: Explanation, path: str | PathLike[str], title: str) -> None:
    """A bar for each step in the colour of its kernel; the strong part of it is what its bound would take."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise RuntimeError("a chart needs matplotlib: pip install 'fast-backbones[plots]'") from missing

    rows, places = found.rows, range(len(found.rows))
    figure = Figure(figsize=(10, 1.6 + INCHES_PER_STEP * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, kernel in enumerate(dict.fromkeys(row.kernel for row in rows)):
        mine = [place for place in places if rows[place].kernel == kernel]
        ms = [rows[place].ms for place in mine]
        bound = [rows[place].ms * min(rows[place].of_bound, 1.0) for place in mine]
        colour = f"C{i % 10}"
        axes.barh(mine, ms, color=colour, alpha=0.35)
        axes.barh(mine, bound, color=colour, label=f"{kernel} ({len(mine)}, {sum(ms):.3g} ms)")
    for place, row in zip(places, rows, strict=True):
        bound = f"{row.of_bound:.0%} of its bound" if row.of_bound else "bound unknown"
        fused = f", with {len(row.fused)} fused" if row.fused else ""
        missed = ", not fused" if row.missed else ""
        axes.annotate(
            f" {_ms(row.ms)} ms, {bound}, {row.isa}{fused}{missed}", (row.ms, place), fontsize=6, va="center"
        )
    axes.set_yticks(places, [row.name for row in rows], fontsize=6, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.45 * max((row.ms for row in rows), default=1.0))
    axes.set_xlabel("ms of a step run alone; strong: what its bound would take")
    axes.set_title("\n".join([title, *found.head()[1:2], *found.foot()[:1]]), fontsize=8, parse_math=False)
    axes.legend(fontsize=6, loc="lower right")
    figure.savefig(path, dpi=150, format="png")
