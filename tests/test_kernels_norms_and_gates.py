"""Affine, norms, gates and averages beyond the table: what a plan asks of them, and their derivatives.

Run as a program,

    python tests/test_kernels_norms_and_gates.py OUT.pt

it saves results of real data; the tests start it once per instruction set.
"""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    backends,
    integers,
    isas,
    needs_native,
    reals,
    run_python,
    threads,
)
from helpers import one_thread as one_thread
from kernel_cases import distances, response_norm, squeeze, unit

from fast_backbones import kernels
from fast_backbones.kernels import _ext

CL = torch.channels_last
ACTIVATIONS = {0: lambda t: t, 1: F.relu, 2: F.relu6, 3: torch.sigmoid, 4: torch.tanh}
MARK = 12345.0


def nhwc(t: torch.Tensor, spare: int = 0) -> torch.Tensor:
    """The values of t in pixels with `spare` floats of NaN behind their channels."""
    n, c, h, w = t.shape
    wide = torch.full((n, h, w, c + spare), float("nan"))
    wide[..., :c] = t.permute(0, 2, 3, 1)
    return wide[..., :c].permute(0, 3, 1, 2)


def run_kind(kind, x, sizes, threads=1, spare=0, **options) -> torch.Tensor:
    """One op of the torch-free interface; tensors among the options are operands, the rest are parameters."""
    n, c, h, w = x.shape
    operands = {k: v for k, v in options.items() if isinstance(v, torch.Tensor)} | {"x": nhwc(x, spare)}
    params = {k: v for k, v in options.items() if not isinstance(v, torch.Tensor)}
    if "residual" in operands:
        operands["residual"] = nhwc(operands["residual"], spare)
    strides = {"ldx": c + spare, "ldy": c + spare, "ldr": c + spare}
    params = {"n": n, "c": c, "h": h, "w": w, "k": c} | strides | params
    memory = torch.full((n, *sizes, c + spare), MARK)
    addresses = {name: t.data_ptr() for name, t in operands.items()} | {"y": memory.data_ptr()}
    _ext.native().run_op(kind, params, addresses, threads=threads)
    assert (memory[..., c:] == MARK).all(), f"{kind} writes between its pixels"
    return memory[..., :c].permute(0, 3, 1, 2)


# ---- affine ----


def affine_formula(x, activation=0, weight=None, bias=None, gate=None, residual=None) -> torch.Tensor:
    y = x
    if weight is not None:
        y = y * weight[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    if gate is not None:
        y = y * gate[:, :, None, None]
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y)


def affine_operands(shape, make, present):
    n, c, _, _ = shape
    sizes = {"weight": (c,), "bias": (c,), "gate": (n, c), "residual": shape}
    chosen = zip(sizes.items(), present)
    return {name: make(size, i) for i, ((name, size), there) in enumerate(chosen) if there}


@needs_native
@pytest.mark.parametrize("shape", [(2, 35, 5, 7), (3, 16, 1, 1), (1, 3, 9, 4), (2, 600, 9, 8)], ids=str)
@pytest.mark.parametrize("present", list(itertools.product((0, 1), repeat=4)), ids=str)
def test_affine_of_integers_is_exact(shape, present):
    x, operands = integers(shape, 9), affine_operands(shape, integers, present)
    exact = {name: t.double() for name, t in operands.items()}
    gated = {"gated": int("gate" in operands)}
    for activation in (0, 1, 2):
        expected = affine_formula(x.double(), activation, **exact).float()
        for spare, count in ((0, 1), (5, 2)):
            y = run_kind("affine", x, shape[2:], count, spare, activation=activation, **gated, **operands)
            assert_equal(y, expected, f"activation {activation}, {spare} floats between pixels")


@needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_affine_of_reals_is_accurate(activation):
    shape = (2, 67, 9, 8)
    x, operands = reals(shape, 9), affine_operands(shape, reals, (1, 1, 1, 1))
    exact = affine_formula(x.double(), activation, **{name: t.double() for name, t in operands.items()})
    y = run_kind("affine", x, shape[2:], activation=activation, gated=1, **operands)
    assert_as_accurate(y, affine_formula(x, activation, **operands), exact)


