"""Loading weights: what is accepted, what is adapted, and that a refusal is one sentence without effect."""

import contextlib
import hashlib
import http.server
import importlib
import importlib.util
import io
import logging
import os
import pickle
import random
import shutil
import stat
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from fast_backbones.backbones._download import _Progress
from fast_backbones.backbones._weights import adapt_input_channels, build_with_weights
from torch import nn

from fast_backbones import backbones
from fast_backbones.backbones import WeightsError, load_weights, resnet

CLASSES = 5


def fresh(seed: int = 0, num_classes: int = CLASSES, **options) -> nn.Module:
    """A ResNet with two blocks in all, so that building, saving and hashing it takes milliseconds."""
    torch.manual_seed(seed)
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 0, 0), num_classes=num_classes, **options).eval()


def built(weights, **options) -> nn.Module:
    """The same network, built as the model functions build theirs when they get `weights=`."""
    return build_with_weights(
        resnet.ResNet, weights, options, block=resnet.BasicBlock, layers=(1, 1, 0, 0)
    ).eval()


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    """A complete state dict that no freshly built model has."""
    return {k: v + 1 if k.endswith("running_mean") else v for k, v in fresh(seed=1).state_dict().items()}


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(source, path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def holds(model: nn.Module, state: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[k], state[k].to(own[k].dtype)) for k in own if not k.startswith(but or "-"))


