"""What the first forward of a model costs in a fresh process: capture, fuse, place, pack, and the run itself.

    python -m bench.first_call resnet50 --batch 1      one measurement, in this process; JSON

The first call includes whatever PyTorch imports on the way (torch.export), since a user's process pays for it
too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import TYPE_CHECKING

from .child import run_child

if TYPE_CHECKING:  # the process to measure imports torch when it is told to
    from torch import Tensor, nn

LIMIT = 3.0  # seconds, for resnet50


def measure_here(name: str, batch: int, threads: int) -> dict[str, object]:
    """Build the model, call it twice, in this process, which should be fresh."""
    import torch

    from fast_backbones import engine

    from .subject import make_input, make_model

    torch.set_num_threads(threads)
    model = make_model(name, trained_like=False)
    x = make_input(model, batch)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            model(x)
            seconds.append(time.perf_counter() - start)
        reason = engine.why_not(model, x)  # after the calls: asking may make the plan
        stages = engine.plan_for(model, x).seconds if reason is None else {}
        guard = guard_seconds(model, x) if reason is None else None
    return {
        "model": name,
        "batch": batch,
        "first_s": seconds[0],
        "second_s": seconds[1],
        "third_s": seconds[2],
        "stages_s": stages,
        "guard_s": guard,
        "why_not": reason,
    }


def guard_seconds(model: nn.Module, x: Tensor, repeats: int = 50) -> float:
    """The least time that the engine needs to see that its plan is up to date, in cache."""
    from fast_backbones.engine.state import EngineState

    from fast_backbones.engine import plain_of

    state, plain, seconds = EngineState.of(model), plain_of(model), []
    for _ in range(repeats):
        start = time.perf_counter()
        state.runner(model, plain, x)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_first_call(
    name: str, batch: int = 1, threads: int = 2, runs: int = 3, tell=lambda share, what: None
) -> dict[str, object]:
    """Medians over `runs` fresh processes."""
    rows = []
    for i in range(runs):
        tell(i / runs, f"first call: {name}, batch {batch}")
        rows.append(
            run_child(["-m", "{bench}.first_call", name, "--batch", str(batch), "--threads", str(threads)])
        )
    stages = {k: round(statistics.median(r["stages_s"][k] for r in rows), 4) for k in rows[0]["stages_s"]}
    return {
        "model": name,
        "batch": batch,
        "first_s": round(statistics.median(r["first_s"] for r in rows), 3),
        "later_s": round(statistics.median(r["third_s"] for r in rows), 4),
        "stages_s": stages,
        "why_not": rows[0]["why_not"],
        "runs": rows,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_call", description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    print(json.dumps(measure_here(options.model, options.batch, options.threads)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
