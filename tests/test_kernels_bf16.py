"""Dense kernels that multiply bfloat16 and add up in float32: exact where that is, else as good as it can be.

The layers are those of conv_layers.LAYERS with `bf16=1`, as a plan asks for it.
"""

from dataclasses import replace

import pytest
import torch
from conv_layers import (
    LAYERS,
    RELU,
    SIGMOID,
    Layer,
    by_why,
    check_exact,
    check_same_bits,
    detail,
    layer,
    packed,
    separable,
    winograd,
)
from helpers import assert_as_accurate, assert_bit_equal, assert_equal, errors, needs_native, run_python
from helpers import one_thread as one_thread

from fast_backbones.kernels import _ext

KINDS = ("conv2d", "winograd_conv2d", "linear", "separable_conv2d", "grouped_conv2d")
HAS_BF16 = _ext.native() is not None and _ext.native().has_bf16()

needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="no AVX512-BF16 on this machine")


def narrow(one: Layer) -> Layer:
    return replace(one, options={**one.options, "bf16": 1})


def grouped(why, x, filters, groups, **rest) -> Layer:
    rest = {"padding": 1, "activation": RELU, "kind": "grouped_conv2d"} | rest
    return layer(f"grouped rows: {why}", x, filters, 3, groups=groups, **rest)


MORE = [
    layer("one channel: half a pair", (2, 1, 5, 4), 33, 3, padding=1),
    layer("31 channels", (2, 31, 5, 7), 33, activation=RELU),
    layer("33 channels", (1, 33, 6, 5), 40, 3, padding=1),
    layer("47 channels, stride 2", (2, 47, 9, 6), 40, stride=2),
    layer("sums longer than a block", (1, 700, 5, 4), 40),
    layer("large weights, stride 2: two phases", (2, 1100, 7, 5), 224, stride=2, activation=RELU),
    separable("large weights on few pixels: two phases", (1, 860, 7, 6), 360, residual=True),
    layer("strided 1x1 from pixels of 4 KiB in pairs", (2, 2048, 5, 6), 40, stride=2),
    layer("3x3 from pixels of 4 KiB in pairs", (1, 2048, 3, 4), 33, 3, padding=1),
    separable("pixels of 4 KiB in pairs", (2, 2048, 5, 6), 40, depth_activation=RELU),
    replace(layer("scaled sums", (2, 40, 5, 7), 53), scaled=True),
    replace(layer("scaled sums without bias", (2, 40, 5, 7), 53, bias=False), scaled=True),
    replace(layer("scaled sums of linear", (3, 84, 1, 1), 45, kind="linear"), scaled=True),
    replace(
        layer("scale, gate, residual, relu", (2, 64, 7, 7), 136, residual=True, gated=1, activation=RELU),
        scaled=True,
    ),
    replace(layer("scaled sums of groups", (2, 24, 5, 6), 36, 3, padding=1, groups=3), scaled=True),
    replace(separable("scaled sums", (2, 32, 11, 9), 70, depth_activation=RELU), scaled=True),
    *(
        grouped(
            f"{width} to {width * widening}, stride {stride}",
            (2, 64, *size),
            64 * widening,
            64 // width,
            stride=stride,
            residual=stride == 1,
        )
        for widening, widths in ((1, (4, 8, 16, 32)), (2, (2, 4, 8, 16)))
        for width in widths
        for stride, size in ((1, (6, 15)), (2, (9, 14)))
    ),
    grouped("one pixel, all padding", (1, 32, 1, 1), 32, 8),
    grouped("several tasks", (1, 128, 30, 58), 128, 32, bias=False),
    replace(grouped("scaled sums", (2, 96, 7, 9), 96, 6, residual=True), scaled=True),
    replace(grouped("scaled sums without bias", (1, 64, 7, 5), 128, 16, bias=False), scaled=True),
    replace(winograd("scaled sums", (1, 40, 11, 9), 70, 2, residual=True), scaled=True),
    replace(winograd("scaled sums", (1, 41, 11, 9), 70, 4, bias=False), scaled=True),
]
FLOAT32_ONLY = [  # scaled inputs of these kinds: `test_refusals_say_why`
    one for one in LAYERS if one.kind in ("winograd_conv2d", "grouped_conv2d") and one.option("pre")
]
NARROW = [
    narrow(one)
    for one in LAYERS + MORE
    if one.kind in KINDS and not one.option("nchw_in") and one not in FLOAT32_ONLY
]
EXACT = [one for one in NARROW if one.is_exact()]
AS_THEY_COME = [  # the products see x and weight themselves, rounded
    one
    for one in NARROW
    if one.kind in ("conv2d", "linear", "grouped_conv2d")
    and not one.option("pre")
    and one.option("pre_activation") != SIGMOID
]


def rounded(tensors: dict) -> dict:
    """What the products see of x and weight."""
    return {name: t.bfloat16().float() if name in ("x", "weight") else t for name, t in tensors.items()}


@needs_bf16
@pytest.mark.parametrize("one", EXACT, ids=by_why)
def test_integer_data_is_exact(one):
    check_exact(one)


