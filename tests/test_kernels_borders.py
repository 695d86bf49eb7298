"""Pools with other padding behind the image than in front, and the copy with a border.

Convolutions with such borders are in test_kernels_conv_epilogues.py. Run as a program,

    python tests/test_kernels_borders.py OUT.pt

it saves results of real data; the test starts it once per instruction set.
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_bit_equal, assert_equal, integers, isas, needs_native, reals, run_python, threads
from helpers import one_thread as one_thread
from test_kernels_norms_and_gates import run_kind

from fast_backbones.kernels import _ext

BORDERS = [(0, 0, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0), (1, 1, 0, 0)]  # top, left, bottom, right
SIZES = [(2, 35, 8, 10), (1, 70, 9, 7), (3, 16, 3, 2)]


def params(border):
    return dict(zip(("pad_h", "pad_w", "pad_bottom", "pad_right"), border))


def padded(x, border, value=0.0):
    top, left, bottom, right = border
    return F.pad(x, (left, right, top, bottom), value=value)


def pool(kind, x, border, stride, *where):
    """The pool as the library does it, at `where`: threads, spare channels around x and y."""
    window = {"r": 3, "s": 3, "stride_h": stride, "stride_w": stride, **params(border)}
    sizes = formula(kind, x, border, stride).shape[2:]
    return run_kind(kind, x, sizes, *where, **window)


def formula(kind, x, border, stride):
    if kind == "max_pool2d":
        return F.max_pool2d(padded(x, border, -math.inf), 3, stride)
    return F.avg_pool2d(padded(x, border), 3, stride)


@needs_native
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("border", BORDERS, ids=str)
@pytest.mark.parametrize("kind", ["max_pool2d", "avg_pool2d"])
def test_pools_are_exact_and_have_the_bits_of_the_padded_image(kind, border, stride):
    for shape in SIZES:
        x = integers(shape, 1) - 9  # all negative: a zero would win
        expected = formula(kind, x.double(), border, stride).float()
        assert_equal(pool(kind, x, border, stride), expected, str(shape))
        assert_equal(pool(kind, x, border, stride, 2, 3), expected, f"{shape}, slices, 2 threads")
        x = reals(shape, 2)
        plain = run_kind(kind, padded(x, border, -math.inf if kind == "max_pool2d" else 0.0),
                         expected.shape[2:], r=3, s=3, stride_h=stride, stride_w=stride)  # fmt: skip
        assert_bit_equal(pool(kind, x, border, stride), plain, f"{shape}, padded beforehand")
        assert_bit_equal(pool(kind, x[-1:], border, stride), plain[-1:], f"{shape}, one image alone")


@needs_native
@pytest.mark.parametrize("value", [0.0, 2.5, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("border", [*BORDERS, (0, 0, 0, 3), (5, 2, 1, 4)], ids=str)
def test_a_copy_with_a_border_is_pytorchs(border, value):
    for shape in (*SIZES, (1, 3, 40, 61), (2, 1, 1, 1)):
        x = reals(shape, 1)
        x[0, 0, 0, 0] = math.nan
        expected = padded(x, border, value)
        for where in ((1, 0), (2, 3)):
            y = run_kind("pad2d", x, expected.shape[2:], *where, border=value, **params(border))
            assert_equal(y, expected, f"{shape}, {where}")


REFUSED = [
    ("max_pool2d", {"r": 3, "s": 3, "pad_bottom": 2, "pad_right": 0}, "more than half"),
    ("avg_pool2d", {"r": 3, "s": 3, "pad_bottom": 0, "pad_right": 2}, "more than half"),
    ("avg_pool2d", {"r": 4, "s": 3, "h": 2, "pad_bottom": 1, "pad_right": 0}, "padded input 3x4"),
    ("affine", {"pad_bottom": 1}, "pads all sides alike"),
    ("pad2d", {"k": 7}, "k differs from c"),
    ("pad2d", {"pad_h": -1}, "padding is negative"),
    ("pad2d", {"activation": 1}, "activation relu"),
    ("pad2d", {"gated": 1}, "no gate"),
]


@needs_native
@pytest.mark.parametrize("kind, options, words", REFUSED, ids=[f"{r[0]}: {r[2]}" for r in REFUSED])
def test_refusals_say_why(kind, options, words):
    sizes = {"n": 1, "c": 8, "k": 8, "h": 4, "w": 4}
    assert words in _ext.native().refusal(kind, {**sizes, **options})


@needs_native
def test_costs_of_a_copy_are_what_it_reads_and_writes():
    plan = _ext.native().Plan()
    x, y = torch.zeros(2 * 4 * 5 * 8), torch.zeros(2 * 5 * 7 * 8)
    sizes = {"n": 2, "h": 4, "w": 5, "c": 8, "k": 8, "pad_h": 0, "pad_w": 2, "pad_bottom": 1, "pad_right": 0}
    plan.add("pad2d", sizes, {"x": (-1, x.data_ptr()), "y": (-1, y.data_ptr())}, deps=[], name="pad")
    plan.finish()
    assert plan.costs(0) == {"flops": 0.0, "bytes": 4.0 * (x.numel() + y.numel())}


def real_results():
    x = reals((3, 83, 14, 12), 9)
    kinds = ("max_pool2d", "avg_pool2d")
    return {f"{kind} {border}": pool(kind, x, border, 2) for kind in kinds for border in BORDERS}


@needs_native
def test_bits_do_not_depend_on_the_instruction_set(tmp_path):
    expected = real_results()
    for isa in isas():
        if isa == "portable":
            continue
        run_python(__file__, str(tmp_path / isa), FB_MAX_ISA=isa, FB_POISON="1")
        for name, result in torch.load(tmp_path / isa).items():
            assert_bit_equal(result, expected[name], f"{name}: {isa}")


if __name__ == "__main__":
    with torch.inference_mode(), threads(1):
        torch.save(real_results(), sys.argv[1])
