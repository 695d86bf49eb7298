"""Depthwise-separable convolutions of MobileNet and Xception, with biases and ReLU after both parts."""

import pytest

from .layers import time_layer

OP = "separable_conv2d"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_separable_conv2d(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
