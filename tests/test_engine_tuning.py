"""fb.tune: every algorithm is right, the fastest is taken and kept, and the batch changes no bits."""

import json

import pytest
import torch
from engine_nets import Tiny
from fast_backbones.engine.run_cpu import Runner
from fast_backbones.engine.state import EngineState, key_of
from helpers import assert_bit_equal, assert_equal, integers, needs_native
from torch import nn

import fast_backbones as fb
from fast_backbones import engine
from fast_backbones.engine import tuning

pytestmark = needs_native
MS = {"conv2d": 3.0, "winograd_conv2d 2": 2.0, "winograd_conv2d 4": 1.0, "grouped_conv2d": 5.0}


class Choosy(Tiny):
    """3x3, 1x7 and grouped 3x3: each with another set of algorithms."""

    def __init__(self):
        nn.Module.__init__(self)
        self.first = nn.Conv2d(32, 32, 1)
        self.square = nn.Conv2d(32, 40, 3, padding=1)
        self.line = nn.Conv2d(40, 32, (1, 7), padding=(0, 3))
        self.groups = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.eval()

    def forward_modules(self, x):
        return self.groups(self.line(self.square(self.first(x)).relu()).relu())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FB_CACHE_DIR", str(tmp_path))
    with torch.inference_mode(False), torch.no_grad():
        yield tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Times as in MS instead of the clock's; how often anything was measured."""
    real, count = Runner.profile, [0]

    def profile(self, x, repeats):
        count[0] += 1
        for step, row in real(self, x, repeats):
            tile = step.params.get("tile")
            name = f"{step.kernel} {tile}" if tile else step.kernel
            yield step, {**row, "ms": MS.get(name, 1.0)}

    monkeypatch.setattr(Runner, "profile", profile)
    return count


def kernels(model, x):
    steps = [step for step in engine.plan_for(model, x).steps if step.op == "conv2d"]
    return {step.name: (step.kernel, step.params.get("tile", 0)) for step in steps}


def exact(model):
    for seed, parameter in enumerate(model.parameters()):
        parameter.copy_(integers(parameter.shape, seed, limit=1, multiple=4))
    return model


def test_every_algorithm_is_exact_and_right_for_any_batch():
    model = exact(Choosy())
    x = integers((3, 32, 13, 14), 9, limit=1)
    expected = model.forward_modules(x)
    traced = tuning.trace(model, engine.plain_of(model), x)
    layers = tuning.layers_of(traced, "highest")
    ways = {layer.name: layer.ways for layer in layers}
    assert ways["square"] == ["conv2d", "winograd_conv2d 2", "winograd_conv2d 4"]
    assert ways["line"] == ["conv2d", "winograd_conv2d"]
    assert ways["groups"] == ["conv2d", "grouped_conv2d"]
    names = {layer.name: layer.key for layer in layers}
    engine.plan_for(model, x)
    for rank in range(3):
        choices = {key: ways[name][rank % len(ways[name])] for name, key in names.items()}
        EngineState.of(model).choose(choices, key_of(engine.plain_of(model), x), traced)
        taken = kernels(model, x)
        for name, key in names.items():
            kernel, tile = taken[name]
            assert choices[key] == (f"{kernel} {tile}" if tile else kernel)
        assert_equal(model(x), expected, str(choices))
        real = torch.randn(3, 32, 13, 14)
        whole = model(real)
        for i in range(3):
            assert_bit_equal(model(real[i : i + 1]), whole[i : i + 1])


def test_the_fastest_is_taken_kept_and_not_measured_again(folder, measured):
    model, x = Choosy(), torch.randn(2, 32, 13, 14)
    found = fb.tune(model, x, rounds=2)
    captures = EngineState.of(model).captures
    assert {layer.name: layer.chosen for layer in found.layers} == {
        "square": "winograd_conv2d 4", "line": "winograd_conv2d", "groups": "conv2d",
    }  # fmt: skip
    assert [layer.name for layer in found.changed] == ["square", "groups"]
    assert "square: winograd_conv2d 2 -> winograd_conv2d 4: 2.000 -> 1.000 ms" in str(found)
    assert kernels(model, x)["square"] == ("winograd_conv2d", 4)
    assert EngineState.of(model).captures == captures  # the plan was made of what tune had captured
    assert kernels(model, x[:1])["groups"] == ("conv2d", 0)
    assert measured[0] == 3 * 3  # three ranks, a round to warm up and two that count
    other = Choosy()
    assert kernels(other, x)["square"] == ("winograd_conv2d", 0)  # only who asks is tuned
    again = fb.tune(other, x[:1], rounds=2)
    assert measured[0] == 9 and kernels(other, x)["square"] == ("winograd_conv2d", 4)
    assert "measured earlier" in str(again) and again.path.parent == folder
    fb.tune(other, x, rounds=1, again=True)
    assert measured[0] == 9 + 3 * 2


def test_less_than_the_margin_changes_nothing(measured, monkeypatch):
    monkeypatch.setitem(MS, "winograd_conv2d 4", 1.95)
    model = Choosy()
    found = fb.tune(model, torch.randn(1, 32, 13, 14), rounds=1)
    assert {layer.name: layer.chosen for layer in found.layers}["square"] == "winograd_conv2d 2"


def test_a_damaged_file_is_measured_anew(measured):
    model, x = Choosy(), torch.randn(1, 32, 13, 14)
    path = fb.tune(model, x, rounds=1).path
    stored = json.loads(path.read_text())
    (key,) = (key for key in stored["choices"] if key.startswith("c=32 k=40"))
    stored["choices"][key] = "conv2d"
    damaged = [text.encode() for text in (json.dumps(stored), path.read_text()[:-9], "[]", "{}")]
    for text in (*damaged, b"\xff"):
        path.write_bytes(text)
        before = measured[0]
        with pytest.warns(UserWarning, match="damaged or of another version"):
            fb.tune(Choosy(), x, rounds=1)
        assert measured[0] > before
    assert json.loads(path.read_text())["choices"][key] == "winograd_conv2d 4"


def test_what_is_known_is_not_measured_beside_what_is_not(measured):
    model = Choosy()
    fb.tune(model, torch.randn(1, 32, 13, 14), rounds=1)
    model.square = nn.Conv2d(32, 40, 3).eval()
    found = fb.tune(model, torch.randn(1, 32, 15, 16), rounds=1)
    assert [layer.name for layer in found.layers if layer.seconds] == ["square"]


def test_without_a_folder_it_says_so(folder, measured, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("FB_CACHE_DIR", str(folder / "file"))
    with pytest.warns(UserWarning, match="not kept"):
        assert fb.tune(Choosy(), torch.randn(1, 32, 13, 14), rounds=1).path is None


def test_what_it_refuses():
    model, x = Choosy(), torch.randn(1, 32, 13, 14)
    with pytest.raises(ValueError, match="rounds is 0"):
        fb.tune(model, x, rounds=0)
    with pytest.raises(RuntimeError, match="there is no plan: the model is in training mode"):
        fb.tune(model.train(), x)


def test_a_real_model_by_the_clock():
    model, x = fb.resnet18().eval(), torch.randn(1, 3, 64, 64)
    shares = []
    found = fb.tune(model, x, rounds=1, progress=lambda share, what: shares.append(share))
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] < 1.0
    assert all(set(layer.seconds) >= {layer.usual, layer.chosen} for layer in found.layers)
    torch.testing.assert_close(model(x), model.forward_modules(x), rtol=1e-4, atol=1e-4)
