"""Weights from an http server: verified, cached, private, and nothing left behind when it fails."""

import hashlib
import http.server
import io
import logging
import stat
import threading

import pytest
import torch
from fast_backbones.backbones._download import _Progress
from weights_checks import built, fresh, holds, refused, sha256
from weights_checks import saved as saved
from weights_checks import source as source

from fast_backbones.backbones import load_weights


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
