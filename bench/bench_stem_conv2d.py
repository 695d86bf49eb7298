"""The 7x7 stride-2 convolution that reads the image (NCHW), with bias and ReLU."""

import pytest

from .layers import time_layer

OP = "stem_conv2d"
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)


def bench_stem_conv2d(benchmark, layer, candidate, batch):
    time_layer(benchmark, layer, candidate, batch)
