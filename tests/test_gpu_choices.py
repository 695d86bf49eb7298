"""Which way and tile a step takes on a GPU, without one: in Triton's interpreter, by a clock that is told
what to say."""

import json

import pytest
import torch
from fast_backbones.bench.exact import float64
from helpers import assert_as_accurate, needs_native
from test_engine_launches import launch_list, made
from triton_device import DEVICE, needs_triton

from fast_backbones.engine import gpu_choices
from fast_backbones.kernels import _gpu

pytestmark = [
    needs_triton,
    needs_native,
    pytest.mark.skipif(DEVICE != "cpu", reason="with a GPU: test_gpu_models.py"),
]


def measured(found, favourite, known=None):
    """Every option takes a millisecond, the favourites half."""
    seen = []

    def clock(call):
        seen.append(call)
        name = getattr(call, "name", "")
        tile = "x".join(str(v) for k, v in getattr(call, "constants", {}).items() if k.startswith("BLOCK"))
        return 5e-4 if favourite(name, tile) else 1e-3

    layers, chosen = gpu_choices.measure(found, clock, known or {})
    return layers, chosen, len(seen)


@torch.no_grad()
def test_the_fastest_is_taken_and_the_network_stays_right():
    model, x = made("lenet5", torch.bfloat16)
    found = launch_list(model, x)
    found.run()
    layers, chosen, times = measured(found, lambda name, tile: tile.startswith("64x32"))
    assert times > len(layers) > 2
    assert {layer.usual for layer in layers} == {"triton"}
    assert any(layer.chosen.startswith("triton 64x32") for layer in layers)
    assert all(layer.chosen in layer.ways for layer in layers)
    again = launch_list(model, x, choices=chosen)
    assert any(bound.how.startswith("triton 64x32") for bound in again.bound)
    again.arena.fill_(torch.nan)
    again.run()
    assert_as_accurate(again.outputs(), model.forward_modules(x), float64(model.double(), x))
    assert measured(again, lambda name, tile: False, chosen)[1:] == ({}, 0)  # nothing is measured twice


@torch.no_grad()
def test_another_batch_keeps_the_way_and_chooses_a_tile():
    model, x = made("lenet5", torch.bfloat16)
    found = launch_list(model, x)
    found.run()
    _, chosen, _ = measured(found, lambda name, tile: name == "library")
    assert "library" in chosen.values()
    more = launch_list(model, torch.cat([x, x]), choices=chosen)
    assert "library" in [bound.how for bound in more.bound]
    more.run()
    layers, then, _ = measured(more, lambda name, tile: name != "library", chosen)
    assert {layer.chosen for layer in layers} == {"library"}  # every convolution and linear layer
    assert all(key.endswith("n=4") or chosen.get(key) == way for key, way in then.items())


@torch.no_grad()
def test_a_way_that_computes_something_else_is_left_out(monkeypatch):
    model, x = made("lenet5")
    found = launch_list(model, x)
    found.run()
    launch = _gpu.launch

    def wrong(way, kind, params, operands, *rest):
        call = launch(way, kind, params, operands, *rest)
        return call if way != "library" else lambda: (call(), operands["y"].mul_(1.01))

    monkeypatch.setattr(_gpu, "launch", wrong)
    with pytest.warns(UserWarning, match="library computes something else"):
        layers, chosen, _ = measured(found, lambda name, tile: False)
    assert layers
    assert "library" not in chosen.values()


def test_a_choice_that_is_no_more_is_the_rules():
    model, x = made("lenet5")
    step = next(bound.step for bound in launch_list(model, x).bound if bound.step.kernel == "conv2d")
    key = launch_list(model, x).key(step)
    for choices in ({key: "a way of another version"}, {key: "triton", f"{key} n=2": "7x7x7"}):
        found = launch_list(model, x, choices=choices)
        bound = next(b for b in found.bound if b.step.kernel == "conv2d")
        assert (
            bound.launch.constants == launch_list(model, x).bound[found.bound.index(bound)].launch.constants
        )


def test_choices_are_kept_by_gpu_driver_and_versions(monkeypatch, tmp_path):
    monkeypatch.setenv("FB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    device = torch.device("cuda", 0)
    monkeypatch.setattr(gpu_choices, "_measured", {})
    gpu_choices.of_device.cache_clear()
    try:
        assert gpu_choices.of_device(device) == {}
        path = gpu_choices.remember(device, {"conv2d": "library"})
        assert path is not None
        assert path.parent == tmp_path
        for part in ("nvidia-h200", "driver-", f"torch-{torch.__version__}", "triton-"):
            assert part in path.name
        assert gpu_choices.of_device(device) == {"conv2d": "library"}
        gpu_choices.remember(device, {"linear": "triton"})
        assert gpu_choices.of_device(device) == {"conv2d": "library", "linear": "triton"}
        monkeypatch.setattr(gpu_choices, "_measured", {})  # another process
        shipped = tmp_path / "tables"
        shipped.mkdir()
        (shipped / "nvidia-h200.json").write_bytes(path.read_bytes())
        path.unlink()
        monkeypatch.setattr(gpu_choices, "SHIPPED", shipped)
        gpu_choices.of_device.cache_clear()
        assert gpu_choices.of_device(device) == {"conv2d": "library", "linear": "triton"}
        gpu_choices.remember(device, {"linear": "library"})  # what was measured here goes before
        assert gpu_choices.of_device(device)["linear"] == "library"
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({**stored, "choices": {"linear": "cuda"}}))
        assert gpu_choices.of_device(device)["linear"] == "library"  # this process has measured it
        monkeypatch.setattr(gpu_choices, "_measured", {})
        gpu_choices.of_device.cache_clear()
        with pytest.warns(UserWarning, match="damaged"):
            assert gpu_choices.of_device(device)["linear"] == "triton"
    finally:
        gpu_choices.of_device.cache_clear()
    assert gpu_choices.of_device(torch.device("cpu")) == {}


@torch.no_grad()
def test_a_way_that_fails_is_left_out(monkeypatch):
    model, x = made("lenet5")
    found = launch_list(model, x)
    found.run()
    launch = _gpu.launch

    def failing(way, *rest):
        if way == "library":
            raise RuntimeError("no engine")
        return launch(way, *rest)

    monkeypatch.setattr(_gpu, "launch", failing)
    kept = []
    with pytest.warns(UserWarning, match="library fails, left out: no engine"):
        layers, chosen = gpu_choices.measure(found, lambda call: 1e-3, {}, keep=kept.append)
    assert "library" not in chosen.values()
    assert {key: way for part in kept for key, way in part.items()} == chosen
    assert len(kept) == len(layers)


@pytest.mark.parametrize(("change", "same"), [(0.0, True), (0.003, True), (0.02, False)])
def test_alike_allows_rounding_and_no_more(change, same):
    expected = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert gpu_choices.alike((expected * (1 + change)).to(torch.bfloat16), expected, "ieee") is same
    one = expected.clone()
    one[3, 5] += 0.5
    assert not gpu_choices.alike(one, expected, "ieee")
