"""One row of the zoo: is the plan of somebody else's network right, and how much of it runs in kernels?

python -m bench.zoo_row timm/resnet50d --no-speed      progress to stderr, a JSON object to stdout
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import zoo_models
from .compare import Error, compare, eager_error, error, exact_outputs
from .peer import as_list, plain
from .peers import make_peers
from .precision import PRECISIONS
from .rows import PROGRESS

PEERS = ("eager", "channels_last", "compile", "ours")
FLOAT = 4

Tell = Callable[[float, str], None]


def measure(name: str, batch: int, threads: int, speed: tuple[float, int] | None, tell: Tell) -> dict:
    """The row, as plain data. speed: seconds of timing and the least number of rounds; None: no timing."""
    tell(0.0, "building the model")
    torch.set_num_threads(threads)
    model = zoo_models.make(name)
    return row_of(name, model, zoo_models.image(name, model, batch), threads, speed, tell)


def row_of(
    name: str, model: nn.Module, x: Tensor, threads: int, speed: tuple[float, int] | None, tell: Tell
) -> dict:
    """Parity, coverage and, if wanted, times of one model on x."""
    module = optimized(model)
    row = {"model": name, "input": list(x.shape), "params": sum(p.numel() for p in model.parameters())}
    with torch.inference_mode():
        tell(0.1, "plan")
        row |= coverage(model, module, x)
        if speed is None:
            tell(0.4, "float64 reference")
            return row | parity(model, module, x)
    budget, rounds = speed

    def rest(share: float, what: str) -> None:
        tell(0.2 + 0.8 * share, what)

    peers = make_peers(list(PEERS), threads)
    found = compare(model, x, peers, budget=budget, min_rounds=rounds, tell=rest)
    ours = found.entry("ours")
    return row | {
        "parity_2x": found.parity,
        "error": as_numbers(ours.error),
        "eager_error": as_numbers(found.own),
        "native_time": native_time(module, x) if row["why_not"] is None else None,
        "speed": found.as_dict(),
    }


def parity(model: nn.Module, module: nn.Module, x: Tensor) -> dict:
    """The 2x rule for `module`, the optimized copy, whether a plan runs or the modules do."""
    exact = exact_outputs(model, x)
    own = eager_error(model, x, exact)
    outputs = as_list(module(x))
    same_shapes = [y.shape for y in outputs] == [r.shape for r in exact]
    ours = error(outputs, exact) if same_shapes else Error(float("inf"), float("inf"))
    within = ours.within(PRECISIONS["highest"].factor, own)
    return {"parity_2x": within, "error": as_numbers(ours), "eager_error": as_numbers(own)}


def coverage(model: nn.Module, module: nn.Module, x: Tensor) -> dict:
    """How much of the plan runs in kernels, and what is left to PyTorch; or why there is no plan.

    native_macs: of the multiplications that PyTorch counts in the modules; native_bytes: of what all steps
    read and write at least. left: how often each operation runs in PyTorch. declined: what the first of each
    was told.
    """
    from fast_backbones.engine.costs import costs

    from fast_backbones import engine

    with FlopCounterMode(display=False) as counter:
        plain(model)(x)
    macs = counter.get_total_flops() / 2
    why_not = engine.why_not(module, x)
    if why_not is not None:
        return {"why_not": why_not, "gmacs": macs / 1e9}
    plan = engine.plan_for(module, x)
    left: Counter[str] = Counter()
    declined: dict[str, str] = {}
    native_flops = native_bytes = all_bytes = 0.0
    for step in plan.steps:
        flops, moved = costs(plan, step, FLOAT)
        all_bytes += moved
        if step.native:
            native_flops, native_bytes = native_flops + flops, native_bytes + moved
            continue
        left[operation(step)] += 1
        declined.setdefault(operation(step), "; ".join(step.refusals))
    return {
        "why_not": None,
        "gmacs": macs / 1e9,
        "steps": len(plan.steps),
        "native_steps": sum(step.native for step in plan.steps),
        "native_macs": min(native_flops / 2 / macs, 1.0) if macs else None,
        "native_bytes": native_bytes / all_bytes if all_bytes else None,
        "left": dict(left.most_common()),
        "declined": declined,
    }


def operation(step) -> str:
    """What a step calls in PyTorch: "aten.roll"; the name of its own operation where it has a formula."""
    if step.call is None:
        return step.op
    target = step.call[0]
    return str(getattr(target, "overloadpacket", getattr(target, "__name__", target)))


def native_time(module: nn.Module, x: Tensor) -> float:
    """The share of kernels in the time of all steps, each run alone."""
    from fast_backbones import engine

    with torch.inference_mode():
        rows = engine.explain(module, x).rows
    return sum(row.ms for row in rows if row.isa != "PyTorch") / sum(row.ms for row in rows)


def optimized(model: nn.Module) -> nn.Module:
    """A copy that fb.optimize_ has had."""
    import fast_backbones as fb

    return fb.optimize_(copy.deepcopy(model).eval())


def as_numbers(found: Error | None) -> dict[str, float] | None:
    return None if found is None else {"max": found.max, "rms": found.rms}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.zoo_row", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="library/name, as in timm/resnet50d")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-speed", action="store_true")
    options = parser.parse_args(argv)

    def tell(share: float, what: str) -> None:
        print(PROGRESS + json.dumps([share, what]), file=sys.stderr, flush=True)

    speed = None if options.no_speed else (options.budget, options.rounds)
    print(json.dumps(measure(options.model, options.batch, options.threads, speed, tell)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
