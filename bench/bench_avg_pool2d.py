"""Average pools between DenseNet's blocks."""

import pytest

from .layers import time_layer

OP = "avg_pool2d"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_avg_pool2d(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
