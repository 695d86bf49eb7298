"""Whole models on a GPU: planned, as accurate as PyTorch on that GPU, and safe to call from streams and
graphs."""

import copy
import os

import pytest
import torch
from fast_backbones.bench.exact import float64
from helpers import assert_as_accurate, assert_equal, deterministic
from model_checks import filled, image
from triton_device import DEVICE, needs_triton

import fast_backbones as fb
from fast_backbones import engine
from fast_backbones.engine import gpu_choices

pytestmark = [needs_triton, pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")]

if DEVICE == "cuda":
    os.environ["FB_GPU_PLANS"] = "1"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODELS = (
    "lenet5", "alexnet", "vgg16_bn", "googlenet", "bninception", "inception_v3", "inception_v4",
    "inception_resnet_v1",
    "inception_resnet_v2", "resnet18", "resnet50", "resnext50_32x4d", "resnext101_64x4d", "legacy_xception",
    "densenet121", "mobilenetv1_100", "legacy_seresnet50", "legacy_seresnext50_32x4d", "legacy_senet154",
    "se_bninception", "se_mobilenetv1_100",
)  # fmt: skip


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32: the rule compares with PyTorch's own float32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(name, dtype, batch=2, layout=torch.channels_last):
    model = filled(lambda: fb.create_model(name))
    x = image(batch, *model.default_cfg["input_size"])
    return model.to("cuda", dtype), x.to("cuda", dtype, memory_format=layout)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_at_most_twice_pytorchs_error(name, dtype):
    with torch.inference_mode(False):
        model, x = on_gpu(name, dtype)
    assert engine.why_not(model, x) is None
    steps = engine.plan_for(model, x).steps
    assert sum(step.native for step in steps) > 0.9 * len(steps), [s.op for s in steps if not s.native]
    plain, fast = model.forward_modules(x), model(x)
    assert (fast.dtype, fast.stride(), fast.device) == (plain.dtype, plain.stride(), plain.device)
    exact = float64(copy.deepcopy(model).cpu().double(), x.cpu())
    assert_as_accurate(fast.cpu(), plain.cpu(), exact)
    assert_equal(model(x), fast, "the same call again")


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["lenet5", "resnet50", "legacy_seresnet18", "mobilenetv1_100", "densenet121"]
)
def test_a_sample_does_not_depend_on_its_batch(name):
    with torch.inference_mode(False):
        model, x = on_gpu(name, torch.bfloat16, batch=40)
    with deterministic():
        assert_equal(model(x)[7:8], model(x[7:8].clone()))


@torch.inference_mode()
def test_outputs_are_the_callers():
    with torch.inference_mode(False):
        model, x = on_gpu("resnet18", torch.float16)
    first = model(x)
    kept = first.clone()
    model(-x)
    assert_equal(first, kept)


@torch.inference_mode()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_layouts(layout):
    with torch.inference_mode(False):
        model, x = on_gpu("resnet50", torch.float16, layout=layout)
    assert engine.why_not(model, x) is None
    other = (
        x.contiguous() if layout is torch.channels_last else x.contiguous(memory_format=torch.channels_last)
    )
    a, b = model(x), model(other)
    assert (a - b).abs().max() <= 1e-2 * a.abs().max()


@torch.inference_mode()
def test_two_streams_at_once():
    with torch.inference_mode(False):
        model, x = on_gpu("resnet50", torch.float16, batch=8)
    expected = model(x), model(-x)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(20):
        found = []
        for stream, each in zip(streams, (x, -x)):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(model(each))
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected):
            assert_equal(ours, theirs)


@torch.inference_mode()
def test_inside_the_callers_own_graph():
    with torch.inference_mode(False):
        model, x = on_gpu("resnet18", torch.float16)
    expected = model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(y, expected)


@torch.no_grad()
def test_changed_weights_are_noticed():
    model, x = on_gpu("resnet18", torch.float16)
    before = model(x)
    model.fc.weight.mul_(-1)
    model.fc.bias.mul_(-1)
    assert_equal(model(x), -before)


@pytest.fixture
def own_choices(tmp_path, monkeypatch):
    """What is tuned in a test stays there."""
    monkeypatch.setenv("FB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_choices, "_measured", {})
    gpu_choices.of_device.cache_clear()
    yield tmp_path
    gpu_choices.of_device.cache_clear()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["resnext50_32x4d", "mobilenetv1_100", "legacy_seresnet18"])
def test_a_tuned_model_stays_as_accurate(name, own_choices):
    with torch.inference_mode(False):
        model, x = on_gpu(name, torch.bfloat16, batch=8)
    model(x)
    found = fb.tune(model, x, rounds=1)
    assert found.path is not None
    assert found.path.parent == own_choices
    assert len(found.layers) > 5
    plain, fast = model.forward_modules(x), model(x)
    assert_as_accurate(fast.cpu(), plain.cpu(), float64(copy.deepcopy(model).cpu().double(), x.cpu()))
    again = fb.tune(model, x, rounds=1)
    assert all(layer.seconds == {} for layer in again.layers)
    assert_equal(model(x), fast, "nothing has changed")


@torch.inference_mode()
def test_explain_times_every_launch(own_choices):
    with torch.inference_mode(False):
        model, x = on_gpu("legacy_seresnet18", torch.float16)
    found = fb.explain(model, x)
    assert found.reason is None
    assert all(row.ms > 0 for row in found.rows)
    assert any(row.detail.startswith("triton") for row in found.rows)
    assert found.copy_gbps > 0
