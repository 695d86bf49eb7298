"""What torch.set_float32_matmul_precision("high") allows: Winograd at real points.

It has more error than float32 sums and far less than TF32, which the setting stands for.
"""

from dataclasses import replace

import pytest
import torch
from conv_layers import LAYERS, RELU, Layer, by_why, check_same_bits, detail, winograd
from helpers import assert_as_accurate, assert_bit_equal, errors, needs_native, run_python, threads
from helpers import one_thread as one_thread
from model_checks import filled, image

import fast_backbones as fb
from fast_backbones import engine
from fast_backbones.engine import batches
from fast_backbones.kernels import _ext

pytestmark = needs_native


def coarse(one: Layer) -> Layer:
    return replace(one, options={**one.options, "real_points": 1})


TILES = [coarse(one) for one in LAYERS if one.kind == "winograd_conv2d" and one.option("tile") == 4]


def tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits behind the point."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("data", ["reals", "positive"])
@pytest.mark.parametrize("one", TILES, ids=by_why)
def test_the_error_is_a_fiftieth_of_tf32s(one, data):
    runs = [one.inputs(data, seed) for seed in range(4)]
    exact = torch.cat([one.exact(tensors).flatten() for tensors in runs])
    fast = torch.cat([one.run(tensors).flatten() for tensors in runs])
    plain = torch.cat([one.reference(tensors).flatten() for tensors in runs])
    narrow = [{k: tf32(t) if k in ("x", "weight") else t for k, t in tensors.items()} for tensors in runs]
    rough = torch.cat([one.exact(tensors).flatten() for tensors in narrow])
    for ours, theirs, pytorchs in zip(errors(fast, exact), errors(rough, exact), errors(plain, exact)):
        assert ours < theirs / 50
        assert ours < 8 * pytorchs + 1e-6


@pytest.mark.parametrize("one", TILES, ids=by_why)
def test_bits_depend_on_neither_threads_nor_batch_nor_strides(one):
    check_same_bits(one)


def test_a_plain_filter_shows_that_every_pixel_lands_in_its_place():
    """Filters with one tap move the image; nothing is added up, so a wrong index could not hide."""
    x = image(1, 3, 9, 10)
    for tap in range(9):
        weight = torch.zeros(5, 3, 3, 3)
        weight[range(5), [0, 1, 2, 0, 1], tap // 3, tap % 3] = 1
        one = coarse(winograd("moves", (1, 3, 9, 10), 5, 4, bias=False, activation=0))
        expected = torch.nn.functional.conv2d(x, weight, padding=1)
        torch.testing.assert_close(one.run({"x": x, "weight": weight}), expected, rtol=0, atol=2e-5)


def test_the_step_says_which_points_it_has():
    params = {"padding": 1}
    for size, words in ((56, "F(4x4,3x3) at real points"), (14, "F(2x2,3x3) ")):
        one = coarse(winograd("", (1, 64, size, size), 32, 0, activation=RELU, **params))
        assert words in detail(one, one.params(1))


def test_only_winograd_has_points():
    assert "no points" in _ext.native().refusal("conv2d", {"n": 1, "c": 16, "k": 16, "real_points": 1})


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def test_a_network_at_each_precision(precision):
    """The 2x rule at "highest", also after another setting; a ten-thousandth of the output at "high"."""
    with torch.inference_mode(False):
        model, x = filled(lambda: fb.create_model("resnet18")), image(2, 3, 160, 160)
    exact = filled(lambda: fb.create_model("resnet18")).double().forward_modules(x.double())
    found = {}
    for name in ("highest", "high", "highest", "high"):
        precision(name)
        y = model(x)
        points = [step.params.get("real_points", 0) for step in engine.plan_for(model, x).steps]
        assert any(points) == (name == "high")
        assert_bit_equal(y, found.setdefault(name, y), f"{name} again")
        with threads(3):
            assert_bit_equal(model(x[1:]), y[1:], "an image alone on other threads")
    assert_as_accurate(found["highest"], model.forward_modules(x), exact)
    assert errors(found["high"], exact)[0] < 1e-4


@torch.inference_mode()
def test_a_plan_is_made_at_the_precision_that_it_is_kept_under(precision, monkeypatch):
    """Another thread may change the setting while this one captures."""
    with torch.inference_mode(False):
        model, x = fb.create_model("resnet18").eval(), image(1, 3, 160, 160)
    capture = batches.capture

    def changed(*arguments):
        precision("high")
        return capture(*arguments)

    monkeypatch.setattr(batches, "capture", changed)
    model(x)
    monkeypatch.undo()
    precision("highest")
    assert not any(step.params.get("real_points") for step in engine.plan_for(model, x).steps)


NEWER = """
import torch, fast_backbones as fb
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
model = fb.resnet18().eval()
with torch.inference_mode():
    model(torch.randn(1, 3, 64, 64))
plan = fb.engine.plan_for(model.requires_grad_(False), torch.randn(1, 3, 64, 64))
assert not any(step.params.get("bf16") or step.params.get("real_points") for step in plan.steps)
"""


def test_pytorchs_newer_interface_to_the_same_setting_does_no_harm():
    run_python("-c", NEWER)
