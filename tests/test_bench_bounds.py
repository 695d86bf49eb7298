"""bench.bounds: what a plan's own algorithms allow."""

import json

import pytest
from fast_backbones.bench import bounds
from fast_backbones.engine.explain import Explanation, Row
from helpers import needs_native

ROWS = [  # name, kernel, fused, ms, GFLOP/s, GB/s, share of the bound
    Row("convolution", "conv2d", [], 2.0, 100.0, 5.0, 0.5, "avx2 direct 4 tasks"),
    Row("pool", "max_pool2d", [], 1.0, 0.0, 10.0, 0.25),
    Row("winograd", "winograd_conv2d", [], 1.0, 225.0, 5.0, 0.5, "avx2 F(2x2,3x3) fused 4 tasks"),
    Row("in cache", "affine", [], 1.0, 0.0, 90.0, 2.25),
    Row("of PyTorch", "aten", [], 0.5, 0.0, 0.0, 0.0),
]


def test_a_step_beyond_its_bound_counts_with_its_time():
    found = bounds.bounds_of(Explanation(plan=object(), rows=ROWS, peak_gflops=200.0, copy_gbps=40.0))
    assert [step["bound_ms"] for step in found["steps"]] == [1.0, 0.25, 0.5, 1.0, 0.5]
    assert (found["ms"], found["bound_ms"]) == (5.5, 3.25)


def test_the_last_file_that_has_a_model_counts(tmp_path):
    for name, ratio in (("a", 1.5), ("b", 1.25)):
        peers = {"onnxruntime": {"name": "ONNX Runtime"}}
        comparison = {
            "model": "resnet18",
            "batch": 1,
            "claims": {bounds.BEST: {"peer": "onnxruntime", "ratio": ratio}},
        }
        (tmp_path / name).write_text(json.dumps({"comparisons": [comparison | {"peers": peers}]}))
    found = bounds.measured_ratios([tmp_path / "a", tmp_path / "b"])
    assert found == {("resnet18", 1): (1.25, "ONNX Runtime")}
    (tmp_path / "b").write_text("{}")
    with pytest.raises(ValueError, match=r"no result file of bench\.models"):
        bounds.measured_ratios([tmp_path / "b"])


@needs_native
def test_a_run_writes_both_files(tmp_path, capsys):
    arguments = ["lenet5", "--batch", "1", "2", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    assert bounds.main(arguments) == 0
    (path,) = tmp_path.glob("bounds-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["model"], row["batch"]) for row in rows] == [("lenet5", 1), ("lenet5", 2)]
    assert all(0 < row["bound_ms"] <= row["ms"] and row["steps"] for row in rows)
    assert capsys.readouterr().out == path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "argv, words", [(["nonsense"], "nonsense"), (["--repeats", "0"], "--repeats 0: at least 1")]
)
def test_options_that_make_no_sense(argv, words, capsys):
    assert bounds.main(argv) == 2 and words in capsys.readouterr().err
