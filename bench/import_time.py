"""What `import fast_backbones` costs beyond `import torch`, in fresh processes taken in turns.

    python -m bench.import_time [--runs 7] [--json]

Also lists modules that an import must not drag in (compilers, plotting, other model zoos), should one be
there, and whether CUDA was initialised.
"""

from __future__ import annotations

import argparse
import json
import statistics

from .child import run_child

LIMIT = 0.15  # seconds that import fast_backbones may add
FORBIDDEN = (
    "torchvision",
    "timm",
    "triton",
    "matplotlib",
    "rich",
    "typer",
    "PIL",
    "sklearn",
    "onnx",
    "onnxruntime",
    "openvino",
    "torch._dynamo",
    "torch._inductor",
    "torch.export",
    "torch.utils.cpp_extension",
    "fast_backbones.bench",
)

SNIPPET = """
import json, sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
import torch
print(json.dumps({{"seconds": seconds, "modules": len(sys.modules), "cuda": torch.cuda.is_initialized(),
                   "loaded": [m for m in {names!r} if m in sys.modules]}}))
"""


def one(module: str) -> dict:
    """Import a module in a fresh process."""
    return run_child(["-c", SNIPPET.format(module=module, names=FORBIDDEN)])


def import_times(runs: int = 7, tell=lambda share, what: None) -> dict[str, object]:
    """Medians of `runs` processes each, taken in turns; the first of each kind warms the file cache and does
    not count."""
    seconds: dict[str, list[float]] = {"torch": [], "fast_backbones": []}
    last = {}
    for i in range(runs + 1):
        for module, values in seconds.items():
            tell(i / (runs + 1), f"import {module}")
            last[module] = one(module)
            if i:
                values.append(last[module]["seconds"])
    torch_s, ours_s = (statistics.median(seconds[m]) for m in ("torch", "fast_backbones"))
    dragged = [m for m in last["fast_backbones"]["loaded"] if m not in last["torch"]["loaded"]]
    added = ours_s - torch_s
    return {
        "import_torch_s": round(torch_s, 4),
        "import_fast_backbones_s": round(ours_s, 4),
        "added_s": round(added, 4),
        "limit_s": LIMIT,
        "forbidden_modules": dragged,
        "cuda_initialised": last["fast_backbones"]["cuda"],
        "ok": added <= LIMIT and not dragged and not last["fast_backbones"]["cuda"],
        "seconds": {m: [round(s, 4) for s in values] for m, values in seconds.items()},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.import_time", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="processes of each kind (default 7)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    result = import_times(options.runs)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"import torch {result['import_torch_s']:.3f} s, import fast_backbones"
            f" {result['import_fast_backbones_s']:.3f} s: {result['added_s']:+.3f} s (limit {LIMIT} s)"
        )
        if result["forbidden_modules"]:
            print("modules that do not belong there:", ", ".join(result["forbidden_modules"]))
        if result["cuda_initialised"]:
            print("the import initialised CUDA")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
