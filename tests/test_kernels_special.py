"""NaN, infinities, signed zeros and denormals go where PyTorch lets them go."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LAYOUTS,
    assert_bit_equal,
    assert_equal,
    integers,
    layout_name,
    needs_native,
)
from helpers import (
    one_thread as one_thread,
)
from kernel_cases import CASES, Inputs, conv, native_candidates

from fast_backbones import kernels

SPECIAL = (math.nan, math.inf, -math.inf)
SMALL = [case for case in CASES if 0 < math.prod(case.x) < 5_000 and case.op != "linear"]


def accepted(case):
    return [backend for backend in native_candidates(case.op) if case.accepted_by(backend)]


def spoiled(case, value, index=None):
    """Integer inputs with one special value in the middle of the last image."""
    inputs = case.inputs("integers")
    x = inputs.args[0].clone()
    index = (x.shape[0] - 1, *(size // 2 for size in x.shape[1:])) if index is None else index
    x[index] = value
    return Inputs((x, *inputs.args[1:]), inputs.kwargs)


@needs_native
@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_one_special_pixel(case, value):
    """Everything but Winograd: the very values of PyTorch, NaN and infinities included."""
    inputs = spoiled(case, value)
    expected = case.exact(inputs).float()
    for layout in LAYOUTS:
        for backend in accepted(case):
            if backend != "winograd":
                actual = case.run(inputs.to_layout(layout), backend)
                assert_equal(actual, expected, f"{backend}, {layout_name(layout)}")


@needs_native
@pytest.mark.parametrize("value", SPECIAL, ids=str)
def test_one_special_pixel_under_winograd(value):
    """No output that PyTorch spoils stays finite; what is spoiled beyond that lies in the tiles around it."""
    large = conv("tiles of 4x4 outputs", 1, 16, 26, 25, 16, padding=1)
    small = [c for c in SMALL if c.op == "conv2d" and c.accepted_by("winograd")]
    for case, reach in [(large, 7), *((each, 3 if each.weight[2:] == (3, 3) else 7) for each in small)]:
        inputs = spoiled(case, value)
        expected, actual = case.exact(inputs), case.run(inputs, "winograd")
        finite = actual.isfinite()
        assert not (finite & ~expected.isfinite()).any(), f"{case.why}: an output stays finite"
        unclipped = Inputs(inputs.args, {**inputs.kwargs, "activation": "none"})
        touched = ~case.exact(unclipped).isfinite()
        # A tile of 2x2 outputs reads 4x4 pixels: a bad pixel reaches one output further than by 3x3, and
        # three further where tiles are 4x4, or 4 outputs in a line.
        near = F.max_pool2d(touched.float(), reach, 1, reach // 2).bool()
        assert not (~finite & ~near).any(), f"{case.why}: spoiled far away"
        assert_equal(torch.where(near, 0.0, actual), torch.where(near, 0.0, expected.float()), case.why)


@needs_native
def test_special_weights_bias_and_residual():
    case = conv("special weights", 1, 16, 5, 5, 16, residual=True)
    inputs = case.inputs("integers")
    x, weight, bias = inputs.args
    for value in SPECIAL:
        for part in ("weight", "bias", "residual"):
            tensors = {"weight": weight, "bias": bias, "residual": inputs.kwargs["residual"]}
            tensors[part] = tensors[part].clone()
            tensors[part].view(-1)[37 % tensors[part].numel()] = value
            expected = F.relu(F.conv2d(x, tensors["weight"], tensors["bias"]) + tensors["residual"])
            actual = kernels.conv2d(x, **tensors, activation="relu", backend="direct")
            assert_equal(actual, expected, f"{part} {value}")


@needs_native
def test_linear_and_pools():
    weight = integers((7, 10), 2)
    for value in SPECIAL:
        x = integers((3, 10), 1)
        x[1, 4] = value
        assert_equal(
            kernels.linear(x, weight, activation="relu", backend="native"),
            F.relu(F.linear(x, weight)),
            "linear",
        )
    x = torch.full((1, 2, 4, 4), -math.inf)
    assert_equal(
        kernels.max_pool2d(x, 3, padding=1, backend="native"), F.max_pool2d(x, 3, padding=1), "all -inf"
    )


@needs_native
def test_relu_keeps_nan_and_the_sign_of_zero():
    """As torch.relu: NaN stays, -0.0 stays. A bias or residual brings the value to every epilogue."""
    for backend, channels in (("direct", 8), ("winograd", 16), ("grouped", 16)):
        groups = 4 if backend == "grouped" else 1
        x = torch.zeros(1, channels, 4, 4)
        weight = torch.zeros(channels, channels // groups, 3, 3)
        residual = torch.zeros(1, channels, 4, 4)
        residual[0, 1], residual[0, 2], residual[0, 3] = math.nan, -math.inf, -1.0
        kwargs = {"padding": 1, "groups": groups, "residual": residual, "backend": backend}
        plain = kernels.conv2d(x, weight, **kwargs)
        assert_bit_equal(kernels.conv2d(x, weight, **kwargs, activation="relu"), F.relu(plain), backend)
    # The exact product -1e-60 rounds to -0.0 where products are fused, so this can be a negative zero before
    # ReLU.
    x, weight = torch.full((1, 1, 2, 2), -1e-30), torch.full((1, 1, 1, 1), 1e-30)
    plain = kernels.pointwise_conv2d(x, weight, backend="native")
    assert_bit_equal(kernels.pointwise_conv2d(x, weight, activation="relu", backend="native"), F.relu(plain))


@needs_native
def test_max_pool_keeps_the_sign_of_zero():
    x = torch.tensor([-0.0, 0.0, -0.0, -1.0, -0.0, -0.0, 0.0, 0.0, -0.0]).view(1, 1, 3, 3).expand(2, 19, 3, 3)
    for kernel in (1, 2, 3):
        for layout in LAYOUTS:
            actual = kernels.max_pool2d(
                x.contiguous(memory_format=layout), kernel, stride=1, backend="native"
            )
            assert_bit_equal(actual, F.max_pool2d(x.contiguous(), kernel, 1), f"{kernel}x{kernel}")


@needs_native
def test_denormals_are_kept_and_the_mode_is_left_alone():
    tiny = torch.full((1, 16, 4, 4), 1e-40)
    identity = torch.eye(16).view(16, 16, 1, 1)
    assert_bit_equal(kernels.pointwise_conv2d(tiny, identity, backend="native"), tiny, "pointwise_conv2d")
    assert_bit_equal(
        kernels.global_avg_pool(tiny, backend="native"), tiny[:, :, 0, 0].contiguous(), "global_avg_pool"
    )
    assert_bit_equal(
        kernels.max_pool2d(tiny, 2, backend="native"), tiny[:, :, :2, :2].contiguous(), "max_pool2d"
    )
    for backend in ("winograd", "direct"):
        kernel = torch.zeros(16, 16, 3, 3)
        kernel[:, :, 1, 1] = torch.eye(16)
        # Winograd scales inside: 16 copies of the value keep every partial sum a multiple of the smallest
        # denormal.
        actual = kernels.conv2d(tiny * 16, kernel, padding=1, backend=backend)
        assert torch.allclose(actual, tiny * 16, rtol=0, atol=1e-44), backend
    assert torch.tensor(1e-40).mul(1).item() != 0
    assert torch.full((64,), 1e-40).add(0.0).min().item() != 0
    assert (1 / torch.tensor(3.0)).item() == 0.3333333432674408