@needs_native
def test_affine_in_place_and_gates_of_a_wider_row():
    x = nhwc(integers((2, 20, 3, 4), 1))
    wide = torch.full((2, 27), float("nan"))
    wide[:, :20] = integers((2, 20), 2)
    expected = x * wide[:, :20, None, None]
    params = {"n": 2, "c": 20, "k": 20, "h": 3, "w": 4, "gated": 1, "ldg": 27}
    addresses = {"x": x.data_ptr(), "y": x.data_ptr(), "gate": wide.data_ptr()}
    _ext.native().run_op("affine", params, addresses, threads=1)
    assert_equal(x, expected)


@needs_native
def test_affine_keeps_special_values():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 7.0]).view(1, 5, 1, 1)
    for activation, formula in ACTIVATIONS.items():
        actual = run_kind("affine", x, (1, 1), activation=activation)
        assert torch.allclose(actual, formula(x), rtol=1e-6, atol=0, equal_nan=True), activation


# ---- average pools ----


@needs_native
@pytest.mark.parametrize("output", [(1, 1), (6, 6), (7, 3), (20, 17), (13, 11)], ids=str)
def test_adaptive_average_is_pytorchs(output):
    x = integers((2, 70, 13, 11), 1)
    expected = F.adaptive_avg_pool2d(x.double(), output).float()
    sizes = {"out_h": output[0], "out_w": output[1]}
    for spare, count in ((0, 1), (3, 2)):
        assert_equal(run_kind("avg_pool2d", x, output, count, spare, **sizes), expected, str(output))
    x = reals((2, 70, 13, 11), 1)
    exact = F.adaptive_avg_pool2d(x.double(), output)
    assert_as_accurate(run_kind("avg_pool2d", x, output, **sizes), F.adaptive_avg_pool2d(x, output), exact)


@needs_native
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_average_with_bias_and_activation(activation):
    """The epilogue of a 1x1 convolution that was moved in front of its pool."""
    x, bias = integers((2, 37, 9, 8), 1, multiple=9), integers((37,), 2, limit=8)
    window = {"r": 3, "s": 3, "pad_h": 1, "pad_w": 1, "activation": activation}
    pooled = F.avg_pool2d(x.double(), 3, 1, 1) + bias[:, None, None]
    actual = run_kind("avg_pool2d", x, (9, 8), 2, bias=bias, **window)
    assert_equal(actual, ACTIVATIONS[activation](pooled).float())


