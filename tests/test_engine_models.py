"""Whole networks through engine and kernels: exact, accurate, reproducible, and nothing left unwritten."""

import contextlib
import functools

import pytest
import torch
from fast_backbones.engine.plan import ARENA
from fast_backbones.engine.state import EngineState
from helpers import (
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    isas,
    needs_native,
    poisoned,
    run_python,
    threads,
)
from test_engine_fuse import NETS, Net, conv, settle
from torch import nn
from torch.utils import _pytree as pytree

import fast_backbones as fb
from fast_backbones import engine
from fast_backbones.engine import place, schedule

pytestmark = needs_native

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def small_chunks(monkeypatch):
    """Loops of one, two and more images even for small maps, where the default has none."""
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "CHUNK_BYTES", 1 << 17)
        patch.setattr(schedule, "FLOPS_PER_WEIGHT_BYTE", 0)
        yield


def planned(model, x):
    """model(x), certain that a plan ran."""
    assert engine.why_not(model, x) is None
    return model(x)


@functools.lru_cache(maxsize=2)  # each is as large as its network
def calibrated_state(name, size):
    torch.manual_seed(0)
    model = getattr(fb, name)()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()
    model(torch.randn(8, 3, size, size))
    return model.state_dict()


def calibrated(name, size=64, **options):
    """Batch norm statistics of random images, so that no layer's numbers grow or vanish."""
    with torch.device("meta"):
        model = getattr(fb, name)(**options).eval()
    state = calibrated_state(name, size)
    model.load_state_dict({key: state[key].clone() for key in model.state_dict()}, assign=True)
    return model


# ---- exact ----


def integers_in(model, seed):
    """Filters with two taps of +-1 (+-4 where Winograd may run); norms that shift by whole numbers.

    The last norm of a block passes half of its channels, so that the sums grow slowly with depth: every
    number in the network is a whole one of at most 13 bits, and float32 rounds nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(*shape):
        return torch.randint(-1, 2, shape, generator=generator).float()

    closing = "bn3" if hasattr(model.layer1[0], "conv3") else "bn2"
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            size = 4.0 if module.kernel_size == (3, 3) else 1.0
            flat = torch.zeros_like(module.weight).flatten(1)
            taps = torch.randint(0, flat.shape[1], (flat.shape[0], 2), generator=generator)
            signs = torch.randint(0, 2, taps.shape, generator=generator) * 2.0 - 1.0
            module.weight.copy_(flat.scatter_(1, taps, signs * size).view_as(module.weight))
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            module.running_mean.copy_(pick(module.num_features) * size)
            module.running_var.fill_(4.0)
            module.weight.fill_(2.0 / size)
            module.bias.copy_(pick(module.num_features))
            if name.endswith(closing):
                module.weight.mul_(torch.randint(0, 2, (module.num_features,), generator=generator))
        elif isinstance(module, nn.Linear):
            module.weight.copy_(pick(*module.weight.shape))
            module.bias.copy_(pick(*module.bias.shape))
    return model.eval()


def integer_image(batch, size, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (batch, 3, size, size), generator=generator).float()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50"])
def test_whole_network_is_exact_on_integers(name):
    """Bit for bit what float64 modules compute: one wrong index in the network changes the logits."""
    model = integers_in(getattr(fb, name)(num_classes=50), seed=1)
    x = integer_image(3, 64)
    planar, wide = planned(model, x), planned(model, x.contiguous(memory_format=torch.channels_last))
    exact = model.double()(x.double())
    assert exact.unique().numel() > 50, "the numbers must not have died on their way"
    assert_equal(planar.double(), exact, f"{name}, contiguous")
    assert_equal(wide.double(), exact, f"{name}, channels_last")


@pytest.mark.parametrize("name", ["resnet50", "resnext50"])
def test_every_feature_map_is_exact_on_integers(name):
    model = integers_in(getattr(fb, name)(features_only=True), seed=2)
    x = integer_image(2, 64)
    ours = planned(model, x)
    for level, (a, b) in enumerate(zip(ours, model.double()(x.double()))):
        assert a.unique().numel() > 10
        assert_equal(a.double(), b, f"{name} level {level}")


OTHER_ISA = """
import torch, fast_backbones as fb
from helpers import assert_equal
from test_engine_models import integer_image, integers_in, planned
assert fb.build_info()["isa"] == "{isa}"
with torch.no_grad():
    model = integers_in(fb.resnext50(num_classes=50), seed=1)
    x = integer_image(2, 64)
    assert_equal(planned(model, x).double(), model.double()(x.double()))
