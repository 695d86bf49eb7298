"""The CUDA C++ kernels, on the CPU in an emulator of thread blocks (tests/native/simt), and on a GPU if any.

Maps are slices of wider ones full of NaN, so that a wrong address shows; around y nothing may change.
"""

import shutil

import pytest
import simt
import torch
import torch.nn.functional as F
from fast_backbones.kernels._cuda import depthwise_conv2d, grouped_conv2d

from fast_backbones.kernels import _ext

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[1:]
AROUND = 8  # elements on either side of a slice: 16 bytes and more


def slice_of_nan(n, c, h, w, dtype):
    """A map that lies as NHWC inside a wider one; and the wider one."""
    wide = torch.full((n, h, w, c + 2 * AROUND), torch.nan, dtype=dtype)
    return wide[..., AROUND : AROUND + c].permute(0, 3, 1, 2), wide


def run_on_gpu(launch, y):
    """The same launch on a GPU, its result put into y and what lies around it."""
    assert _ext.cuda(), _ext.cuda_why_not()

    def moved(tensor):
        base = tensor if tensor._base is None else tensor._base
        there = base.cuda()
        return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    there = [moved(a) if isinstance(a, torch.Tensor) else a for a in launch.arguments]
    type(launch)(launch.name, tuple(there))()
    y._base.copy_(there[2]._base)


def run(launch, y, device):
    """Once, or on the CPU with the threads in both orders."""
    if device == "cuda":
        run_on_gpu(launch, y.fill_(torch.nan))
        yield
        return
    for backwards in (False, True):
        y.fill_(torch.nan)
        simt.call(launch, backwards)
        yield


def untouched(wide):
    return bool(wide[..., :AROUND].isnan().all()) and bool(wide[..., -AROUND:].isnan().all())


def integers(*shape, most=2):
    return torch.randint(-most, most + 1, shape).float()


def epilogue(k):
    return torch.randint(1, 3, (k,)).float(), integers(k)


def expected(x, weight, scale, bias, activation, **how):
    y = F.conv2d(x.double(), weight.double(), **how) * scale.double().view(1, -1, 1, 1)
    y = y + bias.double().view(1, -1, 1, 1)
    return [y, y.relu(), y.clamp(0, 6), y.sigmoid(), y.tanh()][activation]


