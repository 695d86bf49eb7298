"""fast-backbones list, info: which models there are, and facts about one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import AsJson, ModelName, checked_info, fail, say, table_console


def list_(
    pattern: Annotated[str, typer.Argument(help='shell pattern, "*resnext*"')] = "*",
    family: Annotated[str | None, typer.Option(help="this family only: ResNet, DenseNet ...")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the table of the README")] = False,
    into: Annotated[
        Path | None, typer.Option(help="file whose table between the marks `models` is replaced")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the models: input, parameters, multiply-accumulates, origin."""
    import fast_backbones as fb

    from .. import model_tables

    if family is not None:
        known = {name.lower(): name for name in fb.list_families()}
        if family.lower() not in known:
            fail(f"no family is called {family!r}; there are {', '.join(known.values())}")
        family = known[family.lower()]
    names = fb.list_models(pattern, family=family)
    if not names:
        fail(f"no model matches {pattern!r}" + (f" in the family {family}" if family is not None else ""))
    with Console(stderr=True).status("counting parameters and multiply-accumulates"):
        infos = [fb.model_info(name) for name in names]
    if as_json:
        say(json.dumps([dataclasses.asdict(facts) for facts in infos]))
    elif markdown:
        say(model_tables.markdown(infos))
    elif into is not None:
        try:
            model_tables.replace_in(into, infos)
        except (OSError, UnicodeDecodeError, ValueError) as problem:
            fail(str(problem))
    else:
        table_console().print(model_tables.list_table(names, infos))


def info(model: ModelName, as_json: AsJson = False) -> None:
    """Facts about a model: size, cost, preprocessing, feature levels, origin."""
    from .. import model_tables

    facts = checked_info(model)
    if as_json:
        say(json.dumps(dataclasses.asdict(facts)))
        return
    table_console().print(model_tables.facts_table(facts))
    say()
    table_console().print(model_tables.taps_table(facts))