@needs_native
def test_pools_in_ceil_mode_are_pytorchs():
    """Every small size: how many windows there are, and where the last ones lie."""
    for size, window, stride in itertools.product(range(1, 8), range(1, 6), range(1, 6)):
        for padding in range(window // 2 + 1):
            x = integers((1, 3, size, 5), size)
            arguments = ((window, 1), (stride, 1), (padding, 0))
            options = {"stride": (stride, 1), "padding": (padding, 0), "ceil_mode": True}
            try:
                highest = F.max_pool2d(x, *arguments, ceil_mode=True)
            except RuntimeError:
                for pool in (kernels.max_pool2d, kernels.avg_pool2d):
                    with pytest.raises(RuntimeError, match="in height"):
                        pool(x, (window, 1), **options)
                continue
            what = f"{size}, window {window}, stride {stride}, padding {padding}"
            assert_equal(kernels.max_pool2d(x, (window, 1), **options, backend="native"), highest, what)
            for count_pad in (False, True):
                mean = F.avg_pool2d(x.double(), *arguments, True, count_pad).float()
                actual = kernels.avg_pool2d(
                    x, (window, 1), **options, count_include_pad=count_pad, backend="native"
                )
                assert_equal(actual, mean, what)


# ---- local response norm and squeeze-excite ----

OPTIONS = [
    {"size": size, "alpha": alpha, "beta": beta, "k": k}
    for size, alpha, beta, k in (
        (5, 1e-4, 0.75, 1.0),
        (5, 5e-4, 0.75, 2.0),
        (4, 2.0, 0.5, 0.5),
        (3, 1.0, 1.0, 1.0),
    )
]


@needs_native
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("positive", [False, True], ids=["reals", "positive"])
def test_local_response_norm_is_accurate(options, positive):
    options = dict(options)
    size = options.pop("size")
    for scale in (1e-3, 1.0, 50.0):
        x = reals((2, 67, 9, 8), 1, positive=positive) * scale
        exact = kernels.local_response_norm_ref(x.double(), size, **options)
        plain = kernels.local_response_norm_ref(x, size, **options)
        for layout in (torch.contiguous_format, CL):
            actual = kernels.local_response_norm(
                x.to(memory_format=layout), size, **options, backend="native"
            )
            assert_as_accurate(actual, plain, exact, f"scale {scale}")


def derivatives(call, tensors, incoming, outer):
    """First derivatives of sum(incoming * call), and second ones of their products with `outer`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(call(*leaves), leaves, incoming, create_graph=True)
    second = torch.autograd.grad(first, leaves, [t.to(incoming.dtype) for t in outer], allow_unused=True)
    return [*first, *(torch.zeros_like(t) if s is None else s for t, s in zip(leaves, second))]


@needs_native
@pytest.mark.parametrize(
    "case",
    [response_norm("grad", (2, 19, 5, 4), 5), squeeze("grad", 2, 24, 5, 4, 6), unit("grad", 2, 19, 5, 4)],
    ids=lambda c: c.op,
)
@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0])
def test_derivatives_with_rounding(case, beta):
    """Native first and second derivatives against float64, at most twice PyTorch's own error."""
    inputs = case.inputs("reals")
    tensors = [t for t in inputs.args if isinstance(t, torch.Tensor)]
    others = [t for t in inputs.args if not isinstance(t, torch.Tensor)]
    options = {"alpha": 0.3, "beta": beta, "k": 2.0} if others else {}
    incoming, outer = reals(case.x, 8), [reals(t.shape, 20 + i) for i, t in enumerate(tensors)]

    def through(backend):
        return lambda *leaves: getattr(kernels, case.op)(*leaves, *others, **options, backend=backend)

    exact = derivatives(through("reference"), [t.double() for t in tensors], incoming.double(), outer)
    plain = derivatives(through("reference"), tensors, incoming, outer)
    native = derivatives(through("native"), tensors, incoming, outer)
    assert len(native) == 2 * len(tensors)
    for i, (a, p, e) in enumerate(zip(native, plain, exact)):
        assert_as_accurate(a.detach(), p.detach(), e.detach(), f"derivative {i}")


@pytest.mark.parametrize("backend", backends("l2_normalize"))
def test_derivatives_of_lengths_near_eps(backend):
    """Above eps, below it, at zero and at eps itself: as F.normalize, which passes gradients at equality."""
    x = torch.tensor([[3.0, 4.0], [0.3, -0.4], [0.0, 0.0], [1.0, 0.0]])
    for eps in (1.0, 1e-12, 5.0):
        leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
        incoming = reals((4, 2), 1)
        kernels.l2_normalize(leaf, eps=eps, backend=backend).backward(incoming)
        F.normalize(twin, dim=1, eps=eps).backward(incoming.double())
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-5, atol=1e-6)


@needs_native
def test_only_the_wanted_gradients_of_distances_are_made():
    x, centers = distances("grad", 2, 5, 3).inputs("reals").args
    for wanted in range(2):
        tensors = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, centers))]
        kernels.squared_distances(*tensors, backend="native").sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(2)]


@needs_native
def test_lengths_that_float32_cannot_square_are_lengths():
    x = torch.tensor([[3e30, -4e30], [3e-30, 4e-30], [0.0, 0.0]])
    expected = torch.tensor([[0.6, -0.8], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(kernels.l2_normalize(x, eps=1e-32, backend="native"), expected)


@needs_native
def test_only_the_wanted_gradients_of_squeeze_excite_are_made():
    inputs = squeeze("grad", 2, 8, 3, 4, 3).inputs("reals")
    for wanted in range(5):
        tensors = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(inputs.args)]
        kernels.squeeze_excite(*tensors, backend="native").sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(5)]


