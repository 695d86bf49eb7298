"""The average over the last feature map."""

import pytest

from .layers import time_layer

OP = "global_avg_pool"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_global_avg_pool(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
