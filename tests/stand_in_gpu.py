"""The ways to a compiled kernel, for a GPU that is not there: python stand_in_gpu.py CAPABILITY MODEL ...

Compiles launches on all cores, as a graph does; then, with nothing but Triton's cache left, ahead of time in
other processes, and by calls as far as a machine without a GPU goes. Prints as JSON for each whether it was
in the cache. In a process of its own, because kernels of the interpreter cannot be compiled.
"""

import contextlib
import json
import sys

import torch
import triton
from fast_backbones.bench.gpu import ahead
from fast_backbones.engine.launches import EXACT
from fast_backbones.kernels._triton.launch import compile_ahead, compile_all, pretend


def main(capability, *models):
    launches = []
    for dtype in (torch.bfloat16, torch.float32):
        for name in models:
            launches += ahead.distinct(ahead.launches_of(name, 2, dtype, [EXACT], False), "config")
    pretend(capability)

    def call(launch):
        with contextlib.suppress(AttributeError):  # it is compiled; then Triton asks for the GPU's memory
            launch()
            raise AssertionError("a kernel has been put on a GPU that is not there")

    ways = {
        "side by side": lambda: compile_all(launches * 2),
        "ahead": lambda: [compile_ahead(launch, capability) for launch in launches],
        "calls": lambda: [call(launch) for launch in launches],
    }
    found = {"launches": len(launches)}
    for name, way in ways.items():
        for launch in launches:
            launch.kernel.device_caches.clear()
        hits = found[name] = []
        triton.knobs.compilation.listener = lambda cache_hit, hits=hits, **rest: hits.append(cache_hit)
        way()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
