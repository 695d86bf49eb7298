"""Training steps of small networks with the kernels for GPUs, on a GPU or else in Triton's interpreter,
against the plain modules: in float32, and in 16 bits under autocast."""

import copy
import math
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, needs_native
from triton_device import DEVICE
from triton_device import exact_products as exact_products

pytest.importorskip("triton", reason="Triton is not installed")

if DEVICE == "cuda":
    os.environ["FB_GPU_PLANS"] = "1"

from fast_backbones.backbones.densenet import DenseNet
from fast_backbones.backbones.mobilenet import MobileNetV1
from fast_backbones.backbones.resnet import Bottleneck, ResNet
from fast_backbones.kernels._triton import sums

from fast_backbones import engine, kernels
from fast_backbones.engine import plain_of, rules, train_program
from fast_backbones.kernels import _gpu_training

pytestmark = needs_native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NETS = {
    "mobilenet": partial(MobileNetV1, 0.125),
    "gated": partial(MobileNetV1, 0.125, se_reduction=4),
    "resnext": partial(ResNet, Bottleneck, (1, 1, 1, 1), cardinality=8, group_width=4),
    "densenet": partial(DenseNet, 8, (2, 2, 1, 1), 16),
}
SIZE = 32


@pytest.fixture(autouse=True)
def few_programs(monkeypatch, exact_products):
    """The interpreter goes through fewer; each has several tiles."""
    monkeypatch.setattr(sums, "PROGRAMS", 4)


def built(name, seed):
    torch.manual_seed(seed)
    model = NETS[name](num_classes=10).train().to(DEVICE)
    return model.to(memory_format=torch.channels_last), torch.randn(4, 3, SIZE, SIZE).to(DEVICE)


def fused(model):
    """What `model(x)` calls on a GPU; in the interpreter the program itself, with kernels asked by name."""
    if DEVICE == "cuda":
        return model
    program = train_program.make_program(model, plain_of(model))
    assert isinstance(program, train_program.Program), program.reason
    return program


def step(model, x, backend, dtype=torch.float32):
    """Logits, gradients and statistics of a forward and backward pass; dtype: of autocast."""
    model = copy.deepcopy(model)
    chosen = "auto" if DEVICE == "cuda" and backend == "gpu" else backend
    amp = dtype if dtype in DTYPES[1:] else None
    with kernels.backend(chosen), torch.autocast(DEVICE, amp, enabled=amp is not None):
        y = (fused(model) if backend == "gpu" else model)(x)
        F.cross_entropy(y, torch.arange(len(x), device=x.device) % 10).backward()
    found = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return {"logits": y.detach(), **found}


