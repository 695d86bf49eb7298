"""Squeeze-and-excitation with addition and activation: values and gradients of PyTorch's own.

Run as a program,

    python tests/test_kernels_squeeze_excite.py OUT.pt

it saves results of real data; a test starts it once per instruction set.
"""

import sys

import pytest
import torch
from helpers import (
    LAYOUTS,
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    generator,
    integers,
    layout_name,
    needs_native,
    poisoned,
    reals,
    refusal,
    results_of_isas,
    threads,
)
from helpers import one_thread as one_thread

from fast_backbones.kernels import squeeze_excite, squeeze_excite_ref

pytestmark = needs_native

ACTIVATIONS = ("none", "relu", "relu6")
# N, C, H, W, values between the layers; the last has more weights than pixels, and so groups of images
SIZES = ((2, 3, 17, 9, 24), (3, 70, 12, 11, 40), (5, 33, 1, 1, 17), (2, 2072, 3, 2, 33), (6, 200, 3, 2, 130))
NAMES = ("y", "dx", "dweight1", "dbias1", "dweight2", "dbias2", "dresidual")
OPS = torch.ops.fast_backbones


def inputs(sizes, activation="relu", seed=0, layout=torch.channels_last):
    """x, the layers, residual, upstream gradient. Residuals and the first bias keep all sums far from where
    an activation bends: there its derivative is a matter of the last bit."""
    *sizes, hidden = sizes
    c = sizes[1]
    levels = {"none": (0.0,), "relu": (-8.0, 8.0), "relu6": (-8.0, 3.0, 14.0)}[activation]
    chosen = torch.randint(len(levels), sizes, generator=generator(seed))
    x = reals(sizes, seed + 1).clamp(-2, 2)
    residual = torch.tensor(levels)[chosen] + 0.1 * reals(sizes, seed + 2)
    weight1, weight2 = reals((hidden, c), seed + 3) / c, reals((c, hidden), seed + 4) / hidden**0.5
    sides = torch.randint(2, (hidden,), generator=generator(seed + 5)) * 2.0 - 1.0
    bias1, bias2 = sides * (4.0 + reals((hidden,), seed + 6).clamp(-1, 1)), reals((c,), seed + 7)
    maps = [t.contiguous(memory_format=layout) for t in (x, residual, reals(sizes, seed + 8))]
    return maps[0], weight1, bias1, weight2 * 0.3, bias2, maps[1], maps[2]


def everything(op, data, dtype=torch.float32, add=True, **options):
    """Results by name."""
    *tensors, grad = (t.to(dtype) for t in data)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = op(*leaves[:5], residual=leaves[5] if add else None, **options)
    y.backward(grad)
    found = dict(zip(NAMES, (y.detach(), *(leaf.grad for leaf in leaves))))
    return {name: t for name, t in found.items() if t is not None}


