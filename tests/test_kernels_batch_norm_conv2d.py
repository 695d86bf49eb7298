"""Batch norm, activation and convolution as one op: values, gradients and running moments of PyTorch's own.

Run as a program,

    python tests/test_kernels_batch_norm_conv2d.py OUT.pt

it saves results of real data; a test starts it once per instruction set.
"""

import sys
from typing import Any, NamedTuple

import pytest
import torch
from fast_backbones.kernels.batch_norm_conv2d import fused
from helpers import (
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    generator,
    integers,
    needs_native,
    reals,
    results_of_isas,
    threads,
)

from fast_backbones import kernels
from fast_backbones.kernels import _conv, batch_norm_conv2d, batch_norm_conv2d_ref

pytestmark = needs_native

NAMES = ("y", "dx", "dnorm_weight", "dnorm_bias", "dweight", "dbias", "running_mean", "running_var")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Case(NamedTuple):
    kernel: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    options: dict[str, Any]

    @property
    def id(self) -> str:
        sizes = "x".join(map(str, self.weight))
        return f"{self.kernel} {sizes} of {self.x[2]}x{self.x[3]} {self.options}"


CASES = [
    Case("1x1", (2, 32, 9, 9), (48, 32, 1, 1), {}),
    Case("1x1 cut", (3, 33, 9, 7), (20, 33, 1, 1), {"stride": 2}),
    Case("1x1 crowded", (2, 1024, 5, 7), (64, 1024, 1, 1), {}),
    Case("direct", (2, 32, 9, 13), (48, 32, 3, 3), {"stride": 2, "padding": 1}),
    Case("direct", (2, 7, 9, 11), (5, 7, 3, 3), {"padding": 2, "dilation": 2}),
    Case("direct in groups", (2, 30, 9, 13), (40, 6, 3, 3), {"padding": 1, "groups": 5}),
    Case("winograd 2x2", (3, 32, 9, 13), (48, 32, 3, 3), {"padding": 1}),
    Case("winograd 4x4", (2, 32, 30, 29), (32, 32, 3, 3), {"padding": (0, 1)}),
    Case("winograd 5x5", (1, 24, 19, 17), (20, 24, 5, 5), {"padding": 2}),
    Case("winograd 1x7", (2, 24, 11, 9), (20, 24, 1, 7), {"padding": (0, 3)}),
    Case("grouped", (2, 64, 9, 15), (64, 4, 3, 3), {"padding": 1, "groups": 16}),
    Case("grouped", (2, 64, 14, 14), (64, 16, 3, 3), {"padding": 1, "stride": 2, "groups": 4}),
    Case("grouped, wider", (2, 64, 8, 9), (128, 8, 3, 3), {"padding": 1, "groups": 8}),
    Case("depthwise", (2, 40, 9, 13), (40, 1, 3, 3), {"padding": 1, "groups": 40}),
    Case("depthwise", (2, 40, 9, 13), (40, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 40}),
    Case("depthwise 7x7", (2, 19, 9, 13), (19, 1, 7, 7), {"padding": 3, "groups": 19}),
]
FEW = [case for case in CASES if case.kernel in ("1x1", "direct", "winograd 2x2", "grouped", "depthwise")]
OURS = [
    case for case in FEW if case.weight[1] != 7
]  # whose gradients are by native kernels, but for the bias
# Winograd's larger transforms divide, so that whole numbers do not stay exact.
WHOLE = [case for case in CASES if case.kernel not in ("winograd 4x4", "winograd 5x5", "winograd 1x7")]
of_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def real_data(case: Case, seed: int = 0, layout=torch.channels_last) -> tuple[torch.Tensor, ...]:
    """x, norm weight and bias, weight, bias, running moments. No value lies near where an activation bends:
    there its derivative is a matter of the last bit."""
    c = case.x[1]
    levels = torch.tensor((-4.0, -2.5, 2.5, 4.0))[torch.randint(4, case.x, generator=generator(seed))]
    x = 2.0 * levels + 0.1 * reals(case.x, seed + 1) + 3.0 * reals((c, 1, 1), seed + 2)
    weight, bias = reals(case.weight, seed + 5), reals(case.weight[:1], seed + 6)
    moments = reals((c,), seed + 7), reals((c,), seed + 8).square() + 8.0
    norm = 1.0 + 0.2 * reals((c,), seed + 3).clamp(-2, 2), 0.1 * reals((c,), seed + 4).clamp(-2, 2)
    return x.contiguous(memory_format=layout), *norm, weight, bias, *moments


