"""bench.train: steps are checked before they are timed, and the files say what was measured."""

import importlib.util
import json
import math

import pytest
import torch
from fast_backbones.bench import models, train, train_report, train_worker
from helpers import needs_native

FAST = ["--batch", "2", "--rounds", "1", "--threads", "1", "--malloc", "default"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A run on LeNet-5 with two stacks: (exit code, JSON, Markdown, its folder)."""
    folder = tmp_path_factory.mktemp("train")
    code = train.main(["lenet5", *FAST, "--stacks", "ours", "eager", "--out", str(folder)])
    (path,) = folder.glob("train-*.json")
    return code, json.loads(path.read_text()), path.with_suffix(".md").read_text(), path


@needs_native
def test_the_result_file_has_times_memory_and_errors(results):
    code, data, _, _ = results
    assert code == 0 and not data["failures"]
    assert data["machine"]["threads"] == 1 and data["options"]["batch"] == 2
    (row,) = data["rows"]
    assert row["shape"] == [2, 1, 32, 32] and [e["stack"] for e in row["stacks"]] == ["ours", "eager"]
    for e in row["stacks"]:
        assert e["status"] == "timed" and e["median_ms"] > 0 and e["peak_mib"] >= e["step_mib"] > 0
        assert e["error"]["loss"] < 1e-6 and e["error"]["gradients"] < 1e-4 and math.isfinite(e["loss"])
    assert len(row["timing"]["rounds"]) == 1 and row["timing"]["rounds"][0]["ms"]["ours"]


@needs_native
def test_the_markdown_is_made_from_the_file(results):
    _, data, text, _ = results
    assert train_report.markdown(data) == text
    assert "| eager NCHW |" in text and "geometric mean" in text and data["machine"]["cpu"] in text
    ratio = data["rows"][0]["stacks"][1]["ours_is_faster_by"]
    assert f"{ratio:.2f}x" in text
    (time, memory) = data["summary"]
    assert time["against"] == "vs best eager" and time["geometric_mean"] == pytest.approx(ratio, abs=1e-3)
    assert memory["kind"] == "memory" and bool(memory["behind"]) == (memory["geometric_mean"] >= 1)


@needs_native
def test_resume_measures_what_is_missing_and_nothing_else(results, monkeypatch, capsys):
    _, data, _, path = results
    data["machine"]["code"] = train.machine.code()  # files may have changed since; that is another test
    path.write_text(json.dumps(data))
    monkeypatch.setattr(train, "measure_model", lambda *_: pytest.fail("measured again"))
    assert train.main(["--resume", str(path)]) == 0
    assert train.main(["--resume", str(path), "--batch", "3"]) == 2
    assert "leave --batch out" in capsys.readouterr().err.replace("\n", " ")
    data["machine"]["cpu"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(models.CannotResume, match="cpu was another"):
        train.load(path)


@needs_native
def test_steps_under_autocast_are_as_far_from_float64_as_bfloat16_is(tmp_path):
    arguments = [*FAST, "--stacks", "ours", "eager", "--dtype", "bfloat16", "--out", str(tmp_path)]
    assert train.main(["lenet5", *arguments]) == 0
    (path,) = tmp_path.glob("train-bfloat16-*.json")
    assert "bfloat16 under autocast on cpu" in path.with_suffix(".md").read_text()
    (row,) = json.loads(path.read_text())["rows"]
    assert all(1e-4 < e["error"]["gradients"] < 0.1 for e in row["stacks"])
    assert {e["settings"]["dtype"] for e in row["stacks"]} == {"bfloat16"} and row["own"]["gradients"] > 1e-4


def test_what_is_compared():
    exact = {"loss": torch.tensor(2.0), "gradients": {"a": torch.ones(4), "b": torch.full((2,), 1e-9)}}
    exact["buffers"] = {"mean": torch.ones(3)}
    found = {"loss": torch.tensor(2.0), "gradients": {"a": torch.ones(4) * 1.5, "b": torch.zeros(2)}}
    found["buffers"] = {"mean": torch.ones(3)}
    errors = train_worker.differences(found, exact)
    assert errors["loss"] == errors["buffers"] == 0.0
    assert errors["gradients"] == pytest.approx(0.5)  # b is zero but for rounding
    own = {"loss": 1e-7, "gradients": 1e-6, "buffers": 1e-6}
    assert "gradients: error 5.0e-01" in train.wrong(errors, own)
    assert train.wrong({**errors, "gradients": 0.05}, own) is None
    assert train.wrong({**errors, "gradients": 0.3}, {**own, "gradients": 0.1}) is None
    found["gradients"]["a"][0] = math.nan
    assert train_worker.differences(found, exact)["gradients"] == math.inf
    del found["gradients"]["a"]
    assert "other gradients: ['a']" in train.wrong(train_worker.differences(found, exact), own)


class Fake:
    """A worker without a process: a step takes `seconds`, the last turn may fail."""

    def __init__(self, name, stack, malloc, folder, options):
        self.seconds = {"ours": 0.5, "reference": 1.0, "channels_last": 2.0, "eager": 1.5}[stack]
        self.stack, self.turns = stack, 0

    def answer(self):
        off = 0.5 if self.stack == "reference" else 1e-6
        error = {"loss": 1e-7, "gradients": off, "gradients_middle": off, "buffers": 1e-7}
        return {"settings": {"modules": "torchvision 0"}, "error": error, "prepare_s": 1.0}

    def turn(self, steps):
        self.turns += 1
        if self.stack == "eager" and self.turns == 3:
            raise train.ChildFailed(["-m", "x"], "ended with 1", 1, ["RuntimeError: the loss became nan"])
        peak = 100.0 if self.stack == "ours" else 400.0
        return {
            "seconds": [self.seconds] * steps,
            "peak_mib": peak,
            "step_mib": 50.0,
            "faults": 2,
            "loss": 1.0,
        }

    def close(self):
        pass


def test_wrong_and_failed_stacks_get_no_time_and_say_why(monkeypatch):
    own = {"loss": 1e-7, "gradients": 1e-6, "gradients_middle": 1e-6, "buffers": 1e-7}
    monkeypatch.setattr(train, "run_child", lambda *_, **__: {"own": own, "shape": [4, 3, 8, 8]})
    options = train.parser().parse_args(["resnet18", "--batch", "4", "--rounds", "3", "--malloc", "default"])
    train.settle_options(options)
    row = json.loads(json.dumps(train.measure_model("resnet18", options, lambda *_: None, Fake)))
    status = {e["stack"]: e["status"] for e in row["stacks"]}
    assert status == {"ours": "timed", "reference": "wrong", "channels_last": "timed", "eager": "failed"}
    assert train_report.claims(row) == {"vs best eager": (4.0, "channels_last")}
    assert train_report.memory_claims(row) == {"memory over eager's": (0.25, "channels_last")}
    text = "\n".join(train_report.model_lines(row))
    assert "the loss became nan" in text and "gradients: error 5.0e-01" in text and "| 4.00x |" in text
    slower = {**row, "model": "other", "stacks": [dict(e) for e in row["stacks"]]}
    slower["stacks"][2]["ours_is_faster_by"] = 0.25
    time, memory = train_report.summarise([row, slower])
    assert time["geometric_mean"] == 1.0 and memory["geometric_mean"] == 0.25 and not memory["behind"]
    assert time["behind"] == [{"model": "other", "ratio": 0.25, "stack": "channels_last"}]


def test_a_process_that_ends_is_an_error_with_its_last_words(tmp_path):
    options = train.parser().parse_args(["lenet5", *FAST])
    train.settle_options(options)
    worker = train.Worker("lenet5", "ours", "tuned", tmp_path, options)  # the folder has no weights
    with pytest.raises(train.ChildFailed, match=r"ended with 1(.|\n)*start\.pt"):
        worker.answer()
    with pytest.raises(train.ChildFailed):
        worker.turn(1)
    worker.close()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["nonsense"], "nonsense"),
        (["resnet18", "--all"], "either names of models or --all"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--resume", "absent.json"], "not a result file"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_options_that_make_no_sense(argv, words, capsys):
    assert train.main(argv) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_the_stock_modules_have_our_names_and_no_dropout():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    make, source = train_worker.public_maker("alexnet")
    model = train_worker.without_dropout(make())
    assert source.startswith("torchvision ") and type(model).__module__.startswith("torchvision")
    assert model.training and {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert train_worker.public_maker("lenet5") is None
