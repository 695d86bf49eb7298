"""examples/ray_features.py on a local cluster of two CPUs: the model's own bits, resumable, nothing lost."""

import os
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, assert_bit_equal, needs_native
from PIL import Image

import fast_backbones as fb

ray = pytest.importorskip("ray", reason="pip install 'ray[data]'")
pq = pytest.importorskip("pyarrow.parquet")

PROGRAM = ROOT / "examples" / "ray_features.py"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two CPUs, which all runs of this file share."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in QUIET.items():
            patch.setenv(key, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        context = ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False
        )
        yield context.address_info["address"]
        ray.shutdown()


@pytest.fixture
def photos(tmp_path):
    """Five crops of scikit-learn's photographs, PNG and JPEG, one in a folder below, and one broken file."""
    load = pytest.importorskip("sklearn.datasets").load_sample_image
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "c.png", "below/d.jpg", "e.JPG"]):
        image = Image.fromarray(load("china.jpg" if i % 2 else "flower.jpg"))
        image.crop((30 * i, 20 * i, 260 + 30 * i, 240 + 10 * i)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def rows(output) -> dict[str, dict]:
    found = [row for file in output.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len({row["path"] for row in found}) == len(found), "a file has two rows"
    return {row["path"]: row for row in found}


def expected(photos, paths, **options):
    """What the model gives when it is called directly, all images in one batch."""
    torch.manual_seed(0)
    model = fb.create_model("resnet18", **options).eval()
    images = [fb.transforms_for(model)(Image.open(photos / path)) for path in paths]
    with torch.inference_mode():
        return model(torch.stack(images))


@needs_native
def test_embeddings_are_those_of_the_model_and_a_second_run_does_what_is_new(cluster, photos, tmp_path):
    output = tmp_path / "features"
    weights = tmp_path / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(fb.resnet18().state_dict(), weights)
    arguments = [photos, output, "--model", "resnet18", "--weights", weights, "--batch-size", 2]
    arguments += ["--address", cluster]
    (photos / "e.JPG").rename(photos / "later")
    done = run(*arguments)
    assert "4 written, 1 unreadable" in done.stdout and "images/s by 1 actors" in done.stdout
    assert "unreadable: broken.png: " in done.stderr

    (photos / "later").rename(photos / "e.JPG")
    before = {file: file.stat().st_mtime_ns for file in output.glob("*.parquet")}
    half = output / "half.parquet"
    half.write_bytes(next(iter(before)).read_bytes()[:100])  # as an interrupted run leaves it
    done = run(*arguments)
    assert "6 images, 5 of them done before" in done.stderr and "half.parquet is incomplete" in done.stderr
    assert "1 written, 0 unreadable" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "0 written, 0 unreadable" in run(*arguments).stdout  # without a cluster's help

    found = rows(output)
    good = ["a.png", "b.jpg", "below/d.jpg", "c.png", "e.JPG"]
    assert sorted(found) == sorted([*good, "broken.png"])
    assert found["broken.png"]["embedding"] is None and found["broken.png"]["error"]
    assert not any(found[path]["error"] for path in good)
    embeddings = torch.tensor([found[path]["embedding"] for path in good])
    torch.manual_seed(0)
    model = fb.resnet18(weights=str(weights), num_classes=0).eval()
    images = [fb.transforms_for(model)(Image.open(photos / path)) for path in good]
    with torch.inference_mode():
        assert_bit_equal(embeddings, model(torch.stack(images)))


@needs_native
def test_maps_and_settings(cluster, photos, tmp_path):
    output = tmp_path / "maps"
    arguments = [photos, output, "--model", "resnet18", "--features-only", "--out-indices", -2, -1]
    done = run(*arguments, "--address", cluster, "--cpus-per-actor", 1, "--batch-size", 4)
    assert "5 written, 1 unreadable" in done.stdout
    found = rows(output)
    maps = expected(photos, ["a.png", "c.png"], features_only=True, out_indices=[-2, -1])
    for i, level in enumerate(maps):
        for path, y in zip(["a.png", "c.png"], level):
            assert found[path][f"map_{i}_shape"] == list(y.shape)
            assert_bit_equal(torch.tensor(found[path][f"map_{i}"]), y.contiguous().flatten())
    assert found["broken.png"]["map_0"] is None

    done = run(photos, output, "--model", "resnet18", expect=2)
    assert "use --overwrite" in done.stderr and "num_classes None, not 0" in done.stderr
    arguments = [photos, output, "--model", "resnet18", "--overwrite", "--address", cluster]
    done = run(*arguments, "--actors", 2, "--cpus-per-actor", 1, expect=2)
    assert "--actors 2 with --cpus-per-actor 1 take 2 of 2 CPUs" in done.stderr
    assert (
        "--gpus-per-actor 1: 1 actors, and 0 GPUs" in run(*arguments, "--gpus-per-actor", 1, expect=2).stderr
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["absent", "out"], "folder absent is not a folder"),
        ([".", "out", "--batch-size", "0"], "--batch-size 0: at least 1"),
        ([".", "out", "--actors", "-1"], "--actors -1: at least 1"),
        ([".", "out", "--gpus-per-actor", "-1"], "--gpus-per-actor -1: at least 0"),
        ([".", "out", "--out-indices", "1"], "needs --features-only"),
        ([".", "out", "--model", "resnet19"], "--model resnet19"),
        ([".", "out", "--weights", "absent.pth"], "--weights absent.pth"),
    ],
)
def test_errors_name_the_argument(arguments, words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    program = runpy.run_path(str(PROGRAM), run_name="ray_features")
    with pytest.raises(SystemExit) as ended:
        program["main"](arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