def native(*args, **options):
    return squeeze_excite(*args, backend="native", **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_at_most_twice_pytorchs_error(sizes, activation, add, layout):
    runs = []
    for seed in range(0, 80, 20):
        data, how = inputs(sizes, activation, seed, layout), {"add": add, "activation": activation}
        found, plain = everything(native, data, **how), everything(squeeze_excite_ref, data, **how)
        exact = everything(squeeze_excite_ref, data, torch.float64, **how)
        assert set(found) == set(NAMES if add else NAMES[:-1])
        for name, t in found.items():
            assert t.stride() == plain[name].stride(), name
        runs.append((found, plain, exact))
    for name in runs[0][0]:
        assert_as_accurate(*(torch.cat([run[i][name].flatten() for run in runs]) for i in range(3)), name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", (1, 4, 8, 15, 16, 17, 33, 64, 200))
def test_exact_where_arithmetic_is(channels, activation):
    """Means are multiples of 1/32, gates 0, 1/2 or 1; residuals keep sums off 0 and 6."""
    n, h, w, hidden = 4, 4, 8, 7
    maps = [integers((n, channels, h, w), seed).contiguous(memory_format=LAYOUTS[1]) for seed in range(3)]
    weight1, bias1 = integers((hidden, channels), 3, limit=2), integers((hidden,), 4, limit=2)
    weight2 = integers((channels, hidden), 5, limit=1, multiple=256 * 32)
    bias2 = integers((channels,), 6, limit=1, multiple=256)
    data = (maps[0], weight1, bias1, weight2, bias2, maps[1] + 0.25, maps[2])
    found = everything(native, data, activation=activation)
    exact = everything(squeeze_excite_ref, data, torch.float64, activation=activation)
    for name in NAMES:
        assert_equal(found[name], exact[name].float(), name)


@pytest.mark.parametrize("sizes", ((5, 70, 33, 21, 12), (8, 600, 3, 2, 130), (1, 256, 40, 30, 16)), ids=str)
def test_same_bits_for_any_number_of_threads(sizes):
    data = inputs(sizes)
    expected = everything(native, data, activation="relu")
    for count in (2, 3):
        with threads(count):
            found = everything(native, data, activation="relu")
        for name in NAMES:
            assert_bit_equal(found[name], expected[name], f"{name}, {count} threads")


@pytest.mark.parametrize("sizes", ((5, 70, 23, 11, 12), (7, 200, 3, 2, 130)), ids=str)
def test_same_bits_in_any_batch(sizes):
    x, *layers, residual, grad = inputs(sizes)
    for count in (1, 2):
        with threads(count):
            expected = everything(native, (x, *layers, residual, grad), activation="relu")
            for part in (slice(0, 1), slice(2, 5), slice(4, None)):
                data = (x[part], *layers, residual[part], grad[part])
                found = everything(native, data, activation="relu")
                for name in ("y", "dx", "dresidual"):
                    assert_bit_equal(found[name], expected[name][part], f"{name} of {part}")


def real_results():
    found = {}
    for sizes in SIZES:
        for activation in ACTIVATIONS:
            for add in (True, False):
                some = everything(native, inputs(sizes, activation), add=add, activation=activation)
                found |= {f"{sizes} {activation} {add} {name}": value for name, value in some.items()}
    return found


def test_instruction_sets_give_the_same_bits(tmp_path):
    found = results_of_isas("tests/test_kernels_squeeze_excite.py", tmp_path, 1e-4, 1e-5)
    assert len(found) == len(SIZES) * len(ACTIVATIONS) * (2 * len(NAMES) - 1)


def test_the_values_do_not_depend_on_whether_autograd_records():
    for activation in ACTIVATIONS:
        x, *layers, residual, _ = inputs((3, 70, 12, 11, 40), activation)
        how = {"residual": residual, "activation": activation}
        expected = native(x, *layers, **how)
        assert_bit_equal(native(x.requires_grad_(), *layers, **how).detach(), expected, activation)


def test_backward_keeps_its_input_and_a_bit_of_each_element():
    x, *layers, residual, _ = inputs((4, 64, 14, 14, 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = native(x.requires_grad_(), *layers, residual=residual, activation="relu")
    assert not {y.data_ptr(), residual.data_ptr()} & {t.data_ptr() for t in kept}
    small = sum(t.nbytes for t in layers) + 4 * 4 * (64 + 4 + 64)
    assert sum(t.nbytes for t in kept) <= x.nbytes * (1 + 1 / 32) + small


@pytest.mark.parametrize("activation", ("none", "relu"))
def test_only_what_is_needed_gets_a_gradient(activation):
    *tensors, grad = inputs((2, 8, 6, 6, 5), activation)
    expected = everything(native, (*tensors, grad), activation=activation)
    for wanted in range(1, 64):
        flags = [bool(wanted >> i & 1) for i in range(6)]
        leaves = [t.clone().requires_grad_(flag) for t, flag in zip(tensors, flags)]
        native(*leaves[:5], residual=leaves[5], activation=activation).backward(grad)
        assert [leaf.grad is not None for leaf in leaves] == flags
        for leaf, flag, name in zip(leaves, flags, NAMES[1:]):
            if flag:
                assert_bit_equal(leaf.grad, expected[name], name)


def test_without_activation_the_gradient_of_the_residual_is_the_incoming_one():
    *tensors, grad = inputs((2, 8, 6, 6, 5), "none")
    leaves = [t.requires_grad_() for t in tensors]
    y = native(*leaves[:5], residual=leaves[5])
    assert torch.autograd.grad(y, leaves[5], grad)[0].data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", ("sigmoid", "tanh", "relu"))
def test_the_formula_has_the_derivatives_it_says(gate, activation):
    *tensors, _ = (t.double() for t in inputs((2, 3, 4, 3, 5), activation))
    leaves = [t.requires_grad_() for t in tensors]

    def formula(*t):
        return squeeze_excite_ref(*t[:5], residual=t[5], activation=activation, gate=gate)

    torch.autograd.gradcheck(formula, leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation):
    data = inputs((2, 5, 4, 4, 6), activation)

    def second(op, dtype):
        leaves = [t.to(dtype).clone().requires_grad_() for t in data]
        y = op(*leaves[:5], residual=leaves[5], activation=activation)
        first = torch.autograd.grad(y, leaves[:6], leaves[6], create_graph=True)
        norm = sum(g.square().sum() for g in first)
        return torch.autograd.grad(norm, leaves[:5] + leaves[6:])

    found, exact = second(native, torch.float32), second(squeeze_excite_ref, torch.float64)
    for mine, true in zip(found, exact):
        assert (mine - true).abs().max() <= 1e-4 * true.abs().max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_in_its_image_and_passes_the_activations(activation):
    x, *layers, residual, grad = inputs((3, 18, 5, 5, 4), activation)
    x[1, 4, 2, 2] = torch.nan
    found = everything(native, (x, *layers, residual, grad), activation=activation)
    assert found["y"][1].isnan().all() and found["dx"][1].isnan().all()
    for name in ("y", "dx"):
        assert not found[name][[0, 2]].isnan().any()


def test_slices_of_wider_maps_and_one_image():
    x, *layers, residual, grad = inputs((2, 24, 7, 7, 3))
    wide = torch.zeros(2, 40, 7, 7).contiguous(memory_format=torch.channels_last)
    wide[:, 8:32] = x
    expected = native(x, *layers, residual=residual, activation="relu")
    assert_bit_equal(native(wide[:, 8:32], *layers, residual=residual, activation="relu"), expected)
    assert_bit_equal(native(x[1], *layers, residual=residual[1], activation="relu"), expected[1])
    strange = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, residual, grad)]
    found = everything(native, (strange[0], *layers, *strange[1:]), activation="relu")
    for name, value in everything(native, (x, *layers, residual, grad), activation="relu").items():
        assert_bit_equal(found[name], value, name)


def test_all_of_what_is_asked_for_is_written():
    for sizes in ((3, 21, 5, 3, 7), (6, 40, 1, 2, 33)):
        data = inputs(sizes)
        expected = everything(native, data, activation="relu")
        with poisoned():
            found = everything(native, data, activation="relu")
        for name in NAMES:
            assert_bit_equal(found[name], expected[name], name)


def test_an_empty_batch_has_gradients():
    x, *layers, residual, grad = inputs((2, 6, 4, 4, 3))
    found = everything(native, (x[:0], *layers, residual[:0], grad[:0]), activation="relu")
    assert found["y"].shape == found["dx"].shape == (0, 6, 4, 4)
    for name in NAMES[2:6]:
        assert not found[name].any()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"residual": torch.ones(2, 4, 3, 4)}, r"residual has sizes \[2, 4, 3, 4\], expected those of x"),
        ({"residual": torch.ones(4, 3, 3)}, r"residual has sizes \[4, 3, 3\]"),
        ({"residual": torch.ones(2, 4, 3, 3).double()}, "residual is torch.float64"),
        ({"residual": 1.0}, "residual is a float"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"gate": "softmax"}, "gate is 'softmax', expected one of sigmoid, tanh, relu"),
        ({"weight1": torch.ones(2, 3)}, r"weight1 has sizes \[2, 3\]"),
        ({"bias2": torch.ones(3)}, r"bias2 has sizes \[3\], expected \[4\]"),
        ({"gate": "tanh", "backend": "native"}, "gate tanh: native handles sigmoid"),
    ],
)
def test_bad_arguments_are_named(change, words):
    given = {"x": torch.ones(2, 4, 3, 3), "weight1": torch.ones(2, 4), "bias1": None}
    given |= {"weight2": torch.ones(4, 2), "bias2": None}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=words):
        squeeze_excite(**{**given, **change})


