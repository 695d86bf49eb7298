"""bench.scaling: FLOPs, cells that a model refuses, callers, growth, the command and its files."""

import json
import types

import pytest
import torch
from fast_backbones.bench import peers, scaling
from helpers import needs_native, threads
from torch import nn


def quiet(share, what):
    pass


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.default_cfg = {"input_size": (3, 16, 16)}
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        if x.shape[2] > 20:
            raise ValueError("images of at most 20 pixels\nand more words")
        return self.fc(self.conv(x).relu().mean((2, 3)))


class Wrong(peers.Eager):
    key, name = "wrong", "wrong"

    def prepare(self, model, x):
        call = super().prepare(model, x)
        return lambda: [y * 1.01 for y in call()]


@pytest.mark.parametrize("batch, side", [(1, 16), (3, 16), (2, 10)])
def test_flops_are_twice_the_multiply_adds(batch, side):
    assert scaling.count_flops(Tiny(), (batch, 3, side, side)) == 2 * batch * (side * side * 27 * 8 + 8 * 5)


def test_a_wrong_peer_gets_no_time():
    x = torch.randn(2, 3, 16, 16)
    with threads(1):
        row = scaling.measure_cell(Tiny().eval(), x, [peers.Eager(1), Wrong(1)], 0.01, quiet)
    right, wrong = row["peers"]["eager"], row["peers"]["wrong"]
    assert (right["status"], wrong["status"]) == ("timed", "wrong") and "median_ms" not in wrong
    assert right["images_per_s"] == pytest.approx(2e3 / right["median_ms"])
    assert right["gflops"] == pytest.approx(row["flops"] * 1e-6 / right["median_ms"])
    assert len(row["timing"]["rounds"]) >= scaling.ROUNDS and row["best_other"] is None
    assert "- threads" in "\n".join(scaling.cell_table([row], "batch"))


def test_an_input_that_the_model_refuses_is_a_line_with_its_first_words():
    row = scaling.measure_cell(Tiny().eval(), torch.randn(1, 3, 32, 32), [peers.Eager(1)], 0.01, quiet)
    assert row["sentence"] == "images of at most 20 pixels" and row["peers"] == {}
    lines = [line for line in scaling.cell_table([row, row], "size") if line]
    assert lines == ["- size 32x32: not taken by the model: images of at most 20 pixels"]


def test_callers_run_at_once_and_every_output_is_compared():
    inputs = [torch.full((1,), float(i)) for i in range(3)]
    right = [scaling.bits(x + 1) for x in inputs]
    rate, calls, different = scaling.together(lambda x: x + 1, inputs, right, 0.02)
    assert rate > 0 and calls >= 3 and different == 0
    rate, calls, different = scaling.together(lambda x: x + (2 if x == 1 else 1), inputs, right, 0.02)
    assert 0 < different < calls


def test_bits_tell_zeros_apart_and_know_a_nan():
    zero, minus, nan = ([y] for y in torch.tensor([[0.0], [-0.0], [float("nan")]]))
    assert not torch.equal(*scaling.bits(zero), *scaling.bits(minus))
    assert torch.equal(*scaling.bits(nan), *scaling.bits(nan))


def test_an_error_in_a_caller_is_raised():
    def fail(x):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        scaling.together(fail, [torch.zeros(1)] * 2, [[], []], 0.01)


def cells(work, times, threads=1):
    peer = [{"status": "timed", "median_ms": ms, "images_per_s": 1e3 / ms} for ms in times.values()]
    return [{"threads": threads, work: n, "peers": {"ours": p}} for n, p in zip(times, peer)]


FOUND = {
    "model": "m",
    "input_size": [3, 10, 10],
    "batch": cells("batch", {1: 2.0, 4: 6.0}) + cells("batch", {1: 1.0}, threads=2),
    "size": cells("pixels", {25: 1.0, 400: 12.0}),
}


def test_growth_is_the_time_per_image_and_per_pixel():
    image, pixel = scaling.growth(FOUND, 1, "ours")
    assert (image["unit"], image["from"], image["to"], image["ratio"]) == ("image", 1, 4, 0.75)
    assert (pixel["unit"], pixel["from"], pixel["to"], pixel["ratio"]) == ("pixel", 100, 400, 1.5)
    assert scaling.growth(FOUND, 2, "ours") == [] == scaling.growth(FOUND, 1, "eager")


