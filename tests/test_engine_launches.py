"""The launch list of a GPU plan, without a GPU: its formulas on CPU tensors, and its kernels in Triton's
interpreter."""

import pytest
import torch
from fast_backbones.bench.exact import float64
from fast_backbones.engine.recipes import Tensors
from helpers import assert_as_accurate, assert_equal, deterministic, needs_native
from model_checks import filled, image
from triton_device import DEVICE, needs_triton

import fast_backbones as fb
from fast_backbones.engine import launches, plain_of, rules, state
from fast_backbones.kernels import _gpu

pytestmark = [needs_triton, needs_native]

SIZES = {
    "resnet18": 32, "resnet50": 32, "resnext50_32x4d": 32, "legacy_seresnet18": 32, "legacy_seresnet50": 32,
    "legacy_seresnext50_32x4d": 32,
    "legacy_senet154": 32, "densenet121": 32, "mobilenetv1_100": 32, "legacy_xception": 75, "lenet5": 32,
    "alexnet": 96,
    "vgg11_bn": 32, "googlenet": 64, "bninception": 64, "inception_v3": 96, "inception_v4": 96,
    "inception_resnet_v1": 96, "inception_resnet_v2": 96,
}  # fmt: skip


def made(name: str, dtype=torch.float32, layout=torch.channels_last, batch=2):
    model = filled(lambda: fb.create_model(name)).to(dtype)
    x = image(batch, model.in_chans, SIZES[name], SIZES[name]).to(dtype, memory_format=layout)
    return model, x


def launch_list(model, x, **options) -> launches.LaunchList:
    with torch.no_grad():
        traced = state.trace(model, plain_of(model), x, launches.refusal)
        plan = state.make_for_gpu(traced)
        tensors = dict(rules.named_tensors(model))
        weights = launches.DeviceWeights.of(tensors, x.dtype, x.device)
        return launches.LaunchList(plan, weights, x, Tensors(tensors), **options)


LONG = ("inception_v4", "inception_resnet_v1", "inception_resnet_v2", "legacy_senet154", "legacy_xception")
PLANES = [  # from an image in planes
    pytest.param(
        name,
        torch.contiguous_format,
        id=f"{name}-nchw",
        marks=[] if name in ("lenet5", "resnet18") else pytest.mark.slow,
    )
    for name in SIZES
]
PIXELS = [
    pytest.param(name, torch.channels_last, id=f"{name}-nhwc", marks=pytest.mark.slow if name in LONG else [])
    for name in SIZES
]


@torch.no_grad()
@pytest.mark.parametrize("name, layout", [*PLANES, *PIXELS])
def test_formulas_of_the_list_are_the_model(name, layout):
    model, x = made(name, layout=layout)
    found = launch_list(model, x, backend="reference")
    found.arena.fill_(float("nan"))
    found.run()
    plain = model.forward_modules(x)
    assert_as_accurate(found.outputs(), plain, float64(model.double(), x))
    assert found.outputs().stride() == plain.stride()


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUICK = {("lenet5", dtype) for dtype in DTYPES} | {("resnet18", torch.bfloat16)}
IN_FULL = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else pytest.mark.slow)
    for dtype in DTYPES
    for name in (
        "lenet5",
        "resnet18",
        "legacy_seresnet18",
        "legacy_seresnet50",
        "resnext50_32x4d",
        "mobilenetv1_100",
        "densenet121",
    )
]


@torch.no_grad()
@pytest.mark.skipif(
    DEVICE != "cpu", reason="with a GPU the kernels do not run in the interpreter: test_gpu_models.py"
)
@pytest.mark.parametrize("name, dtype", IN_FULL, ids=str)
def test_kernels_of_the_list_are_the_model(name, dtype):
    model, x = made(name, dtype, batch=2 if name == "lenet5" else 1)
    found = launch_list(model, x)
    found.arena.fill_(float("nan"))
    found.run()
    plain = model.forward_modules(x)
    assert all(bound.launch is not None or bound.copy is not None for bound in found.bound)
    assert found.outputs().dtype is dtype
    assert_as_accurate(found.outputs(), plain, float64(model.double(), x))


@torch.no_grad()
@pytest.mark.skipif(DEVICE != "cpu", reason="with a GPU: test_gpu_models.py")
@pytest.mark.parametrize("name", ["lenet5", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_a_sample_does_not_depend_on_its_batch(name):
    model, x = made(name, torch.bfloat16, batch=40 if name == "lenet5" else 3)
    outputs = []
    with deterministic():
        for images in (x, x[1:2].clone()):
            found = launch_list(model, images, allowed=state.allowed_on_gpu())
            assert {bound.how.split()[0] for bound in found.bound} <= {"triton", "PyTorch"}
            assert _gpu.LIBRARY not in {way for step in found.plan.steps for way, _ in found.options(step)}
            products = [b.launch for b in found.bound if b.step.kernel in _gpu.PRODUCTS and b.first is None]
            assert min(launch.constants["BLOCK_M"] for launch in products) >= 64, "no tiles for few rows"
            found.run()
            outputs.append(found.outputs())
    assert_equal(outputs[0][1:2], outputs[1])


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_every_level_has_eager_pytorchs_strides(name, layout):
    model = filled(lambda: fb.create_model(name, features_only=True))
    x = image(2, 3, 64, 64).contiguous(memory_format=layout)
    found = launch_list(model, x, backend="reference")
    found.run()
    for ours, theirs in zip(found.outputs(), model.forward_modules(x), strict=True):
        assert ours.stride() == theirs.stride()
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_a_list_runs_again_on_the_same_memory():
    model, x = made("resnet18")
    found = launch_list(model, x, backend="reference")
    found.run()
    first = found.outputs().clone()
    x.mul_(-1)
    found.run()
    assert not torch.equal(found.outputs(), first)
    x.mul_(-1)
    found.run()
    assert_equal(found.outputs(), first)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, pairs", [("legacy_seresnet18", 8), ("legacy_seresnext50_32x4d", 16), ("lenet5", 1)]
)
def test_the_two_layers_of_an_excitation_are_one_launch(name, pairs):
    model, x = made(name)
    found = launch_list(model, x)
    names = [bound.launch.name for bound in found.bound if bound.launch is not None]
    assert names.count("excitation") == pairs
    assert len(found.bound) == len(found.plan.steps) - pairs
