"""Comparison with other stacks: wrong, failing and absent peers, and each real one against float64."""

import math

import pytest
import torch
from fast_backbones.bench import compare as comparing
from fast_backbones.bench import (
    peers,
    subject,
    timing,
)
from torch import nn

import fast_backbones as fb

native = pytest.mark.skipif(not fb.build_info()["native"], reason="the compiled library is absent")

# comparison


class Tiny(nn.Module):
    """A network small enough for a test, with what subject.py asks for."""

    def __init__(self):
        super().__init__()
        self.default_cfg = {"input_size": (3, 16, 16)}
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def tiny():
    return subject.calibrate(Tiny(), torch.randn(4, 3, 16, 16))


class Spoiled(peers.Eager):
    """PyTorch eager whose output goes through `spoil`."""

    key, name = "spoiled", "spoiled"

    def __init__(self, spoil, key="spoiled"):
        super().__init__(threads=1)
        self.spoil, self.key = spoil, key

    def prepare(self, model, x):
        call = super().prepare(model, x)
        return lambda: self.spoil(call())


def compare(model, *candidates):
    x = torch.randn(2, 3, 16, 16)
    guard = timing.NoiseGuard(lambda: None)
    everyone = [peers.Eager(1), *candidates]
    return comparing.compare(model, x, everyone, budget=0, min_rounds=2, guard=guard)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda ys: [y * 1.01 for y in ys], "the limit is rms"),
        (lambda ys: [y.index_fill(1, torch.tensor(0), math.nan) for y in ys], "inf"),
        (lambda ys: [y[:, :4] for y in ys], "output shapes [[2, 4]], expected [[2, 5]]"),
        (lambda ys: ys * 2, "output shapes"),
    ],
    ids=["one percent off", "NaN", "another shape", "one output too many"],
)
def test_a_wrong_peer_gets_no_time(tiny, spoil, said):
    found = compare(tiny, Spoiled(spoil))
    entry = found.entry("spoiled")
    assert entry.status == "wrong" and said in entry.sentence
    assert found.timed == ["eager"] and "median_ms" not in found.as_dict()["peers"]["spoiled"]


def test_ours_is_held_to_the_2x_rule(tiny, monkeypatch):
    slightly_off = Spoiled(lambda ys: [y + 1e-5 * y.std() for y in ys], key="ours")
    found = compare(tiny, slightly_off)
    assert found.parity is False and found.entry("ours").status == "wrong"
    assert "more than 2 times PyTorch's own" in found.entry("ours").sentence
    fine = compare(tiny, Spoiled(lambda ys: ys, key="ours"))
    assert fine.parity is True and fine.timed == ["eager", "ours"]
    assert compare(tiny).parity is None


def test_a_stack_that_fails_becomes_a_line_but_our_own_failure_is_raised(tiny):
    def explode(ys):
        raise RuntimeError("no such operator")

    entry = compare(tiny, Spoiled(explode)).entry("spoiled")
    assert entry.status == "failed" and "RuntimeError: no such operator" in entry.sentence
    with pytest.raises(RuntimeError, match="no such operator"):
        compare(tiny, Spoiled(explode, key="ours"))


def test_an_absent_package_is_a_line(tiny, monkeypatch):
    monkeypatch.setattr(peers.OpenVino, "packages", (("no_such_module", "openvino"),))
    entry = compare(tiny, peers.OpenVino(1)).entry("openvino")
    assert (entry.status, entry.sentence) == ("absent", "not installed: pip install openvino")


def test_error_is_relative_to_the_rms_of_the_reference():
    exact = [torch.full((2, 2), 10.0, dtype=torch.float64)]
    found = comparing.error([torch.tensor([[10.0, 10.0], [10.0, 11.0]])], exact)
    assert found == comparing.Error(pytest.approx(0.1), pytest.approx(0.05))
    own = comparing.Error(1e-6, 1e-7)
    assert comparing.Error(2e-6, 2e-7).within(2, own)
    assert not comparing.Error(3e-6, 1e-7).within(2, own) and not comparing.Error(1e-6, 1e-6).within(2, own)
    assert comparing.Error(3e-6, 1e-7).within(16, own)


