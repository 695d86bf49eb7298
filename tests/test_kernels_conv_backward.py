"""Compiled gradients of the depthwise and the grouped convolution against PyTorch's.

Run as a program,

    python tests/test_kernels_conv_backward.py OUT.pt

it saves gradients of real data; a test starts it once per instruction set.
"""

import sys
from dataclasses import dataclass

import pytest
import torch
from helpers import (
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
from helpers import one_thread as one_thread

from fast_backbones.kernels import _conv_backward

pytestmark = needs_native

LAYOUTS = (torch.contiguous_format, torch.channels_last)
NAMES = ("dx", "dweight")


@dataclass(frozen=True)
class Case:
    """A convolution: groups 0 is depthwise; `filters` 0 are as many as channels."""

    why: str
    x: tuple[int, int, int, int]
    groups: int = 0
    filters: int = 0
    window: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def needs(self) -> tuple[bool, bool]:
        """The gradient of x keeps the number of channels."""
        return self.filters in (0, self.x[1]), True

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation

    def inputs(self, make, seed: int = 0, layout=torch.channels_last) -> list[torch.Tensor]:
        """grad, x, weight."""
        n, c, h, w = self.x
        groups, filters = self.groups or c, self.filters or c
        size = (h, w)
        p, q = (
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (self.window[i] - 1) - 1) // self.stride[i]
            + 1
            for i in range(2)
        )
        shapes = (n, filters, p, q), self.x, (filters, c // groups, *self.window)
        grad, x, weight = (make(shape, 3 * seed + i) for i, shape in enumerate(shapes))
        return [grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout), weight]

    def native(self, grad, x, weight, needs=None):
        needs = needs or self.needs
        rest = (*self.geometry, *([self.groups] if self.groups else []), *needs)
        ops = torch.ops.fast_backbones
        op = ops.grouped_conv2d_backward if self.groups else ops.depthwise_conv2d_backward
        return tuple(t if needed else None for t, needed in zip(op(grad, x, weight, *rest), needs))

    def reference(self, grad, x, weight):
        geometry = (*self.geometry, False, [0, 0], self.groups or self.x[1])
        needs = [*self.needs, False]
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, needs)[:2]

    def refusal(self, grad, x, weight):
        rest = (*self.geometry, *([self.groups, self.needs[0]] if self.groups else []))
        refuse = (
            _conv_backward.refuse_grouped_backward
            if self.groups
            else _conv_backward.refuse_depthwise_backward
        )
        return refuse(grad, x, weight, *rest)