def whole_data(case: Case) -> tuple[torch.Tensor, ...]:
    """Each channel is a whole number and 3/4 to either side: with eps 7/16 the deviation is 1."""
    n, c, h, w = case.x
    count = n * h * w // 2 * 2
    sign = torch.ones(n * h * w, c)
    for channel in range(c):
        sign[torch.randperm(n * h * w, generator=generator(channel))[: count // 2], channel] = -1.0
    x = (0.75 * sign + integers((c,), 1, limit=8)).reshape(n, h, w, c).permute(0, 3, 1, 2)
    norm = 4.0 * integers((c,), 2, limit=2), integers((c,), 3, limit=3)
    return (
        x,
        *norm,
        integers(case.weight, 4, limit=2),
        integers(case.weight[:1], 5),
        torch.zeros(c),
        torch.ones(c),
    )


def everything(
    op, case: Case, data, dtype=torch.float32, grad_of=reals, **options
) -> dict[str, torch.Tensor]:
    """Results by name."""
    x, *leaves, mean, var = (t.to(dtype) for t in data)
    leaves = [t.detach().clone().requires_grad_() for t in (x, *leaves)]
    mean, var = mean.clone(), var.clone()
    norm, layer = leaves[1:3], leaves[3:]
    y = op(leaves[0], *norm, mean, var, *layer, **case.options, **options)
    grad = grad_of(y.shape, 20).to(dtype).contiguous(memory_format=torch.channels_last)
    found = torch.autograd.grad(y, leaves, grad)
    return dict(zip(NAMES, (y.detach(), *found, mean, var)))


def native(*args, **options):
    return batch_norm_conv2d(*args, backend="native", **options)


@pytest.mark.parametrize("training, activation", [(True, "relu"), (True, "none"), (False, "relu6")])
@of_cases
def test_at_most_twice_pytorchs_error(case, activation, training):
    data = real_data(case)
    options = {"activation": activation, "training": training, "momentum": 0.3}
    found, plain = (everything(op, case, data, **options) for op in (native, batch_norm_conv2d_ref))
    exact = everything(batch_norm_conv2d_ref, case, data, torch.float64, **options)
    for name in NAMES:
        assert_as_accurate(found[name], plain[name], exact[name], name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
def test_layouts_are_those_of_pytorch(case, layout):
    data = real_data(case, layout=layout)
    found, plain = (everything(op, case, data) for op in (native, batch_norm_conv2d_ref))
    for name in set(NAMES) - {"dweight"}:  # which lies as weight does, for its sake
        assert found[name].stride() == plain[name].stride(), name


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.id)
def test_whole_numbers_are_exact(case, activation):
    """Frozen, as the moments of a channel of odd length are no short numbers."""
    data = whole_data(case)
    mean = data[0].mean((0, 2, 3)).round()
    data = (*data[:-2], mean, torch.full_like(mean, 0.5625))
    options = {"activation": activation, "training": False, "eps": 0.4375, "grad_of": integers}
    found = everything(native, case, data, **options)
    exact = everything(batch_norm_conv2d_ref, case, data, torch.float64, **options)
    for name in NAMES:
        assert_equal(found[name], exact[name].float(), name)


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("case", OURS, ids=lambda case: case.id)
def test_same_bits_for_any_number_of_threads(case, count):
    data = real_data(case)
    with threads(2):
        expected = everything(native, case, data)
    with threads(count):
        found = everything(native, case, data)
    for name in set(NAMES) - {"dbias"}:  # PyTorch's
        assert_bit_equal(found[name], expected[name], name)


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.id)
def test_what_is_not_needed_is_not_computed(case):
    data = real_data(case)
    expected = everything(native, case, data)
    for i, name in enumerate(NAMES[1:5]):
        leaves = [t.clone() for t in data]
        leaves[i].requires_grad_()
        y = native(*leaves[:3], *leaves[5:], *leaves[3:5], **case.options)
        (found,) = torch.autograd.grad(
            y, leaves[i], reals(y.shape, 20).contiguous(memory_format=torch.channels_last)
        )
        assert_bit_equal(found, expected[name], name)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
def test_second_derivatives(case):
    """Of a gradient penalty, by the 2x rule."""
    results = []
    for op, dtype in (
        (native, torch.float32),
        (batch_norm_conv2d_ref, torch.float32),
        (batch_norm_conv2d_ref, torch.float64),
    ):
        x, *leaves, mean, var = (t.to(dtype) for t in real_data(case))
        leaves = [t.detach().clone().requires_grad_() for t in (x, *leaves)]
        y = op(leaves[0], *leaves[1:3], mean, var, *leaves[3:], **case.options)
        (dx,) = torch.autograd.grad(y.sin().sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), leaves))
    for found, plain, exact in zip(*results):
        assert_as_accurate(found, plain, exact)