def test_claims_take_the_better_of_a_group():
    rounds = [timing.Round([], {"eager": [3.0], "channels_last": [2.0], "openvino": [1.5], "ours": [1.0]})]
    session = timing.Session(["eager"], rounds, [False], {}, min_rounds=1)
    entries = [comparing.Entry(k, k, "", {}, "timed") for k in rounds[0].seconds]
    entries.append(comparing.Entry("compile", "compile", "", {}, "absent"))
    found = comparing.Comparison(1, entries, comparing.Error(0, 0), session, True)
    assert found.claims() == {
        "eager, better layout": ("channels_last", 2.0),
        "ONNX Runtime or OpenVINO, the better": ("openvino", 1.5),
        comparing.BEST: ("openvino", 1.5),
    }


def test_all_peers_must_have_the_same_threads(tiny):
    with pytest.raises(ValueError, match="same number of threads"):
        comparing.compare(tiny, torch.randn(1, 3, 16, 16), [peers.Eager(1), peers.EagerChannelsLast(2)])


def test_calibration_gives_batch_norms_the_statistics_of_activations():
    model, x = Tiny(), torch.randn(8, 3, 16, 16)
    subject.calibrate(model, x)
    y = model.conv(x)
    torch.testing.assert_close(model.bn.running_mean, y.mean((0, 2, 3)))
    assert not model.training and model.bn.momentum == 0.1


def test_peers_by_key():
    assert [p.key for p in peers.make_peers()] == list(peers.PEERS)
    assert [p.key for p in peers.make_peers(["ours", "eager"])] == ["eager", "ours"]
    with pytest.raises(ValueError, match="unknown peer tvm; known: eager"):
        peers.make_peers(["tvm"])


@pytest.mark.peer
@pytest.mark.parametrize("key", ["onnxruntime", "openvino", "ncnn", "mnn"])
def test_runtimes_agree_with_float64(tiny, key):
    found = compare(tiny, installed(key))
    assert found.entry(key).status == "timed", found.entry(key).sentence
    assert found.entry(key).error.rms < 1e-5


def installed(key, threads=1):
    """The peer, or a skip that says what is missing."""
    peer = peers.PEERS[key](threads)
    if peer.missing():
        pytest.skip(f"{peer.name}: {peer.missing()}")
    return peer


class Levels(Tiny):
    """Two outputs: a feature map with an odd number of channels, and logits."""

    def __init__(self):
        super().__init__()
        self.side = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        y = self.bn(self.conv(x)).relu()
        return [self.side(y), self.fc(y.mean((2, 3)))]