TWO, NONE = (2, 2), (0, 0)
GROUPED = [
    Case("4 channels, odd", (3, 32, 9, 11), 8),
    Case("4 channels, stride 2, odd", (2, 32, 9, 11), 8, stride=TWO),
    Case("4 channels, stride 2, even", (2, 32, 12, 10), 8, stride=TWO),
    Case("4 channels, many rows", (2, 48, 40, 57), 12),
    Case("8 channels", (2, 64, 10, 7), 8),
    Case("8 channels, stride 2", (2, 64, 28, 30), 8, stride=TWO),
    Case("8 channels, stride 2, no padding", (2, 64, 8, 9), 8, stride=TWO, padding=NONE),
    Case("8 channels, no padding", (2, 64, 7, 9), 8, padding=NONE),
    Case("8 channels, rows padded alone", (2, 64, 7, 9), 8, padding=(1, 0)),
    Case("16 channels", (3, 64, 14, 14), 4),
    Case("16 channels, stride 2", (3, 64, 14, 13), 4, stride=TWO),
    Case("32 channels, many images", (12, 64, 7, 7), 2),
    Case("32 channels, stride 2", (2, 96, 7, 14), 3, stride=TWO),
    Case("2 to 4 channels", (2, 32, 9, 11), 16, 64),
    Case("4 to 8 channels, stride 2", (2, 64, 9, 12), 16, 128, stride=TWO),
    Case("8 to 16 channels, no padding", (2, 64, 9, 11), 8, 128, padding=NONE),
    Case("16 to 32 channels", (2, 64, 6, 5), 4, 128),
    Case("one pixel", (2, 64, 1, 1), 8),
    Case("two pixels, stride 2", (2, 64, 2, 2), 8, stride=TWO),
    Case("one column", (2, 64, 5, 1), 8),
    Case("rows that nothing reads", (2, 64, 4, 6), 8, stride=TWO, padding=NONE),
]
DEPTHWISE = [
    Case("odd channels, odd image", (3, 37, 9, 11)),
    Case("stride 2, odd", (2, 37, 9, 11), stride=TWO),
    Case("stride 2, even", (2, 64, 12, 30), stride=TWO),
    Case("many channels", (2, 600, 8, 7)),
    Case("many rows", (3, 24, 60, 61)),
    Case("stride 2, many rows", (3, 24, 60, 61), stride=TWO),
    Case("no padding", (2, 20, 9, 16), padding=NONE),
    Case("stride 2, no padding", (2, 20, 9, 16), padding=NONE, stride=TWO),
    Case("5x5", (2, 20, 14, 29), window=(5, 5), padding=(2, 2)),
    Case("5x5, stride 2", (2, 20, 14, 29), window=(5, 5), padding=(2, 2), stride=TWO),
    Case("7x7", (2, 20, 14, 29), window=(7, 7), padding=(3, 3)),
    Case("6x4", (2, 20, 14, 29), window=(6, 4)),
    Case("1x1", (2, 20, 7, 9), window=(1, 1), padding=NONE),
    Case("2x7, stride 1x2", (2, 20, 7, 19), window=(2, 7), stride=(1, 2), padding=(0, 3)),
    Case("stride 3", (2, 20, 17, 19), stride=(3, 3)),
    Case("dilated", (2, 20, 17, 19), dilation=TWO, padding=TWO),
    Case("dilated 3x2, stride 2", (2, 20, 17, 19), dilation=(3, 2), padding=(3, 2), stride=TWO),
    Case("padding wider than the window", (2, 20, 4, 3), padding=(4, 4)),
    Case("one pixel", (2, 20, 1, 1)),
    Case("a window wider than the image", (2, 20, 3, 2), window=(5, 5), padding=(2, 2)),
]
CASES = [*(pytest.param(c, id=f"grouped {c.why}") for c in GROUPED)]
CASES += [*(pytest.param(c, id=f"depthwise {c.why}") for c in DEPTHWISE)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("case", CASES)
def test_exact_on_whole_numbers(case, layout):
    data = case.inputs(integers, layout=layout)
    assert case.refusal(*data) is None
    expected = case.reference(*(t.double() for t in data))
    with poisoned():
        found = case.native(*data)
    for name, mine, true, needed in zip(NAMES, found, expected, case.needs):
        if needed:
            assert_equal(mine, true.float(), name)
            assert mine.is_contiguous(memory_format=layout if name == "dx" else torch.contiguous_format), name


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "positive"])
@pytest.mark.parametrize("case", CASES)
def test_at_most_twice_pytorchs_error(case, positive):
    def make(shape, seed):
        return reals(shape, seed, positive=positive)

    mine, plain, exact = [], [], []
    for seed in range(3):
        data = case.inputs(make, seed)
        mine.append(case.native(*data))
        plain.append(case.reference(*data))
        exact.append(case.reference(*(t.double() for t in data)))
    for i, name in enumerate(NAMES):
        if case.needs[i]:
            assert_as_accurate(
                *(torch.cat([g[i].flatten() for g in runs]) for runs in (mine, plain, exact)), name
            )


LARGE = [
    Case("grouped", (5, 64, 33, 30), 16),
    Case("grouped, stride 2", (5, 64, 33, 30), 8, stride=TWO),
    Case("grouped, wide", (9, 512, 7, 7), 16),
    Case("depthwise", (5, 70, 33, 30)),
    Case("depthwise, stride 2", (5, 300, 33, 30), stride=TWO),
    Case("depthwise, 5x5", (5, 70, 33, 30), window=(5, 5), padding=(2, 2)),
]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.why)
def test_same_bits_for_any_number_of_threads(case):
    data = case.inputs(reals)
    with threads(2):
        expected = case.native(*data)
    for count in (1, 3):
        with threads(count):
            found = case.native(*data)
        for name, mine, other in zip(NAMES, found, expected):
            assert_bit_equal(mine, other, name)


@pytest.mark.parametrize(
    "case",
    [
        Case("grouped, stride 2", (1, 128, 185, 190), 32, stride=TWO),
        Case("depthwise", (1, 128, 185, 190)),
        Case("depthwise, stride 2", (1, 128, 185, 190), stride=TWO),
    ],
    ids=lambda case: case.why,
)
def test_maps_that_are_written_past_the_caches(case):
    data = case.inputs(integers)
    assert data[1].nbytes > 16 << 20
    expected = case.reference(*data)
    with poisoned():
        found = case.native(*data)
    for name, mine, other in zip(NAMES, found, expected):
        assert_equal(mine, other, name)


def test_what_is_slower_is_declined_in_words():
    grad, x, weight = Case("", (2, 16, 7, 7)).inputs(reals)
    decline = _conv_backward.decline_depthwise_backward
    assert "rows of 7 pixels" in decline(grad, x, weight, (1, 1), (1, 1), (1, 1), False)
    assert decline(grad, x, weight, (1, 1), (1, 1), (1, 1), True) is None
    grad, x, weight = Case("", (2, 64, 14, 14), 16).inputs(reals)
    assert _conv_backward.decline_grouped_backward(grad, x, weight, (1, 1), (1, 1), (1, 1), True) is None