def test_what_native_does_not_take_runs_as_the_formula():
    x, *layers, residual, _ = inputs((2, 6, 4, 4, 3))
    double = [t.double() for t in (x, *layers)]
    how = {"residual": residual.double(), "activation": "relu"}
    assert "torch.float64: native handles" in refusal("squeeze_excite", "native", *double, **how)
    assert_equal(squeeze_excite(*double, **how), squeeze_excite_ref(*double, **how))
    how = {"residual": residual, "activation": "relu6", "gate": "tanh"}
    assert "gate tanh" in refusal("squeeze_excite", "native", x, *layers, **how)
    assert_equal(squeeze_excite(x, *layers, **how), squeeze_excite_ref(x, *layers, **how))
    how = {"residual": residual, "activation": "relu"}
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in refusal("squeeze_excite", "native", x, *layers, **how)
        assert_equal(squeeze_excite(x, *layers, **how), squeeze_excite_ref(x, *layers, **how))


def test_tensors_with_functions_of_their_own_are_asked():
    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, kwargs

    x, *layers, residual, _ = inputs((2, 6, 4, 4, 3))
    called, options = squeeze_excite(x, *layers, residual=residual.as_subclass(Asked), activation="relu")
    assert called is squeeze_excite
    assert options["activation"] == "relu" and type(options["residual"]) is Asked


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("activation", ("none", "relu"))
def test_the_operators_keep_what_their_schemas_say(activation, layout):
    x, *layers, residual, grad = inputs((2, 20, 4, 5, 6), activation, layout=layout)
    checks = ("test_schema", "test_faketensor")
    args = (x, *layers, residual, activation, True)
    torch.library.opcheck(OPS.squeeze_excite.default, args, test_utils=checks)
    _, means, hidden, gate, mask = OPS.squeeze_excite(*args)
    args = (grad, x, mask if activation == "relu" else None, layers[0], layers[2], means, hidden, gate)
    for needs in ((True,) * 6, (False, True) * 3):
        torch.library.opcheck(OPS.squeeze_excite_backward.default, (*args, *needs), test_utils=checks)


