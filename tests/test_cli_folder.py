"""fast-backbones run FOLDER: the features of a folder of images, as a matrix or a table."""

import json
import os
import sys

import numpy
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fast_backbones as fb
from fast_backbones import cli
from fast_backbones.cli import common, features

SIZES = {"b.png": (40, 33), "a/z.png": (32, 32), "c.jpg": (20, 90), "a/y.bmp": (65, 31), "d.PNG": (35, 35)}
NAMES = ["a/y.bmp", "a/z.png", "b.png", "c.jpg", "d.PNG"]  # sorted


@pytest.fixture
def photos(tmp_path):
    """Five images of different sizes below a folder, and a file that is no image."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    draw = numpy.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=numpy.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.app, ["run", *map(str, arguments), "--model", "lenet5", "--threads", "1"])


def expected(photos):
    """Each image alone, by the transform and the model."""
    model = common.build("lenet5", None, num_classes=0)
    to_input = fb.transforms_for(model)
    with torch.inference_mode():
        return numpy.concatenate(
            [model(to_input(Image.open(photos / name)).unsqueeze(0)).numpy() for name in NAMES]
        )


def test_a_matrix_with_the_paths_beside_it(photos, tmp_path):
    out = tmp_path / "features.npy"
    result = run(photos, "--out", out, "--batch", 2)
    assert result.exit_code == 0, result.output
    matrix, beside = numpy.load(out), json.loads((tmp_path / "features.json").read_text())
    assert matrix.dtype == numpy.float32 and matrix.shape == (5, 84)
    assert beside == {"model": "lenet5", "weights": "random", "paths": NAMES, "unreadable": {}}
    assert "5 images x 84 features, 0 unreadable" in result.stdout and "weights: random" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "features.npy", "features.json"}
    if fb.build_info()["native"]:
        assert numpy.array_equal(matrix, expected(photos))  # the same bits, whatever the batch
    else:
        numpy.testing.assert_allclose(matrix, expected(photos), rtol=1e-5, atol=1e-6)


def test_a_table_has_the_same_rows(photos, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional package")
    monkeypatch.setattr(features, "ROWS_PER_GROUP", 3)
    result = run(photos, "--out", tmp_path / "f.parquet", "--batch", 2, "--json")
    assert result.exit_code == 0, result.output
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table["path"].to_pylist() == NAMES
    assert json.loads(table.schema.metadata[b"model"]) == "lenet5"
    assert parquet.ParquetFile(tmp_path / "f.parquet").num_row_groups == 2
    numpy.testing.assert_allclose(numpy.stack(table["embedding"].to_numpy()), expected(photos), rtol=1e-5)
    facts = json.loads(result.stdout)
    assert facts["images"] == 5 and facts["features"] == 84 and facts["unreadable"] == {}
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "f.parquet"}


def test_weights_are_loaded(photos, tmp_path):
    weights, model = tmp_path / "w.pth", fb.lenet5()
    torch.nn.init.zeros_(model.f6.weight)
    torch.nn.init.zeros_(model.f6.bias)
    torch.save(model.state_dict(), weights)
    result = run(photos, "--out", tmp_path / "f.npy", "--weights", weights)
    assert result.exit_code == 0 and "random" not in result.output, result.output
    assert not numpy.load(tmp_path / "f.npy").any()


def test_unreadable_images_are_named_and_have_no_row(photos, tmp_path):
    (photos / "bb.png").write_bytes((photos / "b.png").read_bytes()[:200])
    (photos / "0.jpg").write_text("no image")
    out = tmp_path / "f.npy"
    result = run(photos, "--out", out, "--batch", 2)
    assert result.exit_code == 0 and "5 images x 84 features, 2 unreadable" in result.stdout
    beside = json.loads(out.with_suffix(".json").read_text())
    assert beside["paths"] == NAMES and sorted(beside["unreadable"]) == ["0.jpg", "bb.png"]
    assert "unreadable: bb.png: " in result.stderr and "unreadable: 0.jpg: " in result.stderr
    assert numpy.array_equal(numpy.load(out).shape, (5, 84))


def test_strict_stops_at_the_first(photos, tmp_path):
    (photos / "0.jpg").write_text("no image")
    result = run(photos, "--out", tmp_path / "f.npy", "--strict")
    assert result.exit_code == 1 and "0.jpg: " in result.stderr and "nothing was written" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_folder_without_a_readable_image(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "0.jpg").write_text("no image")
    result = run(folder, "--out", tmp_path / "f.npy")
    assert result.exit_code == 1 and "none of the 1 images can be read" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_interrupted_runs_leave_what_was_there(photos, tmp_path, monkeypatch, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional package")
    out = tmp_path / f"f.{ending}"
    out.write_text("of a run before")
    read = features.read

    def interrupted(path, transform):
        if path.name == "c.jpg":
            raise KeyboardInterrupt
        return read(path, transform)

    monkeypatch.setattr(features, "read", interrupted)
    result = run(photos, "--out", out, "--batch", 1)
    assert result.exit_code == 130 and "interrupted, nothing was written" in result.stderr
    assert out.read_text() == "of a run before"
    assert {path.name for path in tmp_path.iterdir()} == {"photos", out.name}


def test_a_table_without_pyarrow_says_what_to_install(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = run(photos, "--out", tmp_path / "f.parquet")
    assert result.exit_code == 2 and "pip install 'fast-backbones[parquet]'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.skipif(os.geteuid() == 0 or os.name == "nt", reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(photos, tmp_path):
    tmp_path.chmod(0o500)
    try:
        result = run(photos, "--out", tmp_path / "f.npy")
    finally:
        tmp_path.chmod(0o700)
    assert result.exit_code == 2 and "cannot write" in result.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--out", "f.csv"], "--out f.csv: the name must end with .npy or .parquet"),
        (["--out", "absent/f.npy"], "there is no folder absent"),
        (["--out", "f.npy", "--classes", "names.txt"], "--classes has no use for a folder"),
        (["--out", "f.npy", "--budget", "1"], "--budget has no use for a folder"),
        (["--out", "f.npy", "--weights", "absent.pth"], "absent.pth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_explained(photos, arguments, said):
    result = run(photos, *arguments)
    assert result.exit_code == 2 and said in result.stderr, result.output


def test_a_folder_of_something_else(tmp_path):
    result = run(tmp_path, "--out", tmp_path / "f.npy")
    assert result.exit_code == 2 and f"there are no images below {tmp_path}" in result.stderr


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).touch()
    assert features.name_of(features.images_in(tmp_path)[0]) == "caf\\xe9.png"