def outputs(size, window, stride, padding, dilation):
    return (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1


DEPTHWISE = {  # c, h, w, window, stride, padding, dilation, pre_activation
    "3x3": (24, 11, 9, 3, 1, 1, 1, 0),
    "3x3, relu before it": (16, 9, 10, 3, 1, 1, 1, 1),
    "3x3, stride 2, relu6 before it": (16, 11, 13, 3, 2, 1, 1, 2),
    "3x3 without padding": (8, 6, 5, 3, 1, 0, 1, 0),
    "3x3, wider than the image": (8, 1, 2, 3, 1, 1, 1, 0),
    "3x3, dilated": (16, 9, 7, 3, 1, 2, 2, 1),
    "5x5": (8, 10, 9, 5, 1, 2, 1, 0),
    "5x5, stride 2": (8, 11, 9, 5, 2, 2, 1, 0),
    "7x7": (8, 9, 8, 7, 1, 3, 1, 1),
    "channels that fill no vector": (13, 7, 5, 3, 1, 1, 1, 1),
}


def depthwise_case(case, dtype, n=2):
    c, h, w, window, stride, padding, dilation, pre = case
    x, _ = slice_of_nan(n, c, h, w, dtype)
    x.copy_(integers(n, c, h, w, most=7))
    p, q = (outputs(size, window, stride, padding, dilation) for size in (h, w))
    y, wide = slice_of_nan(n, c, p, q, dtype)
    weight, (scale, bias) = integers(c, 1, window, window).to(dtype), epilogue(c)
    launch = depthwise_conv2d.launch(
        x, depthwise_conv2d.pack(weight), y, kernel=(window, window), stride=(stride, stride),
        padding=(padding, padding), dilation=(dilation, dilation), scale=scale, bias=bias, pre_activation=pre,
        activation=1,
    )  # fmt: skip
    before = [x, x.relu(), x.clamp(0, 6)][pre]
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": c}
    return launch, y, wide, expected(before, weight, scale, bias, 1, **how)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("why", DEPTHWISE)
def test_depthwise_on_integers_to_the_bit(why, dtype, device):
    launch, y, wide, exact = depthwise_case(DEPTHWISE[why], dtype)
    for _ in run(launch, y, device):
        assert torch.equal(y.double(), exact.to(dtype).double())
        assert untouched(wide)


GROUPED = {  # channels per group, c, h, w, stride, padding
    "4 per group": (4, 64, 9, 17, 1, 1),
    "4 per group, stride 2": (4, 128, 9, 17, 2, 1),
    "8 per group": (8, 128, 5, 6, 1, 1),
    "16 per group, stride 2, even image": (16, 64, 10, 18, 2, 1),
    "16 per group": (16, 64, 7, 7, 1, 1),
    "32 per group, without padding": (32, 64, 9, 9, 1, 0),
    "32 per group, stride 2": (32, 64, 14, 14, 2, 1),
    "64 per group": (64, 128, 8, 16, 1, 1),
    "64 per group, stride 2": (64, 64, 9, 7, 2, 1),
    "one pixel": (8, 64, 1, 1, 1, 1),
}


def grouped_case(case, dtype, data, n=2, activation=1):
    per_group, c, h, w, stride, padding = case
    groups = c // per_group
    x, _ = slice_of_nan(n, c, h, w, dtype)
    x.copy_(data(n, c, h, w))
    p, q = (outputs(size, 3, stride, padding, 1) for size in (h, w))
    y, wide = slice_of_nan(n, c, p, q, dtype)
    weight, (scale, bias) = data(c, per_group, 3, 3).to(dtype), epilogue(c)
    launch = grouped_conv2d.launch(
        x, grouped_conv2d.pack(weight, groups), y, groups=groups, stride=(stride, stride),
        padding=(padding, padding), scale=scale, bias=bias, activation=activation,
    )  # fmt: skip
    how = {"stride": stride, "padding": padding, "groups": groups}
    return launch, y, wide, (x, weight, scale, bias, activation), how


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("why", GROUPED)
def test_grouped_on_integers_to_the_bit(why, dtype, device):
    launch, y, wide, operands, how = grouped_case(GROUPED[why], dtype, lambda *size: integers(*size, most=1))
    exact = expected(*operands, **how)
    for _ in run(launch, y, device):
        assert torch.equal(y.double(), exact.to(dtype).double())
        assert untouched(wide)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", range(5))
def test_grouped_on_reals_is_as_accurate_as_torch(activation, dtype, device):
    launch, y, wide, operands, how = grouped_case(
        (8, 64, 9, 10, 1, 1), dtype, torch.randn, activation=activation
    )
    x, weight, scale, bias, _ = operands
    exact = expected(*operands, **how)
    plain = F.conv2d(x, weight, **how) * scale.view(1, -1, 1, 1).to(dtype) + bias.view(1, -1, 1, 1).to(dtype)
    plain = [plain, plain.relu(), plain.clamp(0, 6), plain.sigmoid(), plain.tanh()][activation]
    for _ in run(launch, y, device):
        assert untouched(wide)
        assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max()
        assert (y - exact).square().mean() <= 4 * (plain - exact).square().mean()


def test_a_sample_does_not_depend_on_its_batch():
    for launch, y, *_ in (
        depthwise_case(DEPTHWISE["3x3"], torch.bfloat16, 3),
        grouped_case(GROUPED["4 per group"], torch.bfloat16, torch.randn, 3),
    ):
        simt.call(launch)
        whole = y.clone()
        x, weight, _, *rest = launch.arguments
        alone = type(launch)(launch.name, (x[1:2], weight, y[1:2].fill_(torch.nan), *rest))
        simt.call(alone)
        assert torch.equal(y[1], whole[1])


def test_a_nan_stays_where_its_group_and_window_are():
    launch, y, _, operands, _ = grouped_case((8, 64, 9, 17, 1, 1), torch.float16, torch.randn)
    x = operands[0]
    x[1, 20, 4, 8] = torch.nan
    simt.call(launch)
    found = y.isnan().nonzero()
    assert set(found[:, 0].tolist()) == {1}
    assert set(found[:, 1].tolist()) == set(range(16, 24))
    assert set(found[:, 2].tolist()) == {3, 4, 5}
    assert set(found[:, 3].tolist()) == {7, 8, 9}


@pytest.mark.parametrize("per_group", [4, 8, 16])
def test_an_infinity_does_what_it_does_in_torch(per_group):
    """4 channels per group aside: there the neighbour in the pair sees 0 * inf."""
    launch, y, _, operands, how = grouped_case(
        (per_group, 64, 9, 17, 1, 1), torch.float16, torch.randn, activation=0
    )
    operands[0][1, 16, 8, 16] = torch.inf
    simt.call(launch)
    exact = expected(*operands, **how)
    own = slice(None) if per_group > 4 else [c for c in range(64) if c // 4 != 5]
    assert torch.equal(y[:, own].isinf(), exact[:, own].isinf())
    assert torch.equal(y[:, own].isnan(), exact[:, own].isnan())


POOLS = [  # n c h w, window, stride, padding
    ((2, 16, 11, 9), 3, 2, 1),
    ((2, 5, 7, 8), 2, 2, 0),
    ((1, 8, 3, 3), 3, 1, 1),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_max_pool2d_equals_torch(case, dtype, layout):
    (n, c, h, w), window, stride, padding = case
    x = torch.randn(n, c, h, w).to(dtype).to(memory_format=layout)
    x[-1, -1, 0, 0] = torch.nan
    exact = F.max_pool2d(x.float(), window, stride, padding).to(dtype)
    y = torch.empty_like(exact, memory_format=layout)
    nchw = int(layout == torch.contiguous_format)
    size = simt.sizes(n, h, w, c, *exact.shape[2:], window, window, stride, stride, padding, padding)
    simt.check(simt.library().max_pool2d(simt.DTYPES[dtype], nchw, simt.pointer(x), simt.pointer(y), size))
    assert torch.equal(y.nan_to_num(7777), exact.nan_to_num(7777))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 264, 7, 7), (3, 5, 9, 1)], ids=str)
