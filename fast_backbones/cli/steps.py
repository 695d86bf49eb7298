"""fast-backbones explain: what became of each layer, and how near it comes to what this machine can do."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common
from .common import AsJson, Batch, Threads, fail, say, set_threads, table_console

AnyModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="a name from `list`, timm:NAME or torchvision:NAME")
]


def explain(
    model: AnyModel,
    batch: Batch = 1,
    size: Annotated[
        int | None, typer.Option(min=1, help="pixels of the image's sides [the model's own]")
    ] = None,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each step")] = 5,
    html: Annotated[
        Path | None, typer.Option(help="also write a page with bars", metavar="FILE", dir_okay=False)
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="also draw a chart (needs matplotlib)", metavar="FILE", dir_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Each step of a model: what was fused into it, kernel, time, share of its bound, and what refused."""
    import torch

    from .. import engine

    for path in (html, png):
        if path is not None and not path.parent.is_dir():
            fail(f"{path}: there is no folder {path.parent}")
    network, x = common.network_and_input(model, batch, size)
    set_threads(threads)
    with torch.inference_mode():
        found = engine.explain(network, x, repeats=repeats)
    title = f"{model}, {' x '.join(map(str, x.shape))}"
    if as_json:
        facts = {key: getattr(found, key) for key in ("reason", "isa", "threads", "peak_gflops", "copy_gbps")}
        steps = [dataclasses.asdict(row) for row in found.rows]
        say(json.dumps({"model": model, "batch": batch, **facts, "steps": steps}))
    else:
        console = table_console()
        if console.is_terminal:
            console.print(found)
        else:
            say(str(found))
    if html is not None:
        write(html, lambda: found.to_html(html, title))
    if png is not None:
        write(png, lambda: found.to_png(png, title))


def write(path: Path, how: Callable[[], Any]) -> None:
    """Do it and say so; what hinders it ends the command."""
    try:
        how()
    except (OSError, RuntimeError, ValueError) as problem:
        fail(f"cannot write {path}: {problem}")
    print(f"written: {path}", file=sys.stderr)
