"""Depthwise convolutions of MobileNet and Xception, with bias and ReLU."""

import pytest

from .layers import time_layer

OP = "depthwise_conv2d"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_depthwise_conv2d(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
