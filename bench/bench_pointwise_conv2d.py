"""1x1 convolutions of ResNets and ResNeXts, with bias and ReLU; those that end a block add the shortcut."""

import pytest

from .layers import time_layer

OP = "pointwise_conv2d"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_pointwise_conv2d(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
