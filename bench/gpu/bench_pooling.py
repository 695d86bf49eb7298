"""Pooling on CUDA against PyTorch's own operators, on the layers of ResNet. Seconds come from CUDA events."""

import pytest
import torch
import torch.nn.functional as F

from fast_backbones.kernels import _ext

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCHES = [1, 64]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def timed(benchmark, call, *arguments):
    """Each round is a hundred calls between two events: launch latency hides as it does in a network."""
    calls = 100
    call(*arguments)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def milliseconds() -> float:
        start.record()
        for _ in range(calls):
            call(*arguments)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls

    samples = sorted(milliseconds() for _ in range(21))
    benchmark.extra_info["median_us"] = 1e3 * samples[len(samples) // 2]
    benchmark.extra_info["spread_us"] = 1e3 * (samples[-2] - samples[1])
    benchmark.extra_info["device"] = torch.cuda.get_device_name()
    benchmark.pedantic(milliseconds, rounds=5, warmup_rounds=1)


def image(batch, channels, size, dtype):
    x = torch.randn(batch, channels, size, size, device="cuda", dtype=dtype)
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("stack", ["ours", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def bench_max_pool2d(benchmark, batch, dtype, stack):
    assert _ext.cuda(), _ext.cuda_why_not()
    x = image(batch, 64, 112, dtype)
    ours = torch.ops.fast_backbones.max_pool2d.default
    assert torch.equal(ours(x, [3, 3], [2, 2], [1, 1], False), F.max_pool2d(x, 3, 2, 1))
    if stack == "ours":
        timed(benchmark, ours, x, [3, 3], [2, 2], [1, 1], False)
    else:
        timed(benchmark, F.max_pool2d, x, 3, 2, 1)


@pytest.mark.parametrize("stack", ["ours", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def bench_global_avg_pool(benchmark, batch, dtype, stack):
    assert _ext.cuda(), _ext.cuda_why_not()
    x = image(batch, 2048, 7, dtype)
    ours = torch.ops.fast_backbones.global_avg_pool.default
    torch.testing.assert_close(ours(x), x.mean((2, 3)))
    if stack == "ours":
        timed(benchmark, ours, x)
    else:
        timed(benchmark, lambda t: F.adaptive_avg_pool2d(t, 1), x)
