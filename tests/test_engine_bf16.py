"""Products of bfloat16 in whole networks: models in bfloat16, and float32 models at precision "medium"."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.bench.exact import float64
from helpers import assert_as_accurate, assert_bit_equal, needs_native, run_python
from model_checks import filled, image
from torch import nn
from torch.utils import _pytree as pytree

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
@pytest.mark.parametrize("filters", [5, 33, 1001], ids=lambda n: f"{n} filters")
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_a_changed_value_that_no_counter_sees(filters, which):
    """An odd number of values leaves half a word at the end."""
    model = backbones.resnet18(num_classes=filters).eval().bfloat16()
    x = image().bfloat16()
    before = model(x)
    bits = model.fc.bias.data.view(torch.int16).numpy()
    bits[which] = torch.tensor(64.0).bfloat16().view(torch.int16).item()
    assert model(x)[0, which] != before[0, which]


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
@pytest.mark.parametrize(
    "after", [lambda y: y.cumsum(1), lambda y: y.float().bfloat16()], ids=["cumsum", "casts"]
)
def test_what_has_no_kernel_runs_in_the_models_own_type(after):
    model, x = small(after), image(2, 32, 9, 9).bfloat16()
    assert "has no kernel, and the model is in bfloat16" in engine.why_not(model, x)
    assert torch.equal(engine.forward(model, x, model.forward), model.forward(x))


class Computed(nn.Module):
    """Filters, biases and factors that are computed from parameters, and results of several kinds."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(48, 32, 1, 1)), nn.Parameter(torch.randn(48))
        self.factor = nn.Parameter(torch.rand(48, 1, 1))
        self.does = forward

    def forward(self, x):
        return self.does(self, x)

    def conv(self, x):
        return F.conv2d(x, self.w, self.b)


def standardised(m, x):
    w = m.w.float()
    return F.conv2d(x, ((w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)).to(m.w.dtype), m.b)


PLANNED = {
    "filters cast back": lambda m, x: F.conv2d(x, (m.w.float() * 2).to(m.w.dtype), m.b),
    "standardised filters": standardised,
    "a bias cast back": lambda m, x: F.conv2d(x, m.w, (m.b.float() * 2).to(m.b.dtype)),
    "constant filters": lambda m, x: F.conv2d(
        x, torch.full((32, 1, 3, 3), 1 / 8, dtype=x.dtype), padding=1, groups=32
    ),
    "a factor": lambda m, x: m.conv(x) * m.factor,
}


@torch.no_grad()
@pytest.mark.parametrize("name", PLANNED)
def test_what_is_computed_from_parameters(name):
    model, x = Computed(PLANNED[name]).eval().bfloat16(), image(2, 32, 9, 9).bfloat16()
    assert engine.why_not(model, x) is None
    plain, fast = model.forward(x), engine.forward(model, x, model.forward)
    assert (fast.dtype, fast.stride()) == (plain.dtype, plain.stride())
    assert_as_accurate(fast, plain, float64(copy.deepcopy(model).double(), x))


REFUSED = {
    "a float32 factor makes the result float32": (lambda m, x: m.conv(x) * m.factor.float(), "not bfloat16"),
    "a comparison": (lambda m, x: m.conv(x) > 0, "not bfloat16"),
    "the input itself": (lambda m, x: (x, m.conv(x)), "memory of the input"),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*without a plan")
@pytest.mark.parametrize("name", REFUSED)
def test_results_of_another_type_come_from_the_modules(name):
    does, words = REFUSED[name]
    model, x = Computed(does).eval().bfloat16(), image(2, 32, 9, 9).bfloat16()
    assert words in engine.why_not(model, x)
    plain, found = model.forward(x), engine.forward(model, x, model.forward)
    for ours, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(plain), strict=True):
        assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)
    if name == "the input itself":
        assert found[0] is x


@torch.no_grad()
def test_results_share_memory_as_they_do_in_float32():
    for dtype in (torch.float32, torch.bfloat16):
        model = Computed(lambda m, x: (m.conv(x),) * 2).eval().to(dtype)
        x = image(2, 32, 9, 9).to(dtype, memory_format=torch.channels_last)
        assert engine.why_not(model, x) is None
        a, b = engine.forward(model, x, model.forward)
        assert a.dtype is dtype and a.data_ptr() == b.data_ptr()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*without a plan")
def test_a_float32_model_with_a_part_in_bfloat16_runs_its_modules():
    model = Computed(lambda m, x: F.linear(m.conv(x).mean((2, 3)).to(m.w.dtype), m.narrow).float()).eval()
    model.narrow = nn.Parameter(torch.randn(5, 48).bfloat16())
    model.does = lambda m, x: F.linear(m.conv(x).mean((2, 3)).bfloat16(), m.narrow).float()
    x = image(2, 32, 9, 9)
    assert "narrow is torch.bfloat16" in engine.why_not(model, x)
    assert torch.equal(engine.forward(model, x, model.forward), model.forward(x))


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
