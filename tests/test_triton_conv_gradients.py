"""Depthwise and grouped convolutions of training by Triton, forward and both gradients, on a GPU or else in
Triton's interpreter: integers to the bit, elsewhere at most twice PyTorch's error."""

from typing import NamedTuple

import pytest
import torch
from conv_layers import Place
from helpers import assert_as_accurate, assert_equal, integers, reals
from triton_device import DEVICE
from triton_device import exact_products as exact_products

pytest.importorskip("triton", reason="Triton is not installed")

from fast_backbones.kernels._triton import sums

from fast_backbones import kernels
from fast_backbones.kernels import _recompute

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUICK = DTYPES  # without a GPU float16 is slow
if DEVICE == "cpu":
    QUICK = (torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16)


class Case(NamedTuple):
    why: str
    x: tuple[int, int, int, int]
    filters: int
    kernel: int
    stride: int
    padding: int
    groups: int
    dilation: int = 1

    @property
    def is_depthwise(self):
        return self.groups == self.x[1]

    def call(self, x, weight, bias, **options):
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if self.is_depthwise:
            return kernels.depthwise_conv2d(x, weight, bias, **window, **options)
        return kernels.conv2d(x, weight, bias, **window, groups=self.groups, **options)

    def tensors(self, made, seed):
        """x, weight, bias, grad, float32."""
        n, c, h, w = self.x
        weight = self.filters, c // self.groups, self.kernel, self.kernel
        reach = self.dilation * (self.kernel - 1) + 1
        p, q = ((size + 2 * self.padding - reach) // self.stride + 1 for size in (h, w))
        sizes = self.x, weight, (self.filters,), (n, self.filters, p, q)
        return [made(size, seed + i) for i, size in enumerate(sizes)]


CASES = [
    Case("depthwise 3x3, an odd number of pixels", (1, 19, 7, 9), 19, 3, 1, 1, 19),
    Case("depthwise 3x3, stride 2", (2, 40, 8, 9), 40, 3, 2, 1, 40),
    Case("depthwise 3x3, stride 2, no padding, three channels", (3, 3, 7, 8), 3, 3, 2, 0, 3),
    Case("depthwise of one pixel", (3, 130, 1, 1), 130, 3, 1, 1, 130),
    Case("depthwise 5x5, stride 2", (1, 20, 9, 8), 20, 5, 2, 2, 20),
    Case("depthwise 7x7", (1, 17, 6, 8), 17, 7, 1, 3, 17),
    Case("depthwise 3x3, dilated", (1, 18, 9, 7), 18, 3, 1, 2, 18, 2),
    Case("4 a group", (2, 32, 5, 7), 32, 3, 1, 1, 8),
    Case("4 a group, stride 2", (1, 32, 9, 6), 32, 3, 2, 1, 8),
    Case("8 a group, stride 2, even and odd sizes", (2, 48, 7, 8), 48, 3, 2, 1, 6),
    Case("16 a group", (1, 48, 5, 4), 48, 3, 1, 1, 3),
    Case("32 a group, stride 2, no padding", (1, 64, 6, 5), 64, 3, 2, 0, 2),
    Case("64 a group", (1, 128, 3, 4), 128, 3, 1, 1, 2),
    Case("64 a group, stride 2", (1, 128, 4, 3), 128, 3, 2, 1, 2),
    Case("2 to 4 a group, stride 2", (1, 32, 6, 7), 64, 3, 2, 1, 16),
    Case("8 to 4 a group", (1, 64, 5, 4), 32, 3, 1, 1, 8),
    Case("three groups that make no pair", (1, 24, 5, 4), 24, 3, 1, 1, 3),
    Case("one row of one pixel", (5, 32, 1, 1), 32, 3, 1, 1, 8),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch, exact_products):
    """Each goes through several tiles, and the interpreter through few programs."""
    monkeypatch.setattr(sums, "PROGRAMS", 6)


def run(case, tensors, backend, dtype, wide=False, activation="none"):
    x, weight, bias, grad = (t.to(DEVICE, dtype) for t in tensors)
    x, grad = (Place(t, wide, float("nan")).values.detach() for t in (x, grad))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = case.call(*inputs, backend=backend, activation=activation)
    return dict(zip(("y", "x", "weight", "bias"), (y.detach(), *torch.autograd.grad(y, inputs, grad))))


def ids(value):
    return value.why if isinstance(value, Case) else str(value)


@pytest.mark.parametrize("dtype", QUICK, ids=ids)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_integers_to_the_bit(case, dtype, record_property):
    tensors = case.tensors(integers, 0)
    found = run(case, tensors, "triton", dtype, wide=dtype is torch.bfloat16)
    exact = run(case, tensors, "reference", torch.float64)
    for name in ("y", "x", "weight"):  # PyTorch's is the gradient of bias
        assert_equal(found[name], exact[name].float().to(dtype), name)


@pytest.mark.parametrize("dtype", QUICK, ids=ids)
@pytest.mark.parametrize("kind", ["depthwise", "grouped"])
def test_at_most_twice_pytorchs_error(kind, dtype):
    some = CASES[::2] if DEVICE == "cpu" else CASES  # the interpreter takes seconds for each
    cases = [case for case in some if case.is_depthwise == (kind == "depthwise")]
    found, plain, exact = {}, {}, {}
    for number, case in enumerate(cases):
        tensors = [t.to(dtype) for t in case.tensors(reals, 10 * number)]
        tensors[1] = tensors[1] * 0.25
        for results, backend, kind in (
            (found, "triton", dtype), (plain, "reference", dtype), (exact, "reference", torch.float64),
        ):  # fmt: skip
            for name, value in run(case, tensors, backend, kind, activation="relu").items():
                results.setdefault(name, []).append(value.flatten())
    for name in ("y", "x", "weight"):
        assert_as_accurate(*(torch.cat(results[name]) for results in (found, plain, exact)), name)


@pytest.mark.parametrize("case", [CASES[1], CASES[8]], ids=ids)
def test_same_bits_again_and_in_both_layouts(case):
    tensors = case.tensors(reals, 0)
    first, second = (run(case, tensors, "triton", torch.float32) for _ in range(2))
    x, weight, bias, grad = (t.to(DEVICE) for t in tensors)
    y = case.call(x.requires_grad_(), weight.requires_grad_(), bias, backend="triton")
    planar = y.detach(), *torch.autograd.grad(y, (x, weight), grad)
    assert y.is_contiguous()
    for name, third in zip(("y", "x", "weight"), planar):
        assert_equal(second[name], first[name], name)
        assert_equal(third, first[name], name)


@pytest.mark.parametrize(
    "case, activation", [(CASES[0], "relu6"), (CASES[1], "relu"), (CASES[7], "relu")], ids=ids
)
def test_derivatives_of_the_gradient(case, activation):
    def second(backend, dtype):
        x, weight, bias, _ = (t.to(DEVICE, dtype).requires_grad_() for t in case.tensors(reals, 0))
        y = case.call(x, weight, bias, activation=activation, backend=backend)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight))

    for fast, exact in zip(second("triton", torch.float32), second("reference", torch.float64)):
        assert (fast - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    "backend, sizes, groups", [("library", (24, 32, 1, 1), 1), ("triton", (32, 4, 3, 3), 8)]
)
def test_a_norms_input_is_kept_instead_of_its_output(backend, sizes, groups, dtype):
    """One map for the norm and the convolution behind it; the same gradients as with the map itself."""
    made = [reals((2, 32, 5, 4), 0), reals((32,), 1), reals((32,), 2), reals(sizes, 3)]
    x, weight, bias, filters = (t.to(DEVICE, dtype).requires_grad_() for t in made)
    results = []
    for noted in (True, False):
        y = kernels.batch_norm(x, weight, bias, activation="relu", backend="triton")
        assert _recompute.keep(y)[0][0] is x
        seen = y if noted else y.view_as(y)  # which carries no note
        out = kernels.conv2d(seen, filters, padding=sizes[2] // 2, groups=groups, backend=backend)
        kept = [t for t in out.grad_fn.saved_tensors if t is not None and t.shape == x.shape]
        assert [t.data_ptr() for t in kept] == [(x if noted else y).data_ptr()]
        results.append(torch.autograd.grad(out.square().sum(), (x, weight, filters)))
    for one, other in zip(*results):
        assert_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize("case", [CASES[1], CASES[7], Case("dense", (2, 20, 5, 4), 24, 3, 1, 1, 1)], ids=ids)
def test_autocast(case, dtype):
    """Operands are cast as PyTorch's autocast casts them; gradients come in float32."""
    x, weight, bias, grad = (t.to(DEVICE) for t in case.tensors(integers, 0))
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    results = []
    for backend in ("gpu", "reference"):
        with torch.autocast(DEVICE, dtype):
            y = case.call(x, weight, bias, backend=backend)
        assert y.dtype is dtype
        results.append((y, *torch.autograd.grad(y, (x, weight, bias), grad.to(dtype))))
    for ours, theirs in zip(*results):
        assert_equal(ours, theirs)


REFUSED = [
    ({"groups": 1}, "1 group"),
    ({"groups": 32, "sizes": (32, 1, 3, 3)}, "1 to 1 channels per group"),
    ({"groups": 8, "sizes": (32, 4, 5, 5)}, "kernel 5x5"),
    ({"groups": 8, "stride": 3}, "stride 3x3"),
    ({"groups": 8, "padding": 3}, "padding 3x3"),
    ({"groups": 8, "dilation": 2}, "dilation 2x2"),
    ({"groups": 8, "dtype": torch.float64}, "torch.float64"),
]


@pytest.mark.parametrize("options, words", REFUSED, ids=[words for _, words in REFUSED])
def test_refusals_say_why(options, words):
    options = {"padding": 1, "groups": 8, **options}
    dtype = options.pop("dtype", torch.float32)
    weight = torch.zeros(
        options.pop("sizes", (32, 32 // options["groups"], 3, 3)), dtype=dtype, device=DEVICE
    )
    x = torch.zeros(1, 32, 8, 8, dtype=dtype, device=DEVICE)
    with pytest.raises(RuntimeError, match=words):
        kernels.conv2d(x, weight, backend="triton", **options)


def test_depthwise_refuses_large_windows():
    with pytest.raises(RuntimeError, match="up to 49 taps"):
        kernels.depthwise_conv2d(
            torch.zeros(1, 4, 9, 9, device=DEVICE), torch.zeros(4, 1, 9, 9, device=DEVICE), backend="triton"
        )


def test_the_library_declines_where_nothing_is_kept():
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(4, 4, 1, 1)
    (said,) = [v for v in kernels.explain("conv2d", x, weight).candidates if v.name == "library"]
    assert said.declined == "no gradient is wanted: nothing is kept"
