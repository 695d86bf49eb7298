"""Loading weights: what is accepted and what is adapted."""

import importlib
import logging

import pytest
import torch
from fast_backbones.backbones._weights import adapt_input_channels
from torch import nn
from weights_checks import CLASSES, built, fresh, holds, refused, sha256
from weights_checks import saved as saved
from weights_checks import source as source

from fast_backbones import backbones
from fast_backbones.backbones import WeightsError, load_weights

# What loads


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "str", "home", "mapping", "weights="])
def test_sources(kind, source, saved, tmp_path, monkeypatch):
    model = fresh()
    if kind == "zip":
        load_weights(model, saved)
    elif kind == "legacy":
        torch.save(source, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        load_weights(model, tmp_path / "old.pt")
    elif kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(source, tmp_path / "x.safetensors")
        load_weights(model, tmp_path / "x.safetensors")
    elif kind == "str":
        load_weights(model, str(saved))
    elif kind == "home":
        monkeypatch.setenv("HOME", str(saved.parent))
        load_weights(model, f"~/{saved.name}")
    elif kind == "mapping":
        load_weights(model, source)
    else:
        model = built(saved)
    assert holds(model, source)


def test_every_model_function_takes_weights(tmp_path):
    torch.manual_seed(3)
    theirs = backbones.resnet18(num_classes=2)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    for ours in (backbones.resnet18, backbones.create_model):
        name = () if ours is backbones.resnet18 else ("resnet18",)
        assert holds(ours(*name, weights=tmp_path / "x.pth"), theirs.state_dict())
    for function in (
        backbones.resnext50,
        backbones.resnext101_64x4d,
        lambda **k: backbones.resnext(50, 2, **k),
    ):
        with torch.device("meta"), pytest.raises(WeightsError, match="does not fit resnext"):
            function(weights=theirs.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {}, "args": "x"},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
    ],
    ids=["state_dict", "model", "DDP", "compiled under DDP", "twice", "parameters"],
)
def test_wrappers_of_training_scripts(wrap, source, tmp_path):
    torch.save(wrap(source), tmp_path / "x.pth")
    model = fresh()
    load_weights(model, tmp_path / "x.pth")
    assert holds(model, source)


def test_the_next_call_uses_the_new_weights(source):
    model, x = fresh(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = model(x)
        load_weights(model, source)
        after = model(x)
        assert not torch.allclose(before, after, rtol=1e-2)
        torch.testing.assert_close(after, model.forward_modules(x), rtol=1e-4, atol=1e-4)


def test_report(source, saved):
    report = load_weights(fresh(), saved, sha256=sha256(saved))
    assert report.source == str(saved) and report.sha256 == sha256(saved)
    assert (report.loaded, report.notes) == (len(source), ())
    assert load_weights(fresh(), source).sha256 is None


def test_old_files_without_batch_counters_load(source):
    model = fresh()
    model.bn1.num_batches_tracked.fill_(7)
    load_weights(model, {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")})
    assert torch.equal(model.conv1.weight, source["conv1.weight"]) and model.bn1.num_batches_tracked == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrower_floats_are_widened_exactly(dtype, source):
    narrow = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.items()}
    model = fresh()
    report = load_weights(model, narrow)
    assert holds(model, narrow) and model.conv1.weight.dtype is torch.float32
    assert any("float32" in note for note in report.notes)


def test_cast_narrows_when_asked(source):
    wide = {k: v.double() if v.is_floating_point() else v for k, v in source.items()}
    model = fresh()
    load_weights(model, wide, cast=True)
    assert holds(model, source)
    half = fresh().half()
    load_weights(half, source, cast=True)
    assert torch.equal(half.conv1.weight, source["conv1.weight"].half())


def test_a_model_on_the_meta_device_takes_the_tensors(source):
    with torch.device("meta"):
        model = fresh()
    load_weights(model, {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")})
    assert not any(t.is_meta for t in model.state_dict().values()) and holds(model, source)
    assert model.conv1.weight.requires_grad
    assert model.conv1.weight.data_ptr() != source["conv1.weight"].data_ptr()


def test_any_module_loads_strictly(source):
    model = nn.Sequential(nn.Linear(3, 2))
    load_weights(model, {"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2)})
    assert torch.equal(model[0].weight, torch.ones(2, 3))
    with refused(model, "does not fit Sequential"):
        load_weights(model, source)


# What is adapted


def test_weights_decide_the_number_of_classes_where_none_is_given(saved, source):
    model = built(saved)
    assert model.num_classes == model.fc.out_features == CLASSES and holds(model, source)


def test_another_number_of_classes_keeps_the_fresh_head_and_says_so(saved, source, caplog):
    head = fresh(seed=4, num_classes=9).fc.weight
    torch.manual_seed(4)
    with caplog.at_level(logging.WARNING, logger="fast_backbones.weights"):
        model = built(saved, num_classes=9)
    assert holds(model, source, but=("fc",)) and torch.equal(model.fc.weight, head)
    assert "classifier fc not loaded: 5 classes in the checkpoint, 9 in the model" in caplog.text


def test_head_argument(saved, source):
    model = fresh(num_classes=9)
    with refused(model, r"fc\.weight \[5, 128\], expected \[9, 128\]"):
        load_weights(model, saved, head="strict")
    load_weights(model, saved, head="adopt")
    assert holds(model, source) and model.num_classes == CLASSES
    with pytest.raises(ValueError, match="head"):
        load_weights(model, saved, head="resize")


def test_no_classifier_and_features_only_leave_parts_out(saved, source):
    bare = fresh(num_classes=0)
    report = load_weights(bare, saved)
    assert holds(bare, source) and report.notes == ("left out fc, which this model does not have",)
    taps = built(saved, features_only=True, out_indices=(0, 1))
    assert holds(taps, source) and not any(k.startswith("layer2") for k in taps.state_dict())
    with refused(model := fresh(), "2 of 38 entries are missing.*num_classes=0"):
        load_weights(model, bare.state_dict())


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_input_channels_are_adapted(channels, saved, source, caplog):
    with caplog.at_level(logging.WARNING, logger="fast_backbones.weights"):
        model = built(saved, in_chans=channels)
    assert holds(model, source, but=("conv1",))
    assert f"conv1.weight adapted from 3 to {channels} input channels" in caplog.text
    w, ours = source["conv1.weight"], model.conv1.weight
    if channels == 1:
        torch.testing.assert_close(ours, w.sum(1, keepdim=True))
    else:
        assert all(torch.equal(ours[:, i], w[:, i % 3] * (3 / channels)) for i in range(channels))


def test_input_channels_of_a_grey_checkpoint():
    weight = torch.randn(4, 1, 3, 3)
    assert torch.allclose(adapt_input_channels(weight, 3).sum(1, keepdim=True), weight, atol=1e-6)
    assert adapt_input_channels(weight.half(), 5).dtype is torch.float16


@pytest.mark.peer
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_input_channels_are_adapted_as_timm_does(channels):
    from model_checks import peer

    theirs = importlib.import_module(f"{peer('timm').__name__}.models").adapt_input_conv
    for weight in (torch.randn(8, 3, 7, 7), torch.randn(8, 3, 3, 3).half()):
        assert torch.equal(adapt_input_channels(weight, channels), theirs(channels, weight.clone()))
