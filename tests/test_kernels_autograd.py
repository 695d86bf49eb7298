"""Derivatives: native kernels' or the formula's, of second order the formula's; forward mode and torch.func
take the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    integers,
    needs_native,
    reals,
)
from helpers import (
    one_thread as one_thread,
)
from kernel_cases import (
    CASES,
    Inputs,
    average,
    conv,
    depthwise,
    distances,
    linear,
    mean_pool,
    native_candidates,
    pointwise,
    pool,
    prepared,
    separable,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fast_backbones import kernels

SMALL = [
    case for case in CASES if len(case.x) == 2 or 0 < case.x[0] * case.x[1] * case.x[2] * case.x[3] < 6_000
]
TINY = [
    conv("residual, ReLU", 2, 2, 3, 3, 3, padding=1, residual=True),
    conv("stride, dilation, groups", 1, 4, 5, 4, 2, groups=2, stride=2, dilation=(1, 2), padding=1),
    pointwise("stride", 1, 3, 4, 3, 2, stride=2),
    linear("ReLU", 2, 4, 3, relu=True),
    separable("ReLU twice, stride", 2, 3, 5, 4, 2, stride=(2, 1)),
    separable(
        "ReLU6, dilation", 1, 2, 5, 6, 3, (3, 2), dilation=2, padding=2, activations=("relu6", "relu6")
    ),
    pool("overlapping", (1, 2, 3, 4), (1, 3), stride=1, padding=(0, 1)),
    depthwise("ReLU, stride", 2, 2, 5, 4, stride=(2, 1), padding=1),
    depthwise("ReLU6, dilation", 1, 2, 5, 6, (3, 2), dilation=2, padding=2, activation="relu6"),
    mean_pool(
        "ceil mode", (1, 2, 4, 5), (2, 3), stride=2, padding=1, ceil_mode=True, count_include_pad=False
    ),
    average("six pixels", 2, 2, 2, 3),
    distances("two to three", 2, 4, 3),
]


ROUNDED = (
    "local_response_norm",
    "squeeze_excite",
    "l2_normalize",
)  # derivatives with powers; test_kernels_norms_and_gates.py


def whole_share(case) -> int:
    """A multiple that makes the share of a pixel in an average a whole number."""
    if case.op == "global_avg_pool":
        return case.x[2] * case.x[3]
    if case.op == "avg_pool2d":
        _, kernel, *_ = prepared(case)
        inside = case.options.get("padding", 0) == 0 and not case.options.get("ceil_mode", False)
        return math.prod(size if inside else math.lcm(*range(1, size + 1)) for size in kernel)
    return 1


def accepted(case):
    return [backend for backend in native_candidates(case.op) if case.accepted_by(backend)]


def gradients(case, inputs, backend, incoming):
    """The output, and the gradient of sum(incoming * output) for every tensor."""
    leaves = inputs.map(lambda t: t.detach().clone().requires_grad_())
    output = case.run(leaves, backend)
    tensors = [t for t in (*leaves.args, *leaves.kwargs.values()) if isinstance(t, torch.Tensor)]
    return output.detach(), torch.autograd.grad(output, tensors, incoming)


@needs_native
@pytest.mark.parametrize("case", [c for c in SMALL if c.op not in ROUNDED], ids=lambda case: case.id)
def test_gradients_of_integers_are_exact(case):
    """Forward and backward without rounding: equal to float64 through the reference."""
    inputs = case.inputs("integers")
    incoming = integers(case.reference(inputs).shape, 9, limit=2, multiple=whole_share(case))
    _, exact = gradients(case, inputs.double(), "reference", incoming.double())
    for backend in accepted(case):
        _, actual = gradients(case, inputs, backend, incoming)
        for i, (a, e) in enumerate(zip(actual, exact)):
            assert_equal(a, e.float(), f"{backend}, gradient {i}")


@needs_native
@pytest.mark.parametrize(
    "case",
    [c for c in SMALL if c.x[0] > 0 and c.op not in ("max_pool2d", *ROUNDED)][::4],
    ids=lambda case: case.id,
)
def test_gradients_of_reals_keep_the_2x_rule(case):
    """Without ReLU and maxima, whose masks may flip with the last bit; over seeds, for tensors are small."""
    for backend in accepted(case):
        runs: list[list] = [[], [], []]  # native, PyTorch's, exact
        for seed in range(6):
            inputs = case.inputs("reals", seed)
            for name in ("activation", "depth_activation"):
                inputs.kwargs.pop(name, None)
            incoming = reals(case.reference(inputs).shape, 9 + seed)
            for run, how in zip(runs, (backend, "reference")):
                run.append(gradients(case, inputs, how, incoming))
            runs[2].append(gradients(case, inputs.double(), "reference", incoming.double()))
        results = [[(output, *found) for output, found in run] for run in runs]
        for i in range(len(results[0][0])):
            joined = (torch.cat([result[i].flatten() for result in run]) for run in results)
            assert_as_accurate(*joined, f"{backend}, gradient {i - 1}" if i else f"{backend}, output")


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_gradcheck_in_float64(case):
    inputs = case.inputs("reals").double()
    leaves = inputs.map(lambda t: t.requires_grad_())
    names = [k for k, v in leaves.kwargs.items() if isinstance(v, torch.Tensor)]
    tensors = [t for t in leaves.args if isinstance(t, torch.Tensor)] + [leaves.kwargs[k] for k in names]
    count = len(tensors) - len(names)

    def call(*values):
        args = values[:count] + tuple(a for a in leaves.args if not isinstance(a, torch.Tensor))
        return case.run(Inputs(args, {**leaves.kwargs, **dict(zip(names, values[count:]))}))

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@needs_native
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_double_backward_of_integers_is_exact(case):
    inputs = case.inputs("integers")
    results = {}
    for backend, dtype in [("reference", torch.float64), *((name, torch.float32) for name in accepted(case))]:
        leaves = inputs.map(lambda t: t.to(dtype).requires_grad_())  # noqa: B023
        tensors = [t for t in (*leaves.args, *leaves.kwargs.values()) if isinstance(t, torch.Tensor)]
        output = case.run(leaves, backend)
        scale = whole_share(case)
        incoming = integers(output.shape, 9, limit=2, multiple=scale, dtype=dtype).requires_grad_()
        first = torch.autograd.grad(output, tensors, incoming, create_graph=True)
        outer = [integers(g.shape, 20 + i, limit=1, multiple=scale, dtype=dtype) for i, g in enumerate(first)]
        second = torch.autograd.grad(first, [*tensors, incoming], outer, allow_unused=True)
        results[backend] = second
    exact = results.pop("reference")
    for backend, second in results.items():
        for i, (a, e) in enumerate(zip(second, exact)):
            zero = torch.zeros(())
            a, e = zero if a is None else a, zero if e is None else e.float()
            assert_equal(
                a.expand_as(e) if a.dim() == 0 else a, e.expand_as(a), f"{backend}, second derivative {i}"
            )


@needs_native
def test_only_the_wanted_gradients_are_made():
    x, weight, bias = reals((1, 16, 5, 5), 1), reals((16, 16, 3, 3), 2), reals((16,), 3)
    residual = reals((1, 16, 3, 3), 4)
    for wanted in range(4):
        tensors = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, weight, bias, residual))]
        y = kernels.conv2d(*tensors[:3], residual=tensors[3], backend="native")
        y.sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(4)]
    separable_tensors = (x, reals((16, 1, 3, 3), 5), reals((8, 16, 1, 1), 6), bias, reals((8,), 7))
    for wanted in range(5):
        tensors = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(separable_tensors)]
        kernels.separable_conv2d(*tensors, depth_activation="relu", backend="native").sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(5)]
    with torch.no_grad():
        assert not kernels.conv2d(x.clone().requires_grad_(), weight, backend="native").requires_grad
    shared = reals((1, 16, 5, 5), 1).requires_grad_()
    kernels.conv2d(shared, weight, padding=1, residual=shared, backend="native").sum().backward()
    twin = shared.detach().clone().requires_grad_()
    (F.conv2d(twin, weight, padding=1) + twin).sum().backward()
    torch.testing.assert_close(shared.grad, twin.grad, msg="x that is also the residual")


@needs_native
@pytest.mark.parametrize(
    "call",
    [
        lambda x: kernels.avg_pool2d(x, 2),
        lambda x: kernels.max_pool2d(x, 3, stride=2),
        lambda x: kernels.batch_norm(x, activation="relu"),
        lambda x: kernels.conv2d(x, reals((8, 16, 1, 1), 2), stride=2),
    ],
    ids=["avg_pool2d", "max_pool2d", "batch_norm", "conv2d"],
)
def test_many_gradients_at_once_are_those_one_by_one(call):
    x = reals((2, 16, 6, 6), 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = call(x)
    incoming = reals((3, *y.shape), 3)
    (found,) = torch.autograd.grad(y, x, incoming, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        assert_bit_equal(found[i], *torch.autograd.grad(y, x, incoming[i], retain_graph=True))


class _Calls(TorchDispatchMode):
    """The operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@needs_native