def relative(a, exact):
    return ((a.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def cases():
    quick = {("gated", torch.float32), ("resnext", torch.bfloat16), ("densenet", torch.float32)}
    for name in NETS:
        for dtype in DTYPES:
            slow = DEVICE == "cpu" and (name, dtype) not in quick
            yield pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("name, dtype", list(cases()))
def test_gradients_of_every_parameter_keep_the_2x_rule(name, dtype):
    """In the mean over the tensors of a step. A ReLU whose input lies within rounding of zero falls on either
    side in either computation, so no single number says much."""
    model, x = built(name, 0)
    ours, plain = (step(model, x, backend, dtype) for backend in ("gpu", "reference"))
    exact = step(copy.deepcopy(model).double(), x.double(), "reference", torch.float64)
    assert ours.keys() == plain.keys() == exact.keys()
    largest = max(t.double().norm() for t in exact.values() if t.is_floating_point())
    errors = {}
    for key, truth in exact.items():
        if not truth.is_floating_point():
            assert_equal(ours[key], plain[key], key)
        elif truth.norm() > 1e-8 * largest:
            assert ours[key].dtype is plain[key].dtype, key
            errors[key] = relative(ours[key], truth), relative(plain[key], truth)
    tiny = 1e-7  # of what is exact but for the last bit
    ratios = [math.log((a + tiny) / (b + tiny)) for a, b in errors.values()]
    assert math.exp(sum(ratios) / len(ratios)) <= 2, errors
    most = max(0.1, 2 * max(b for _, b in errors.values()))
    worst = max(errors, key=lambda key: errors[key][0])
    assert errors[worst][0] < most, (worst, errors[worst])


@pytest.mark.slow
def test_a_step_has_the_same_bits_again():
    model, x = built("gated", 1)
    first, second = (step(model, x, "gpu") for _ in range(2))
    for key, value in first.items():
        assert_equal(second[key], value, key)


def test_kernels_of_a_step():
    """Which they are, by a run on tensors without memory: a step that wants a number of the device fails."""
    with torch.device("meta"):
        model, x = NETS["resnext"](num_classes=10).train(), torch.empty(4, 3, SIZE, SIZE)
    program = train_program.make_program(model, plain_of(model))
    with _gpu_training.recorded() as found, kernels.backend("gpu"):
        program(x).sum().backward()
    names = [launch.name for launch in found]
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert names.count("batch_norm_moments") == names.count("batch_norm_input") == norms
    assert names.count("grouped_weight_gradient") == 4
    # Three norms of a block are inputs of a convolution, whose gradient makes that input again.
    again = names.count("batch_norm_apply") - norms
    assert again == 8, names


def test_momentum_none_averages():
    model, x = built("densenet", 0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    results = {}
    for backend in ("gpu", "reference"):
        copied = copy.deepcopy(model)
        chosen = "auto" if DEVICE == "cuda" and backend == "gpu" else backend
        with torch.no_grad(), kernels.backend(chosen):
            call = fused(copied) if backend == "gpu" else copied
            for image in (x, x.flip(0) * 2):
                call(image)
        results[backend] = dict(copied.named_buffers())
    for key, value in results["gpu"].items():
        torch.testing.assert_close(value, results["reference"][key], rtol=1e-3, atol=1e-4)


class OnGpu:
    """A CUDA tensor as far as the rules look at it, on a machine without one."""

    layout, is_cuda, is_cpu = torch.strided, True, False
    device = torch.device("cuda", 0)

    def __init__(self, dtype=torch.float32, sizes=(2, 3, 32, 32)):
        self.dtype, self.shape = dtype, sizes

    def dim(self):
        return len(self.shape)

    def numel(self):
        return math.prod(self.shape)

    def is_inference(self):
        return False


def test_the_rules_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("FB_GPU_PLANS", raising=False)
    for ask in (rules.gpu_refusal, _gpu_training.device_refusal):
        ask.cache_clear()
    refused = rules.training_call_refusal
    try:
        assert "FB_GPU_PLANS=1 switches them on" in refused(OnGpu())
        rules.gpu_refusal.cache_clear()
        monkeypatch.setenv("FB_GPU_PLANS", "1")
        for dtype in DTYPES:
            assert refused(OnGpu(dtype)) is None
        assert "torch.float64 on cuda:0" in refused(OnGpu(torch.float64))
        assert "3 dimensions" in refused(OnGpu(sizes=(3, 32, 32)))
        assert refused(OnGpu(sizes=(0, 3, 32, 32))) == "the input is empty"
        with kernels.backend("reference"):
            assert refused(OnGpu()) == "the backend is 'reference'"
        rules.gpu_refusal.cache_clear()
        _gpu_training.device_refusal.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "compute capability (7, 5)" in refused(OnGpu())
    finally:
        for ask in (rules.gpu_refusal, _gpu_training.device_refusal):
            ask.cache_clear()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_models_on_a_gpu_say_that_they_are_fused():
    model, x = built("resnext", 0)
    assert engine.why_not_fused(model, x) is None
    with torch.autocast("cuda", torch.bfloat16):
        assert engine.why_not_fused(model, x) is None
        assert model(x).dtype is torch.bfloat16