def test_global_avg_pool_of_integers(size, dtype, layout):
    n, c, h, w = size
    x = integers(*size, most=3).mul(h * w).to(dtype).to(memory_format=layout)  # so that the mean is exact
    for backwards in (0, 1):
        y = torch.full((n, c), torch.nan, dtype=dtype)
        nchw = int(layout == torch.contiguous_format)
        simt.library().backwards(backwards)
        simt.check(
            simt.library().global_avg_pool(
                simt.DTYPES[dtype], nchw, simt.pointer(x), simt.pointer(y),
                *(simt.ctypes.c_int64(v) for v in (n, h, w, c)),
            )
        )  # fmt: skip
        assert torch.equal(y, (x.double().sum((2, 3)) / (h * w)).to(dtype))


def test_the_emulator_finds_mistakes():
    y = torch.full((64,), torch.nan)
    mistake = simt.library().mistake
    assert mistake(0, simt.pointer(y)) == b"a barrier that not all threads reach"
    simt.check(mistake(1, simt.pointer(y)))
    assert y[0] == 0  # the copy had not come
    found = []
    for backwards in (0, 1):
        simt.library().backwards(backwards)
        simt.check(mistake(2, simt.pointer(y)))
        found.append(y.clone())
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 5, "s": 5}, "3x3"), ({"dilation_h": 2}, "3x3"), ({"stride_h": 2}, "stride"),
        ({"k": 256}, "channels"), ({"groups": 1}, "128 channels per group"), ({"pre": 1}, "only scale"),
        ({"residual": 1}, "only scale"), ({}, ""),
    ],
)  # fmt: skip
def test_the_grouped_kernel_says_what_it_does_not_take(change, words):
    params = {"c": 128, "k": 128, "groups": 32, "r": 3, "s": 3, **change}
    said = grouped_conv2d.refusal(params, torch.bfloat16)
    assert words in said
    assert bool(words) == bool(said)
    assert "16 bits" in grouped_conv2d.refusal(params, torch.float32)


@pytest.mark.parametrize(
    ("wide", "first", "words"), [(136, 0, ""), (136, 8, ""), (136, 4, "16 bytes"), (132, 0, "16 bytes")]
)
def test_the_grouped_kernel_wants_aligned_pixels(wide, first, words):
    params = {"c": 128, "k": 128, "groups": 32, "r": 3, "s": 3}
    dense, slice_of = (
        torch.zeros(2, 5, 5, size, dtype=torch.bfloat16)[..., at : at + 128].permute(0, 3, 1, 2)
        for size, at in ((128, 0), (wide, first))
    )
    said = grouped_conv2d.refusal(params, torch.bfloat16, (dense, slice_of))
    assert (words in said) if words else not said
