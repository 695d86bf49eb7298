"""AlexNet's normalisation across channels."""

import pytest

from .layers import time_layer

OP = "local_response_norm"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_local_response_norm(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