@contextlib.contextmanager
def refused(model: nn.Module, match: str):
    """The block raises one readable WeightsError, and the model keeps every bit and every module."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(WeightsError, match=match) as caught:
        yield caught
    assert len(str(caught.value)) < 900
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert dict(model.named_modules()) == modules


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
    from test_models import peer

    theirs = importlib.import_module(f"{peer('timm').__name__}.models").adapt_input_conv
    for weight in (torch.randn(8, 3, 7, 7), torch.randn(8, 3, 3, 3).half()):
        assert torch.equal(adapt_input_channels(weight, channels), theirs(channels, weight.clone()))


# What is refused, and leaves the model as it was


def written(path: Path, what: object) -> Path:
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        torch.save(what, path)
    return path


class Code:
    def __reduce__(self):
        return os.mkdir, ("pickled-code-ran",)


def test_missing_file_and_folder(tmp_path):
    model = fresh()
    with refused(model, "there is no weights file .*nowhere.pth"):
        load_weights(model, tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        load_weights(model, "hf-hub:nobody/nothing")
    with refused(model, "is not a file"):
        load_weights(model, tmp_path)
    with pytest.raises(TypeError, match="path, a URL or a state dict"):
        load_weights(model, 3)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999], ids=["head", "half", "nearly all"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind, keep, source, tmp_path):
    whole = io.BytesIO()
    if kind == "safetensors":
        save = pytest.importorskip("safetensors.torch").save
        whole.write(save(source))
    else:
        torch.save(source, whole, _use_new_zipfile_serialization=kind == "zip")
    data = whole.getvalue()
    path = written(tmp_path / "x.bin", data[: int(len(data) * keep)])
    with refused(model := fresh(), "truncated or damaged|not a complete .safetensors file"):
        load_weights(model, path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.pth", b"", "is empty"),
        ("page.pth", b"<!DOCTYPE html><html>404</html>", "is not a checkpoint"),
        ("noise.pth", bytes(range(255, 0, -1)) * 40, "is not a checkpoint"),
        ("page.safetensors", b"<!DOCTYPE html><html>404</html>", "not a complete .safetensors"),
        ("list.pth", [torch.ones(2)], "holds a list, not a state dict"),
        ("tensor.pth", torch.ones(2), "holds a Tensor, not a state dict"),
        ("nothing.pth", {}, "empty state dict"),
        ("numbers.pth", {"conv1.weight": torch.ones(1), "lr": 0.1}, "no tensors: lr"),
        ("integers.pth", {1: torch.ones(2)}, "no tensors: 1"),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v and " " not in v else "",
)
def test_files_that_are_no_checkpoint(name, content, message, tmp_path):
    with refused(model := fresh(), message):
        load_weights(model, written(tmp_path / name, content))


def test_other_archives(tmp_path):
    model = fresh()
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with refused(model, "truncated or damaged"):
        load_weights(model, tmp_path / "x.pth")


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*TorchScript archive.*:UserWarning"
)
def test_torchscript_archives(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "x.pt")
    with refused(model := fresh(), "TorchScript archive"):
        load_weights(model, tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "whole model"])
def test_pickled_code_is_refused_and_not_run(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "pickle":
        Path("x.pth").write_bytes(pickle.dumps({"conv1.weight": Code()}))
    elif kind == "whole model":
        torch.save(fresh(), "x.pth")
    else:
        torch.save({"conv1.weight": Code()}, "x.pth", _use_new_zipfile_serialization=kind == "zip")
    with refused(model := fresh(), "and was refused") as caught:
        load_weights(model, "x.pth")
    assert not Path("pickled-code-ran").exists()
    if kind in ("zip", "legacy"):
        assert "mkdir" in str(caught.value)


def test_wrong_architecture_names_a_handful_and_counts_the_rest(source):
    model = backbones.resnet50(num_classes=CLASSES)
    with refused(model, "does not fit resnet50") as caught:
        load_weights(model, source)
    text = str(caught.value)
    assert " of 320 entries are missing (layer1.0.conv3.weight, " in text and ", and 2" in text
    assert "have another shape (layer1.0.conv1.weight [64, 64, 3, 3], expected [64, 64, 1, 1], " in text
    grouped = backbones.resnext50(num_classes=CLASSES)
    with refused(grouped, r"does not fit resnext50_32x4d: \d+ have another shape"):
        load_weights(grouped, model.state_dict())
    with refused(small := fresh(), "2 are unexpected .extra.weight, extra.bias."):
        load_weights(small, {**source, "extra.weight": torch.ones(1), "extra.bias": torch.ones(1)})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.index_fill(0, torch.tensor([1]), float("nan")),
            "conv1.weight has 147 non-finite of 9408",
        ),
        (lambda t: t / 0, "conv1.weight has 9408 non-finite"),
        (lambda t: t.double(), "conv1.weight is float64, the model has float32, cast=True would narrow it"),
        (lambda t: t.to(torch.int64), "conv1.weight is int64, the model has float32"),
        (lambda t: t > 0, "conv1.weight is bool"),
        (lambda t: t.to(torch.complex64), "conv1.weight is complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "conv1.weight is float8_e4m3fn"),
        (lambda t: t.to("meta"), "not a plain dense tensor"),
        (lambda t: t.to_sparse(), "not a plain dense tensor"),
    ],
    ids=["nan", "inf", "float64", "int64", "bool", "complex", "float8", "meta", "sparse"],
)
def test_unusable_values(change, message, source):
    with refused(model := fresh(), message):
        load_weights(model, {**source, "conv1.weight": change(source["conv1.weight"])})


def test_the_last_tensor_is_checked_before_the_first_is_copied(source):
    with refused(model := fresh(num_classes=9), "fc.bias has 5 non-finite"):
        load_weights(model, {**source, "fc.bias": source["fc.bias"] * float("inf")}, head="adopt")


def test_narrowing_that_overflows_is_refused(source):
    with refused(model := fresh().half(), "non-finite"):
        load_weights(model, {**source, "fc.bias": torch.full((CLASSES,), 1e6)}, cast=True)


def test_digests_of_local_files(saved, source, tmp_path):
    digest = sha256(saved)
    for expected in (digest, digest.upper(), digest[:8]):
        load_weights(fresh(), saved, sha256=expected)
    model = fresh()
    with refused(model, "has SHA-256 .*, expected 0{64}"):
        load_weights(model, saved, sha256="0" * 64)
    with pytest.raises(ValueError, match="hexadecimal"):
        load_weights(model, saved, sha256="1234")
    with pytest.raises(TypeError, match="state dict"):
        load_weights(model, source, sha256=digest)
    assert load_weights(model, shutil.copy(saved, tmp_path / f"net-{digest[:8]}.pth")).sha256 in (
        digest,
        None,
    )
    with refused(model, "its name promises deadbeef"):
        load_weights(model, shutil.copy(saved, tmp_path / "net-deadbeef.pth"))
    load_weights(model, shutil.copy(saved, tmp_path / "net-20250131.pth"))  # a date, not a digest


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_load_or_are_refused(kind, tmp_path):
    """Bytes changed at random: a flipped bit inside a tensor goes unseen, the rest is a WeightsError."""
    model = nn.Sequential(nn.Linear(8, 4))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    whole = io.BytesIO()
    if kind == "safetensors":
        whole.write(pytest.importorskip("safetensors.torch").save(state))
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "zip")
    dice, refusals = random.Random(0), 0
    for _ in range(150):
        data = bytearray(whole.getvalue())
        for _ in range(dice.choice((1, 3, 20))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path = written(tmp_path / "x.bin", bytes(data))
        try:
            load_weights(model, path)
        except WeightsError:
            refusals += 1
            assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        else:
            model.load_state_dict(state)
    assert 50 < refusals < 150


# Downloads


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        path, _, query = self.path.partition("?")
        data = self.server.files.get(path)
        if data is None:
            return self.send_error(404)
        if query == "redirect":
            self.send_response(302)
            self.send_header("Location", path)
            return self.end_headers()
        self.send_response(200)
        if query != "no-length":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if query == "cut" else data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(saved, tmp_path, monkeypatch):
    """A local HTTP server with the weights under two names, and an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home" / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for switch in ("FB_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    data = saved.read_bytes()
    server.digest = sha256(saved)
    server.files = {"/net.pth": data, f"/net-{server.digest[:8]}.pth": data}
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.cache = tmp_path / "home" / "torch" / "hub" / "checkpoints"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def cached(web) -> list[str]:
    return sorted(p.name for p in web.cache.iterdir()) if web.cache.exists() else []


