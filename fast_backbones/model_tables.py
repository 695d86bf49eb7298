"""Facts about models as tables: for the terminal, and for README.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.table import Table

BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"


def list_table(names: list[str], infos: list[Any]) -> Table:
    """One line for each model; where a name is an alias, it stands for its model."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("family")
    for head in ("input", "Mparams", "GMACs"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("checkpoints of")
    table.add_column("paper")
    for name, facts in zip(names, infos, strict=True):
        table.add_row(name, facts.family, *_numbers(facts), checkpoints(facts), facts.paper)
    return table


def facts_table(facts: Any) -> Table:
    """Everything about one model but its taps."""
    heads = f", and {facts.aux_params:,} of auxiliary heads in training" if facts.aux_params else ""
    rows = {
        "model": facts.name,
        "aliases": ", ".join(facts.aliases),
        "family": facts.family,
        "paper": facts.paper,
        "checkpoints of": checkpoints(facts),
        "input": " x ".join(map(str, facts.input_size)),
        "preprocessing": str(facts.preprocessing),
        "parameters": f"{facts.params - facts.aux_params:,}{heads}",
        "multiply-accumulates": f"{facts.gmacs:.4g} G for one image",
        "features": f"{facts.num_features:,} before the classifier",
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for label, text in rows.items():
        if text:
            table.add_row(label, text)
    return table


def taps_table(facts: Any) -> Table:
    """What `features_only=True` returns."""
    table = Table(box=None, pad_edge=False)
    table.add_column("features_only")
    for head in ("channels", "reduction"):
        table.add_column(head, justify="right")
    for row in zip(facts.tap_modules, facts.tap_channels, facts.tap_reductions, strict=True):
        table.add_row(*map(str, row))
    return table


def markdown(infos: list[Any]) -> str:
    """The models as a Markdown table, family by family, with their aliases."""
    families = list(dict.fromkeys(facts.family for facts in infos))
    lines = [
        "| model | also called | input | M parameters | GMACs | checkpoints of | paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for facts in sorted(infos, key=lambda facts: families.index(facts.family)):  # stable: names stay in order
        aliases = ", ".join(f"`{alias}`" for alias in facts.aliases)
        cells = (f"`{facts.name}`", aliases, *_numbers(facts), checkpoints(facts), facts.paper)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace_in(path: Path, infos: list[Any]) -> None:
    """Put the Markdown table between the marks of a file. ValueError when it does not have them."""
    text = path.read_text(encoding="utf-8")
    section = re.compile(f"(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})", re.DOTALL)
    if section.search(text) is None:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    path.write_text(section.sub(lambda _: markdown(infos) + "\n", text), encoding="utf-8")


def checkpoints(facts: Any) -> str:
    """The public implementations whose files load; "own" says that PyTorch has none with this layout."""
    return ", ".join(origin for origin in facts.compatible_with if origin != "own") or "none public"


def _numbers(facts: Any) -> tuple[str, str, str]:
    """Input size, millions of parameters, GMACs; with auxiliary heads first what inference needs."""
    params = f"{(facts.params - facts.aux_params) / 1e6:.2f}"
    if facts.aux_params:
        params += f" ({facts.params / 1e6:.2f} with aux)"
    gmacs = f"{facts.gmacs:.2f}" if facts.gmacs >= 0.995 else f"{facts.gmacs:.3g}"
    return "x".join(map(str, facts.input_size)), params, gmacs