@needs_bf16
@pytest.mark.parametrize("data", ["reals", "positive"])
@pytest.mark.parametrize("one", NARROW, ids=by_why)
def test_at_most_twice_pytorchs_error_in_bfloat16(one, data):
    """PyTorch computes all of the formula in bfloat16; scales, shifts and gates are float32 here."""
    runs = [one.inputs(data, seed) for seed in range(4)]
    fast, plain, exact = [], [], []
    for tensors in runs:
        same = {name: t.bfloat16() for name, t in tensors.items()}
        plain.append(one.reference(same).flatten())
        fast.append(one.run({name: t.float() for name, t in same.items()}).flatten().bfloat16())
        exact.append(one.exact(same).flatten())
    assert_as_accurate(torch.cat(fast), torch.cat(plain), torch.cat(exact))


@needs_bf16
@pytest.mark.parametrize("data", ["reals", "positive"])
@pytest.mark.parametrize("one", AS_THEY_COME, ids=by_why)
def test_only_x_and_weight_are_rounded(one, data):
    """Against the exact result of the rounded ones, the error is that of sums in float32."""
    tensors = rounded(one.inputs(data))
    largest, rms = errors(one.run(tensors), one.exact(tensors))
    assert largest < 2e-5 and rms < 2e-6, (largest, rms)
    assert_bit_equal(one.run(one.inputs(data)), one.run(tensors), "rounding once more changes nothing")


@needs_bf16
@pytest.mark.parametrize("one", NARROW, ids=by_why)
def test_bits_depend_on_neither_threads_nor_batch_nor_strides(one):
    check_same_bits(one)


@needs_bf16
def test_rounding_to_nearest_even_as_pytorch_does():
    x = torch.cat(
        [torch.randn(4000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3e38, float("inf")])]
    )
    pixels = x.reshape(-1, 1, 1, 1).expand(-1, 2, 1, 1).contiguous()
    by_weight, by_input = (
        narrow(layer("", (1, 2, 1, 1), len(x), bias=False)),
        narrow(layer("", pixels.shape, 1, bias=False)),
    )
    one = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    expected = x.bfloat16().float()
    finite = expected.isfinite()  # infinity times 0 is none of our business
    assert_equal(by_input.run({"x": pixels, "weight": one}).flatten()[finite], expected[finite])
    assert_equal(by_weight.run({"x": one, "weight": pixels}).flatten()[finite], expected[finite])


@needs_bf16
def test_nan_stays_nan():
    x = torch.ones(1, 40, 2, 2)
    x[0, 7, 0, 0] = float("nan")
    y = narrow(layer("", (1, 40, 2, 2), 33, bias=False)).run({"x": x, "weight": torch.ones(33, 40, 1, 1)})
    assert y[0, :, 0, 0].isnan().all() and y[0, :, 0, 1:].isfinite().all()


@needs_bf16
def test_packed_weights_take_half_the_memory():
    wide, half = layer("", (1, 64, 7, 7), 96, 3), narrow(layer("", (1, 64, 7, 7), 96, 3))
    floats = [_ext.native().packed_floats(one.kind, one.params(1)) for one in (wide, half)]
    assert floats[0] == 2 * floats[1]


@needs_bf16
def test_every_form_says_that_it_is_bf16():
    forms = set()
    for one in NARROW:
        assert _ext.native().refusal(one.kind, one.params(one.x[0])) == "", one.why
        words = detail(one, one.params(one.x[0]))
        assert " bf16 " in words
        form = next((w for w in ("copied", "strided", "direct", "fused", "two-phase") if w in words), "")
        forms.add((form, "+" in words))
    both = {(form, phases) for form in ("copied", "strided", "direct") for phases in (False, True)}
    assert both | {("fused", False), ("two-phase", True)} <= forms


REFUSED = [
    (layer("", (1, 3, 8, 8), 16, 3, nchw_in=1), "planar input"),
    (grouped("", (1, 48, 4, 4), 48, 12), "handle multiples of 32"),
    (layer("", (1, 40, 8, 8), 40, 3, groups=40, kind="depthwise_conv2d"), "multiplies float32 only"),
    *((one, "scales and shifts its input in float32 only") for one in FLOAT32_ONLY),
]


@needs_bf16
@pytest.mark.parametrize(
    "one, words", REFUSED, ids=[f"{one.kind} {one.why}: {words}" for one, words in REFUSED]
)
def test_refusals_say_why(one, words):
    assert words in _ext.native().refusal(one.kind, narrow(one).params(1))


@needs_native
def test_kernels_of_float32_take_no_scale():
    plan, y = _ext.native().Plan(), torch.zeros(64)
    one = layer("", (1, 16, 1, 1), 32)
    weight = packed(one.kind, one.params(1), torch.zeros(32, 16, 1, 1))
    places = {name: (-1, t.data_ptr()) for name, t in (("x", y), ("weight", weight), ("scale", y), ("y", y))}
    with pytest.raises(ValueError, match="folded into their weights"):
        plan.add(one.kind, one.params(1), places, deps=[], name="")


@needs_native
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_a_capped_instruction_set_refuses(isa):
    code = (
        "from fast_backbones.kernels import _ext; n = _ext.native(); assert not n.has_bf16();"
        "print(n.refusal('conv2d', {'n': 1, 'c': 16, 'k': 16, 'bf16': 1}))"
    )
    assert "no AVX512-BF16 here" in run_python("-c", code, FB_MAX_ISA=isa).stdout