def test_graph_of_tensors_made_of_each_other():
    """The weight is made of x, and one tensor is the norm's weight and bias: with a graph of its own each
    path still counts once."""
    case = CASES[0]
    x, norm, _, weight, *_ = (t.requires_grad_() for t in real_data(case))
    y = native(x, norm, norm, None, None, weight * (1 + x.mean()), activation="none")
    grad = reals(y.shape, 20)
    expected = torch.autograd.grad(y, (x, norm, weight), grad, retain_graph=True)
    found = torch.autograd.grad(y, (x, norm, weight), grad, create_graph=True)
    for ours, plain in zip(found, expected):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_second_derivatives_with_frozen_moments_that_require_gradients():
    x, norm, _, weight, _, mean, var = (t.requires_grad_() for t in real_data(CASES[0]))
    y = native(x, norm, norm, mean, var, weight, training=False)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert dx.requires_grad and dx.isfinite().all()


@pytest.mark.parametrize("case", [*FEW, CASES[1]], ids=lambda case: case.id)
def test_an_input_passed_on_gets_the_sum_of_its_gradients(case):
    """Of this op and of a convolution alone: y, and x for later readers."""
    data = real_data(case)
    x, *norm, weight, bias, mean, var = data
    stride, padding, dilation, groups = (
        case.options.get(k, d) for k, d in zip(("stride", "padding", "dilation", "groups"), (1, 0, 1, 1))
    )
    pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]

    def normed(x, passes):
        return fused(x, *norm, mean.clone(), var.clone(), weight, bias, passes=passes, **case.options)

    def plain(x, passes):
        window = {"stride": pairs[0], "padding": pairs[1], "dilation": pairs[2], "groups": groups}
        return (
            _conv.passing(x, weight, bias, *pairs, groups)
            if passes
            else (kernels.conv2d(x, weight, bias, **window), x)
        )

    for call in (normed, plain):
        found = []
        for passes in (False, True):
            leaf = x.clone().requires_grad_()
            y, later = call(leaf, passes)
            assert (later is leaf) != passes
            assert torch.equal(later, leaf)
            loss = (y * reals(y.shape, 3)).sum() + (later * reals(x.shape, 4)).sum()
            found.append((y, *torch.autograd.grad(loss, leaf)))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
        leaf = x.clone().requires_grad_()
        _, later = call(leaf, True)
        (alone,) = torch.autograd.grad((later * reals(x.shape, 4)).sum(), leaf)
        assert torch.equal(alone, reals(x.shape, 4))


def test_bad_arguments_are_named():
    x, weight, one = torch.randn(2, 8, 5, 5), torch.randn(4, 8, 1, 1), torch.ones(8)
    for arguments, error, words in (
        (
            (x, torch.ones(7), one, one, one, weight),
            RuntimeError,
            r"norm_weight has sizes \[7\], expected \[8\]",
        ),
        (
            (x, one, torch.ones(9), one, one, weight),
            RuntimeError,
            r"norm_bias has sizes \[9\], expected \[8\]",
        ),
        ((x, one, one, None, one, weight), RuntimeError, "running_mean and running_var go together"),
        ((x, one, one, one, one, torch.randn(4, 7, 1, 1)), RuntimeError, "x has 8 channels, expected 7"),
        ((x[0], one, one, one, one, weight), RuntimeError, r"x has sizes \[8, 5, 5\]"),
        (
            (x[:1, :, :1, :1], one, one, one, one, weight),
            ValueError,
            "Expected more than 1 value per channel when training",
        ),
        ((x, one, one, one, one, "w"), TypeError, "weight is a str, expected a tensor"),
    ):
        with pytest.raises(error, match=words):
            batch_norm_conv2d(*arguments)
    with pytest.raises(TypeError, match="momentum is None, expected a number"):
        batch_norm_conv2d(x, one, one, one, one, weight, momentum=None)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        batch_norm_conv2d(x, one, one, one, one, weight, activation="gelu")


def test_what_native_refuses_runs_through_the_formula():
    case = CASES[0]
    data = [t.double() for t in real_data(case)]
    norm = data[1], data[2], data[5], data[6]
    said = kernels.explain("batch_norm_conv2d", data[0], *norm, *data[3:5])
    assert said.chosen == "reference"
    found = everything(batch_norm_conv2d, case, data, torch.float64)
    assert torch.equal(found["y"], everything(batch_norm_conv2d_ref, case, data, torch.float64)["y"])


def test_all_instruction_sets_agree(tmp_path):
    results_of_isas("tests/test_kernels_batch_norm_conv2d.py", tmp_path, 1e-4, 1e-4)


if __name__ == "__main__":
    saved = {}
    for each in CASES:
        for key, value in everything(native, each, real_data(each)).items():
            saved[f"{each.id}: {key}"] = value
    torch.save(saved, sys.argv[1])
