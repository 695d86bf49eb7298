"""Batch normalisation with addition and activation: values, gradients and running moments of PyTorch's own.

Run as a program,

    python tests/test_kernels_batch_norm.py OUT.pt

it saves results of real data; a test starts it once per instruction set.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    generator,
    needs_native,
    reals,
    results_of_isas,
    threads,
)

from fast_backbones.kernels import batch_norm, batch_norm_ref

pytestmark = needs_native

ACTIVATIONS = ("none", "relu", "relu6")
SIZES = ((2, 3, 17, 9), (4, 16, 8, 8), (3, 70, 12, 11), (1, 200, 9, 31), (16, 8, 40, 33))
LAYOUTS = (torch.contiguous_format, torch.channels_last)
NAMES = ("y", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var")


def inputs(sizes, activation, seed=0, layout=torch.channels_last):
    """x, weight, bias, residual, running mean and variance, upstream gradient. The residual pushes every sum
    far from where an activation bends: there its derivative is a matter of the last bit."""
    c = sizes[1]
    x = reals(sizes, seed) * 3 + reals((c, 1, 1), seed + 1) * 5
    levels = {"none": (0.0,), "relu": (-20.0, 20.0), "relu6": (-20.0, 3.0, 26.0)}[activation]
    chosen = torch.randint(len(levels), sizes, generator=generator(seed + 2))
    residual = torch.tensor(levels)[chosen] + 0.1 * reals(sizes, seed + 3)
    weight, bias = reals((c,), seed + 4).clamp(-2, 2) * 0.4, reals((c,), seed + 5).clamp(-2, 2) * 0.1
    mean, var = reals((c,), seed + 6), reals((c,), seed + 7).square() + 1.0
    maps = [t.contiguous(memory_format=layout) for t in (x, residual, reals(sizes, seed + 8))]
    return maps[0], weight, bias, maps[1], mean, var, maps[2]


def everything(op, data, dtype=torch.float32, add=True, **options):
    """Results by name."""
    x, weight, bias, residual, mean, var, grad = (t.to(dtype) for t in data)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    mean, var = mean.clone(), var.clone()
    y = op(*leaves[:3], mean, var, residual=leaves[3] if add else None, **options)
    y.backward(grad)
    return dict(zip(NAMES, (y.detach(), *(leaf.grad for leaf in leaves), mean, var)))


def native(*args, **options):
    return batch_norm(*args, backend="native", **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_at_most_twice_pytorchs_error(sizes, activation, training, layout):
    data = inputs(sizes, activation, layout=layout)
    options = {"training": training, "activation": activation, "momentum": 0.3}
    found, plain = everything(native, data, **options), everything(batch_norm_ref, data, **options)
    exact = everything(batch_norm_ref, data, torch.float64, **options)
    for name in NAMES:
        assert_as_accurate(found[name], plain[name], exact[name], name)
        assert found[name].stride() == plain[name].stride(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", (1, 4, 8, 15, 16, 17, 33, 64, 200))
def test_exact_where_arithmetic_is(channels, activation):
    """Each channel is a whole number and 3/4 to either side, and 9/16 + eps is 1: all is exact."""
    n, h, w = 4, 16, 8
    sign = torch.ones(n * h * w, channels)
    for c in range(channels):
        sign[torch.randperm(n * h * w, generator=generator(c))[: n * h * w // 2], c] = -1.0
    x = 0.75 * sign + torch.randint(-8, 9, (channels,), generator=generator(2))

    def as_map(rows):
        return rows.reshape(n, h, w, channels).permute(0, 3, 1, 2)

    def whole(seed, sizes, limit):
        return torch.randint(-limit, limit + 1, sizes, generator=generator(seed)).float()

    weight, bias = 2.0 * whole(3, (channels,), 4), whole(4, (channels,), 3)
    residual, grad = as_map(whole(5, x.shape, 6)), as_map(512.0 * whole(6, x.shape, 4))
    data = (as_map(x), weight, bias, residual, torch.zeros(channels), torch.ones(channels), grad)
    options = {"eps": 7 / 16, "activation": activation, "momentum": 0.5}
    found = everything(native, data, **options)
    exact = everything(batch_norm_ref, data, torch.float64, **options)
    for name in NAMES[:-1]:  # the unbiased variance has a quotient
        assert_equal(found[name], exact[name].float(), name)


@pytest.mark.parametrize("count", (1, 3))
def test_same_bits_for_any_number_of_threads(count):
    data = inputs((5, 70, 33, 21), "relu")
    with threads(2):
        expected = everything(native, data, activation="relu")
    with threads(count):
        found = everything(native, data, activation="relu")
    for name in NAMES:
        assert_bit_equal(found[name], expected[name], name)


def real_results():
    found = {}
    for sizes in SIZES:
        for activation in ACTIVATIONS:
            for training in (True, False):
                options = {"training": training, "activation": activation}
                some = everything(native, inputs(sizes, activation), **options)
                found |= {f"{sizes} {options} {name}": value for name, value in some.items()}
    return found


def test_instruction_sets_give_the_same_bits(tmp_path):
    found = results_of_isas("tests/test_kernels_batch_norm.py", tmp_path, 1e-4, 1e-5)
    assert len(found) == len(SIZES) * len(ACTIVATIONS) * 2 * len(NAMES)


def test_without_weights_records_and_addition():
    x = reals((3, 20, 7, 5), 0)
    for options in ({}, {"activation": "relu"}):
        found, plain = (op(x, **options) for op in (native, batch_norm_ref))
        exact = batch_norm_ref(x.double(), **options)
        assert_as_accurate(found, plain, exact)


def test_running_moments_are_those_of_the_module():
    module = torch.nn.BatchNorm2d(24, momentum=0.2)
    mean, var = module.running_mean.clone(), module.running_var.clone()
    for seed in range(5):
        x = reals((4, 24, 6, 6), seed) * (1 + seed)
        module(x)
        native(x, module.weight, module.bias, mean, var, momentum=0.2)
    torch.testing.assert_close(mean, module.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, module.running_var, rtol=1e-6, atol=1e-6)


def test_running_moments_move_without_a_new_version():
    """As F.batch_norm moves them: a graph of eval() that has saved them still goes backward."""
    mean, var = torch.zeros(16), torch.ones(16)
    x = reals((2, 16, 5, 5), 0).requires_grad_()
    frozen = F.batch_norm(x, mean, var)
    batch_norm(x, None, None, mean, var).sum().backward()
    frozen.sum().backward()
    assert mean._version == var._version == 0 and mean.any()


def test_backward_keeps_its_input_and_a_bit_of_each_element():
    x, weight, bias, residual, mean, var, _ = inputs((4, 64, 14, 14), "relu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        x.requires_grad_()
        native(x, weight, bias, mean, var, residual=residual, activation="relu")
    assert sum(kept) <= x.nbytes * (1 + 1 / 32) + 4 * weight.nbytes


def test_only_what_is_needed_gets_a_gradient():
    x, weight, bias, residual, mean, var, grad = inputs((2, 8, 6, 6), "relu")
    for wanted in range(1, 16):
        flags = [bool(wanted >> i & 1) for i in range(4)]
        leaves = [t.clone().requires_grad_(flag) for t, flag in zip((x, weight, bias, residual), flags)]
        y = native(*leaves[:3], mean.clone(), var.clone(), residual=leaves[3], activation="relu")
        y.backward(grad)
        assert [leaf.grad is not None for leaf in leaves] == flags


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation, training):
    data = inputs((2, 5, 4, 4), activation)

    def second(op, dtype):
        x, weight, bias, residual, mean, var, grad = (t.to(dtype) for t in data)
        leaves = [t.clone().requires_grad_() for t in (x, weight, residual, grad)]
        how = {"training": training, "activation": activation}
        y = op(*leaves[:2], bias, mean.clone(), var.clone(), residual=leaves[2], **how)
        first = torch.autograd.grad(y, leaves[:2], leaves[3], create_graph=True)
        norm = sum(g.square().sum() for g in first)
        return torch.autograd.grad(norm, leaves[:2] + leaves[3:])

    found, exact = second(native, torch.float32), second(batch_norm_ref, torch.float64)
    for mine, true in zip(found, exact):
        assert (mine - true).abs().max() <= 1e-4 * true.abs().max()


def test_a_nan_stays_in_its_channel_and_passes_the_activation():
    x, weight, bias, _, mean, var, grad = inputs((2, 18, 5, 5), "none")
    x[1, 4, 2, 2] = torch.nan
    for activation in ACTIVATIONS:
        leaf = x.clone().requires_grad_()
        y = native(leaf, weight, bias, mean.clone(), var.clone(), activation=activation)
        y.backward(grad)
        for t in (y, leaf.grad):
            assert t[:, 4].isnan().all()
            assert not t[:, [c for c in range(18) if c != 4]].isnan().any()


def test_slices_of_wider_maps():
    data = inputs((2, 24, 7, 7), "relu")
    wide = torch.zeros(2, 40, 7, 7).contiguous(memory_format=torch.channels_last)
    wide[:, 8:32] = data[0]
    expected = native(data[0], data[1], data[2], activation="relu")
    assert_bit_equal(native(wide[:, 8:32], data[1], data[2], activation="relu"), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weight": torch.ones(3)}, r"weight has sizes \[3\], expected \[4\]"),
        ({"weight": torch.ones(4).double()}, "weight is torch.float64, expected torch.float32, x being"),
        ({"bias": torch.ones(4, device="meta")}, "bias is on meta, expected cpu"),
        ({"running_var": torch.ones(4).half()}, "running_var is torch.float16, expected torch.float32"),
        ({"running_mean": None}, "go together"),
        ({"running_mean": None, "running_var": None, "training": False}, "training is False"),
        ({"residual": torch.ones(2, 4, 3, 4)}, r"residual has sizes \[2, 4, 3, 4\]"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"momentum": None}, "momentum is None, expected a number"),
        ({"eps": "1e-5"}, "eps is '1e-5', expected a number"),
        ({"x": torch.ones(1, 4, 1, 1)}, "Expected more than 1 value per channel when training"),
        ({"x": torch.ones(4)}, r"x has sizes \[4\]"),
    ],
)
def test_bad_arguments_are_named(change, words):
    given = {"x": torch.ones(2, 4, 3, 3), "running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=words):
        batch_norm(**{**given, **change})


def test_what_native_does_not_take_runs_as_the_formula():
    x = reals((6, 5), 0)
    assert_equal(batch_norm(x), torch.nn.functional.batch_norm(x, None, None, training=True))
    double = reals((2, 4, 3, 3), 0).double()
    assert_equal(batch_norm(double), batch_norm_ref(double))


@pytest.mark.parametrize("activation", ("none", "relu"))
def test_the_operators_keep_what_their_schemas_say(activation):
    x, weight, bias, residual, mean, var, grad = inputs((2, 20, 4, 5), activation)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.fast_backbones
    args = (x, weight, bias, residual, None, None, 1e-5, activation, True)
    torch.library.opcheck(ops.batch_norm.default, args, test_utils=checks)
    mask = ops.batch_norm(*args)[4] if activation != "none" else None
    args = (grad, x, mask, weight, mean, var, 1e-5, False, True, True, True)
    torch.library.opcheck(ops.batch_norm_backward.default, args, test_utils=checks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(real_results(), sys.argv[1])
