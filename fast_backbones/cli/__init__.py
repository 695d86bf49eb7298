"""The command fast-backbones: run models on images, list, explain, benchmark, check and show the set-up.

Imported by the console script and by `python -m fast_backbones` only. Exit codes: 0; 1 when numbers break the
2x rule, a check fails or no image of a folder can be read; 2 when what was asked for makes no sense (no such
model, no such image); 130 after Ctrl-C.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .checks import bench, selftest
from .common import say
from .images import run
from .models import info, list_
from .report import env
from .steps import explain

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="fast-backbones",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="CNN backbones for PyTorch with fused CPU kernels.",
)
app.command()(run)
app.command("list")(list_)
app.command()(info)
app.command()(explain)
app.command()(selftest)
app.command(context_settings=PASSED_ON, add_help_option=False)(bench)  # its options are those of bench.models
app.command()(env)


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