def test_download_verifies_caches_and_is_private(web, source):
    name = f"net-{web.digest[:8]}.pth"
    model = fresh()
    report = load_weights(model, f"{web.url}/{name}")
    assert holds(model, source) and report.sha256 == web.digest
    assert cached(web) == [name] and len(web.requests) == 1
    assert (
        stat.S_IMODE(web.cache.stat().st_mode) == stat.S_IMODE((web.cache / "../..").stat().st_mode) == 0o700
    )
    assert stat.S_IMODE((web.cache / name).stat().st_mode) == 0o600
    assert holds(built(f"{web.url}/{name}"), source)
    assert len(web.requests) == 1  # from the cache


@pytest.mark.parametrize("how", ["argument", "fragment", "no-length", "redirect"])
def test_download_with_a_digest_given_separately(web, source, how):
    model, url = fresh(), f"{web.url}/net.pth"
    if how == "fragment":
        load_weights(model, f"{url}#sha256={web.digest}")
    else:
        load_weights(model, url if how == "argument" else f"{url}?{how}", sha256=web.digest)
    assert holds(model, source) and cached(web) == [f"net-{web.digest[:16]}.pth"]


def test_download_without_a_digest_is_refused(web):
    with refused(model := fresh(), "needs its SHA-256"):
        load_weights(model, f"{web.url}/net.pth")
    assert web.requests == []


@pytest.mark.parametrize(
    "address, message",
    [
        ("/net-00000000.pth", "404"),
        ("/net.pth?cut#sha256=DIGEST", "broke off after|IncompleteRead"),
        ("/net.pth#sha256=" + 64 * "0", "has SHA-256 .*, expected 000"),
        ("/#sha256=DIGEST", "usable file name"),
        ("/%2e%2e%2fescape.pth#sha256=DIGEST", "404"),
        ("/..%2f.hidden#sha256=DIGEST", "usable file name"),
    ],
    ids=["404", "cut off", "wrong content", "no name", "path tricks", "hidden file"],
)
def test_failed_downloads_leave_nothing_behind(web, address, message):
    with refused(model := fresh(), message):
        load_weights(model, (web.url + address).replace("DIGEST", web.digest))
    assert cached(web) == []


def test_messages_keep_secrets(web):
    url = f"{web.url}/absent.pth?token=secret".replace("//", "//user:secret@")
    with refused(model := fresh(), "download of http://127.0.0.1:.*/absent.pth failed") as caught:
        load_weights(model, url, sha256=web.digest)
    assert "secret" not in str(caught.value)


def test_unreachable_server(web):
    web.shutdown()
    web.server_close()
    with refused(model := fresh(), "download of http://127.0.0.1.* failed: .*refused"):
        load_weights(model, f"{web.url}/net.pth", sha256=web.digest)


def test_a_damaged_cache_is_replaced(web, source, caplog):
    name = f"net-{web.digest[:8]}.pth"
    load_weights(fresh(), f"{web.url}/{name}")
    data = bytearray((web.cache / name).read_bytes())
    data[len(data) // 2] ^= 1  # a flipped bit would load without a word
    (web.cache / name).write_bytes(data)
    load_weights(model := fresh(), f"{web.url}/{name}")
    assert holds(model, source) and len(web.requests) == 2 and "downloading it again" in caplog.text


@pytest.mark.parametrize("switch", ["FB_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(web, source, monkeypatch, switch):
    url = f"{web.url}/net-{web.digest[:8]}.pth"
    monkeypatch.setenv(switch, "1")
    with refused(model := fresh(), switch):
        load_weights(model, url)
    monkeypatch.setenv(switch, "0")
    load_weights(model, url)
    monkeypatch.setenv(switch, "1")
    load_weights(model, url)
    assert holds(model, source) and len(web.requests) == 1


def test_files_that_share_a_name_do_not_meet_in_the_cache(web, source):
    other = io.BytesIO()
    torch.save({k: v * 2 for k, v in source.items()}, other)
    web.files["/v2/net.pth"] = other.getvalue()
    digest = hashlib.sha256(other.getvalue()).hexdigest()
    load_weights(a := fresh(), f"{web.url}/net.pth", sha256=web.digest)
    load_weights(b := fresh(), f"{web.url}/v2/net.pth", sha256=digest)
    assert (
        holds(a, source) and torch.equal(b.conv1.weight, 2 * source["conv1.weight"]) and len(cached(web)) == 2
    )


def test_a_cache_open_to_everybody_is_reported(web, caplog):
    web.cache.mkdir(parents=True)
    web.cache.chmod(0o777)
    load_weights(fresh(), f"{web.url}/net.pth", sha256=web.digest)
    assert "writable by every user" in caplog.text


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log"])
def test_progress_of_long_downloads(terminal, monkeypatch, caplog):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", screen)
    with (
        caplog.at_level(logging.INFO, logger="fast_backbones.weights"),
        _Progress("net.pth", True) as progress,
    ):
        progress.show(1_000_000, 4_000_000)  # within the first second: nothing
        progress.next = 0.0
        progress.show(2_000_000, 4_000_000)
    text = screen.getvalue() if terminal else caplog.text
    assert "net.pth: 2.0 MB of 4.0 MB (50%)" in text and "1.0 MB" not in text
    assert screen.getvalue().endswith("\n") if terminal else screen.getvalue() == ""
