"""Gradients of dense convolution: of the filters, with a norm in front that is computed on the way, too; of
the input.

python tests/test_kernels_conv2d_backward.py OUT.pt    writes results, for another instruction set
"""

import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LAYOUTS,
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    integers,
    layout_name,
    needs_native,
    poisoned,
    reals,
    results_of_isas,
    threads,
)

from fast_backbones import kernels

pytestmark = needs_native
CL = torch.channels_last
NO_NORM = (None, None, None, "none")


@dataclass(frozen=True)
class Case:
    why: str
    x: tuple[int, int, int, int]
    filters: int
    window: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation

    def inputs(self, make, seed=0, layout=CL):
        """grad, x, weight."""
        x, weight = make(self.x, 3 * seed), make((self.filters, self.x[1], *self.window), 3 * seed + 1)
        with torch.device("meta"):
            y = F.conv2d(torch.empty(self.x), torch.empty(weight.shape), None, *self.geometry)
        grad = make(y.shape, 3 * seed + 2)
        return [grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout), weight]

    def of_weight(self, grad, x, weight, norm=NO_NORM):
        return torch.ops.fast_backbones.conv2d_backward_weight(grad, x, weight, *self.geometry, *norm)

    def reference(self, grad, x, weight, needs=(False, True, False)):
        geometry = (*self.geometry, False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, needs)


CASES = [
    Case("1x1", (3, 33, 8, 7), 65),
    Case("1x1, one of each", (1, 1, 1, 1), 1),
    Case("1x1, many pixels", (3, 40, 37, 41), 30),
    Case("1x1, many filters", (2, 35, 9, 9), 700),
    Case("1x1, a block of pixels and one", (1, 16, 3, 43), 17),
    Case("1x1, stride 2", (2, 64, 20, 31), 30, stride=(2, 2)),
    Case("1x1, padded", (2, 20, 5, 6), 12, padding=(1, 2)),
    Case("3x3", (2, 20, 9, 11), 27, (3, 3), padding=(1, 1)),
    Case("3x3, no padding", (9, 70, 14, 15), 30, (3, 3)),
    Case("3x3, stride 2", (2, 16, 13, 10), 20, (3, 3), (2, 2), (1, 1)),
    Case("3x3, stride 2, even", (2, 16, 12, 14), 20, (3, 3), (2, 2), (1, 1)),
    Case("3x3, dilated", (2, 18, 12, 12), 14, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Case("3x3, dilated, stride 2x1", (2, 18, 12, 13), 14, (3, 3), (2, 1), (2, 0), (2, 3)),
    Case("5x3, wide padding", (2, 40, 9, 9), 14, (5, 3), padding=(2, 2)),
    Case("7x7, stride 2, few channels", (1, 3, 31, 29), 9, (7, 7), (2, 2), (3, 3)),
    Case("1x7", (2, 24, 9, 12), 18, (1, 7), padding=(0, 3)),
    Case("a window wider than the image", (2, 17, 3, 2), 5, (5, 5), padding=(2, 2)),
    Case("stride 3 over a window of 2", (2, 17, 11, 13), 5, (2, 2), (3, 3)),
    Case("1x1, stride 2x1, dilated", (2, 32, 9, 8), 20, stride=(2, 1), dilation=(3, 2)),
]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@by_name
def test_exact_on_whole_numbers(case, layout):
    grad, x, weight = case.inputs(integers, layout=layout)
    expected = case.reference(grad.double(), x.double(), weight.double())[1].float()
    for of_weight in LAYOUTS:
        with poisoned():
            found = case.of_weight(grad, x, weight.contiguous(memory_format=of_weight))
        assert_equal(found, expected)


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "positive"])
@by_name
def test_at_most_twice_pytorchs_error(case, positive):
    def make(shape, seed):
        return reals(shape, seed, positive=positive)

    results = [[], [], []]
    for seed in range(3):
        data = case.inputs(make, seed)
        results[0].append(case.of_weight(*data).flatten())
        results[1].append(case.reference(*data)[1].flatten())
        results[2].append(case.reference(*(t.double() for t in data))[1].flatten())
    assert_as_accurate(*(torch.cat(found) for found in results))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7], CASES[12]], ids=lambda case: case.why)
def test_a_norm_in_front_has_the_bits_of_the_map_it_makes(case, activation):
    """Padding is zero behind the norm, not before it."""
    grad, x, weight = case.inputs(reals)
    channels = case.x[1]
    mean, scale, bias = reals((channels,), 7), reals((channels,), 8, positive=True), reals((channels,), 9)
    y = torch.ops.fast_backbones.batch_norm_again(x, mean, scale, bias, activation)
    found = case.of_weight(grad, x, weight, (mean, scale, bias, activation))
    assert_bit_equal(found, case.of_weight(grad, y, weight))


@by_name
def test_input_gradients_keep_the_2x_rule_and_are_exact(case):
    def gradient(data, backend):
        grad, x, weight = data
        x = x.clone().requires_grad_()
        padding = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
        y = kernels.conv2d(x, weight, backend=backend, **padding)
        return torch.autograd.grad(y, x, grad)[0]

    def multiples(shape, seed):  # Winograd's filters: its sums are exact then
        return integers(shape, seed, multiple=16 if shape[2:] == case.window else 1)

    data = case.inputs(multiples)
    expected = gradient([t.double() for t in data], "reference").float()
    assert_equal(gradient(data, "native"), expected)
    results = [[], [], []]
    for seed in range(3):
        data = case.inputs(reals, seed)
        results[0].append(gradient(data, "native").flatten())
        results[1].append(gradient(data, "reference").flatten())
        results[2].append(gradient([t.double() for t in data], "reference").flatten())
    assert_as_accurate(*(torch.cat(found) for found in results))


