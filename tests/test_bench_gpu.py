"""The GPU tools without a GPU: rows, files and tables."""

import json

import pytest
from fast_backbones.bench.gpu import job, layers, models, tune
from fast_backbones.bench.gpu.machine import facts
from triton_device import needs_triton

pytestmark = needs_triton


def options(tmp_path, *words):
    found = job.parser("bench.gpu.tool", "About.", ["resnet18", "resnet50"])
    return found.parse_args([*words, "--batch", "256", "1", "--out", str(tmp_path / "rows.json")])


def test_a_job_goes_on_where_it_ended(tmp_path):
    first = job.Job(options(tmp_path), lambda results: f"{len(results['rows'])} rows\n")
    for case, _ in zip(first.cases(), range(3)):
        first.add(dict(zip(("model", "batch", "dtype"), case)))
    assert (tmp_path / "rows.md").read_text() == "3 rows\n"
    again = job.Job(options(tmp_path), lambda results: "")
    assert list(again.cases()) == [("resnet50", 1, "bfloat16")]
    stored = json.loads((tmp_path / "rows.json").read_text())
    assert stored["commit"] != ""
    assert {"build", "devices", "driver", "triton", "cudnn"} <= set(stored["machine"])


def test_no_row_starts_after_its_time(tmp_path, capsys):
    work = job.Job(options(tmp_path, "--seconds", "-1"), lambda results: "")
    assert list(work.cases()) == []
    assert "goes on from here" in capsys.readouterr().out


LAUNCH = {
    "name": "layer1.0.conv1",
    "kernel": "conv2d",
    "ms": 0.0123,
    "peak": 0.5,
    "detail": "triton 64x64",
}
LAYER = {"name": "conv1", "chosen": "library", "seconds": {"library": 2e-6, "triton": 3e-6}}
KNOWN = {"name": "conv2", "chosen": "cuda", "seconds": {}}
CASE = {"model": "resnet18", "batch": 256, "dtype": "bfloat16"}
TIMES = {"ours": 2.0, "eager nhwc": 3.0}
ROW = {**CASE, "ms": TIMES, "ratio": {"eager nhwc": 1.5}, "failed": {"compile nchw": "no"}}


@pytest.mark.parametrize(
    ("tool", "row", "cells"),
    [
        (layers, {**CASE, "launches": [LAUNCH]}, "layer1.0.conv1 | conv2d | 12.3 | 50% | triton 64x64"),
        (models, ROW, "3.000 | failed |  | 2.000 | 128000 | 1.50x"),
        (tune, {**CASE, "layers": [LAYER, KNOWN]}, "conv1 | library | library 2.0, triton 3.0"),
    ],
)  # fmt: skip
def test_tables(tool, row, cells):
    text = tool.markdown({"machine": facts(), "commit": "abc", "rows": [row]})
    heading, _, *rest = text.splitlines()
    assert heading.startswith("# ")
    assert "Triton" in heading
    assert "commit abc" in heading
    lines = [line for line in rest if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert any(cells in line and "resnet18 | 256 | bfloat16" in line for line in lines), text
