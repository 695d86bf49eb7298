"""fb.save_plan and fb.load_plan: a loaded plan is the model's own, without the model."""

import copy
import threading
import warnings
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from engine_nets import Tap, Tiny
from helpers import assert_bit_equal, isas, needs_native, run_python
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fast_backbones as fb
from fast_backbones import engine
from fast_backbones.engine import plan_file
from fast_backbones.kernels import _ext

pytestmark = needs_native
Pair = namedtuple("Pair", ["maps", "pooled"])
TWO_ISAS = pytest.mark.skipif(len(isas()) < 2, reason="this machine has one instruction set")


class Nested(Tiny):
    """Steps of PyTorch between kernels, a weight that is computed, and something of everything returned."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16, 1, 1, 1))

    def forward_modules(self, x):
        x = self.relu(self.bn(self.conv(x)))
        x = F.conv2d(x, F.softplus(self.gain) * self.body[0].weight)
        x = F.pad(x, (1, 1, 1, 1), mode="reflect").cumsum(2)
        pooled = (x * self.gain.flatten()[:, None, None]).mean((2, 3))
        return {"maps": [x, self.body(x)], "pair": Pair(pooled, (pooled.exp(), 3)), "none": None}


class Permuted(Tiny):
    """Of its maps PyTorch's capture may have other strides than eager."""

    def forward_modules(self, x):
        y = F.layer_norm(self.conv(x).permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2)
        return y, self.body(y)


class Tied(Tiny):
    """Two layers with the same weights."""

    def __init__(self):
        super().__init__()
        self.again = nn.Conv2d(16, 16, 1)
        self.again.weight = self.body[0].weight

    def forward_modules(self, x):
        return self.again(self.body(self.conv(x)))


class Odd(Tiny):
    """Other things for odd batches than for even ones, and nothing for five."""

    def forward_modules(self, x):
        if len(x) == 5:
            raise ValueError("five images")
        return super().forward_modules(x) * [1, 2, 3, 4, 6, 7, 8, 9, 10][len(x)]


def settled(model, seed=0):
    torch.manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1.0)
    return model.eval()


def assert_same(ours, theirs):
    """The same nesting, types, strides and bits; named tuples by their names and fields."""
    if isinstance(theirs, tuple) and hasattr(theirs, "_fields"):
        assert (type(ours).__name__, ours._fields) == (type(theirs).__name__, theirs._fields)
    else:
        assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        assert ours.shape == theirs.shape and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype
        assert_bit_equal(ours.float(), theirs.float())
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_same(a, b)
    else:
        assert ours == theirs


