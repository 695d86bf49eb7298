"""Peak memory of a training step of DenseNet, with and without recomputation in backward.

    python -m bench.densenet_memory densenet121 --batch 8            both modes, each in its own process
    python -m bench.densenet_memory densenet121 --mode plain         one mode, in this process; JSON

Method. As in `bench.memory`: a fresh process, malloc that gives freed pages back, VmHWM against VmRSS. The
step is forward in train(), cross entropy, backward. The first one, which allocates the gradients of the
parameters, is not counted; of the next two the larger peak above the state just before it is. `digest` is a
hash of the gradients of the first step: the two modes must have the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time

from .child import run_child
from .memory import ENVIRONMENT, peak_of

MODES = ("plain", "memory_efficient")


def measure_here(name: str, mode: str, batch: int, size: int, threads: int) -> dict[str, object]:
    """Measure one mode in this process, which should be fresh."""
    import torch

    import fast_backbones as fb

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = fb.create_model(name, memory_efficient=mode == "memory_efficient").train()
    x = torch.randn(batch, model.in_chans, size, size)
    target = torch.randint(0, model.num_classes, (batch,))

    def step() -> None:
        with fb.backend("reference"):  # the option is one of the modules; fused steps have their own way
            torch.nn.functional.cross_entropy(model(x), target).backward()

    step()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.grad.numpy().tobytes())
    start = time.perf_counter()
    peak = max(peak_of(step) for _ in range(2))
    return {
        "model": name,
        "mode": mode,
        "batch": batch,
        "size": size,
        "peak_mib": round(peak / 1024, 1),
        "seconds": round((time.perf_counter() - start) / 2, 2),
        "digest": digest.hexdigest()[:16],
    }


def measure_both(name: str, batch: int, size: int, threads: int) -> dict[str, dict[str, object]]:
    """Each mode in its own process. RuntimeError when their gradients differ in any bit."""
    rows = {}
    for mode in MODES:
        sizes = ["--batch", str(batch), "--size", str(size), "--threads", str(threads)]
        arguments = ["-m", "{bench}.densenet_memory", name, "--mode", mode, *sizes]
        rows[mode] = run_child(arguments, environment=ENVIRONMENT)
    if len({row["digest"] for row in rows.values()}) != 1:
        raise RuntimeError(f"the gradients of the two modes of {name} differ: {rows}")
    return rows


def main(argv: list[str] | None = None) -> int:
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.densenet_memory", description=about)
    parser.add_argument("model", nargs="?", default="densenet121")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, help="measure this one here and print JSON")
    options = parser.parse_args(argv)
    sizes = (options.batch, options.size, options.threads)
    if options.mode is not None:
        print(json.dumps(measure_here(options.model, options.mode, *sizes)))
        return 0
    rows = measure_both(options.model, *sizes)
    print(f"{options.model}, batch {options.batch}, {options.size}x{options.size}, same gradients to the bit")
    for mode, row in rows.items():
        print(f"{mode:18}{row['peak_mib']:10.1f} MiB{row['seconds']:10.2f} s a step")
    share = rows["memory_efficient"]["peak_mib"] / rows["plain"]["peak_mib"]
    print(f"memory_efficient needs {share:.0%} of the memory")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
