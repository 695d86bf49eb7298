"""Classifiers, and VGG's large hidden layers."""

import pytest

from .layers import time_layer

OP = "linear"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_linear(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