def test_no_zeros_are_made_for_what_has_no_gradient():
    y = kernels.max_pool2d(reals((1, 8, 8, 8), 1).requires_grad_(), 2)
    grad = torch.ones_like(y)
    with _Calls() as calls:
        y.backward(grad)
    assert not [name for name in calls.names if "zeros" in name]


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("sizes, groups", [((24, 16, 3, 3), 1), ((32, 8, 3, 3), 4), ((16, 1, 3, 3), 16)])
def test_a_bias_costs_no_second_gradient_of_the_weight(sizes, groups, layout):
    """oneDNN has no gradient of the bias alone."""
    x = reals((3, sizes[1] * groups, 12, 11), 1).contiguous(memory_format=layout)
    weight, bias = reals(sizes, 2), reals(sizes[:1], 3)
    grad = reals((3, sizes[0], 12, 11), 4).contiguous(memory_format=layout)

    def gradients(dtype, backend):
        tensors = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = kernels.conv2d(*tensors, padding=1, groups=groups, backend=backend)
        return torch.autograd.grad(y, tensors, grad.to(dtype))

    with _Calls() as calls:
        found = gradients(torch.float32, "native")
    assert not [name for name in calls.names if "convolution_backward" in name]
    plain, exact = gradients(torch.float32, "reference"), gradients(torch.float64, "reference")
    for ours, theirs, truth in zip(found, plain, exact):
        assert_as_accurate(ours, theirs, truth)