LARGE = [
    Case("1x1, large", (6, 64, 30, 33), 128),
    Case("3x3, large", (6, 48, 30, 33), 40, (3, 3), padding=(1, 1)),
    Case("few pixels", (3, 64, 7, 7), 300, (3, 3), padding=(1, 1)),
]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.why)
def test_same_bits_for_any_number_of_threads(case):
    data = case.inputs(reals)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(case.of_weight(*data))
    for other in results[1:]:
        assert_bit_equal(other, results[0])


def real_results():
    found = {}
    for case in (*CASES, *LARGE):
        grad, x, weight = case.inputs(reals)
        norm = (reals(x.shape[1:2], 7), reals(x.shape[1:2], 8), reals(x.shape[1:2], 9), "relu")
        found[case.why] = case.of_weight(grad, x, weight)
        found[f"{case.why}, normed"] = case.of_weight(grad, x, weight, norm)
    return found


def test_instruction_sets_give_the_same_bits(tmp_path):
    found = results_of_isas("tests/test_kernels_conv2d_backward.py", tmp_path, 1e-4, 1e-4)
    assert len(found) == 2 * (len(CASES) + len(LARGE))


def test_slices_of_wider_maps():
    case = CASES[0]
    grad, x, weight = case.inputs(integers)
    wide = torch.full((x.shape[0], x.shape[1] + 24, *x.shape[2:]), torch.nan).contiguous(memory_format=CL)
    wide[:, 8 : 8 + x.shape[1]] = x
    wide_grad = torch.full((grad.shape[0], grad.shape[1] + 9, *grad.shape[2:]), torch.nan)
    wide_grad = wide_grad.contiguous(memory_format=CL)
    wide_grad[:, 1 : 1 + grad.shape[1]] = grad
    found = case.of_weight(wide_grad[:, 1 : 1 + grad.shape[1]], wide[:, 8 : 8 + x.shape[1]], weight)
    assert_bit_equal(found, case.of_weight(grad, x, weight))


def test_an_empty_batch_gives_zeros():
    case = CASES[7]
    grad, x, weight = case.inputs(reals)
    with poisoned():
        assert_equal(case.of_weight(grad[:0], x[:0], weight), torch.zeros_like(weight))


def test_crowded_pixels_are_copied_apart():
    """Dense maps of 1024 channels take another way through the forward kernel, with the same results."""
    x, weight = integers((2, 1024, 5, 6), 0).contiguous(memory_format=CL), integers((70, 1024, 1, 1), 1)
    wide = torch.zeros(2, 1040, 5, 6).contiguous(memory_format=CL)
    wide[:, :1024] = x
    expected = kernels.conv2d(wide[:, :1024], weight, backend="direct")
    assert_bit_equal(kernels.conv2d(x, weight, backend="direct"), expected)
    assert_equal(expected, F.conv2d(x, weight))


@pytest.mark.parametrize("groups, taps", [(1, (1, 1)), (1, (3, 2)), (4, (3, 3))])
@pytest.mark.parametrize("filters, depth", [(4, 1), (48, 33), (132, 40)])
def test_filters_are_turned_round(groups, taps, filters, depth):
    weight = reals((filters, depth, *taps), 0)
    found = torch.ops.fast_backbones.transposed_filters(weight, groups)
    parts = weight.view(groups, filters // groups, depth, *taps).transpose(1, 2).flip(3, 4)
    assert_bit_equal(found, parts.reshape(groups * depth, filters // groups, *taps))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"grad": (2, 65, 8, 6)}, "grad has sizes"),
        ({"x": (3, 32, 8, 7)}, "does not fit x"),
        ({"mean": torch.zeros(33)}, "mean, scale and bias go together"),
        ({"mean": torch.zeros(3), "scale": torch.zeros(33), "bias": torch.zeros(33)}, "mean has sizes"),
        ({"activation": "tanh"}, "activation is"),
        ({"activation": "relu"}, "mean, scale and bias go together"),
        ({"stride": (0, 1)}, "stride is 0"),
        ({"padding": (1,)}, "padding has 1 values"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    grad, x, weight = CASES[0].inputs(reals)
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    norm = {"mean": None, "scale": None, "bias": None, "activation": "none"}
    arguments = {"grad": grad, "x": x, "weight": weight, **geometry, **norm}
    arguments |= {k: torch.zeros(v) if k in ("grad", "x") else v for k, v in change.items()}
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fast_backbones.conv2d_backward_weight(**arguments)


def test_opcheck():
    grad, x, weight = CASES[7].inputs(reals)
    norm = (*(reals(x.shape[1:2], i) for i in range(3)), "relu6")
    ops = torch.ops.fast_backbones
    tests = ("test_schema", "test_faketensor")
    for arguments in (NO_NORM, norm):
        given = (grad, x, weight, *CASES[7].geometry, *arguments)
        torch.library.opcheck(ops.conv2d_backward_weight.default, given, test_utils=tests)
    torch.library.opcheck(ops.transposed_filters.default, (weight, 1), test_utils=tests)
    again = (x, norm[0], norm[1], norm[2], "relu")
    torch.library.opcheck(ops.batch_norm_again.default, again, test_utils=tests)


if __name__ == "__main__":
    torch.save(real_results(), sys.argv[1])
