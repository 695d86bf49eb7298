"""fast-backbones run: a photograph, or the features of a folder of images."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import common
from .common import AsJson, Threads, checked_info, fail, say, set_threads, table_console, warn

OURS, EAGER, COMPILE = "ours", ("eager", "channels_last"), "compile"


def class_names(path: Path | None, classes: int) -> list[str] | None:
    """One name per line of a text file."""
    if path is None:
        return None
    try:
        names = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        fail(f"cannot read the class names: {problem}")
    if len(names) != classes:
        fail(f"{path} has {len(names)} names, the model has {classes} classes")
    return names


def top5(logits: Any, names: list[str] | None) -> list[dict[str, Any]]:
    """The five likeliest classes of the first image."""
    chances = logits[0].softmax(0)
    best = chances.topk(min(5, chances.numel()))
    rows = []
    for chance, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        rows.append({"class": index, "probability": chance, **({"name": names[index]} if names else {})})
    return rows


PHOTO, FOLDER = "A photograph", "A folder"  # in the help
OF_A_PHOTO = {"classes": "--classes", "compile_peer": "--compile", "budget": "--budget"}
OF_A_FOLDER = {"out": "--out", "strict": "--strict"}


def run(
    context: typer.Context,
    image: Annotated[
        str, typer.Argument(help="an image file, sample:china or sample:flower; or a folder of images")
    ],
    model: Annotated[str, typer.Option(help="a name from `fast-backbones list`")] = "resnext50_32x4d",
    weights: Annotated[str | None, typer.Option(help="a file, a URL, or hf-hub:user/repository")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="images at a time [1; 16 for a folder]")] = None,
    threads: Threads = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="text file with one class name per line", rich_help_panel=PHOTO),
    ] = None,
    compile_peer: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="also time torch.compile, which compiles for a while",
            rich_help_panel=PHOTO,
        ),
    ] = True,
    budget: Annotated[float, typer.Option(min=0, help="seconds of timing", rich_help_panel=PHOTO)] = 8.0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="where the features go: .npy (and the paths in a .json beside it) or .parquet",
            rich_help_panel=FOLDER,
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="stop at the first unreadable image", rich_help_panel=FOLDER),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a model on a photograph, or write the features of a folder of images.

    A photograph: plan, time against PyTorch, error against float64, likeliest classes.
    A folder (and those below it): the pooled features of every image, one row each, sorted by path.
    """
    is_folder = Path(image).expanduser().is_dir()
    for name, option in (OF_A_PHOTO if is_folder else OF_A_FOLDER).items():
        if context.get_parameter_source(name).name == "COMMANDLINE":
            kind = "folder" if is_folder else "photograph"
            fail(f"{option} has no use for a {kind}, and {image} is {'one' if is_folder else 'no folder'}")
    if is_folder:
        if out is None:
            fail(f"{image} is a folder: --out features.npy or --out features.parquet says where features go")
        run_folder(Path(image).expanduser(), model, weights, batch or 16, threads, out, strict, as_json)
    else:
        run_photo(image, model, weights, batch or 1, threads, classes, compile_peer, budget, as_json)


