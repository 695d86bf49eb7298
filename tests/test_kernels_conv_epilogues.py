"""What convolutions do around their products: gates, activations, scaled and activated inputs.

The torch-free interface offers more than the public ops ask of it; a plan uses all of it. Run as a program,

    python tests/test_kernels_conv_epilogues.py OUT.pt

it checks every layer exactly and saves results of real data; the tests start it once per instruction set.
"""

import sys

import pytest
import torch
from conv_layers import (
    ACTIVATIONS,
    LAYERS,
    RELU6,
    SIGMOID,
    TANH,
    by_why,
    check_exact,
    check_same_bits,
    detail,
    layer,
    separable,
    winograd,
)
from helpers import (
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    isas,
    needs_native,
    reals,
    run_python,
)
from helpers import one_thread as one_thread

from fast_backbones.kernels import _ext

EXACT = [one for one in LAYERS if one.is_exact()]


@needs_native
@pytest.mark.parametrize("one", EXACT, ids=by_why)
def test_integer_data_is_exact(one):
    check_exact(one)


@needs_native
@pytest.mark.parametrize("data", ["reals", "positive"])
@pytest.mark.parametrize("one", LAYERS, ids=by_why)
def test_at_most_twice_pytorchs_error(one, data):
    runs = [one.inputs(data, seed) for seed in range(4)]
    fast, plain, exact = (
        torch.cat([f(tensors).flatten() for tensors in runs]) for f in (one.run, one.reference, one.exact)
    )
    assert_as_accurate(fast, plain, exact)


@needs_native
@pytest.mark.parametrize("one", LAYERS, ids=by_why)
def test_bits_depend_on_neither_threads_nor_batch_nor_strides(one):
    check_same_bits(one)


@needs_native
@pytest.mark.parametrize("one", [one for one in LAYERS if one.kind == "separable_conv2d"], ids=by_why)
def test_separable_has_the_bits_of_its_two_parts(one):
    tensors = one.inputs("reals")
    c = one.x[1]
    options = {"pre_activation": one.option("pre_activation"), "activation": one.option("depth_activation")}
    geometry = {"stride": one.stride, "padding": one.padding, "dilation": one.dilation}
    geometry |= {name: one.options[name] for name in ("pad_bottom", "pad_right") if name in one.options}
    depth = layer("", one.x, c, one.kernel, kind="depthwise_conv2d", groups=c, **geometry, **options)
    parts = {"x": tensors["x"], "weight": tensors["depth_weight"], "bias": tensors.get("depth_bias")}
    between = depth.run({name: t for name, t in parts.items() if t is not None})
    last = {name: t for name, t in tensors.items() if not name.startswith("depth")} | {"x": between}
    dense = layer("", between.shape, one.filters, residual=one.residual, activation=one.option("activation"))
    assert_bit_equal(one.run(tensors), dense.run(last))


@needs_native
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_sigmoid_and_tanh_are_as_good_as_float32_allows(kind):
    """At most 2 units in the last place, on 200 000 values; sigmoid(0) is one half exactly."""
    x = torch.cat([reals((99_999,), 1) * 4, reals((99_999,), 2) * 0.3, torch.tensor([0.0, 104.0])])
    x = x.reshape(-1, 1, 1, 1)
    for activation in (SIGMOID, TANH):
        one = layer("identity", tuple(x.shape), 1, kind=kind, bias=False, activation=activation)
        y = one.run({"x": x, "weight": torch.ones(1, 1, 1, 1)}).flatten()
        exact = ACTIVATIONS[activation](x.double().flatten())
        unit = torch.exp2(torch.frexp(exact.abs().clamp(min=2.0**-126)).exponent.double() - 24)
        assert ((y - exact).abs() / unit).max() <= 2
        assert y[-2] == (0.5 if activation == SIGMOID else 0.0)
        assert y[-1] == 1.0


@needs_native
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a > TANH])
def test_costly_activations_are_as_good_as_pytorchs(activation):
    x = torch.cat([reals((99_999,), 1) * 4, reals((99_999,), 2) * 0.3, torch.linspace(-12, 12, 40_001)])
    one = layer("identity", (x.numel(), 1, 1, 1), 1, bias=False, activation=activation)
    y = one.run({"x": x.reshape(-1, 1, 1, 1), "weight": torch.ones(1, 1, 1, 1)}).flatten()
    assert_as_accurate(y, ACTIVATIONS[activation](x), ACTIVATIONS[activation](x.double()))
    small = x.abs() < 0.3
    exact = ACTIVATIONS[activation](x[small].double())
    assert_as_accurate(y[small], ACTIVATIONS[activation](x[small]), exact)


@needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass_as_in_pytorch(activation):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.5]).reshape(1, 1, 1, 6)
    identity = {"x": x, "weight": torch.ones(33, 1, 1, 1)}
    after = layer("after", tuple(x.shape), 33, bias=False, activation=activation)
    before = layer("before", tuple(x.shape), 33, bias=False, pre_activation=activation)
    expected = ACTIVATIONS[activation](x).repeat(1, 33, 1, 1)
    for one in (after, before) if activation <= TANH else (after,):
        actual = one.run(identity)
        if activation <= RELU6:
            assert_equal(actual, expected, one.why)
        else:
            assert torch.allclose(actual, expected, rtol=1e-6, atol=0, equal_nan=True), one.why


