"""Compiles the Triton kernels of whole models for GPUs that are not there: python -m bench.gpu.ahead resnet50
--dtype bfloat16

Every launch of each model's plan, at its default size, becomes what Triton would compile for it; equal ones
once. With --training those of a training step instead, as under autocast to the type. For each target:
registers, spilled bytes, shared memory, and the matrix instruction that the products became.

    --each launch      everything that compiles to other code
    --each constants   one for each kernel, its constants and operands, whatever is known of the numbers
    --each config      one for each kernel, type and config (tile, warps, stages): the one that does most

Needs Triton; no GPU. TRITON_INTERPRET must not be 1: kernels in the interpreter have no source to compile.
What has been compiled lies in Triton's cache, where a GPU of the same kind finds it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from fast_backbones.engine.launches import EXACT, Arithmetic
from fast_backbones.engine.recipes import Tensors
from fast_backbones.kernels._triton.launch import Launch, compile_ahead, resources, specialization
from torch import nn

import fast_backbones as fb
from fast_backbones.engine import launches, plain_of, rules, state, train_program
from fast_backbones.kernels import _gpu, _gpu_training, backend

from .machine import DTYPES

# Bytes of a block. 86 and 89: GPUs of desktops, which nothing here is tuned for.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TF32 = {  # "convolutions" is PyTorch's default
    "neither": EXACT,
    "convolutions": Arithmetic(convolutions=True),
    "linear": Arithmetic(linear=True),
    "both": Arithmetic(convolutions=True, linear=True),
}
PRODUCTS = ("wgmma", "tcgen05.mma", "mma.sync")  # in PTX, the best first


@dataclass
class Compiled:
    """One kernel for one target. `spills`: bytes; `product`: the matrix instruction, "" where there is
    none."""

    kernel: str
    tiles: dict[str, Any]
    dtype: str
    target: int
    registers: int
    spills: int
    shared: int
    product: str
    seconds: float

    def faults(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes spilled")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} bytes of shared memory, the limit is {SHARED_LIMIT[self.target]}")
        return found


def launch_lists(
    name: str, batch: int, dtype: torch.dtype, allowed: Iterable[Arithmetic] = (EXACT,)
) -> Iterator[launches.LaunchList]:
    """Of a model's plan, on tensors without memory; one for each arithmetic."""
    model = fb.create_model(name).eval().to(dtype)
    size = model.default_cfg["input_size"]
    x = torch.empty(batch, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plan = state.make_for_gpu(state.trace(model, plain_of(model), x, launches.refusal))
    tensors = dict(rules.named_tensors(model))
    weights = launches.DeviceWeights.of(tensors, dtype, torch.device("meta"))
    for one in allowed:
        yield launches.LaunchList(plan, weights, x.to("meta"), Tensors(tensors), allowed=one)


def launches_of(
    name: str, batch: int, dtype: torch.dtype, allowed: Iterable[Arithmetic], tiles: bool
) -> list[Launch]:
    """Triton's of a model's plan. tiles: all that fb.tune may choose, too."""
    found = []
    for made in launch_lists(name, batch, dtype, allowed):
        found += [bound.launch for bound in made.bound]
        if tiles:
            found += [
                made.bind(step, way, tile).launch
                for step in made.plan.steps
                for way, tile in made.options(step)
                if way == _gpu.TRITON
            ]
    return [launch for launch in found if isinstance(launch, Launch)]


def training_launches_of(
    name: str, batch: int, dtype: torch.dtype, allowed: Iterable[Arithmetic] = (EXACT,)
) -> list[Launch]:
    """Triton's of a training step, forward and backward, on tensors without memory. Filters and maps are of
    the type, norms float32, as under autocast."""
    with torch.device("meta"):
        model = fb.create_model(name).train().to(memory_format=torch.channels_last)
        x = torch.empty(batch, *model.default_cfg["input_size"], dtype=dtype)
    for part in model.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.to(dtype)
    program = train_program.make_program(model, plain_of(model))
    if not isinstance(program, train_program.Program):
        raise RuntimeError(f"{name}: {program.reason}")
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    with _gpu_training.recorded() as found, backend("gpu"):
        try:
            for one in allowed:
                conv.fp32_precision = "tf32" if one.convolutions else "ieee"
                outputs = program(x)
                logits = (
                    [outputs] if isinstance(outputs, torch.Tensor) else [y for y in outputs if y is not None]
                )
                sum(y.sum() for y in logits if y is not None).backward()
        finally:
            conv.fp32_precision = before
    return found


def blocks(launch: Launch) -> dict[str, Any]:
    return {key: value for key, value in launch.constants.items() if key.startswith("BLOCK")}


def config(launch: Launch) -> tuple[Hashable, ...]:
    tile = tuple(sorted(blocks(launch).items()))
    return (launch.name, launch.constants.get("PRECISION"), tile, launch.num_warps, launch.num_stages)


def operands(launch: Launch) -> tuple[str, ...]:
    return tuple(name for name, value in launch.arguments.items() if isinstance(value, torch.Tensor))


def work(launch: Launch) -> int:
    """How much a launch does beside its products: operands, and constants that are not their least."""
    return len(operands(launch)) + sum(isinstance(v, int) and v > 0 for v in launch.constants.values())


def distinct(found: list[Launch], each: str = "launch") -> list[Launch]:
    """What compiles to different code: other types, constants, and what is known of the arguments; or fewer,
    see above."""
    if each == "config":
        most: dict[Hashable, Launch] = {}
        for launch in found:
            known = most.setdefault(config(launch), launch)
            if work(launch) > work(known):
                most[config(launch)] = launch
        return list(most.values())
    chosen: dict[Hashable, Launch] = {}
    for launch in found:
        key = (*config(launch), str(launch.constants), operands(launch))
        chosen.setdefault((*key, specialization(launch) if each == "launch" else ()), launch)
    return list(chosen.values())


def compiled(launch: Launch, target: int, dtype: str) -> Compiled:
    start = perf_counter()
    kernel = compile_ahead(launch, target)
    registers, spills = resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    product = next((word for word in PRODUCTS if word in ptx), "")
    used = registers, spills, kernel.metadata.shared, product, perf_counter() - start
    return Compiled(launch.name, blocks(launch), dtype, target, *used)


_todo: list[tuple[Launch, int, str]] = []  # what forked processes find; launches cannot be sent


def compiled_here(index: int) -> Compiled:
    return compiled(*_todo[index])


def compile_each(todo: list[tuple[Launch, int, str]], jobs: int) -> Iterator[Compiled]:
    """In order, by as many processes."""
    _todo[:] = todo
    if jobs == 1:
        yield from map(compiled_here, range(len(todo)))
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(compiled_here, range(len(todo)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.ahead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", help="names from fast_backbones.list_models()")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--target", nargs="+", type=int, default=[80, 90, 100], choices=SHARED_LIMIT)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 256])
    parser.add_argument(
        "--tf32", nargs="+", choices=TF32, default=["convolutions"], help="of float32 products"
    )
    parser.add_argument("--training", action="store_true", help="of a training step, not of a plan")
    parser.add_argument("--tiles", action="store_true", help="every tile that fb.tune may choose, too")
    parser.add_argument("--each", choices=("launch", "constants", "config"), default="launch")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    todo: list[tuple[Launch, int, str]] = []
    configs: set[Hashable] = set()
    for dtype in options.dtype:
        allowed = [TF32[tf32] for tf32 in (options.tf32 if dtype == "float32" else ["neither"])]
        every: list[Launch] = []
        for name, batch in itertools.product(options.models, options.batch):
            how = name, batch, DTYPES[dtype], allowed
            every += training_launches_of(*how) if options.training else launches_of(*how, options.tiles)
        configs |= {(dtype, *config(launch)) for launch in every}
        found = distinct(every, options.each)
        todo += [(launch, target, dtype) for launch in found for target in options.target]
    rows: list[Compiled] = []
    for row in compile_each(todo, options.jobs):
        rows.append(row)
        tile = " ".join(f"{key[6:]}={value}" for key, value in row.tiles.items())
        used = f"{row.registers:>4} registers {row.shared:>7} B shared {row.product:<12}"
        faults = "; ".join(row.faults())
        print(f"{row.kernel:<18} {row.dtype:<9} {tile:<28} sm_{row.target:<4} {used} {faults}", flush=True)
    faulty = [row for row in rows if row.faults()]
    kernels = {row.kernel for row in rows}
    targets = ", ".join(f"sm_{target}" for target in options.target)
    print(
        f"{len(kernels)} Triton kernels, {len(configs)} configs (type, precision, tile, warps, stages), "
        f"{len(rows)} times compiled, for {targets}: {len(faulty)} with faults"
    )
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    raise SystemExit(1 if faulty else 0)


if __name__ == "__main__":
    main()