@needs_native
def test_filters_and_matrices_give_the_same_gates():
    x, weight1, bias1, weight2, bias2 = squeeze("filters", 2, 24, 5, 4, 6).inputs("reals").args
    expected = kernels.squeeze_excite(x, weight1, bias1, weight2, bias2, backend="native")
    again = kernels.squeeze_excite(x, weight1[..., None, None], bias1, weight2[:, :, 0, 0], bias2)
    assert_bit_equal(again, expected)
    assert_bit_equal(kernels.squeeze_excite(x[1], weight1, bias1, weight2, bias2), expected[1], "one image")


# ---- the same bits everywhere ----


def real_results() -> dict[str, torch.Tensor]:
    shape = (3, 83, 14, 13)
    x, operands = reals(shape, 9), affine_operands(shape, reals, (1, 1, 1, 1))
    results = {}
    for activation in ACTIVATIONS:
        results[f"affine {activation}"] = run_kind(
            "affine", x, shape[2:], activation=activation, gated=1, **operands
        )
    for options in OPTIONS:
        results[f"norm {options}"] = kernels.local_response_norm(x, **options, backend="native")
    results["adaptive"] = run_kind("avg_pool2d", x, (5, 20), out_h=5, out_w=20)
    weights = squeeze("bits", 3, 83, 14, 13, 9).inputs("reals").args[1:]
    results["gates"] = kernels.squeeze_excite(x, *weights, backend="native")
    pre = {"pre": 1, "pre_scale": operands["weight"], "pre_shift": operands["bias"], "pre_activation": 1}
    filters = {"r": 3, "s": 3, "pad_h": 1, "pad_w": 1, "groups": 83}
    weight = reals((9, 83), 5)  # packed as it is
    results["depthwise"] = run_kind("depthwise_conv2d", x, shape[2:], weight=weight, **filters, **pre)
    return results


@needs_native
def test_bits_do_not_depend_on_threads_or_instruction_set(tmp_path):
    expected = real_results()
    with threads(2):
        for name, result in real_results().items():
            assert_bit_equal(result, expected[name], f"{name}: 2 threads")
    for isa in isas():
        if isa == "portable":
            continue
        run_python(__file__, str(tmp_path / isa), FB_MAX_ISA=isa)
        for name, result in torch.load(tmp_path / isa).items():
            assert_bit_equal(result, expected[name], f"{name}: {isa}")


@needs_native
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_depthwise_scales_and_activates_its_input(stride, activation):
    """Padding stays zero: it is added after the scaling."""
    x, scale, shift = integers((2, 35, 9, 15), 1), integers((35,), 2), integers((35,), 3)
    weight, bias = integers((35, 1, 3, 3), 4), integers((35,), 5)
    packed = weight.reshape(35, 9).t().contiguous()
    window = {"r": 3, "s": 3, "pad_h": 1, "pad_w": 1, "groups": 35, "stride_h": stride, "stride_w": stride}
    for pre in (0, 1):
        before = x * scale[:, None, None] + shift[:, None, None] if pre else x
        before = ACTIVATIONS[activation](before)
        expected = F.relu6(F.conv2d(before.double(), weight.double(), bias.double(), stride, 1, groups=35))
        operands = {"pre_scale": scale, "pre_shift": shift} if pre else {}
        actual = run_kind(
            "depthwise_conv2d",
            x,
            expected.shape[2:],
            2,
            3,
            weight=packed,
            bias=bias,
            activation=2,
            pre=pre,
            pre_activation=activation,
            **window,
            **operands,
        )
        assert_equal(actual, expected.float(), f"pre {pre}")


if __name__ == "__main__":
    with torch.inference_mode(), threads(1):
        torch.save(real_results(), sys.argv[1])