REFUSED = [
    (separable("", (1, 16, 4, 4), 16, gated=1), "no gate"),
    (separable("", (1, 16, 4, 4), 16, pre=1), "scale"),
    (separable("", (1, 16, 4, 4), 16, depth_activation=10), "depth_activation 10"),
    (separable("", (1, 16, 4, 4), 16, pre_activation=TANH), "pre_activation tanh"),
    (separable("", (1, 16, 4, 4), 16, groups=2), "2 groups"),
    (separable("", (1, 16, 4, 4), 16, 9, padding=4), "7x7"),
    (separable("", (1, 16, 4, 4), 16, nchw_in=1), "planar"),
    (layer("", (1, 16, 4, 4), 16, depth_activation=1), "no depthwise part"),
    (layer("", (4, 40, 1, 1), 70, kind="linear", gated=1), "no gate"),
    (layer("", (1, 16, 4, 4), 16, activation=10), "activation number 10"),
    (layer("", (1, 16, 4, 4), 16, activation=-1), "activation number -1"),
    (layer("", (1, 16, 4, 4), 16, pre_activation=10), "pre_activation number 10"),
    (layer("", (1, 16, 4, 4), 64, act_from=24, activation=1), "act_from is 24"),
    (layer("", (1, 64, 4, 4), 64, groups=2, act_from=32, activation=1), "act_from with 2 groups"),
    (winograd("", (1, 16, 4, 4), 16, 3), "tile is 3, expected 2, 4 or 0"),
    (layer("", (1, 16, 4, 4), 16, 3, padding=1, kind="winograd_conv2d", gated=1), "no gate"),
    (layer("", (1, 16, 4, 4), 16, 3, padding=1, kind="winograd_conv2d", pre_activation=1), "input"),
    (
        layer("", (1, 64, 4, 4), 64, 3, padding=1, kind="winograd_conv2d", act_from=32, activation=1),
        "all channels",
    ),
    (layer("", (1, 16, 4, 4), 16, 3, kind="winograd_conv2d", pad_bottom=1, pad_right=1), "all sides alike"),
    (layer("", (1, 32, 4, 4), 32, 3, groups=4, kind="grouped_conv2d", pad_bottom=2, pad_right=0), "padding"),
    (layer("", (1, 16, 4, 4), 16, 3, pad_bottom=2**40, pad_right=0), "padding is negative or too large"),
    (layer("", (1, 32, 4, 4), 32, 3, padding=1, groups=4, kind="grouped_conv2d", gated=1), "no gate"),
]


@needs_native
@pytest.mark.parametrize("one, words", REFUSED, ids=[f"{one.kind}: {words}" for one, words in REFUSED])
def test_refusals_say_why(one, words):
    assert words in _ext.native().refusal(one.kind, one.params(1))


@needs_native
def test_layers_of_the_table_are_accepted_and_reach_every_form():
    forms = set()
    for one in LAYERS:
        params = one.params(one.x[0])
        assert _ext.native().refusal(one.kind, params) == "", one.why
        words = detail(one, params)
        form = next((w for w in ("copied", "strided", "direct", "fused", "two-phase") if w in words), "")
        forms.add((form, "+" in words))
    both = {(form, phases) for form in ("copied", "strided", "direct") for phases in (False, True)}
    assert both | {("fused", False), ("two-phase", True)} <= forms


@needs_native
@pytest.mark.parametrize(
    "x, padding, form",
    [
        ((1, 64, 56, 56), 1, "F(4x4,3x3)"),
        ((1, 32, 27, 27), 0, "F(4x4,3x3)"),
        ((1, 64, 24, 24), 1, "F(2x2,3x3)"),  # 36 tiles of 16: too few to read 46 weights for each
        ((1, 64, 14, 14), 1, "F(2x2,3x3)"),
        ((1, 64, 200, 1), 1, "F(2x2,3x3)"),  # three quarters of each large tile would lie beside the image
    ],
)
def test_the_layer_alone_chooses_the_size_of_winograds_tiles(x, padding, form):
    for n in (1, 5):
        one = layer("", (n, *x[1:]), 32, 3, padding=padding, kind="winograd_conv2d")
        assert form in detail(one, one.params(n))


# ---- every instruction set ----


def main(path: str) -> None:
    results = {}
    for one in LAYERS:
        if one.is_exact():
            tensors = one.inputs()
            assert_equal(one.run(tensors), one.exact(tensors).float(), one.why)
        results[one.why] = one.run(one.inputs("reals"))
    torch.save({"isa": _ext.native().isa(), "results": results}, path)


@needs_native
def test_every_instruction_set_is_exact_and_avx2_equals_avx512(tmp_path):
    saved = {}
    for isa in isas():
        path = tmp_path / f"{isa}.pt"
        run_python(__file__, str(path), FB_MAX_ISA=isa, FB_POISON="1")
        saved[isa] = torch.load(path)
        assert saved[isa]["isa"] == isa
    if not {"avx2", "avx512"} <= set(saved):
        pytest.skip(f"this machine runs {', '.join(saved)}")
    for why, result in saved["avx512"]["results"].items():
        assert_bit_equal(result, saved["avx2"]["results"][why], why)


if __name__ == "__main__":
    main(sys.argv[1])