CASES = {
    "a backbone": (fb.lenet5, (2, 1, 32, 32), "nchw", torch.float32),
    "feature maps in NHWC": (lambda: Tap(), (2, 3, 9, 8), "nhwc", torch.float32),
    "in bfloat16": (Tiny, (3, 3, 9, 8), "nchw", torch.bfloat16),
    "steps of PyTorch": (Nested, (2, 3, 9, 8), "nchw", torch.float32),
    "strides in doubt": (Permuted, (2, 3, 9, 8), "nchw", torch.float32),
    "tied weights": (Tied, (1, 3, 9, 8), "nchw", torch.float32),
    "one channel in NHWC": (fb.lenet5, (2, 1, 32, 32), "nhwc", torch.float32),
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@torch.no_grad()
@pytest.mark.parametrize(
    "case, weights",
    [*((case, "both") for case in CASES), ("tied weights", "plain"), ("steps of PyTorch", "packed")],
)
def test_a_loaded_plan_gives_the_bits_of_the_models_own(case, weights, tmp_path):
    make, shape, layout, dtype = CASES[case]
    model = settled(make()).to(dtype)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    fb.save_plan(model, x, tmp_path / "net.plan", weights=weights)
    plan = fb.load_plan(tmp_path / "net.plan")
    assert "with N of 1, 2 and more" in repr(plan)
    for batch in (shape[0], 1, 4):
        x = torch.randn(batch, *shape[1:], dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        assert engine.why_not(model, x) is None
        assert_same(plan(x), model(x))


@torch.no_grad()
def test_weights_are_those_of_the_moment_and_the_file_may_go(tmp_path):
    model, x = settled(Tiny()), torch.randn(2, 3, 9, 8)
    fb.save_plan(model, x, tmp_path / "net.plan")
    before = model(x)
    model.fc.weight.mul_(2)
    plan = fb.load_plan(tmp_path / "net.plan")
    (tmp_path / "net.plan").unlink()
    assert_same(plan(x), before)
    x = torch.randn(7, 3, 9, 8)
    model.fc.weight.div_(2)
    assert_same(plan(x), model(x))


@torch.no_grad()
def test_a_fresh_process_without_the_class(tmp_path):
    model, x = settled(Nested()), torch.randn(2, 3, 9, 8)
    fb.save_plan(model, x, tmp_path / "net.plan")
    torch.save([x, pytree.tree_leaves(model(x))], tmp_path / "results.pt")
    script = """
import sys, torch, fast_backbones as fb
plan = fb.load_plan(sys.argv[1] + "/net.plan")
assert plan(torch.ones(6, 3, 9, 8))["pair"].maps.shape == (6, 16)
found = {"sympy", "torch._dynamo", "engine_nets"} & sys.modules.keys()
assert not found, f"{found}: slow to import, or the model's own"
x, expected = torch.load(sys.argv[1] + "/results.pt", weights_only=True)
for a, b in zip(torch.utils._pytree.tree_leaves(plan(x)), expected, strict=True):
    assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b
"""
    run_python("-c", script, str(tmp_path), timeout=500)


@torch.no_grad()
def test_several_threads_at_once(tmp_path):
    model = settled(Nested())
    fb.save_plan(model, (2, 3, 9, 8), tmp_path / "net.plan", weights="plain")
    images = [torch.randn(1 + i % 5, 3, 9, 8) for i in range(20)]
    expected = [model(x) for x in images]
    plan = fb.load_plan(tmp_path / "net.plan")
    found, start = {}, threading.Barrier(4)

    def run(first):
        start.wait()
        for i in range(first, len(images), 4):
            found[i] = plan(images[i])

    runners = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in runners:
        thread.start()
    for thread in runners:
        thread.join()
    for i, result in enumerate(expected):
        assert_same(found[i], result)


@torch.no_grad()
def test_several_sizes_layouts_and_how_they_are_named(tmp_path):
    model = settled(Tap())
    wide = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    fb.save_plan(model, [(2, 3, 9, 8), wide], tmp_path / "net.plan")
    plan = fb.load_plan(tmp_path / "net.plan")
    assert plan.images == [
        "[N, 3, 9, 8] float32 NCHW with N of 1, 2 and more",
        "[N, 3, 8, 8] float32 NHWC with N of 1, 2 and more",
    ]
    assert "Tap" in repr(plan) and plan.facts["instruction set"] == _ext.require().isa()
    x = torch.randn(3, 3, 9, 8)
    assert_same(plan(x), model(x))
    assert_same(plan(wide), model(wide))
    assert_same(plan(wide.contiguous()), model(wide))
    assert_same(plan(x[:, :, ::1].transpose(2, 3).contiguous().transpose(2, 3)), model(x))
    assert "conv2d" in str(fb.explain(plan, x, repeats=1))


@torch.no_grad()
def test_a_forward_that_differs_from_batch_to_batch(tmp_path):
    model = settled(Odd())
    with pytest.warns(UserWarning, match="takes batches of 1, 2, 4 images and no others: Odd"):
        fb.save_plan(model, [(4, 3, 9, 8), (2, 3, 9, 8)], tmp_path / "net.plan")
    plan = fb.load_plan(tmp_path / "net.plan")
    for batch in (1, 2, 4):
        x = torch.randn(batch, 3, 9, 8)
        assert_same(plan(x), model(x))
    with pytest.raises(ValueError, match=r"image is \[3, 3, 9, 8\] float32 on cpu, expected .* N of 1, 2, 4"):
        plan(torch.randn(3, 3, 9, 8))
    with pytest.raises(RuntimeError, match=r"there is no plan: .*five images"):
        fb.save_plan(model, (5, 3, 9, 8), tmp_path / "five.plan")


@torch.no_grad()
def test_only_the_batches_that_were_asked_for(tmp_path):
    model = settled(Tiny())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fb.save_plan(model, (3, 3, 9, 8), tmp_path / "net.plan", dynamic_batch=False)
    plan = fb.load_plan(tmp_path / "net.plan")
    assert plan.images == ["[N, 3, 9, 8] float32 NCHW with N of 3"]
    with pytest.raises(ValueError, match=r"with N of 3$"):
        plan(torch.randn(1, 3, 9, 8))


@torch.no_grad()
def test_precision_and_tuned_choices_are_kept(tmp_path):
    model, x = settled(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())), torch.randn(2, 64, 12, 12)
    torch.set_float32_matmul_precision("high")
    try:
        fb.save_plan(model, x, tmp_path / "net.plan")
    finally:
        torch.set_float32_matmul_precision("highest")
    plan = fb.load_plan(tmp_path / "net.plan")
    (step,) = (s for s in plan.bound(x)[0].plan.steps if s.kernel == "winograd_conv2d")
    assert step.params["real_points"] == 1
    found = fb.tune(model, x, rounds=1)
    state = engine.state.EngineState.of(model)
    state.choices = dict.fromkeys((layer.key for layer in found.layers), "conv2d") or state.choices
    engine.refresh(fresh := copy.deepcopy(model))
    engine.state.EngineState.of(fresh).choices = dict(state.choices)
    fb.save_plan(fresh, x, tmp_path / "net.plan")
    kernels = {s.kernel for s in fb.load_plan(tmp_path / "net.plan").bound(x)[0].plan.steps}
    assert kernels == {s.kernel for s in engine.plan_for(fresh, x).steps}


# ---- what can be saved ----


def test_arguments_that_are_none(tmp_path):
    model, path = settled(Tiny()), tmp_path / "net.plan"
    with pytest.raises(TypeError, match=r"model is a str, expected an nn\.Module"):
        fb.save_plan("resnet50", (1, 3, 9, 8), path)
    for images in (None, [], "image", 3):
        with pytest.raises(TypeError, match=r"images is .*, expected an image"):
            fb.save_plan(model, images, path)
    for sizes in ((3, 9, 8), (0, 3, 9, 8), [(1, 3, 9, 8), (1, 3, 9)], [(1, 3, 9.0, 8)]):
        with pytest.raises(ValueError, match=r"an image has sizes .*, expected four positive numbers"):
            fb.save_plan(model, sizes, path)
    with pytest.raises(ValueError, match="weights is 'int8', expected one of both, plain, packed"):
        fb.save_plan(model, (1, 3, 9, 8), path, weights="int8")
    with pytest.raises(RuntimeError, match="there is no plan: the model is in training mode"):
        fb.save_plan(settled(Tiny()).train(), (1, 3, 9, 8), path)
    hooked = settled(Tiny())
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the model has forward hooks"):
        fb.save_plan(hooked, (1, 3, 9, 8), path)
    with pytest.raises(OSError, match="nowhere"):
        fb.save_plan(model, (1, 3, 9, 8), tmp_path / "nowhere" / "net.plan")
    assert not list(tmp_path.iterdir())


def test_a_step_that_a_file_cannot_name(tmp_path):
    library = torch.library.Library("saved_plan_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("twice", torch.empty_like, "Meta")

    class Foreign(Tap):
        def forward_modules(self, x):
            return torch.ops.saved_plan_test.twice(self.conv(x))

    model = settled(Foreign())
    with torch.no_grad():
        assert engine.why_not(model, torch.randn(1, 3, 9, 8)) is None
    with pytest.raises(
        ValueError, match=r"step twice calls saved_plan_test::twice\.default, which is one of"
    ):
        fb.save_plan(model, (1, 3, 9, 8), tmp_path / "net.plan")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = settled(Tiny()), tmp_path / "net.plan"
    fb.save_plan(model, (1, 3, 9, 8), path)
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(plan_file.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        fb.save_plan(settled(Tiny(), 1), (1, 3, 9, 8), path)
    assert [path] == list(tmp_path.iterdir()) and path.read_bytes() == before


def test_any_reader_of_safetensors_shows_the_weights(tmp_path):
    model = settled(Tied())
    fb.save_plan(model, (1, 3, 9, 8), tmp_path / "net.plan")
    with safe_open(tmp_path / "net.plan", "pt") as file:
        names = set(file.keys())
        assert {"weights.conv.weight", "weights.again.bias"} < names
        assert len({"weights.again.weight", "weights.body.0.weight"} & names) == 1
        assert_bit_equal(file.get_tensor("weights.conv.weight"), model.conv.weight.detach())
        assert any(name.startswith("packed.") for name in names)


# ---- calls ----


def test_calls_that_cannot_be(tmp_path):
    fb.save_plan(settled(Tiny()), (1, 3, 9, 8), tmp_path / "net.plan")
    plan, x = fb.load_plan(tmp_path / "net.plan"), torch.randn(2, 3, 9, 8)
    with pytest.raises(TypeError, match=r"image is a list, expected a torch\.Tensor"):
        plan([x])
    expected = r"expected \[N, 3, 9, 8\] float32 NCHW with N of 1, 2 and more"
    for wrong in (x[0], x[:, :2], x.double(), x[:0], x.to("meta"), x.clone().requires_grad_()):
        with pytest.raises(ValueError, match=f"plan: image is .*{expected}"):
            plan(wrong)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast is active"):
        plan(x)
    with fb.backend("reference"), pytest.raises(RuntimeError, match="the backend is 'reference'"):
        plan(x)
    assert not plan(x).requires_grad


# ---- other machines ----


@TWO_ISAS
@torch.no_grad()
def test_another_instruction_set(tmp_path):
    """Weights are packed anew where there are plain ones; AVX2 gives the bits of AVX-512, portable kernels
    round products on their own."""
    other, isa = isas()[-2:]
    model, x = settled(fb.lenet5()), torch.randn(2, 1, 32, 32)
    for weights in ("both", "packed"):
        fb.save_plan(model, x, tmp_path / weights, weights=weights)
    torch.save([x, model(x)], tmp_path / "results.pt")
    script = """
import sys, torch, fast_backbones as fb
x, expected = torch.load(sys.argv[1] + "/results.pt", weights_only=True)
rtol = 1e-4 if sys.argv[2] == "portable" else 0
torch.testing.assert_close(fb.load_plan(sys.argv[1] + "/both")(x), expected, rtol=rtol, atol=rtol)
try:
    fb.load_plan(sys.argv[1] + "/packed")
except fb.engine.PlanFileError as error:
    print(error)
"""
    said = run_python("-c", script, str(tmp_path), other, timeout=500, FB_MAX_ISA=other).stdout
    assert f"packed for instruction set {isa}, and this process has {other}; save it there" in said
    assert str(tmp_path / "packed") in said
