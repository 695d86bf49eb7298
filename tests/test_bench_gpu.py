"""The GPU tools without a GPU: rows, files and tables."""

import json

import pytest
import torch
from fast_backbones.bench.gpu import job, layers, models, train, tune
from fast_backbones.bench.gpu.machine import facts
from helpers import needs_native
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
    "of_bound": 0.5,
    "detail": "triton 64x64",
}
LAYER = {"name": "conv1", "chosen": "library", "seconds": {"library": 2e-6, "triton": 3e-6}}
KNOWN = {"name": "conv2", "chosen": "cuda", "seconds": {}}
CASE = {"model": "resnet18", "batch": 256, "dtype": "bfloat16"}
TIMES = {"ours": 2.0, "eager nhwc": 3.0}
STEP = {"mib": {"ours": 300.0, "eager nchw": 500.0, "eager nhwc": 400.0}, "failed": {"compile nhwc": "no"}}
ROW = {**CASE, "ms": TIMES, "ratio": {"eager nhwc": 1.5}, "failed": {"compile nchw": "no"}}


@pytest.mark.parametrize(
    ("tool", "row", "cells"),
    [
        (layers, {**CASE, "launches": [LAUNCH]}, "layer1.0.conv1 | conv2d | 12.3 | 50% | triton 64x64"),
        (models, ROW, "3.000 | failed |  | 2.000 | 128000 | 1.50x"),
        (train, {**ROW, **STEP}, "3.00 | failed | 2.00 | 128000 | 1.50x | 300 | 0.75"),
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


@needs_native
def test_training_stacks_are_checked_before_they_are_timed(monkeypatch):
    row = train.Row("lenet5", 4, "float32")
    found = train.stacks_of(row, ("ours", "eager nchw", "eager nhwc"), "cpu")
    assert list(found) == ["ours", "eager nchw", "eager nhwc"], row.failed
    assert 0 < row.errors["ours"] < 1e-3
    before = [p.detach().clone() for p in found["ours"].model.parameters()]
    for stack in found.values():
        stack.step()
    after = [list(stack.model.parameters()) for stack in found.values()]
    for one, ours, plain in zip(before, *after[:2]):
        assert not torch.equal(one, ours)
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(train.Stack, "check", lambda self, exact: 0.1 if self.reference else 1.0)
    row = train.Row("lenet5", 4, "float32")
    assert list(train.stacks_of(row, ("ours", "eager nhwc"), "cpu")) == ["eager nhwc"]
    assert "gradients are off by 1, the plain modules' by 0.1" in row.failed["ours"]
