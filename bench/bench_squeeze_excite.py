"""Channel gates of SE-ResNet."""

import pytest

from .layers import time_layer

OP = "squeeze_excite"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_squeeze_excite(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
