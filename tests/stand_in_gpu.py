"""Compiles launches ahead of time, then as calls on such a GPU would, on all cores; prints as JSON for each
whether the second found the first in Triton's cache: python stand_in_gpu.py CAPABILITY MODEL ...

In a process of its own, because kernels of the interpreter cannot be compiled.
"""

import json
import sys

import torch
import triton
from fast_backbones.bench.gpu import ahead
from fast_backbones.engine.launches import EXACT
from fast_backbones.kernels._triton.launch import compile_all, pretend


def main(capability, *models):
    launches = []
    for dtype in (torch.bfloat16, torch.float32):
        for name in models:
            launches += ahead.distinct(ahead.launches_of(name, 2, dtype, EXACT, False), "config")
    list(ahead.compile_each([(launch, capability, "") for launch in launches], 2))  # in other processes
    hits = {}

    def listener(src, metadata, cache_hit, **rest):
        hits[metadata["hash"]] = cache_hit

    triton.knobs.compilation.listener = listener
    pretend(capability)
    compile_all(launches)
    print(json.dumps({"launches": len(launches), "hits": list(hits.values())}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
