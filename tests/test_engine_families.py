"""Whole networks with concatenations, gates and prologues: the same bits whatever runs them."""

import pytest
import torch
from helpers import assert_bit_equal, assert_equal, needs_native, poisoned, threads
from integer_nets import assert_exactly_representable, integer_image, integers_in
from test_engine_models import calibrated, planned, poison_arenas, small_chunks

import fast_backbones as fb
from fast_backbones import engine

pytestmark = needs_native

FAMILIES = {  # each for what no other has; an image whose last map has 1 or 4 pixels
    "densenet121": 64,  # prefixes of one buffer, norms before convolutions
    "legacy_xception": 64,  # separable, leading ReLU
    "legacy_seresnext26_32x4d": 64,  # gates before the last convolution
    "se_bninception": 64,  # siblings before a concatenation, gates behind it, pools behind projections
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode(False), torch.no_grad():
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_same_bits_for_any_threads_batch_layout_and_schedule(name, monkeypatch):
    size = FAMILIES[name]
    model = calibrated(name, size)
    x = torch.randn(3, 3, size, size)
    expected = planned(model, x)
    assert all(step.native for step in engine.plan_for(model, x).steps)
    for count in (1, 2, 3):
        with threads(count):
            assert_bit_equal(planned(model, x), expected, f"{count} threads")
    assert_bit_equal(planned(model, x.to(memory_format=torch.channels_last)), expected, "channels_last")
    assert_bit_equal(torch.cat([planned(model, part) for part in x.split([1, 2])]), expected, "batch split")
    with small_chunks(monkeypatch), threads(2):
        engine.refresh(model)
        assert_bit_equal(planned(model, x), expected, "small chunks")
        poison_arenas(model)
        with poisoned():
            assert_bit_equal(planned(model, x), expected, "arena full of NaN")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_feature_map_is_exact_on_integers(name):
    model = integers_in(fb.create_model(name, features_only=True), seed=1)
    x = integer_image(2, 3, FAMILIES[name], FAMILIES[name])
    plain = model.forward_modules(x)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = planned(model, x.contiguous(memory_format=layout))
        for level, (a, b) in enumerate(zip(ours, plain, strict=True)):
            assert b.unique().numel() > 8
            assert_exactly_representable(b.double(), f"{name} level {level}")
            assert_equal(a, b, f"{name} level {level}, {layout}")


@pytest.mark.parametrize("name", ["densenet121", "bninception"])
def test_a_concatenation_is_never_copied(name):
    model = fb.create_model(name).eval()
    plan = engine.plan_for(model, torch.randn(1, 3, 64, 64))
    assert not [step.name for step in plan.steps if " into " in step.name]
    assert plan.rewrites["write_into_slices"] >= 10


def test_a_changed_weight_reaches_every_part_of_a_step():
    """Of a norm before a convolution, a depthwise filter, a fused sibling, a pool's bias."""
    for name, parameter in (
        ("densenet121", "features.denseblock1.denselayer2.norm1.weight"),
        ("legacy_xception", "block2.rep.1.conv1.weight"),
        ("bninception", "inception_3a_3x3_reduce.weight"),
        ("bninception", "inception_3a_pool_proj_bn.bias"),
    ):
        model = calibrated(name, 64)
        x = torch.randn(1, 3, 64, 64)
        before = planned(model, x)
        model.get_parameter(parameter).add_(0.5)
        after = planned(model, x)
        assert not torch.equal(before, after), parameter
        largest = after.abs().max().item()
        torch.testing.assert_close(after, model.forward_modules(x), rtol=0, atol=1e-4 * largest)