def run_folder(
    folder: Path, model: str, weights: str | None, batch: int, threads: int | None, out: Path, strict: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the features of all images below a folder; see features.py."""
    from . import features

    checked_info(model)
    if out.suffix not in features.ENDINGS:
        fail(f"--out {out}: the name must end with {' or '.join(features.ENDINGS)}")
    if not out.parent.is_dir():
        fail(f"--out {out}: there is no folder {out.parent}")
    paths = features.images_in(folder)
    if not paths:
        fail(f"there are no images below {folder}")
    threads = set_threads(threads)
    network = common.build(model, weights, num_classes=0)
    if weights is None:
        warn("weights: random, the model has learned nothing and features mean nothing (--weights)")
    facts = {"model": model, "weights": weights if weights is not None else "random"}
    console, start = Console(stderr=True), time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    bar = Progress(
        TextColumn("{task.description}"),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    try:
        with bar:
            task = bar.add_task(model, total=len(paths), rate="")

            def tell(count: int) -> None:
                seen = bar.tasks[0].completed + count
                bar.update(task, advance=count, rate=f"{seen / (time.perf_counter() - start):.1f} images/s")

            found = features.extract(network, folder, paths, out, facts, batch, strict, tell)
    except KeyboardInterrupt:
        warn("interrupted, nothing was written")
        raise typer.Exit(130) from None
    except features.Unreadable as problem:
        warn(f"{problem}; nothing was written")
        raise typer.Exit(1) from None
    except features.Refused as problem:
        fail(str(problem))
    except OSError as problem:
        fail(f"cannot write {out}: {problem}")
    seconds = time.perf_counter() - start
    for path, why in found.unreadable.items():
        warn(f"unreadable: {path}: {why}")
    rate = len(found.paths) / seconds
    if as_json:
        counts = {"images": len(found.paths), "features": found.dimension, "unreadable": found.unreadable}
        speed = {"seconds": seconds, "images_per_second": rate, "threads": threads}
        say(json.dumps({"out": str(out), **facts, **counts, **speed}))
        return
    say(
        f"{out}: {len(found.paths)} images x {found.dimension} features, {len(found.unreadable)} unreadable;"
        f" {seconds:.1f} s, {rate:.1f} images/s"
    )


def run_photo(
    image: str, model: str, weights: str | None, batch: int, threads: int | None, classes: Path | None,
    compile_peer: bool, budget: float, as_json: bool,
) -> None:  # fmt: skip
    """One photograph against the peers."""
    from ..bench import machine
    from ..bench.compare import compare
    from ..bench.image import ImageError, load_image, preprocess
    from ..bench.peers import make_peers
    from ..bench.show import comparison_table, notes, progress

    checked_info(model)
    try:
        picture = load_image(image)
        network = common.build(model, weights)
        x = preprocess(picture, network.default_cfg).repeat(batch, 1, 1, 1)
    except ImageError as problem:
        fail(str(problem))
    threads = set_threads(threads)
    names = class_names(classes, network.num_classes)
    facts = machine.describe(threads)
    source = weights if weights is not None else "random"
    plan = plan_text(network, x)
    if not as_json:
        say(machine.headline(facts))
        say(f"{model} on {image} ({picture.width} x {picture.height}), batch {batch}")
        say(
            "weights: random, the model has learned nothing (--weights loads a checkpoint)"
            if weights is None
            else f"weights: {source}"
        )
        say(f"plan: {plan}")

    keys = [*EAGER, *([COMPILE] if compile_peer else []), OURS]
    with progress(Console(stderr=True), model) as tell:
        comparison = compare(network, x, make_peers(keys, threads), budget=budget, tell=tell)
    best = top5(comparison.logits, names) if comparison.logits is not None else []
    if as_json:
        say(
            json.dumps(
                {
                    "image": image,
                    "model": model,
                    "weights": source,
                    "machine": facts,
                    "plan": plan,
                    "comparison": comparison.as_dict(),
                    "top5": best,
                }
            )
        )
    else:
        say()
        table_console().print(comparison_table(comparison, f"{model}, batch {batch}"))
        for line in notes(comparison):
            say(f"  {line}")
        about = " of random weights: they mean nothing" if weights is None else ""
        say(f"\nlikeliest classes{about}")
        for row in best:
            name = f"  {row['name']}" if "name" in row else ""
            say(f"  {row['probability']:7.2%}  class {row['class']}{name}")
        if weights is not None and names is None:
            say("  (the checkpoint brings no class names; --classes FILE gives them)")
    if comparison.parity is False:
        raise typer.Exit(1)


def plan_text(network: Any, x: Any) -> str:
    """The plan in a line, or why there is none."""
    import torch

    from .. import engine

    with torch.inference_mode():
        reason = engine.why_not(network, x)
        if reason is not None:
            return f"none, the modules run through PyTorch: {reason}"
        plan = engine.plan_for(network, x)
    made = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in plan.seconds.items())
    return f"{engine.plan_summary(plan)}; made by {made}"
