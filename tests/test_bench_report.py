"""bench.report on several files, and its short form."""

import copy
import json

import pytest
from fast_backbones.bench import report
from fast_backbones.bench.compare import BEST
from fast_backbones.bench.files import as_json

RATIO = {"ratio": 1.5, "peer": "ncnn"}
ROW = {
    "model": "resnet18",
    "batch": 1,
    "peers": {
        "ncnn": {"name": "ncnn", "version": "1", "settings": {}, "status": "timed", "median_ms": 15.0},
        "ours": {"name": "ours", "version": "1", "settings": {}, "status": "timed", "median_ms": 10.0},
    },
    "claims": {"ncnn or MNN, the better": RATIO, BEST: RATIO},
    "timing": None,
    "parity_2x": True,
}
MACHINE = {"cpu": "CPU", "cpus": 2, "torch": "2", "code": "a", "fast_backbones": {}, "threads": 2, "date": ""}
RUN = {"machine": MACHINE, "command": "one", "options": {"precision": "highest"}, "comparisons": [ROW]}


def run(command="two", machine=(), **row):
    changed = copy.deepcopy(RUN)
    changed["command"] = command
    changed["machine"].update(machine)
    changed["comparisons"][0].update(row)
    return changed


def test_runs_of_the_same_code_are_one_table():
    claims = {BEST: {"ratio": 6.0, "peer": "ncnn"}}
    found = report.merged([RUN, run(model="vgg16", claims=claims), run("three", batch=1, parity_2x=None)])
    assert [(row["model"], row["parity_2x"]) for row in found["comparisons"]] == [
        ("resnet18", None),  # the last run has it
        ("vgg16", True),
    ]
    assert found["command"] == "one`, `two`, `three" and RUN["comparisons"] == [ROW]
    (best,) = (row for row in found["summary"] if row["against"] == BEST)
    assert best["models"] == 2 and best["geometric_mean"] == 3.0


@pytest.mark.parametrize("key", ["cpu", "cpus", "torch", "code", "threads"])
def test_runs_of_something_else_are_not(key, tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, results in zip(files, (RUN, run(machine={key: "other"})), strict=True):
        file.write_text(json.dumps(results))
    assert report.main([*map(str, files)]) == 2
    assert f"{key}: {MACHINE[key]} and other" in capsys.readouterr().err


def test_a_run_that_does_not_say_its_code_is_none():
    old = run()
    del old["machine"]["code"]
    with pytest.raises(ValueError, match="does not say its code"):
        report.merged([old, old])


def test_versions_of_a_stack_do_not_mix():
    other = run(model="vgg16")
    other["comparisons"][0]["peers"]["ncnn"]["version"] = "2"
    with pytest.raises(ValueError, match="ncnn 1 and 2"):
        report.merged([RUN, other])


def test_a_row_that_another_run_has_did_not_fail():
    failed = [
        {"model": "resnet18", "batch": 1, "sentence": "a"},
        {"model": "vgg16", "batch": 1, "sentence": "b"},
    ]
    assert [row["sentence"] for row in report.merged([RUN, {**run(), "failures": failed}])["failures"]] == [
        "b"
    ]


def test_precisions_do_not_mix():
    other = run()
    other["options"]["precision"] = "bfloat16"
    with pytest.raises(ValueError, match="different precisions"):
        report.merged([RUN, other])


def test_the_short_form(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RUN))
    assert report.main([str(path), "--brief"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"| model | batch | ours, ms | vs ncnn or MNN, the better | vs {BEST} |",
        "|---|---|---|---|---|",
        "| resnet18 | 1 | 10.0 | 1.50x | 1.50x ncnn |",
    ]


def test_kernels_have_no_short_form(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"machine": MACHINE, "benchmarks": []}))
    assert report.main([str(path), "--brief"]) == 2
    assert "here are kernels" in capsys.readouterr().err


def test_a_list_of_numbers_takes_one_line():
    results = {"ms": [0.5, -1, 2e-05], "one": [7], "none": [], "mixed": [0.5, None]}
    results["rows"] = [{"a": [1, 2]}, "b, [1,\n 2]"]
    text = as_json(results)
    assert json.loads(text) == results
    assert '"ms": [0.5, -1, 2e-05]' in text and '"one": [7]' in text and '"a": [1, 2]' in text
