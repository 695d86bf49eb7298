"""Which way and which tile each step takes on a GPU (kernels/_gpu.py has them): by rule, or as measured.

    key         what makes a step fast or slow, besides the batch: "conv2d bfloat16 ieee c=64 h=56 ..."
    of_device   what was measured: shipped with the package for this GPU (engine/gpu_tables/NAME.json), and
                over it what fb.tune has kept on this machine, by GPU, driver and versions
    measure     every way and tile of every step of a launch list, in its place in the network

A way belongs to a key, a tile to a key and a batch. So a sample has the same bits in any batch: ways may
differ in them, tiles do not. Nothing is measured unless fb.tune asks for it.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import _gpu
from . import choices as kept
from . import gpu_peaks
from .plan import Step

if TYPE_CHECKING:
    from .launches import LaunchList
    from .run_cuda import CudaRunner
    from .state import EngineState

SHIPPED = Path(__file__).resolve().parent / "gpu_tables"
Choices = Mapping[str, str]  # key: way; key and batch: tile
Clock = Callable[[Callable[[], object]], float]  # seconds of a call


def key(step: Step, dtype: torch.dtype, precision: str) -> str:
    """Numbers in alphabetical order, then what is read besides x."""
    given = {n: v for n, v in step.params.items() if isinstance(v, int)}
    numbers = sorted((n, v) for n, v in given.items() if v or n.startswith("pad_"))
    others = [role for role in step.roles if role != "x"]
    name = str(dtype).removeprefix("torch.")
    return " ".join([step.kernel, name, precision, *(f"{n}={int(v)}" for n, v in numbers), *others])


def with_batch(found: str, batch: int) -> str:
    return f"{found} n={batch}"


_measured: dict[torch.device, dict[str, str]] = {}  # in this process


@cache
def of_device(device: torch.device) -> Choices:
    """Read once a process; `remember` adds to it."""
    if device.type != "cuda":
        return {}
    shipped = SHIPPED / f"{words(torch.cuda.get_device_name(device))}.json"
    stored = {**(kept.load(shipped) if shipped.is_file() else {}), **kept.load(path_of(device))}
    return {**stored, **_measured.get(device, {})}


def remember(device: torch.device, choices: Choices) -> Path | None:
    """Keep them for the next process, and use them in this one from now on."""
    _measured.setdefault(device, {}).update(choices)  # also where no file can be written
    path = kept.save(path_of(device), {**kept.load(path_of(device)), **choices})
    of_device.cache_clear()
    return path


def path_of(device: torch.device) -> Path:
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    name = torch.cuda.get_device_name(device)
    return kept.cache_file(
        f"gpu-{words(name)}-driver-{driver}-torch-{torch.__version__}-triton-{version('triton')}"
    )


def words(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def tune(
    state: EngineState, runner: CudaRunner, x: Tensor, rounds: int, again: bool, tell: kept.Tell | None
) -> kept.Tuning:
    """See engine.tune."""
    with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
        launches = runner.launch_list(x.clone())
        launches.compile()
        launches.run()

        def clock(call: Callable[[], object]) -> float:
            return 1e-3 * gpu_peaks.usual(call, calls=20, rounds=rounds)

        known = {} if again else of_device(x.device)
        keep = partial(remember, x.device)
        layers, chosen = measure(launches, clock, known, tell or (lambda share, what: None), keep)
    path = path_of(x.device) if path_of(x.device).is_file() or not chosen else None
    for each in list(state.runners.values()):
        if isinstance(each, type(runner)):
            each.forget_graphs()
    with gpu_peaks.CAPTURING:  # nobody makes a graph meanwhile
        runner.weights.packed.clear()  # for every way; the next graphs pack what they read
    return kept.Tuning(layers, path)


def measure(
    launches: LaunchList,
    clock: Clock,
    known: Choices,
    tell: kept.Tell = lambda share, what: None,
    keep: Callable[[Choices], object] = lambda chosen: None,
) -> tuple[list[kept.Layer], dict[str, str]]:
    """(every step with a choice, what to remember). known: what is not measured again. keep: is told of each.

    The list has been run, so that the memory of every map holds numbers of the network, its own or later
    ones. A way whose result is farther from the usual one than its type's rounding is not taken, and a
    warning says so.
    """
    layers: dict[str, kept.Layer] = {}
    bound = {}
    for each in launches.bound:
        options = launches.options(each.step)
        if len(options) < 2 or each.first is not None:
            continue
        name = launches.key(each.step)
        names = [described(*option) for option in options]
        layer = kept.Layer(each.step.name, name, names, described(*launches.option(each.step, {})), [])
        layers.setdefault(name, layer).steps.append(each.step.name)
        bound.setdefault(name, each)
    compile_options(launches, {name: bound[name].step for name in layers}, known, tell)
    chosen: dict[str, str] = {}
    for count, (name, layer) in enumerate(layers.items()):
        tell(count / len(layers), layer.name)
        batched = with_batch(name, launches.plan.batch)
        if name in known and batched in known:
            layer.chosen = described(known[name], known[batched])
            continue
        way, tile = measure_step(launches, bound[name].step, layer, clock, known.get(name))
        layer.chosen = described(way, tile)
        chosen |= {name: way, batched: tile}
        keep({name: way, batched: tile})  # at once: the next one may take minutes
    return list(layers.values()), chosen


def compile_options(launches: LaunchList, steps: Mapping[str, Step], known: Choices, tell: kept.Tell) -> None:
    """All that will be measured, on all cores. What fails here fails again when its turn comes."""
    found: list[object] = []
    unknown = {n: step for n, step in steps.items() if with_batch(n, launches.plan.batch) not in known}
    for name, step in unknown.items():
        for option in launches.options(step):
            if known.get(name) in (None, option[0]):
                with contextlib.suppress(Exception):
                    found.append(launches.bind(step, *option).launch)
    if found:
        tell(0.0, f"compiling {len(found)} ways and tiles of {len(unknown)} layers")
        _gpu.compile_all(found)


def measure_step(
    launches: LaunchList, step: Step, layer: kept.Layer, clock: Clock, only: str | None
) -> tuple[str, str]:
    """The fastest option; `only`: of this way, which another batch has settled."""
    usual = launches.option(step, {} if only is None else {layer.key: only})
    target = launches.read(step.output)
    launches.bind(step, *usual).launch()
    expected = target.clone()
    seconds = {usual: clock(launches.bind(step, *usual).launch)}
    for option in launches.options(step):
        if option in seconds or (only is not None and option[0] != only):
            continue
        try:
            call = launches.bind(step, *option).launch
            target.fill_(torch.nan)
            call()
            spent = clock(call)
        except Exception as problem:  # does not compile here, no room, no engine: there are other ways
            warnings.warn(f"{layer.name}: {described(*option)} fails, left out: {problem}", stacklevel=2)
            continue
        if not alike(target, expected, launches.precision(step)):
            warnings.warn(
                f"{layer.name}: {described(*option)} computes something else; left out", stacklevel=2
            )
            continue
        seconds[option] = spent
    launches.bind(step, *usual).launch()
    layer.seconds = {described(*option): spent for option, spent in seconds.items()}
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < kept.MARGIN * seconds[usual] else usual


def alike(found: Tensor, expected: Tensor, precision: str) -> bool:
    """Within the rounding of their type, and of TF32's ten bits where products have them: on the whole, and
    nowhere far off. Sums of float32 differ by their order, too."""
    eps = max(torch.finfo(found.dtype).eps, 2.0**-10 if precision == "tf32" else 0.0)
    usual = 16 if found.dtype is torch.float32 else 2
    exact, distance = expected.float(), (found.float() - expected.float()).abs()
    tiny = torch.finfo(torch.float32).tiny
    on_the_whole = distance.square().mean().sqrt() <= usual * eps * exact.square().mean().sqrt() + tiny
    return bool(on_the_whole) and bool(distance.max() <= 2 * usual * eps * exact.abs().max() + tiny)


def described(way: str, tile: str) -> str:
    return f"{way} {tile}" if tile else way
