"""The command fast-backbones: run a model on a photograph, list, explain, benchmark, show the set-up.

Imported by the console script and by `python -m fast_backbones` only. Exit codes: 0; 1 when our numbers break
the 2x rule; 2 when what was asked for makes no sense (no such model, no such image).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    name="fast-backbones",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="CNN backbones for PyTorch with fused CPU kernels.",
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="a name from `fast-backbones list`")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of every candidate [the CPUs, at most 2]")]
Batch = Annotated[int, typer.Option(min=1, help="images at a time")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]

OURS, EAGER, COMPILE = "ours", ("eager", "channels_last"), "compile"


def fail(message: str) -> NoReturn:
    """Say on stderr what is wrong, and end with exit code 2."""
    print(f"fast-backbones: {message}", file=sys.stderr)
    raise typer.Exit(2)


def say(text: str = "") -> None:
    """A line of plain text on stdout, never wrapped or coloured."""
    print(text, flush=True)


def table_console() -> Console:
    from .bench.models import table_console

    return table_console()


def set_threads(threads: int | None) -> int:
    """The number of threads that everything in this process uses from now on."""
    import torch

    from .bench.machine import cpu_count

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


def build(name: str, weights: str | None) -> Any:
    """The model in eval mode, with weights from a file, a URL or the hub, or with seeded random ones."""
    import fast_backbones as fb

    from .bench.subject import make_model

    checked_info(name)
    if weights is None:
        return make_model(name)
    try:
        return fb.create_model(name, weights=weights).eval()
    except fb.WeightsError as problem:
        fail(str(problem))


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


@app.command()
def run(
    image: Annotated[str, typer.Argument(help="an image file, sample:china or sample:flower")],
    model: Annotated[str, typer.Option(help="a name from `fast-backbones list`")] = "resnext50_32x4d",
    weights: Annotated[str | None, typer.Option(help="a file, a URL, or hf-hub:user/repository")] = None,
    classes: Annotated[Path | None, typer.Option(help="text file with one class name per line")] = None,
    batch: Batch = 1,
    threads: Threads = None,
    compile_peer: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="also time torch.compile, which compiles for a while"),
    ] = True,
    budget: Annotated[float, typer.Option(min=0, help="seconds of timing")] = 8.0,
    as_json: AsJson = False,
) -> None:
    """Run a model on a photograph: plan, time against PyTorch, error against float64, likeliest classes."""
    from .bench import machine
    from .bench.compare import compare
    from .bench.image import ImageError, load_image, preprocess
    from .bench.peers import make_peers
    from .bench.show import comparison_table, notes, progress

    checked_info(model)
    try:
        picture = load_image(image)
        network = build(model, weights)
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

    from . import engine

    with torch.inference_mode():
        reason = engine.why_not(network, x)
        if reason is not None:
            return f"none, the modules run through PyTorch: {reason}"
        plan = engine.plan_for(network, x)
    made = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in plan.seconds.items())
    return f"{engine.plan_summary(plan)}; made by {made}"


@app.command("list")
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

    from . import model_tables

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


@app.command()
def info(model: ModelName, as_json: AsJson = False) -> None:
    """Facts about a model: size, cost, preprocessing, feature levels, origin."""
    from . import model_tables

    facts = checked_info(model)
    if as_json:
        say(json.dumps(dataclasses.asdict(facts)))
        return
    table_console().print(model_tables.facts_table(facts))
    say()
    table_console().print(model_tables.taps_table(facts))


@app.command()
def explain(
    model: ModelName,
    batch: Batch = 1,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each step")] = 5,
    as_json: AsJson = False,
) -> None:
    """Each fused step of a model: kernel, time, GFLOP/s, GB/s, share of the machine's measured peak."""
    import torch

    from . import engine
    from .bench.subject import make_input

    network = build(model, None)
    set_threads(threads)
    with torch.inference_mode():
        found = engine.explain(network, make_input(network, batch), repeats=repeats)
    if as_json:
        say(
            json.dumps(
                {
                    "model": model,
                    "batch": batch,
                    "reason": found.reason,
                    "peak_gflops": found.peak_gflops,
                    "copy_gbps": found.copy_gbps,
                    "steps": [dataclasses.asdict(row) for row in found.rows],
                }
            )
        )
    else:
        say(str(found))


@app.command()
def env(as_json: AsJson = False) -> None:
    """What a bug report needs: versions, processor, build, FB_ variables. No names of people or hosts."""
    import torch

    from .bench import machine
    from .bench.peer import package_version

    facts = machine.describe(torch.get_num_threads())
    packages = ("numpy", "pillow", "safetensors", "triton", "torchvision", "timm", "onnxruntime", "openvino")
    report = {
        "machine": {k: v for k, v in facts.items() if k != "fast_backbones"},
        "build": facts["fast_backbones"],
        "packages": {name: package_version(name) for name in packages},
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("FB_", "OMP_", "MKL_NUM"))
        },
        "threads": torch.__config__.parallel_info().splitlines(),
    }
    if as_json:
        say(json.dumps(report))
        return
    for section, content in report.items():
        say(f"[{section}]")
        lines = content.items() if isinstance(content, dict) else ((None, line) for line in content)
        for key, value in lines:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            say(f"  {key}: {text}" if key is not None else f"  {text}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Time whole models against their peers, as `python -m bench.models` does (--help lists the options)."""
    from .bench.models import main as models

    raise typer.Exit(models(context.args, prog="fast-backbones bench"))


def show_version(wanted: bool) -> None:
    if wanted:
        import fast_backbones as fb

        say(f"fast_backbones {fb.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="fast-backbones")


if __name__ == "__main__":
    main()
