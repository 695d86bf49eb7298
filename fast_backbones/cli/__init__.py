"""The command fast-backbones: run models on images, list, explain, benchmark, check and show the set-up.

Imported by the console script and by `python -m fast_backbones` only. Exit codes: 0; 1 when numbers break the
2x rule, a check fails or no image of a folder can be read; 2 when what was asked for makes no sense (no such
model, no such image); 130 after Ctrl-C.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import checks, env, explain, models, run  # noqa: F401 each registers its commands
from .common import app, say


def show_version(wanted: bool) -> None:
    if wanted:
        import fast_backbones as fb

        say(f"fast_backbones {fb.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="fast-backbones")
