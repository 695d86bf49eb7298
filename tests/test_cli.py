"""The command line: a run on a photograph from end to end, and what people see when they ask for nonsense."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fast_backbones.bench import peers
from fast_backbones.bench.models import table_console
from typer.testing import CliRunner

import fast_backbones as fb
from fast_backbones import cli, model_tables
from fast_backbones.cli import common, report

QUICK = ["--no-compile", "--budget", "0", "--threads", "1"]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    noise = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(path)
    return path


@pytest.fixture
def small(monkeypatch):
    """Models see 64 x 64 images, so that a run takes a moment only."""
    build = common.build

    def build_small(name, weights, **options):
        model = build(name, weights, **options)
        model.default_cfg["input_size"] = (3, 64, 64)
        return model

    monkeypatch.setattr(common, "build", build_small)


def test_run_prints_plan_times_errors_and_classes(photo, small):
    result = invoke("run", photo, "--model", "resnet18", *QUICK)
    assert result.exit_code == 0, result.output
    out = result.stdout
    for part in ("60 x 40", "weights: random", "plan: ", "eager NCHW", "eager channels_last", "max error"):
        assert part in out
    assert "interleaved rounds" in out and "of random weights" in out
    if fb.build_info()["native"]:
        assert "within twice PyTorch's own" in out and "x as fast as eager, better layout" in out


def test_run_as_json(photo, small):
    result = invoke("run", photo, "--model", "resnet18", "--batch", 2, "--json", *QUICK)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["model"] == "resnet18" and data["weights"] == "random" and len(data["top5"]) == 5
    found = data["comparison"]
    assert found["batch"] == 2 and found["peers"]["eager"]["status"] == "timed"
    assert found["parity_2x"] is (True if fb.build_info()["native"] else None)
    assert data["machine"]["torch"] == torch.__version__


def test_run_loads_weights_and_names(photo, small, tmp_path):
    weights, names = tmp_path / "w.pth", tmp_path / "names.txt"
    model = fb.resnet18()
    torch.nn.init.zeros_(model.fc.weight)
    torch.nn.init.zeros_(model.fc.bias)
    model.fc.bias.data[7] = 100.0
    torch.save(model.state_dict(), weights)
    names.write_text("".join(f"thing {i}\n" for i in range(1000)))
    result = invoke("run", photo, "--model", "resnet18", "--weights", weights, "--classes", names, *QUICK)
    assert result.exit_code == 0, result.output
    assert "100.00%  class 7  thing 7" in result.stdout and "random" not in result.stdout


def test_run_fails_when_our_numbers_are_wrong(photo, small, monkeypatch):
    class Wrong(peers.Eager):
        key, name = "ours", "fast_backbones"

        def prepare(self, model, x):
            call = super().prepare(model, x)
            return lambda: [y + 1e-3 for y in call()]

    monkeypatch.setitem(peers.PEERS, "ours", Wrong)
    result = invoke("run", photo, "--model", "resnet18", *QUICK)
    assert result.exit_code == 1
    assert "more than 2 times PyTorch's own" in result.stdout and "NOT within" in result.stdout


def test_run_says_when_there_is_no_native_library(photo, small, monkeypatch):
    from fast_backbones.kernels import _ext

    monkeypatch.setattr(_ext, "native", lambda: None)
    monkeypatch.setattr(_ext, "why_not", lambda: "nobody built it")
    result = invoke("run", photo, "--model", "resnet18", *QUICK)
    assert result.exit_code == 0, result.output
    assert "plan: none, the modules run through PyTorch" in result.stdout
    assert "fast_backbones absent: no native library: nobody built it" in result.stdout


@pytest.mark.parametrize("sample", ["china", "flower"])
def test_samples_are_photographs(sample):
    pytest.importorskip("sklearn")
    from fast_backbones.bench.image import load_image

    assert load_image(f"sample:{sample}").size == (640, 427)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["run", "absent.jpg"], "there is no image absent.jpg; samples that need no file: sample:china"),
        (["run", "sample:dog"], "there is no sample 'dog', only china and flower"),
        (["run", "{text}"], "is not an image that Pillow can read"),
        (["run", "{photo}", "--model", "resnet5O"], "no model is called 'resnet5O': did you mean resnet50"),
        (["run", "{photo}", "--model", "resnet18", "--weights", "absent.pth"], "absent.pth"),
        (
            ["run", "{photo}", "--model", "resnet18", "--weights", "https://a/b.pth"],
            "https://a/b.pth: a down",
        ),
        (
            ["run", "{photo}", "--model", "resnet18", "--weights", "hf-hub:a/b/c"],
            "hf-hub:a/b/c is not a hub id",
        ),
        (["run", "{photo}", "--model", "resnet18", "--classes", "{text}"], "has 1 names, the model has 1000"),
        (["info", "resnext50_32x5d"], "did you mean resnext50_32x4d"),
        (["explain", "resnet"], "did you mean"),
        (["explain", "keras:resnet50"], "'keras' is neither timm nor torchvision"),
        (["explain", "lenet5", "--html", "absent/plan.html"], "there is no folder absent"),
        (["run", "{photo}", "--out", "a.npy"], "--out has no use for a photograph"),
        (["run", "{folder}"], "is a folder: --out features.npy or"),
        (["list", "*vit*"], "no model matches '*vit*'"),
        (["list", "*vit*", "--family", "resnet"], "no model matches '*vit*' in the family ResNet"),
        (["list", "--family", "vit"], "no family is called 'vit'; there are"),
        (["bench", "resnet5O"], "fast-backbones bench: no model is called 'resnet5O'"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_mistakes_are_explained(arguments, said, photo, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    filled = [a.format(folder=tmp_path, text=text, photo=photo) for a in arguments]
    result = invoke(*filled)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and "Traceback" not in result.output


def test_truncated_images_are_explained(photo, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:2000])
    result = invoke("run", broken)
    assert result.exit_code == 2 and "cannot read" in result.stderr


def test_list():
    result = invoke("list", "resnet18")
    assert result.exit_code == 0 and "resnet18" in result.stdout and "11.69" in result.stdout
    assert "torchvision, timm" in result.stdout and "3x224x224" in result.stdout
    result = invoke("list", "*50*", "--family", "resnext")
    assert "resnext50_32x4d" in result.stdout and "resnet50" not in result.stdout
    rows = json.loads(invoke("list", "res*18", "--json").stdout)
    assert [row["name"] for row in rows] == ["resnet18"] and rows[0]["params"] == 11_689_512
    lines = invoke("list", "resnext50_32x4d", "--markdown").stdout.splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert "| `resnext50_32x4d` | `resnext50` | 3x224x224 | 25.03 | 4.23 |" in lines[2]


def test_info():
    result = invoke("info", "resnext50")
    for part in (
        "resnext50_32x4d",
        "25,028,904",
        "4.23 G",
        "shorter side to 256 (bilinear)",
        "layer4",
        "2048",
    ):
        assert part in result.stdout
    data = json.loads(invoke("info", "resnet18", "--json").stdout)
    assert data["params"] == 11_689_512 and data["preprocessing"]["interpolation"] == "bilinear"
    assert data["tap_modules"] == ["relu", "layer1", "layer2", "layer3", "layer4"]


def test_parameters_of_auxiliary_heads_are_told_apart():
    facts = dataclasses.replace(fb.model_info("resnet18"), params=27_161_264, aux_params=3_326_696)
    assert "| 23.83 (27.16 with aux) |" in model_tables.markdown([facts])
    console = table_console()
    with console.capture() as captured:
        console.print(model_tables.facts_table(facts))
    assert "23,834,568, and 3,326,696 of auxiliary heads in training" in captured.get()


def test_the_table_goes_into_a_file(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{model_tables.BEGIN}\nold\n{model_tables.END}\nafter\n")
    assert invoke("list", "resnet18", "--into", page).exit_code == 0
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", model_tables.BEGIN] and lines[-2:] == [model_tables.END, "after"]
    assert len(lines) == 7 and "`resnet18`" in lines[4] and "old" not in lines
    page.write_text("nothing")
    for path in (page, tmp_path / "absent.md", tmp_path):
        assert invoke("list", "resnet18", "--into", path).exit_code == 2


@pytest.mark.skipif(not fb.build_info()["native"], reason="the compiled library is absent")
def test_explain_prints_each_step():
    result = invoke("explain", "resnet18", "--repeats", 1)
    assert result.exit_code == 0 and "layer1.0.conv1" in result.stdout and "GFLOP/s" in result.stdout
    steps = json.loads(invoke("explain", "resnet18", "--repeats", 1, "--json").stdout)["steps"]
    assert len(steps) > 10 and all(step["kernel"] and step["ms"] > 0 for step in steps)


@pytest.mark.skipif(not fb.build_info()["native"], reason="the compiled library is absent")
def test_explain_writes_a_page_and_a_chart(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional package")
    page, chart = tmp_path / "plan.html", tmp_path / "plan.png"
    result = invoke("explain", "lenet5", "--repeats", 1, "--html", page, "--png", chart)
    assert result.exit_code == 0 and "of bound" in result.stdout
    assert f"written: {page}" in result.stderr and f"written: {chart}" in result.stderr
    assert "lenet5, 1 x 1 x 32 x 32" in page.read_text() and chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.peer
@pytest.mark.parametrize("model", ["torchvision:squeezenet1_1", "timm:mobilenetv3_small_050"])
def test_explain_takes_networks_of_others(model):
    if any(importlib.util.find_spec(name) is None for name in ("torchvision", model.partition(":")[0])):
        pytest.skip("torchvision or timm is not installed")
    result = invoke("explain", model, "--repeats", 1, "--size", 64, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["reason"] is None or not fb.build_info()["native"]
    assert all(step["isa"] and "missed" in step for step in found["steps"])


def test_explain_without_the_library_of_others(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    result = invoke("explain", "timm:resnet50d")
    assert result.exit_code == 2 and "timm:resnet50d needs timm: pip install timm" in result.stderr


def test_env_has_what_a_bug_report_needs(monkeypatch):
    monkeypatch.setenv("FB_BACKEND", "auto")
    report = json.loads(invoke("env", "--json").stdout)
    assert report["machine"]["torch"] == torch.__version__ and report["build"] == fb.build_info()
    assert report["environment"]["FB_BACKEND"] == "auto" and report["packages"]["numpy"]
    text = invoke("env").stdout
    assert "[build]" in text and "FB_BACKEND: auto" in text
    assert report["torch"]["threads"] == torch.get_num_threads() and "libc" in report["system"]
    if fb.build_info()["native"]:
        assert report["kernels"]["instruction set in use"] == fb.build_info()["isa"]


def test_env_names_nobody(monkeypatch):
    home = Path("/home/alice")
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr(report.platform, "node", lambda: "wonderland")
    monkeypatch.setattr(report, "user_name", lambda: "alice")
    monkeypatch.setenv("FB_CACHE_DIR", "/home/alice/cache-of-alice at wonderland")
    monkeypatch.setenv("LD_PRELOAD", "/home/alice/lib/liballoc.so")
    values = report.cleaned(report.environment())
    assert values["FB_CACHE_DIR"] == "~/cache-of-USER at HOST" and values["LD_PRELOAD"] == "liballoc.so"
    assert report.cleaned({"a": ["alice", 1, "malice"]}) == {"a": ["USER", 1, "malice"]}


def test_bench_hands_its_options_on(monkeypatch):
    from fast_backbones.bench import models

    seen = []
    monkeypatch.setattr(models, "main", lambda args, prog: seen.append((args, prog)) or 0)
    assert invoke("bench", "resnet18", "--batch", 1, 16, "--json").exit_code == 0
    assert seen == [(["resnet18", "--batch", "1", "16", "--json"], "fast-backbones bench")]


def test_module_entry_point_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "fast_backbones", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"fast_backbones {fb.__version__}\n", done.stderr
