"""The float64 truth: depthwise convolutions by taps give what PyTorch gives; nothing else is replaced."""

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.bench.exact import depthwise_by_taps, float64
from torch import nn

CASES = {
    "same": {"kernel_size": 3, "padding": 1},
    "stride, no padding": {"kernel_size": 3, "stride": 2},
    "uneven everything": {"kernel_size": (5, 2), "stride": (1, 3), "padding": (2, 0), "dilation": (2, 1)},
}


@pytest.mark.parametrize("why", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_by_taps(why, bias):
    conv = nn.Conv2d(6, 6, groups=6, bias=bias, **CASES[why]).double()
    x = torch.randn(2, 6, 13, 11, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(float64(conv, x), conv(x), rtol=1e-13, atol=1e-13)


def test_everything_else_is_pytorchs_own():
    plain = F.conv2d
    grouped, dense = nn.Conv2d(6, 6, 3, groups=2).double(), nn.Conv2d(1, 1, 3).double()
    with torch.no_grad():
        for conv in (grouped, dense):
            x = torch.randn(1, conv.in_channels, 5, 5, dtype=torch.float64)
            assert torch.equal(float64(conv, x), conv(x))
        with depthwise_by_taps():
            single, x = nn.Conv2d(6, 6, 3, groups=6), torch.randn(1, 6, 5, 5)
            assert torch.equal(single(x), plain(x, single.weight, single.bias, groups=6))
    assert F.conv2d is plain