def real_results():
    found = {}
    for case in (*GROUPED, *DEPTHWISE, *LARGE):
        gradients = zip(NAMES, case.native(*case.inputs(reals)))
        kind = "grouped" if case.groups else "depthwise"
        found |= {f"{kind} {case.why} {name}": g for name, g in gradients if g is not None}
    return found


def test_instruction_sets_give_the_same_bits(tmp_path):
    found = results_of_isas("tests/test_kernels_conv_backward.py", tmp_path, 1e-4, 1e-4)
    assert len(found) > 80


@pytest.mark.parametrize("case", [GROUPED[1], DEPTHWISE[0]], ids=["grouped", "depthwise"])
def test_only_what_is_needed_is_computed(case):
    data = case.inputs(integers)
    both = case.native(*data)
    for needs in ((True, False), (False, True), (False, False)):
        found = case.native(*data, needs)
        for needed, mine, other in zip(needs, found, both):
            assert (mine is None) == (not needed)
            if needed:
                assert_bit_equal(mine, other)


@pytest.mark.parametrize("case", [GROUPED[0], DEPTHWISE[0]], ids=["grouped", "depthwise"])
def test_slices_of_wider_maps_and_layouts_of_weights(case):
    grad, x, weight = case.inputs(integers)
    expected = case.native(grad, x, weight)
    wide = torch.full((x.shape[0], x.shape[1] + 24, *x.shape[2:]), torch.nan)
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, 8 : 8 + x.shape[1]] = x
    wide_grad = torch.full((grad.shape[0], grad.shape[1] + 8, *grad.shape[2:]), torch.nan)
    wide_grad = wide_grad.contiguous(memory_format=torch.channels_last)
    wide_grad[:, : grad.shape[1]] = grad
    found = case.native(wide_grad[:, : grad.shape[1]], wide[:, 8 : 8 + x.shape[1]], weight)
    for mine, other in zip(found, expected):
        assert_bit_equal(mine, other)
    last = weight.contiguous(memory_format=torch.channels_last)
    found = case.native(grad.contiguous(), x.contiguous(), last)
    for mine, other in zip(found, expected):
        assert_bit_equal(mine, other)
        if case.groups:  # filters of one channel lie in both orders: torch calls them contiguous
            assert mine.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", [GROUPED[0], DEPTHWISE[0]], ids=["grouped", "depthwise"])
def test_an_empty_batch_gives_zeros(case):
    grad, x, weight = case.inputs(integers)
    dx, dweight = case.native(grad[:0], x[:0], weight)
    assert dx.shape == x[:0].shape
    assert_equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize(
    "case, words",
    [
        (Case("", (2, 48, 6, 6), 2), "24 output channels per group"),
        (Case("", (2, 32, 6, 6), 8, 96), "32 to 96 channels"),
        (Case("", (2, 8, 6, 6), 2), "multiples of 16"),
        (Case("", (2, 32, 6, 6), 8, window=(5, 5)), "kernel 5x5"),
        (Case("", (2, 32, 6, 6), 8, stride=(1, 2)), "stride 1x2"),
        (Case("", (2, 32, 6, 6), 8, padding=TWO), "padding 2x2"),
        (Case("", (2, 32, 6, 6), 8, dilation=TWO), "dilation 2x2"),
        (Case("", (2, 4, 9, 9), window=(9, 9)), "kernel 9x9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(case, words):
    data = case.inputs(reals)
    assert words in case.refusal(*data)
    with pytest.raises(RuntimeError, match="conv2d_backward: "):
        case.native(*data, (True, True))


def test_other_types_and_widening_are_refused():
    case = GROUPED[0]
    assert "bfloat16" in case.refusal(*(t.bfloat16() for t in case.inputs(reals)))
    grad, x, weight = (case := GROUPED[13]).inputs(reals)
    words = "the gradient of x handles as many out as in"
    assert words in _conv_backward.refuse_grouped_backward(grad, x, weight, *case.geometry, case.groups)
    with pytest.raises(RuntimeError, match="32 to 64 channels"):
        case.native(grad, x, weight, (True, False))
    grad, x, weight = (case := DEPTHWISE[0]).inputs(reals)
    assert "one filter per channel" in case.refusal(grad, x[:, :5], weight)
    with pytest.raises(RuntimeError, match=r"grad has sizes \[3, 37, 8, 11\], expected \[3, 37, 9, 11\]"):
        case.native(grad[:, :, 1:], x, weight)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("case", [GROUPED[1], DEPTHWISE[1]], ids=["grouped", "depthwise"])
def test_the_operators_keep_what_their_schemas_say(case, layout):
    grad, x, weight = case.inputs(reals, layout=layout)
    op = "grouped_conv2d_backward" if case.groups else "depthwise_conv2d_backward"
    groups = [case.groups] if case.groups else []
    for needs in ((True, True), (False, True), (True, False)):
        args = (grad, x, weight, *case.geometry, *groups, *needs)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.fast_backbones, op).default, args, test_utils=checks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(real_results(), sys.argv[1])
