"""Products of bfloat16 in whole networks: models in bfloat16, and float32 models at precision "medium"."""

import copy

import pytest
import torch
from fast_backbones.bench.exact import float64
from helpers import assert_as_accurate, assert_bit_equal, needs_native, run_python
from model_checks import filled, image
from torch import nn

import fast_backbones as fb
from fast_backbones import backbones, engine
from fast_backbones.kernels import _ext

pytestmark = needs_native

HAS_BF16 = _ext.native() is not None and _ext.native().has_bf16()
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="no AVX512-BF16 on this machine")

SIZES = {
    "resnet18": 96, "resnext50_32x4d": 64, "legacy_seresnet18": 64, "densenet121": 64, "mobilenetv1_100": 96,
    "lenet5": 32, "googlenet": 96, "inception_v3": 128, "legacy_xception": 96, "vgg11_bn": 64, "alexnet": 96,
}  # fmt: skip
LONG = ("googlenet", "inception_v3", "legacy_xception", "vgg11_bn", "alexnet")
NETWORKS = [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in SIZES]


@pytest.fixture
def medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    model = filled(lambda: fb.create_model(name))
    return model, image(3, model.in_chans, SIZES[name], SIZES[name])


def narrow_steps(model: nn.Module, x: torch.Tensor) -> list:
    return [step for step in engine.plan_for(model, x).steps if step.params.get("bf16")]


@needs_bf16
@torch.inference_mode()
@pytest.mark.parametrize("name", NETWORKS)
def test_models_in_bfloat16(name):
    """Planned, of the model's own type and strides, and at most twice PyTorch's error in that type."""
    with torch.inference_mode(False):
        model, x = network(name)
        model, x = model.bfloat16(), x.bfloat16()
    assert engine.why_not(model, x) is None
    assert all(step.native for step in engine.plan_for(model, x).steps)
    assert narrow_steps(model, x)
    plain, fast = model.forward_modules(x), model(x)
    assert (fast.dtype, fast.stride()) == (plain.dtype, plain.stride())
    assert_as_accurate(fast, plain, float64(copy.deepcopy(model).double(), x))
    assert_bit_equal(model(x[1:2]).float(), fast[1:2].float(), "an image alone")


@needs_bf16
@torch.inference_mode()
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_models_at_medium_precision(name, medium):
    with torch.inference_mode(False):
        model, x = network(name)
        half = copy.deepcopy(model).bfloat16()
    assert narrow_steps(model, x)
    fast = model(x)
    assert fast.dtype is torch.float32
    exact = float64(copy.deepcopy(model).double(), x)
    assert_as_accurate(fast.bfloat16(), half.forward_modules(x.bfloat16()), exact)
    torch.set_float32_matmul_precision("highest")
    assert not narrow_steps(model, x)
    assert_as_accurate(model(x), model.forward_modules(x), exact, "at the highest precision again")
    torch.set_float32_matmul_precision("medium")
    assert_bit_equal(model(x), fast, "and back")


@needs_bf16
@torch.inference_mode()
def test_feature_maps_in_bfloat16():
    with torch.inference_mode(False):
        model = backbones.resnet18(features_only=True).eval().bfloat16()
        x = image().bfloat16()
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        plain, fast = model.forward_modules(x), model(x)
        assert engine.why_not(model, x) is None
        exact = float64(copy.deepcopy(model).double(), x)
        for ours, theirs, true in zip(fast, plain, exact, strict=True):
            assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
            assert_as_accurate(ours, theirs, true)


class Small(nn.Module):
    def __init__(self, after=None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(32, 48, 1, bias=False), nn.BatchNorm2d(48)
        self.after = after

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if self.after is None else self.after(y)


def small(after=None) -> Small:
    torch.manual_seed(0)
    model = Small(after).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model.bfloat16()


@needs_bf16
@torch.no_grad()
def test_the_weights_of_a_bfloat16_model_are_not_rounded_again():
    """The norm is applied to the sums in float32; folded into the weights it would round them once more."""
    model, x = small(), image(2, 32, 9, 9).bfloat16()
    exact = copy.deepcopy(model).double()(x.double())
    assert torch.equal(engine.forward(model, x, model.forward), exact.bfloat16())


@torch.no_grad()
def test_changed_weights_of_a_bfloat16_model_are_noticed():
    model = backbones.resnet18(num_classes=7).eval().bfloat16()
    x = image().bfloat16()
    before = model(x)
    assert engine.why_not(model, x) is None
    model.fc.weight.mul_(-1)
    model.fc.bias.mul_(-1)
    assert torch.equal(model(x), -before)
    model.float()
    assert model(x.float()).dtype is torch.float32
    assert engine.why_not(model, x.float()) is None


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*without a plan")
def test_types_that_do_not_fit_raise_what_pytorch_raises():
    model, x = backbones.resnet18(num_classes=7).eval(), image()
    for other in (x, x.bfloat16()):
        with pytest.raises(RuntimeError):
            model(other.bfloat16() if other is x else x)
        model.bfloat16()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*without a plan")
@pytest.mark.parametrize("after", [lambda y: y.cumsum(1), lambda y: y.float()], ids=["cumsum", "float"])
def test_what_has_no_kernel_runs_in_the_models_own_type(after):
    model, x = small(after), image(2, 32, 9, 9).bfloat16()
    assert "has no kernel, and the model is in bfloat16" in engine.why_not(model, x)
    assert torch.equal(engine.forward(model, x, model.forward), model.forward(x))


@torch.no_grad()
def test_a_returned_input_is_the_input():
    model = small()
    model.after = lambda y: y
    model.forward = lambda x: (x, Small.forward(model, x))
    x = image(2, 32, 9, 9).bfloat16()
    assert model(x)[0] is x


@torch.inference_mode()
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_without_the_instructions_products_are_float32(isa):
    code = """
import torch, fast_backbones as fb
from model_checks import filled, image
from fast_backbones import engine
from fast_backbones.bench.exact import float64
from helpers import assert_as_accurate
model, x = filled(lambda: fb.create_model("resnet18")).bfloat16(), image(1, 3, 64, 64).bfloat16()
with torch.inference_mode():
    plan = engine.plan_for(model, x)
    assert not any(step.params.get("bf16") for step in plan.steps)
    plain, fast = model.forward_modules(x), model(x)
assert_as_accurate(fast, plain, float64(model.double(), x))
"""
    run_python("-c", code, FB_MAX_ISA=isa)
