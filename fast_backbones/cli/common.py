"""What the commands share: options, words on stdout and stderr, models by name.

What only one command needs is imported when it runs: `fast-backbones --help` stays quick.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="a name from `fast-backbones list`")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of every candidate [the CPUs, at most 2]")]
Batch = Annotated[int, typer.Option(min=1, help="images at a time")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


def fail(message: str) -> NoReturn:
    """Say on stderr what is wrong, and end with exit code 2."""
    print(f"fast-backbones: {message}", file=sys.stderr)
    raise typer.Exit(2)


def warn(text: str) -> None:
    """A line on stderr."""
    print(f"fast-backbones: {text}", file=sys.stderr, flush=True)


def say(text: str = "") -> None:
    """A line of plain text on stdout, never wrapped or coloured."""
    print(text, flush=True)


def table_console() -> Console:
    from ..bench.models import table_console

    return table_console()


def set_threads(threads: int | None) -> int:
    """The number of threads that everything in this process uses from now on."""
    import torch

    from ..bench.machine import cpu_count

    threads = threads if threads is not None else min(2, cpu_count())
    torch.set_num_threads(threads)
    return threads


def checked_info(name: str) -> Any:
    """model_info, or exit code 2 with the closest names."""
    import fast_backbones as fb

    try:
        return fb.model_info(name)
    except ValueError as unknown:
        fail(str(unknown))


def build(name: str, weights: str | None, **options: Any) -> Any:
    """The model in eval mode, with weights from a file, a URL or the hub, or with seeded random ones."""
    import fast_backbones as fb

    from ..bench.subject import make_model

    checked_info(name)
    if weights is None:
        return make_model(name, **options)
    try:
        return fb.create_model(name, weights=weights, **options).eval()
    except fb.WeightsError as problem:
        fail(str(problem))


def network_and_input(name: str, batch: int, size: int | None) -> tuple[Any, Any]:
    """A network in eval mode with random weights, of this library or as timm:NAME or torchvision:NAME, and
    noise for it: [batch, C, size, size]. Foreign networks are optimised (`fb.optimize_`)."""
    import torch

    import fast_backbones as fb

    from ..bench import zoo_models
    from ..bench.subject import input_size

    library, colon, rest = name.partition(":")
    if not colon:
        network = build(name, None)
        channels, *sides = input_size(network)
    else:
        if library not in zoo_models.LIBRARIES:
            fail(f"{name}: {library!r} is neither {' nor '.join(zoo_models.LIBRARIES)}")
        try:
            network = fb.optimize_(zoo_models.plain(f"{library}/{rest}"))
        except ModuleNotFoundError as missing:
            fail(f"{name} needs {missing.name}: pip install {missing.name}")
        except ValueError as unknown:
            fail(str(unknown))
        channels, *sides = zoo_models.size(f"{library}/{rest}", network)
    sides = [size, size] if size is not None else sides
    return network, torch.randn(batch, channels, *sides, generator=torch.Generator().manual_seed(0))