@pytest.mark.parametrize(
    "position, change, words",
    [
        (0, lambda t: t[:1], "grad has sizes [1, 20, 4, 5], expected those of x"),
        (1, lambda t: t[0], "x has sizes [20, 4, 5], expected 4 dimensions"),
        (2, lambda t: t[1:], "mask has sizes [39, 4], expected bytes [40, 4]"),
        (3, lambda t: t[:, :3], "weight1 has sizes [6, 3], expected [any, 20]"),
        (5, lambda t: t[:1], "means has sizes [1, 20], expected [2, 20]"),
        (6, lambda t: t[:, :5], "hidden has sizes [2, 5], expected [2, 6]"),
        (7, lambda t: t.double(), "gate must be float32"),
    ],
)
def test_the_operators_name_what_does_not_fit(position, change, words):
    x, *layers, residual, grad = inputs((2, 20, 4, 5, 6))
    _, means, hidden, gate, mask = OPS.squeeze_excite(x, *layers, residual, "relu", True)
    args = [grad, x, mask, layers[0], layers[2], means, hidden, gate]
    args[position] = change(args[position])
    with pytest.raises(RuntimeError) as caught:
        OPS.squeeze_excite_backward(*args, *(True,) * 6)
    assert words in str(caught.value)


def test_compiled_graphs_hold_the_operators():
    x, *layers, residual, grad = inputs((2, 20, 4, 5, 6))
    compiled = torch.compile(native, backend="aot_eager", fullgraph=True)
    data = (x, *layers, residual, grad)
    expected = everything(native, data, activation="relu")
    for name, value in everything(compiled, data, activation="relu").items():
        assert_bit_equal(value, expected[name], name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(real_results(), sys.argv[1])
