"""Dense 3x3 convolutions of ResNets and VGG, with bias and ReLU."""

import pytest

from .layers import time_layer

OP = "conv2d"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_conv2d(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
