"""What a caller sees after a mistake: PyTorch's type of error, the argument, what came, what was expected.

After every rejected call the next good call must be right.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_bit_equal, needs_native, public, reals
from helpers import one_thread as one_thread

from fast_backbones import kernels

X = reals((2, 16, 6, 7), 1)
W = reals((16, 16, 3, 3), 2)
B = reals((16,), 3)
ONE = W[:, :, :1, :1].contiguous()
G = reals((16, 4, 3, 3), 4)
D = reals((16, 1, 3, 3), 7)
ROWS = reals((3, 16), 5)
HEAD = reals((10, 16), 6)
HUGE = torch.zeros(1).expand(2**16, 16, 2**11, 2**11)


def bad(op, message, *args, error=RuntimeError, marks=(), **kwargs):
    return pytest.param(op, error, message, args, kwargs, id=f"{op}: {message}", marks=marks)


BAD = [
    bad(
        "conv2d",
        "x has sizes [16, 16], expected [N, C, H, W]",
        X[0, :, :, 0].reshape(16, 6)[:, :1].expand(16, 16),
        W,
    ),
    bad("conv2d", "x has sizes [1, 2, 16, 6, 7]", X[None], W),
    bad("conv2d", "weight has sizes [16, 16, 3]", X, W[..., 0]),
    bad("conv2d", "x has 16 channels, expected 8", X, W[:, :8]),
    bad("conv2d", "bias has sizes [15], expected [16]", X, W, B[:15]),
    bad("conv2d", "bias has sizes [16, 1], expected [16]", X, W, B[:, None]),
    bad("conv2d", "groups is 0, expected at least 1", X, W, groups=0),
    bad("conv2d", "groups is -1, expected at least 1", X, W, groups=-1),
    bad("conv2d", "x has 16 channels, expected 48", X, W, groups=3),
    bad("conv2d", "weight has 15 filters, expected a multiple of groups, 4", X, G[:15], groups=4),
    bad("conv2d", "stride is 0, expected 1 to", X, W, stride=0),
    bad("conv2d", "stride is (1, 2, 3), expected an integer or two", X, W, stride=(1, 2, 3)),
    bad("conv2d", "stride is 1.5, expected integers", X, W, stride=1.5, error=TypeError),
    bad("conv2d", "dilation is 0, expected 1 to", X, W, dilation=0),
    bad("conv2d", "padding is -1, expected 0 to", X, W, padding=-1),
    bad("conv2d", f"padding is {2**31}, expected 0 to", X, W, padding=2**31),
    bad("conv2d", f"padding is {2**62}, expected 0 to", X[:0], W, padding=2**62),
    bad("conv2d", "padding is 'reflect'", X, W, padding="reflect", error=ValueError),
    bad("conv2d", "padding is 'same' and stride (2, 2)", X, W, padding="same", stride=2),
    bad(
        "conv2d",
        "the kernel covers 11 in height, more than the padded input, 6 + 2 * 1",
        X,
        W,
        dilation=5,
        padding=1,
    ),
    bad("conv2d", "weight is torch.float64, expected torch.float32", X, W.double()),
    bad("conv2d", "bias is torch.float64, expected torch.float32", X, W, B.double()),
    bad("conv2d", "residual is torch.float16", X, W, residual=X.half()),
    bad("conv2d", "weight is torch.float32, expected torch.int32", X.int(), W),
    bad("conv2d", "weight is on meta, expected cpu", X, W.to("meta")),
    bad("conv2d", "bias is on meta, expected cpu", X, W, B.to("meta")),
    bad("conv2d", "residual has sizes [2, 16, 6, 7], expected [2, 16, 4, 5]", X, W, residual=X),
    bad("conv2d", "expected at least one channel", X[:, :0], W[:, :0]),
    bad("conv2d", "weight has sizes [0, 16, 3, 3]", X, W[:0]),
    bad("conv2d", "expected at least one channel and one pixel", X[:, :, :0], W, padding=3),
    bad(
        "conv2d",
        "activation is 'gelu', expected one of none, relu",
        X,
        W,
        activation="gelu",
        error=ValueError,
    ),
    bad("conv2d", "x is a list, expected a tensor", [1.0], W, error=TypeError),
    bad("conv2d", "weight is a NoneType, expected a tensor", X, None, error=TypeError),
    bad("conv2d", "bias is a int, expected a tensor", X, W, 3, error=TypeError),
    bad(
        "conv2d", "backend is 'cudnn', expected one of auto, direct", X, W, backend="cudnn", error=ValueError
    ),
    bad("conv2d", "winograd: kernel 1x1: winograd handles 3x3", X, ONE, backend="winograd"),
    bad(
        "conv2d",
        "torch.float64: native handles torch.float32",
        X.double(),
        ONE.double(),
        backend="direct",
        marks=needs_native,
    ),
    bad("pointwise_conv2d", "weight has sizes [16, 16, 3, 3], expected [K, C, 1, 1]", X, W),
    bad("pointwise_conv2d", "stride is 0", X, ONE, stride=0),
    bad("grouped_conv2d", "x has 16 channels, expected 32", X, G, groups=8),
    bad("grouped_conv2d", "padding is (0, 0, 0)", X, G, groups=4, padding=(0, 0, 0)),
    bad("separable_conv2d", "depth_weight has sizes [16, 4, 3, 3], expected [16, 1, R, S]", X, G, ONE),
    bad("separable_conv2d", "weight has sizes [16, 16, 3, 3], expected [K, 16, 1, 1]", X, D, W),
    bad("separable_conv2d", "weight has sizes [16, 8, 1, 1], expected [K, 16, 1, 1]", X, D, ONE[:, :8]),
    bad("separable_conv2d", "depth_bias has sizes [15], expected [16]", X, D, ONE, B[:15]),
    bad("separable_conv2d", "bias has sizes [16, 1], expected [16]", X, D, ONE, None, B[:, None]),
    bad("separable_conv2d", "stride is 0, expected 1 to", X, D, ONE, stride=0),
    bad("separable_conv2d", "the kernel covers 11 in height", X, D, ONE, dilation=5),
    bad("separable_conv2d", "depth_weight is torch.float64, expected torch.float32", X, D.double(), ONE),
    bad("separable_conv2d", "weight is a NoneType, expected a tensor", X, D, None, error=TypeError),
    bad(
        "separable_conv2d",
        "depth_activation is 'tanh', expected one of none, relu, relu6",
        X,
        D,
        ONE,
        depth_activation="tanh",
        error=ValueError,
    ),
    bad(
        "separable_conv2d",
        "kernel 9x9: native handles up to 7x7",
        X,
        D.repeat(1, 1, 3, 3),
        ONE,
        padding=4,
        backend="native",
    ),
    bad("stem_conv2d", "stride is -2", X, W, stride=-2),
    bad("stem_conv2d", "the kernel covers 3 in width", X[..., :1], W, padding=(1, 0)),
    bad("max_pool2d", "x has sizes [16, 6]", X[0, :, :, 0], 2),
    bad("max_pool2d", "kernel_size is 0", X, 0),
    bad("max_pool2d", "stride is 0", X, 2, stride=0),
    bad("max_pool2d", "padding is (2, 2), expected at most half of kernel_size, (3, 3)", X, 3, padding=2),
    bad("max_pool2d", "the kernel covers 9 in height", X, 9),
    bad("max_pool2d", "expected at least one channel and one pixel", X[:, :0], 2),
    bad(
        "max_pool2d",
        "window 1x65: native handles up to 64 taps",
        torch.zeros(1, 1, 1, 70),
        (1, 65),
        backend="native",
        marks=needs_native,
    ),
    bad("max_pool2d", "the kernel covers 9 in height", X, 9, stride=2, ceil_mode=True),
    bad("avg_pool2d", "x has sizes [16, 6]", X[0, :, :, 0], 2),
    bad("avg_pool2d", "kernel_size is 0", X, 0),
    bad("avg_pool2d", "stride is (1, 2, 3), expected an integer or two", X, 2, stride=(1, 2, 3)),
    bad("avg_pool2d", "padding is (2, 2), expected at most half of kernel_size, (3, 3)", X, 3, padding=2),
    bad("avg_pool2d", "the kernel covers 9 in height", X, 9),
    bad("avg_pool2d", "torch.float64: native", X.double(), 2, backend="native", marks=needs_native),
    bad("depthwise_conv2d", "weight has sizes [16, 16, 3, 3], expected [16, 1, R, S]", X, W),
    bad("depthwise_conv2d", "weight has sizes [15, 1, 3, 3], expected [16, 1, R, S]", X, D[:15]),
    bad("depthwise_conv2d", "bias has sizes [15], expected [16]", X, D, B[:15]),
    bad("depthwise_conv2d", "stride is 0, expected 1 to", X, D, stride=0),
    bad("depthwise_conv2d", "the kernel covers 11 in height", X, D, dilation=5),
    bad("depthwise_conv2d", "weight is torch.float64, expected torch.float32", X, D.double()),
    bad("depthwise_conv2d", "weight is a NoneType, expected a tensor", X, None, error=TypeError),
    bad(
        "depthwise_conv2d",
        "activation is 'tanh', expected one of none, relu, relu6",
        X,
        D,
        activation="tanh",
        error=ValueError,
    ),
    bad(
        "depthwise_conv2d",
        "kernel 9x9: native handles up to 7x7",
        X,
        D.repeat(1, 1, 3, 3),
        padding=4,
        backend="native",
    ),
    bad("local_response_norm", "x has sizes [2, 16]", X[:, :, 0, 0], 5),
    bad("local_response_norm", "size is 0, expected at least 1", X, 0),
    bad("local_response_norm", "size is 1.5, expected an integer", X, 1.5, error=TypeError),
    bad("local_response_norm", "beta 0.6: native handles 0.5, 0.75, 1.0", X, 5, beta=0.6, backend="native"),
    bad("local_response_norm", "size 65: native handles 1 to 64", X, 65, backend="native"),
    bad("l2_normalize", "x has sizes [16, 6, 7], expected [N, C] or [N, C, H, W]", X[0]),
    bad("l2_normalize", "x has sizes [3, 0]", ROWS[:, :0]),
    bad("l2_normalize", "eps is -1, expected 0 or more", ROWS, eps=-1),
    bad("l2_normalize", "eps is nan, expected 0 or more", ROWS, eps=math.nan),
    bad("l2_normalize", "eps is 'small', expected a number", ROWS, eps="small", error=TypeError),
    bad("squared_distances", "x has sizes [3, 15], expected [N, 16]", ROWS[:, :15], HEAD),
    bad("squared_distances", "x has sizes [2, 16, 6, 7], expected [N, 16]", X, HEAD),
    bad("squared_distances", "centers has sizes [16], expected [K, C]", ROWS, HEAD[0]),
    bad("squared_distances", "centers has sizes [0, 16], expected [K, C]", ROWS, HEAD[:0]),
    bad("squared_distances", "centers is torch.float64, expected torch.float32", ROWS, HEAD.double()),
    bad("squared_distances", "centers is a NoneType, expected a tensor", ROWS, None, error=TypeError),
    bad("squeeze_excite", "x has sizes [2, 16]", X[:, :, 0, 0], ONE[:4], None, ONE[:, :4], None),
    bad("squeeze_excite", "weight1 has sizes [4, 8, 1, 1]", X, ONE[:4, :8], None, ONE[:, :4], None),
    bad("squeeze_excite", "weight1 has sizes [16, 16, 3, 3]", X, W, None, ONE, None),
    bad(
        "squeeze_excite",
        "weight2 has sizes [16, 5], expected [16, 4]",
        X,
        HEAD[:4],
        None,
        ONE[:, :5, 0, 0],
        None,
    ),
    bad("squeeze_excite", "weight1 has sizes [0, 16]", X, HEAD[:0], None, ONE[:, :0], None),
    bad("squeeze_excite", "bias1 has sizes [3], expected [4]", X, HEAD[:4], B[:3], ONE[:, :4], B),
    bad(
        "squeeze_excite", "bias2 has sizes [16, 1], expected [16]", X, HEAD[:4], None, ONE[:, :4], B[:, None]
    ),
    bad(
        "squeeze_excite",
        "weight2 is a NoneType, expected a tensor",
        X,
        ONE,
        None,
        None,
        None,
        error=TypeError,
    ),
    bad("squeeze_excite", "bias2 is torch.float64", X, ONE, None, ONE, B.double()),
    bad("global_avg_pool", "x has sizes [2, 16]", X[:, :, 0, 0]),
    bad("global_avg_pool", "expected at least one channel and one pixel", X[..., :0]),
    bad("linear", "x has sizes [3, 15], expected [..., 16]", ROWS[:, :15], HEAD),
    bad("linear", "weight has sizes [10], expected [K, C]", ROWS, HEAD[:, 0]),
    bad("linear", "weight has sizes [0, 16]", ROWS, HEAD[:0]),
    bad("linear", "bias has sizes [9], expected [10]", ROWS, HEAD, B[:9]),
    bad("linear", "weight is torch.float64", ROWS, HEAD.double()),
    bad("linear", "weight is on meta", ROWS, HEAD.to("meta")),
    bad("linear", "x has sizes []", torch.tensor(1.0), HEAD),
]


@pytest.mark.parametrize("op, error, message, args, kwargs", BAD)
def test_the_message_names_the_mistake(op, error, message, args, kwargs):
    expected = kernels.conv2d(X, W, B, padding=1)
    with pytest.raises(error, match=re.escape(message)) as caught:
        public(op)(*args, **kwargs)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{op}: ")
    assert_bit_equal(kernels.conv2d(X, W, B, padding=1), expected, "the next good call")


def operator(name):
    return getattr(torch.ops.fast_backbones, name)


ONES, ZEROS = [1, 1], [0, 0]
BARE = [  # the operators themselves, as a graph may call them
    ("conv2d", (X, W[:, :8], None, None, ONES, ZEROS, ONES, 1, "none"), "does not fit"),
    ("conv2d", (X, W, B[:3], None, ONES, ZEROS, ONES, 1, "none"), "bias has sizes [3], expected [16]"),
    (
        "conv2d",
        (X, W, None, X, ONES, ZEROS, ONES, 1, "none"),
        "residual has sizes [2, 16, 6, 7], expected [2, 16, 4, 5]",
    ),
    ("conv2d", (X, W, None, None, [1], ZEROS, ONES, 1, "none"), "stride has 1 values, expected 2"),
    ("conv2d", (X, W, None, None, [0, 1], ZEROS, ONES, 1, "none"), "stride is 0"),
    ("conv2d", (X, W, None, None, ONES, [2**40, 0], ONES, 1, "none"), "padding is"),
    ("conv2d", (X, W, None, None, ONES, ZEROS, [2**31, 1], 1, "none"), "dilation is"),
    ("conv2d", (X, W, None, None, ONES, ZEROS, [9, 1], 1, "none"), "covers 19 in height"),
    ("conv2d", (X, W, None, None, ONES, ZEROS, ONES, 0, "none"), "groups is 0"),
    ("conv2d", (X, W, None, None, ONES, ZEROS, ONES, 1, "tanh"), 'activation is "tanh"'),
    ("conv2d", (X.double(), W.double(), None, None, ONES, ZEROS, ONES, 1, "none"), "x must be float32"),
    ("conv2d", (X, W.double(), None, None, ONES, ZEROS, ONES, 1, "none"), "weight must be float32"),
    ("conv2d", (X[0], W, None, None, ONES, ZEROS, ONES, 1, "none"), "expected 4 dimensions"),
    ("conv2d", (X[:, :0], W, None, None, ONES, ZEROS, ONES, 1, "none"), "only the batch may be empty"),
    ("conv2d", (X, W[:0], None, None, ONES, ZEROS, ONES, 1, "none"), "none may be 0"),
    ("conv2d", (HUGE, W, None, None, ONES, [2**29] * 2, ONES, 1, "none"), "64-bit addresses"),
    ("winograd_conv2d", (X, ONE, None, None, ONES, ZEROS, ONES, 1, "none"), "winograd handles 3x3"),
    ("grouped_conv2d", (X, W, None, None, ONES, ONES, ONES, 1, "none"), None),
    ("max_pool2d", (X, [2, 2], ONES, [2, 2], False), "more than half"),
    ("max_pool2d", (X, [9, 9], ONES, ZEROS, False), "covers 9"),
    ("max_pool2d", (X, [2**33, 1], ONES, ZEROS, False), "kernel_size is"),
    ("max_pool2d", (X.int(), [2, 2], ONES, ZEROS, False), "x must be float32"),
    ("avg_pool2d", (X, [2, 2], ONES, [2, 2], False, True), "more than half"),
    ("avg_pool2d", (X, [9, 9], ONES, ZEROS, True, True), "covers 9"),
    ("avg_pool2d", (X[:, :0], [2, 2], ONES, ZEROS, False, True), "only the batch may be empty"),
    ("depthwise_conv2d", (X, W, None, ONES, ZEROS, ONES, "none"), "does not fit"),
    ("depthwise_conv2d", (X, D, B[:3], ONES, ZEROS, ONES, "none"), "bias has sizes [3], expected [16]"),
    ("depthwise_conv2d", (X, D, None, ONES, ZEROS, ONES, "tanh"), 'activation is "tanh"'),
    ("depthwise_conv2d", (X[:, :0], D[:0], None, ONES, ZEROS, ONES, "none"), "only the batch may be empty"),
    ("local_response_norm", (X, 0, 1.0, 0.75, 1.0), "size 0: local_response_norm handles 1 to 64"),
    ("local_response_norm", (X, 5, 1.0, 0.6, 1.0), "handles 0.5, 0.75 and 1"),
    ("local_response_norm", (X.double(), 5, 1.0, 0.75, 1.0), "x must be float32"),
    (
        "squeeze_excite",
        (X, HEAD[:, :8], None, HEAD.t(), None),
        "weight1 has sizes [10, 8], expected [any, 16]",
    ),
    ("squeeze_excite", (X, HEAD, None, HEAD, None), "weight2 has sizes [10, 16], expected [any, 10]"),
    ("squeeze_excite", (X, HEAD, None, HEAD[:, :10], None), "weight2 has sizes [10, 10], expected [16, 10]"),
    ("squeeze_excite", (X, HEAD, B, HEAD.t(), None), "bias1 has sizes [16], expected [10]"),
    ("global_avg_pool", (X[0],), "expected 4 dimensions"),
    ("l2_normalize", (ROWS, 1e-12), "expected 4 dimensions"),
    ("l2_normalize", (X, -1.0), "eps is -1"),
    ("l2_normalize", (X[:, :0], 1e-12), "only the batch may be empty"),
    ("squared_distances", (ROWS, HEAD[:, :3]), "do not fit"),
    ("squared_distances", (X, HEAD), "expected 2 dimensions"),
    ("squared_distances", (ROWS, HEAD.double()), "centers must be float32"),
    ("linear", (ROWS, HEAD[:, :3], None, "none"), "does not fit"),
    ("linear", (ROWS, HEAD, B, "none"), "bias has sizes [16], expected [10]"),
]


@needs_native
@pytest.mark.parametrize("name, args, message", BARE, ids=[f"{name}: {text}" for name, _, text in BARE])
def test_bare_operators_check_for_themselves(name, args, message):
    if message is None:  # sixteen channels in one group are a grouped convolution too
        operator(name)(*args)
        return
    with pytest.raises(RuntimeError, match=re.escape(message)):
        operator(name)(*args)


@needs_native
def test_mixed_devices_never_reach_a_kernel():
    meta = torch.device("meta")
    for x, weight, bias in ((X, W.to(meta), None), (X.to(meta), W, None), (X, W, B.to(meta))):
        with pytest.raises(RuntimeError, match="expected"):
            operator("conv2d")(x, weight, bias, None, ONES, ZEROS, ONES, 1, "none")
    with pytest.raises(RuntimeError, match="expected"):
        operator("linear")(ROWS, HEAD.to(meta), None, "none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_other_dtypes_are_pytorchs(dtype):
    x, weight = X.to(dtype), W.to(dtype)
    assert torch.equal(kernels.conv2d(x, weight, padding=1), F.conv2d(x, weight, padding=1))
    assert torch.equal(kernels.global_avg_pool(x), x.mean((2, 3)))
    assert torch.equal(
        kernels.linear(ROWS.to(dtype), HEAD.to(dtype)), F.linear(ROWS.to(dtype), HEAD.to(dtype))
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_pytorch_refuses_or_takes(dtype):
    """The same result or an error of the same type; never a wrong fast path."""
    x, weight = X.to(dtype), W.to(dtype)
    calls = [
        (lambda: F.conv2d(x, weight), lambda: kernels.conv2d(x, weight)),
        (lambda: F.max_pool2d(x, 2), lambda: kernels.max_pool2d(x, 2)),
        (lambda: x.mean((2, 3)), lambda: kernels.global_avg_pool(x)),
    ]
    for theirs, ours in calls:
        try:
            expected = theirs()
        except (RuntimeError, NotImplementedError) as error:
            with pytest.raises(type(error)):
                ours()
        else:
            assert torch.equal(ours(), expected)


def test_unbatched_images_are_accepted():
    for layout in (torch.contiguous_format, torch.channels_last):
        x = X.to(memory_format=layout)
        residual = F.conv2d(x, W)
        expected = F.relu(F.conv2d(x[1], W, B) + residual[1])
        actual = kernels.conv2d(x[1], W, B, residual=residual[1], activation="relu")
        assert actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-5)
        assert torch.equal(kernels.max_pool2d(x[1], 2), F.max_pool2d(x[1], 2))
        assert torch.allclose(kernels.global_avg_pool(x[1]), x[1].mean((1, 2)), atol=1e-6)


def test_named_padding_is_pytorchs():
    for kernel, dilation in (((3, 3), 1), ((2, 4), 1), ((3, 2), (2, 3)), ((1, 1), 1)):
        weight = W[:, :, :1, :1].repeat(1, 1, *kernel).contiguous()
        for padding in ("same", "valid"):
            expected = F.conv2d(X, weight, padding=padding, dilation=dilation)
            actual = kernels.conv2d(X, weight, padding=padding, dilation=dilation)
            assert actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-4)


def test_integer_likes_and_short_sequences():
    numpy = pytest.importorskip("numpy")
    expected = F.conv2d(X, W, stride=2, padding=1)
    for stride, padding in ((numpy.int64(2), [1]), (torch.tensor(2), (1,)), ([2, 2], torch.Size([1, 1]))):
        actual = kernels.conv2d(X, W, stride=stride, padding=padding, backend="reference")
        assert torch.equal(actual, expected)


@needs_native
def test_memory_exhausted_is_a_python_exception():
    """An output nobody can allocate, from an input that takes 4 bytes."""
    x = torch.zeros(1).expand(2**20, 1, 2**9, 2**9)
    with pytest.raises(RuntimeError):
        kernels.conv2d(x, torch.zeros(64, 1, 1, 1), backend="direct")
    assert kernels.global_avg_pool(X).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3), (4,)], ids=str)
def test_sparse_and_quantized_tensors_take_pytorchs_way(shape):
    """No compiled kernel reads them; PyTorch answers or refuses."""
    sparse = torch.eye(4)[: math.prod(shape[:1])].to_sparse()
    verdicts = kernels.explain("linear", sparse, torch.eye(4)).candidates
    assert verdicts[0].refusal is not None
    assert torch.equal(kernels.linear(sparse, torch.eye(4)), torch.eye(4)[: math.prod(shape[:1])])