def test_the_chart_has_a_line_per_number_of_threads(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pyplot, drawn = scaling.drawing(), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    results = {"models": [FOUND, FOUND], "options": {"threads": [1, 2]}}
    scaling.draw(results, tmp_path / "s.png")
    assert [len(axes.lines) for axes in drawn[0].axes] == [2, 1, 2, 1]
    assert list(drawn[0].axes[1].lines[0].get_xdata()) == [25, 400] == list(drawn[0].axes[1].get_xticks())
    assert {axes.get_xscale() + axes.get_yscale() for axes in drawn[0].axes} == {"loglog"}
    assert (tmp_path / "s.png").stat().st_size > 1000
    monkeypatch.undo()
    pyplot.close(drawn[0])


@needs_native
def test_the_command_measures_and_writes_both_files(tmp_path, capsys):
    before = torch.get_num_threads()
    argv = ["lenet5", "--threads", "1", "--batch", "2", "1", "2", "--size", "32", "64", "--callers", "2"]
    assert scaling.main([*argv, "--budget", "0.03", "--out", str(tmp_path / "new")]) == 0
    assert torch.get_num_threads() == before
    written, text = sorted((tmp_path / "new").iterdir()), capsys.readouterr().out
    assert [path.suffix for path in written] == [".json", ".md"]
    assert all(path.name.startswith("scaling-") for path in written)
    assert text == written[1].read_text() and "size 64x64: not taken by the model: LeNet-5" in text
    (found,) = json.loads(written[0].read_text())["models"]
    assert [row["batch"] for row in found["batch"]] == [1, 2]
    assert found["batch"][1]["flops"] == 2 * found["batch"][0]["flops"]
    assert all(row["best_other"]["peer"] == "channels_last" for row in found["batch"])
    assert [(row["peer"], row["callers"]) for row in found["callers"]] == [
        ("channels_last", 1),
        ("channels_last", 2),
        ("ours", 1),
        ("ours", 2),
    ]
    for row in found["callers"]:
        assert len(row["rates"]) == scaling.ROUNDS and row["different"] == 0
        assert row["calls"] >= row["callers"] * scaling.ROUNDS
    assert [row["unit"] for row in found["growth"]] == ["image", "image"]


@needs_native
def test_threads_are_put_back_after_an_error(monkeypatch):
    def fail(*_):
        raise RuntimeError("stop")

    before = torch.get_num_threads()
    monkeypatch.setattr(scaling, "measure_cell", fail)
    options = scaling.parser().parse_args(["lenet5", "--threads", str(before + 1)])
    with pytest.raises(RuntimeError, match="stop"):
        scaling.measure_model(
            scaling.start_model("lenet5"), options, scaling.Console(quiet=True), lambda: None
        )
    assert torch.get_num_threads() == before


@needs_native
def test_cells_of_an_interrupted_run_are_in_its_files(tmp_path, monkeypatch, capsys):
    measure_cell, left = scaling.measure_cell, [1, 1]

    def interrupted(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return measure_cell(*arguments)

    monkeypatch.setattr(scaling, "measure_cell", interrupted)
    argv = ["lenet5", "--threads", "1", "--batch", "1", "2", "4", "--budget", "0.01", "--out", str(tmp_path)]
    assert scaling.main(argv) == 130
    written, text = sorted(tmp_path.iterdir())
    (found,) = json.loads(written.read_text())["models"]
    assert [row["batch"] for row in found["batch"]] == [1, 2] and found["callers"] == []
    assert "## lenet5" in text.read_text()


@needs_native
@pytest.mark.parametrize("entry, code", [({}, 0), ({"status": "wrong"}, 1), ({"different": 2}, 1)])
def test_the_exit_code_says_whether_ours_was_right(entry, code, tmp_path, monkeypatch, capsys):
    found = FOUND | {"batch": [], "size": [], "growth": [], "callers": []}
    found["callers"] = [{"peer": "ours", "callers": 1, "status": "refused", "sentence": "no"} | entry]
    monkeypatch.setattr(scaling, "start_model", lambda _: found)
    monkeypatch.setattr(scaling, "measure_model", lambda *_: None)
    assert scaling.main(["lenet5", "--out", str(tmp_path)]) == code


@needs_native
@pytest.mark.parametrize(
    "argv, said",
    [
        (["resnet5O"], "did you mean resnet50"),
        (["lenet5", "--peers", "ours", "nobody"], "unknown peer nobody; known: eager"),
        (["lenet5", "--peers", "eager"], "--peers eager: ours must be among them"),
        (["lenet5", "--threads", "2", "0"], "--threads 0: at least 1"),
        (["lenet5", "--batch", "-1"], "--batch -1: at least 1"),
        (["lenet5", "--size", "0"], "--size 0: at least 1"),
        (["lenet5", "--callers", "0"], "--callers 0: at least 1"),
        (["lenet5", "--budget", "0"], "--budget 0: seconds above 0"),
        (["lenet5", "--budget", "nan"], "--budget nan: seconds above 0"),
        (["lenet5", "--plot", "chart.txt"], "--plot chart.txt: a name that ends in .png or .svg"),
        (["lenet5", "--out", __file__], "--out or --plot: "),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "measure_model", lambda *_: pytest.fail("measured"))
    given = argv if "--out" in argv else [*argv, "--out", str(tmp_path / "new")]
    assert scaling.main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m bench.scaling: ") and said in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_without_ours_or_matplotlib_it_says_why(tmp_path, monkeypatch):
    options = scaling.parser().parse_args(["lenet5", "--out", str(tmp_path)])
    missing = types.SimpleNamespace(key="ours", missing=lambda: "no native library: reason")
    monkeypatch.setattr(scaling, "make_peers", lambda keys: [missing])
    assert scaling.check_options(options) == "--peers ours: no native library: reason"
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    options.plot = tmp_path / "s.png"
    assert "pip install matplotlib" in scaling.check_options(options)