@pytest.mark.peer
@pytest.mark.parametrize("key", ["onnxruntime", "openvino", "ncnn", "mnn"])
def test_runtimes_return_feature_maps_in_order(key):
    model, x, peer = (
        subject.calibrate(Levels(), torch.randn(4, 3, 16, 16)),
        torch.randn(2, 3, 16, 16),
        installed(key),
    )
    call = peer.prepare(model, x)
    call()
    for y, expected in zip(call(), model(x), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.peer
def test_ncnn_tries_every_way_to_run_a_batch(tiny, monkeypatch):
    peer, tried = installed("ncnn", threads=2), []

    def note(ways):
        tried.extend(ways)
        return peers.Ncnn.SPREAD

    monkeypatch.setattr(peers, "fastest", note)
    x = torch.randn(3, 3, 16, 16)
    (y,) = peer.prepare(tiny, x)()
    torch.testing.assert_close(y, tiny(x), rtol=1e-4, atol=1e-4)
    assert tried == [peers.Ncnn.ONE_BY_ONE, peers.Ncnn.TOGETHER, peers.Ncnn.SPREAD]
    assert peer.settings()["batch"] == peers.Ncnn.SPREAD and peer.settings()["use_fp16_storage"] == "False"


@pytest.mark.peer
@pytest.mark.parametrize("way", [peers.Mnn.MODULE, peers.Mnn.SESSION])
def test_both_interfaces_of_mnn_give_the_same_numbers_each_time(tiny, monkeypatch, way, capfd):
    peer = installed("mnn")
    monkeypatch.setattr(peers, "fastest", lambda ways: way)
    x = torch.randn(2, 3, 16, 16)
    call = peer.prepare(tiny, x)
    for _ in range(3):
        torch.testing.assert_close(call()[0], tiny(x), rtol=1e-4, atol=1e-4)
    assert peer.settings()["interface"] == way and capfd.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("mode", [peers.Compile, peers.CompileAutotuned])
def test_torch_compile_has_the_weights_as_constants(mode, tiny, monkeypatch):
    from torch._inductor import freezing

    freeze, kept = freezing.freeze, []

    def spy(*args, **kwargs):
        graph, inputs = freeze(*args, **kwargs)
        kept.append(list(inputs))
        return graph, inputs

    monkeypatch.setattr(freezing, "freeze", spy)
    mode(1).prepare(tiny, torch.randn(1, 3, 16, 16))
    assert [len(inputs) for inputs in kept] == [1], "only the image is an input of the frozen graph"


@pytest.mark.slow
@pytest.mark.peer
def test_two_modes_of_torch_compile_live_side_by_side(tiny):
    torch._dynamo.utils.counters.clear()
    found = compare(tiny, peers.Compile(1), peers.CompileAutotuned(1))
    assert found.timed == ["eager", "compile", "autotune"], [e.sentence for e in found.entries]
    recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert recompiled == 2 and [found.entry(k).settings["mode"] for k in found.timed[1:]] == [
        "default",
        "max-autotune",
    ]


def test_a_converter_that_fails_is_a_refusal_with_its_words(tmp_path):
    import sys

    command = [sys.executable, "-c", "import sys; print('no such layer'); sys.exit(3)"]
    with pytest.raises(peers.Refused, match=r"could not convert it \(exit 3\): no such layer"):
        peers.run_tool(command, tmp_path, tmp_path / "product")
    with pytest.raises(peers.Refused, match=r"exit 0"):
        peers.run_tool([sys.executable, "-c", ""], tmp_path, tmp_path / "product")


def test_fastest_takes_the_quicker_way():
    import time

    ways = {"slow": lambda: time.sleep(0.02), "quick": lambda: time.sleep(0.001)}
    assert peers.fastest(ways) == "quick" and peers.fastest({"only": ways["slow"]}) == "only"


def test_printed_keeps_what_native_code_writes(capfd):
    import os

    with peers.printed() as said:
        os.write(1, b"one\ntwo\n")
        assert said() == "one / two"
    os.write(1, b"three")
    assert capfd.readouterr().out == "three"


def test_a_stack_that_spoils_its_input_is_wrong(tiny):
    calls = []

    def second_is_off(ys):
        calls.append(1)
        return ys if len(calls) == 1 else [y * 1.1 for y in ys]

    assert compare(tiny, Spoiled(second_is_off)).entry("spoiled").status == "wrong"


@native
def test_our_peer_runs_the_plan_and_refuses_to_time_anything_else(tiny):
    model = fb.resnet18(num_classes=7).eval()
    x = torch.randn(1, 3, 64, 64)
    call = peers.Ours(1).prepare(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(call()[0], model.forward_modules(x), rtol=1e-4, atol=1e-4)
    model.layer1[0].register_forward_hook(lambda *_: None)
    with pytest.raises(peers.Refused, match="hook"):
        peers.Ours(1).prepare(model, x)


# result files
