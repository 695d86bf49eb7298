"""Time on a GPU, and what one can do at best: the two limits that explain() holds a kernel against."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import torch

CAPTURING = threading.Lock()  # starting a capture waits for the device, which another capture forbids
COPY_BYTES = 1 << 30  # far more than any L2 holds
PRODUCT = 8192  # rows and columns of the matrix product


def milliseconds(call: Callable[[], Any], calls: int) -> float:
    """Of one call, by events around `calls` of them on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def usual(call: Callable[[], Any], calls: int = 5, rounds: int = 5) -> float:
    """The median of some rounds, in milliseconds, after a warm-up.

    The calls are replayed as one CUDA graph: put on the stream one by one from Python, a kernel of a few
    microseconds would be timed by the launches.
    """
    call()
    graph = torch.cuda.CUDAGraph()
    with CAPTURING:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            for _ in range(calls):
                call()
    milliseconds(graph.replay, 1)
    return median(milliseconds(graph.replay, 1) / calls for _ in range(rounds))


@cache
def copy_bandwidth(device: int) -> float:
    """Bytes per second, read and written together, of a large copy on the device."""
    with torch.cuda.device(device):
        a = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        return 2 * COPY_BYTES / (1e-3 * usual(lambda: b.copy_(a)))


@cache
def matrix_rate(device: int, dtype: torch.dtype) -> float:
    """Flops per second of a large product of random matrices in PyTorch (cuBLAS)."""
    with torch.cuda.device(device):
        a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda").to(dtype) for _ in range(2))
        return 2.0 * PRODUCT**3 / (1e-3 * usual(lambda: a @ b))
