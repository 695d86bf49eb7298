"""Weights from the Hugging Face hub: a local server speaks as the hub does, huggingface_hub does the rest."""

import hashlib
import http.server
import io
import json
import sys
import threading

import pytest
import torch
from weights_checks import built, fresh, holds, refused, sha256
from weights_checks import saved as saved
from weights_checks import source as source

from fast_backbones import backbones
from fast_backbones.backbones import WeightsError, WeightsNotFoundError, load_weights, transforms_for

constants = pytest.importorskip("huggingface_hub.constants")
safetensors = pytest.importorskip("safetensors.torch")

TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
CONFIG = {
    "architecture": "resnet10",
    "num_classes": 5,
    "pretrained_cfg": {
        "input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "first_conv": "conv1",
    },
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The resolve endpoint of the hub: /user/repository/resolve/revision/file, HEAD and GET."""

    protocol_version = "HTTP/1.1"

    def answer(self, body: bool) -> None:
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        self.server.requests.append(f"{self.command} {repo}@{revision}/{name}")
        revisions = self.server.repositories.get(repo)
        error = None
        if revisions is None:
            error = (401, "RepoNotFound") if repo != "gated/net" else (403, "GatedRepo")
        elif revision not in revisions:
            error = (404, "RevisionNotFound")
        elif name not in revisions[revision]:
            error = (404, "EntryNotFound")
        data = b"" if error else revisions[revision][name]
        self.send_response(error[0] if error else 200)
        if error:
            self.send_header("X-Error-Code", error[1])
        commit = hashlib.sha1(repr(revisions.get(revision) if revisions else None).encode()).hexdigest()
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(source, tmp_path, monkeypatch):
    """The hub on this machine with user/net (main and v2) and user/bin, and an empty cache."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for switch in ("FB_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(switch, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    plain, config = safetensors.save(source), json.dumps(CONFIG).encode()
    other = safetensors.save({k: v * 2 if v.is_floating_point() else v for k, v in source.items()})
    pickled = io.BytesIO()
    torch.save(source, pickled)
    server.requests = []
    server.repositories = {
        "user/net": {
            "main": {"config.json": config, "model.safetensors": plain, "pytorch_model.bin": b"not read"},
            "v2": {"config.json": config, "model.safetensors": other},
        },
        "user/bin": {"main": {"pytorch_model.bin": pickled.getvalue()}},
    }
    server.digest = hashlib.sha256(plain).hexdigest()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.cache = tmp_path / "cache"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def change(hub, repo="user/net", **config) -> None:
    hub.repositories[repo]["main"]["config.json"] = json.dumps({**CONFIG, **config}).encode()


# What loads


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:", "HF-Hub:"])
def test_safetensors_come_first_and_once(hub, source, prefix):
    model = fresh()
    report = load_weights(model, f"{prefix}user/net")
    assert holds(model, source) and report.sha256 == hub.digest and report.loaded == len(source)
    assert not any("pytorch_model" in request for request in hub.requests)
    before = len([r for r in hub.requests if r.startswith("GET")])
    load_weights(fresh(), f"{prefix}user/net")
    assert len([r for r in hub.requests if r.startswith("GET")]) == before


def test_revisions(hub, source):
    load_weights(model := fresh(), "hf-hub:user/net@v2")
    assert torch.equal(model.conv1.weight, 2 * source["conv1.weight"])


def test_a_repository_without_safetensors_and_configuration(hub, source):
    before = dict((model := fresh()).default_cfg)
    report = load_weights(model, "hf-hub:user/bin")
    assert holds(model, source) and model.default_cfg == before and report.notes == ()


def test_model_functions_take_hub_ids(hub, source):
    model = built("hf-hub:user/net")
    assert model.num_classes == 5 and holds(model, source)


@pytest.mark.parametrize("switch", ["FB_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_means_the_cache(hub, source, monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with refused(
        fresh(), f"neither model.safetensors nor pytorch_model.bin in the hub's cache, and {switch}"
    ):
        load_weights(fresh(), "hf-hub:user/net")
    assert hub.requests == []
    monkeypatch.setenv(switch, "0")
    load_weights(fresh(), "hf-hub:user/net")
    requests = len(hub.requests)
    monkeypatch.setenv(switch, "1")
    load_weights(model := fresh(), "hf-hub:user/net")
    assert holds(model, source) and len(hub.requests) == requests
    assert model.default_cfg["interpolation"] == "bicubic"


def test_a_digest_may_be_asked_for(hub):
    assert load_weights(fresh(), "hf-hub:user/net", sha256=hub.digest[:8]).sha256 == hub.digest
    with refused(model := fresh(), "has SHA-256 .*, expected 00000000"):
        load_weights(model, "hf-hub:user/net", sha256="0" * 8)


# What config.json decides


def test_preprocessing_is_taken_over(hub):
    report = load_weights(model := fresh(), "hf-hub:user/net")
    facts = transforms_for(model).facts
    assert (facts.height, facts.resize, facts.interpolation) == (288, 303, "bicubic")
    assert facts.mean == (0.5, 0.4, 0.3) and any("bicubic" in note for note in report.notes)
    load_weights(grey := fresh(in_chans=1), "hf-hub:user/net")
    assert grey.default_cfg["mean"] == pytest.approx((0.4,)) and grey.default_cfg["input_size"] == (
        1,
        288,
        288,
    )


@pytest.mark.parametrize(
    "config",
    [
        {"interpolation": "random"},
        {"mean": 0.5},
        {"mean": []},
        {"mean": {"red": 0.5}},
        {"mean": [0.5, 0.5, float("nan")]},
        {"std": [0, 0, 0]},
        {"input_size": "big"},
        {"input_size": [3, 0, 224]},
        {"input_size": [3, float("inf"), 224]},
    ],
    ids=str,
)
def test_preprocessing_that_makes_no_sense_is_left_alone(hub, config, caplog):
    change(hub, pretrained_cfg={**CONFIG["pretrained_cfg"], **config})
    before = dict((model := fresh()).default_cfg)
    load_weights(model, "hf-hub:user/net")
    assert model.default_cfg == before and "preprocessing of config.json not taken over" in caplog.text


def test_a_flat_configuration(hub, source):
    hub.repositories["user/net"]["main"]["config.json"] = b'{"num_classes": 5, "crop_pct": 0.9}'
    load_weights(model := fresh(), "hf-hub:user/net")
    assert model.default_cfg["crop_pct"] == 0.9 and holds(model, source)


def test_a_wrong_number_of_classes_is_an_error(hub):
    change(hub, num_classes=7)
    with refused(model := fresh(), r"config.json says 7 classes, fc.weight is \[5, 128\]"):
        load_weights(model, "hf-hub:user/net")


def test_zero_classes(hub, source, caplog):
    headless = {k: v for k, v in source.items() if not k.startswith("fc.")}
    hub.repositories["user/net"]["main"]["model.safetensors"] = safetensors.save(headless)
    with refused(model := fresh(), r"2 of 38 entries are missing \(fc"):
        change(hub)
        load_weights(model, "hf-hub:user/net")
    change(hub, num_classes=0)
    model = built("hf-hub:user/net")
    assert model.num_classes == 0 and model(torch.randn(1, 3, 64, 64)).shape == (1, 128)
    model = built("hf-hub:user/net", num_classes=3)
    assert model.num_classes == 3 and holds(model, source, but=("fc",))
    assert "classifier fc not loaded: the checkpoint has none" in caplog.text
    with refused(model := fresh(), "are missing"):
        load_weights(model, "hf-hub:user/net", head="strict")


def test_another_architecture_is_named(hub):
    change(hub, architecture="vit_base")
    wrong = {"blocks.0.weight": torch.ones(1)}
    hub.repositories["user/net"]["main"]["model.safetensors"] = safetensors.save(wrong)
    with refused(model := fresh(), "does not fit resnet: 32 of 38 .* that it is a vit_base"):
        load_weights(model, "hf-hub:user/net")


# What is refused


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("nobody/nothing", WeightsNotFoundError, "the hub has no repository nobody/nothing"),
        ("user/net@v3", WeightsNotFoundError, "user/net has no revision v3"),
        ("gated/net", WeightsError, "gated, HF_TOKEN must give access"),
        ("a/b/c", WeightsError, "is not a hub id: hf-hub:user/repository"),
        ("../net", WeightsError, "is not a hub id"),
        ("user/net@", WeightsError, "is not a hub id"),
        ("", WeightsError, "is not a hub id"),
        ("user/net--x", WeightsError, "could not be fetched from the hub"),
    ],
)
def test_what_the_hub_does_not_have(hub, name, error, message):
    with refused(model := fresh(), message) as caught:
        load_weights(model, f"hf-hub:{name}")
    assert isinstance(caught.value, error)


def test_a_repository_without_weights(hub):
    hub.repositories["user/net"]["main"].clear()
    with refused(model := fresh(), "neither model.safetensors nor pytorch_model.bin in that repository"):
        load_weights(model, "hf-hub:user/net")


@pytest.mark.parametrize("content, message", [(b"{", "not JSON"), (b"\xff", "not JSON"), (b"[1]", "a list")])
def test_a_broken_configuration(hub, content, message):
    hub.repositories["user/net"]["main"]["config.json"] = content
    with refused(model := fresh(), message):
        load_weights(model, "hf-hub:user/net")


def test_a_flipped_bit_in_the_cache_is_seen(hub):
    load_weights(fresh(), "hf-hub:user/net")
    blob = hub.cache / "models--user--net" / "blobs" / hub.digest
    assert sha256(blob) == hub.digest
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with refused(model := fresh(), "is damaged .its SHA-256 is .*: delete it"):
        load_weights(model, "hf-hub:user/net")


def test_truncated_and_pickled_files(hub):
    files = hub.repositories["user/net"]["main"]
    files["model.safetensors"] = files["model.safetensors"][:-100]
    with refused(model := fresh(), "not a complete .safetensors file"):
        load_weights(model, "hf-hub:user/net")
    code = io.BytesIO()
    torch.save(fresh(), code)
    hub.repositories["user/bin"]["main"]["pytorch_model.bin"] = code.getvalue()
    with refused(model := fresh(), "pickled code .*refused"):
        load_weights(model, "hf-hub:user/bin")


def test_an_unreachable_hub(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of huggingface_hub
    hub.shutdown()
    hub.server_close()
    with refused(model := fresh(), "the hub cannot be reached and config.json is not in its cache"):
        load_weights(model, "hf-hub:user/net")


def test_huggingface_hub_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused(model := fresh(), "needs `pip install huggingface_hub`"):
        load_weights(model, "hf-hub:user/net")
    assert backbones.resnet18 is not None