"""


@pytest.mark.parametrize("isa", isas()[:-1])
def test_other_instruction_sets_are_exact_too(isa):
    run_python("-c", OTHER_ISA.replace("{isa}", isa), FB_MAX_ISA=isa)


# ---- as accurate as PyTorch ----


@pytest.mark.parametrize(
    "name, size", [("resnet18", 64), ("resnet50", 64), ("resnext50", 64), ("resnext101_64x4d", 32)]
)
def test_twice_pytorchs_error_at_most(name, size):
    """Logits and every feature map against float64; error as a share of the rms, maximum and rms of it."""
    x = torch.randn(2, 3, size, size)
    model, taps = calibrated(name, size), calibrated(name, size, features_only=True)
    ours, plain = [*planned(taps, x), planned(model, x)], [*taps.forward_modules(x), model.forward_modules(x)]
    engine.refresh(model)
    engine.refresh(taps)
    exact = [*taps.double()(x.double()), model.double()(x.double())]
    for level, (a, b, c) in enumerate(zip(ours, plain, exact)):
        assert a.stride() == b.stride()
        assert_as_accurate(a, b, c, f"{name} output {level} of {len(exact)}")


@pytest.mark.parametrize("size", [(33, 47), (31, 64)], ids=str)
def test_odd_images(size):
    model = calibrated("resnext50")
    x = torch.randn(2, 3, *size)
    ours, plain = planned(model, x), model.forward_modules(x)
    assert_as_accurate(ours, plain, model.double()(x.double()), "resnext50")


# ---- reproducible ----


@pytest.mark.parametrize("name", ["resnet50", "resnext50"])
def test_same_bits_for_any_threads_batch_layout_and_schedule(name, monkeypatch):
    model = calibrated(name)
    x = torch.randn(5, 3, 64, 64)
    expected = planned(model, x)
    for count in (1, 2, 3):
        with threads(count):
            assert_bit_equal(planned(model, x), expected, f"{count} threads")
    assert_bit_equal(planned(model, x.to(memory_format=torch.channels_last)), expected, "channels_last")
    for split in ([1] * 5, [2, 3], [4, 1]):
        parts = torch.cat([planned(model, part) for part in x.split(split)])
        assert_bit_equal(parts, expected, f"batch split into {split}")
    with small_chunks(monkeypatch):
        engine.refresh(model)
        for count in (1, 2, 3):
            with threads(count):
                assert_bit_equal(planned(model, x), expected, f"small chunks, {count} threads")
        loops = engine.plan_for(model, x).schedule.body
        assert any(isinstance(item, schedule.Loop) for item in loops)


# ---- nothing unwritten, nothing kept ----


def poison_arenas(model):
    arenas = EngineState.of(model).arenas.spare
    assert arenas, "the last call gave its arena back"
    for arena in arenas:
        arena.fill_(torch.nan)


@pytest.mark.parametrize("chunks", [False, True], ids=["whole batch", "small chunks"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_arena_and_outputs_full_of_nan(layout, chunks, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 64, 64).contiguous(memory_format=layout)
    with small_chunks(monkeypatch) if chunks else contextlib.nullcontext():
        for model in (fb.resnet18().eval(), fb.resnext50(features_only=True).eval()):
            expected = torch.utils._pytree.tree_leaves(planned(model, x))
            poison_arenas(model)
            with poisoned():
                again = torch.utils._pytree.tree_leaves(planned(model, x))
            for a, b in zip(again, expected):
                assert_bit_equal(a, b)


@pytest.mark.parametrize("sizes", [(64, 256), (256, 64)], ids=str)
def test_plans_of_other_sizes_share_only_weights_of_the_same_layout(sizes):
    """Winograd takes tiles of 2x2 on small maps and of 4x4 on large ones, whose packed filters differ."""
    model = calibrated("resnet18")
    for size in sizes:
        x = torch.randn(1, 3, size, size)
        alone = planned(calibrated("resnet18"), x)
        assert_bit_equal(planned(model, x), alone, f"{size} pixels")


def test_an_arena_serves_plans_of_every_size():
    model = fb.resnet18().eval()
    for size in (96, 32, 64):
        planned(model, torch.randn(1, 3, size, size))
    assert len(EngineState.of(model).arenas.spare) == 1
    largest = max(runner.plan.arena_bytes for runner in EngineState.of(model).runners.values())
    assert EngineState.of(model).arenas.spare[0].nbytes >= largest


# ---- networks with steps that no kernel takes ----


@pytest.mark.parametrize("chunks", [False, True], ids=["whole batch", "small chunks"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("why", NETS)
def test_small_networks_natively(why, layout, chunks, monkeypatch):
    """The networks of test_engine_fuse.py, kernels and PyTorch calls side by side in one plan."""
    model = settle(NETS[why][0])
    x = torch.randn(3, 8, 10, 10).contiguous(memory_format=layout)
    keep = x.clone()
    if chunks:
        monkeypatch.setattr(schedule, "CHUNK_BYTES", 1)
        monkeypatch.setattr(schedule, "FLOPS_PER_WEIGHT_BYTE", 0)
    engine.refresh(model)
    for _ in range(2):
        with poisoned():
            ours, plain = engine.forward(model, x, model.forward), model(x)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        assert ours.stride() == plain.stride()
        poison_arenas(model)
    assert torch.equal(x, keep)
    engine.refresh(model)  # the networks stay: their plans need not


def test_results_of_every_kind_natively():
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            y = self.conv(x)
            left, right = y.chunk(2, 1)
            pooled = nn.functional.adaptive_avg_pool2d(y, 1)
            return {
                "map": y, "again": y, "view": left, "strided": right[..., ::2], "sum": y.sum(), "none": None,
                "three": 3, "input": x, "argmax": y.argmax(1), "pooled": pooled, "flat": pooled.flatten(1),
                "copy": y.clone(), "list": [torch.relu(y)],
            }  # fmt: skip

    model = Kinds().eval()
    x = torch.randn(2, 8, 6, 6)
    ours, plain = engine.forward(model, x, model.forward), model(x)
    assert engine.why_not(model, x) is None
    torch.testing.assert_close(ours, plain)
    assert ours["map"] is ours["again"] and ours["input"] is x
    assert ours["copy"].data_ptr() != ours["map"].data_ptr()
    before = {key: value.clone() for key, value in ours.items() if isinstance(value, torch.Tensor)}
    engine.forward(model, torch.randn_like(x), model.forward)
    poison_arenas(model)
    assert all(torch.equal(ours[key], value) for key, value in before.items()), (
        "a result still lies in the arena"
    )


# ---- explain, and the first call ----


def test_explain_names_every_step():
    model = fb.resnet50().eval()
    x = torch.randn(2, 3, 64, 64)
    found = engine.explain(model, x, repeats=1)
    text = str(found)
    steps = engine.plan_for(model, x).steps
    assert [row.name for row in found.rows] == [step.name for step in steps]
    for step in steps:
        assert step.name in text and step.kernel in text
    for row in found.rows:
        assert row.ms > 0 and row.of_bound > 0 and row.gbps > 0
        assert (row.gflops > 0) == (row.kernel not in ("max_pool2d", "global_avg_pool"))
    macs = sum(row.gflops * row.ms for row in found.rows) / 2e3 / 2
    assert macs == pytest.approx(4.09 * (64 / 224) ** 2, rel=0.05)
    assert "layer1.0.bn1 + layer1.0.act1" in text or "layer1.0.bn1 + layer1.0" in text
    assert f"{found.threads} thread" in text and found.isa in text
    assert "activation memory: arena" in text and "first call:" in text
    assert "declined: winograd_conv2d: output 2x2" in text and "of the bound" in text


def test_explain_with_pytorch_calls_and_without_a_plan():
    model = settle(NETS["operations without a kernel"][0])
    x = torch.randn(2, 8, 6, 6)
    text = str(engine.explain(model, x, repeats=1))
    assert "aten.softmax" in text and "aten.cumsum" in text and "PyTorch" in text
    assert str(engine.explain(model.train(), x)) == "no plan: the model is in training mode"


def test_summary_is_one_line():
    model = fb.resnext50().eval()
    plan = engine.plan_for(model, torch.randn(1, 3, 64, 64))
    line = engine.plan_summary(plan)
    assert "\n" not in line and "16 grouped_conv2d" in line and "operations fused away" in line
    assert set(plan.seconds) == {"capture", "fuse", "place", "pack"}


def test_the_first_call_captures_once_and_says_what_its_parts_took():
    """How long that is, bench.first_call measures."""
    model, x = fb.resnet18().eval(), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for _ in range(3):
            model(x)
    assert EngineState.of(model).captures == 1
    assert set(engine.plan_for(model, x).seconds) == {"capture", "fuse", "place", "pack"}


@pytest.mark.parametrize("name", NETS)
def test_maps_whose_pixels_lie_apart_give_the_same_bits(name, monkeypatch):
    """Where pixels are multiples of 4 KiB they lie a cache line further apart; here all do that can."""
    model = settle(NETS[name][0])
    for batch in (1, 3):
        x = torch.randn(batch, 8, 10, 10)
        engine.refresh(model)
        expected = pytree.tree_leaves(planned(model, x))
        with monkeypatch.context() as patch:
            patch.setattr(place, "ALIASED_FLOATS", 1)
            engine.refresh(model)
            actual = pytree.tree_leaves(planned(model, x))
        for a, b in zip(actual, expected, strict=True):
            assert_bit_equal(a, b)
    engine.refresh(model)


def test_pixels_of_4_kib_lie_apart_where_no_row_is_made_of_them():
    layers = {"wide": conv(3, 1024, 1), "conv": nn.Conv2d(1024, 1024, 3), "fc": nn.Linear(4096, 8)}
    model = settle(Net(lambda m, x: m.fc(m.conv(m.wide(x).relu()).flatten(1)), **layers))
    plan = engine.plan_for(model, torch.randn(2, 3, 4, 4))
    strides = {plan.values[v].shape: p.pixel_stride for v, p in plan.places.items() if p.slot == ARENA}
    assert strides[2, 1024, 4, 4] == 1024 + 16
    assert strides[2, 1024, 2, 2] == 1024


@pytest.mark.parametrize(
    "channels, kernel, apart", [(512, 3, 16), (256, 3, 16), (128, 3, 0), (128, 7, 16), (520, 7, 0)]
)
def test_pixels_under_a_window_lie_apart_where_they_compete_for_sets_of_the_cache(channels, kernel, apart):
    """27 lines of a 3x3 tile fill 16 ways of 512 channels and 32 of 256; those of 128 have 64."""
    layers = {
        "wide": conv(8, channels, 1),
        "depth": nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels),
    }
    model = settle(Net(lambda m, x: m.depth(m.wide(x).relu()).mean((2, 3)), **layers))
    plan = engine.plan_for(model, torch.randn(2, 8, 14, 14))
    windows = [s for s in plan.steps if s.params.get("r") == kernel]
    assert [s.kernel for s in windows] == ["depthwise_conv2d"]
    assert {plan.places[s.inputs[0]].pixel_stride for s in windows} == {channels + apart}
    assert plan.places[windows[0].output].pixel_stride == channels


def test_activations_take_a_fraction_of_what_eager_needs():
    """ResNet-50, 16 images: eager holds several maps of 51 MB; the whole arena is smaller than one."""
    model = fb.resnet50().eval()
    plan = engine.plan_for(model, torch.empty(16, 3, 224, 224))
    assert plan.arena_bytes < 16 * 256 * 56 * 56 * 4
