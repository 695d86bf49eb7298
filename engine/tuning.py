"""fb.tune: which algorithm computes a convolution fastest here, by measuring.

Without it a layer's sizes decide, by rules that were found on one machine (candidates.py), so that a model
gives the same bits on every machine with AVX2. Measuring gives that up and nothing else: a choice belongs to
a layer and a precision, whatever the batch and the threads it was measured with, so a sample still has the
same bits in any batch and on any number of threads.

    measure     one plan for each rank: every layer by its first algorithm, every layer by its second, ...
                The plans run step by step, in turns, so that a layer's weights are as cold as in the network
    choose      the algorithm that is at least 3 % faster than the one the rules take, else that one
    keep        in a JSON file for this processor, instruction set and version; the next tune reads it
"""

from __future__ import annotations

import platform
import re
import statistics
from pathlib import Path
from types import MethodType

from torch import Tensor, nn

from ..kernels import _ext
from .candidates import algorithms, layer_key
from .choices import MARGIN, Layer, Tell, Tuning, cache_file, load, save
from .plan import Step
from .recipes import Tensors
from .run_cpu import ArenaPool, Runner
from .state import EngineState, Traced, key_of, make, trace
from .weights import WeightStore


def tune(
    model: nn.Module,
    x: Tensor,
    plain: MethodType,
    rounds: int = 7,
    again: bool = False,
    tell: Tell | None = None,
) -> Tuning:
    """See engine.tune, which has checked that this call can have a plan."""
    traced, key = trace(model, plain, x), key_of(plain, x)
    path = cache_path()
    known = {} if again else load(path)
    layers = layers_of(traced, precision=key[-1])
    for layer in layers:
        layer.chosen = known.get(layer.key, "")
    missing = [layer for layer in layers if not layer.chosen]
    state = EngineState.of(model)
    if missing:
        measure(state, traced, key[-1], missing, rounds, tell or (lambda share, what: None))
        path = save(path, {**load(path), **{layer.key: layer.chosen for layer in missing}})
    state.choose({layer.key: layer.chosen for layer in layers}, key, traced)
    return Tuning(layers, path if layers else None)


def layers_of(traced: Traced, precision: str) -> list[Layer]:
    """Layers with a choice, those that are alike as one."""
    refusal = _ext.require().refusal
    usual = {step.name: step for step in make(traced, precision).steps if step.op == "conv2d"}
    found: dict[str, Layer] = {}
    for node in traced.graph.nodes:
        ways = list(algorithms(node, refusal))
        if len(ways) > 1:
            key = layer_key(node, precision)
            layer = Layer(node.name, key, ways, algorithm_of(usual[node.name], ways), [])
            found.setdefault(key, layer).steps.append(node.name)
    return list(found.values())


def algorithm_of(step: Step, ways: list[str]) -> str:
    """The name, among `ways`, of what a plan's step does; Winograd's tile shows in its weights."""
    if step.kernel != "winograd_conv2d" or step.kernel in ways:
        return step.kernel
    native = _ext.require()

    def packed(**more: int) -> int:
        return native.packed_floats(step.kernel, {**step.params, "n": 1, **more})

    tiles = [way for way in ways if way.startswith(step.kernel)]
    return next(way for way in tiles if packed(tile=int(way.split()[1])) == packed())


def measure(
    state: EngineState, traced: Traced, precision: str, layers: list[Layer], rounds: int, tell: Tell
) -> None:
    """Time every algorithm of these layers and choose; the others stay as the rules have them."""
    guard = state.guard
    assert guard is not None
    runs: list[tuple[dict[str, str], Runner]] = []
    for rank in range(max(len(layer.ways) for layer in layers)):
        choices = {layer.key: layer.ways[rank % len(layer.ways)] for layer in layers}
        store = WeightStore(guard.native, Tensors(guard.aliases))  # packed for this alone
        runs.append((choices, Runner(make(traced, precision, choices), guard, store, ArenaPool())))
    key_of_step = {name: layer.key for layer in layers for name in layer.steps}
    samples: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for rank, (choices, runner) in enumerate(runs):
            tell((turn * len(runs) + rank) / ((rounds + 1) * len(runs)), f"round {turn} of {rounds}")
            spent: dict[str, float] = {}
            for step, measured in runner.profile(traced.x, 1):
                key = key_of_step.get(step.name) if step.op == "conv2d" else None
                if key is not None:
                    spent[key] = spent.get(key, 0.0) + measured["ms"] * 1e-3
            for key, seconds in spent.items():
                if turn > 0:  # the first round touches memory for the first time
                    samples.setdefault((key, choices[key]), []).append(seconds)
    for layer in layers:
        layer.seconds = {way: statistics.median(samples[layer.key, way]) for way in layer.ways}
        best = min(layer.seconds, key=layer.seconds.__getitem__)
        clear = layer.seconds[best] < MARGIN * layer.seconds[layer.usual]
        layer.chosen = best if clear else layer.usual


def cache_path() -> Path:
    """Of this processor and instruction set."""
    words = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    return cache_file(f"{words}-{_ext.require().isa()}")


def processor() -> str:
    """Its name, and the numbers that tell processors of one name apart."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    keys = ("model name", "cpu family", "model", "stepping")
    found = [re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in keys]
    return " ".join(part.group(1) for part in found if part) or platform.processor() or platform.machine()