@needs_native
def test_changing_a_weight_between_forward_and_backward_is_an_error():
    x, weight = reals((1, 16, 5, 5), 1).requires_grad_(), reals((16, 16, 3, 3), 2).requires_grad_()
    for backend in ("winograd", "direct"):
        y = kernels.conv2d(x, weight, backend=backend)
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@needs_native
def test_zero_batch_has_zero_weight_gradients():
    weight, bias = reals((8, 4, 3, 3), 1).requires_grad_(), reals((8,), 2).requires_grad_()
    kernels.conv2d(torch.empty(0, 4, 6, 6), weight, bias, padding=1, activation="relu").sum().backward()
    assert weight.grad.eq(0).all() and bias.grad.eq(0).all()
    rows = reals((5, 3), 3).requires_grad_()
    kernels.linear(torch.empty(0, 3), rows).sum().backward()
    assert rows.grad.eq(0).all()


@needs_native
def test_inference_tensors():
    with torch.inference_mode():
        x = reals((1, 16, 5, 5), 1)
        weight = reals((16, 16, 3, 3), 2)
        expected = kernels.conv2d(x, weight, backend="native")
    assert_bit_equal(kernels.conv2d(x, weight, backend="native"), expected, "outside inference mode")
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        kernels.conv2d(x, weight.clone().requires_grad_(), backend="native")


@needs_native
def test_forward_mode_is_right_or_raises():
    x, weight = reals((1, 16, 5, 5), 1), reals((16, 16, 3, 3), 2)
    tangent = reals(x.shape, 3)
    expected = F.conv2d(tangent, weight)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        y = kernels.conv2d(dual, weight)
        assert_bit_equal(forward_ad.unpack_dual(y).tangent, expected, "dual numbers")
        pooled = kernels.global_avg_pool(kernels.max_pool2d(dual, 2))
        assert forward_ad.unpack_dual(pooled).tangent.abs().sum() > 0
        with pytest.raises(RuntimeError, match="forward-mode differentiation is on"):
            kernels.conv2d(dual, weight, backend="native")
    _, jvp = torch.func.jvp(lambda t: kernels.conv2d(t, weight), (x,), (tangent,))
    assert_bit_equal(jvp, expected, "torch.func.jvp")


@needs_native
def test_torch_func():
    x, weight = reals((3, 2, 16, 5, 5), 1), reals((16, 16, 3, 3), 2)
    batched = torch.vmap(lambda t: kernels.conv2d(t, weight, padding=1, activation="relu"))(x)
    alone = torch.stack([kernels.conv2d_ref(t, weight, padding=1, activation="relu") for t in x])
    assert torch.allclose(batched, alone, atol=1e-5)
    grad = torch.func.grad(lambda w: kernels.conv2d(x[0], w).square().sum())(weight)
    leaf = weight.clone().requires_grad_()
    F.conv2d(x[0], leaf).square().sum().backward()
    assert torch.allclose(grad, leaf.grad, rtol=1e-5)
    rows = torch.func.jacrev(lambda t: kernels.linear(t, weight[:, :, 0, 0]))(x[0, 0, :, 0, 0])
    assert torch.allclose(rows, weight[:, :, 0, 0])
    with pytest.raises(RuntimeError, match=r"torch\.func transform"):
        torch.vmap(lambda t: kernels.global_avg_pool(t, backend="native"))(x)
