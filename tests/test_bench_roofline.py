"""bench.roofline: bounds of steps, what they would gain, the chart."""

import json

import pytest
import torch
from fast_backbones.bench import roofline
from fast_backbones.engine.explain import Explanation, Row

import fast_backbones as fb

native = pytest.mark.skipif(not fb.build_info()["native"], reason="the compiled library is absent")

ROWS = [  # name, kernel, fused, ms, GFLOP/s, GB/s, share of the bound
    Row("convolution", "conv2d", [], 2.0, 100.0, 5.0, 0.5),
    Row("pool", "max_pool2d", [], 1.0, 0.0, 10.0, 0.25),
    Row("winograd", "winograd_conv2d", [], 1.0, 300.0, 5.0, 1.5),
    Row("of PyTorch", "aten", [], 0.5, 0.0, 0.0, 0.0),
]


def explanation():
    return Explanation(plan=object(), rows=ROWS, peak_gflops=200.0, copy_gbps=40.0, threads=1)


def test_a_step_is_bound_by_the_slower_of_arithmetic_and_memory():
    convolution, pool, winograd, other = roofline.points(explanation())
    assert (convolution.limit, convolution.share, convolution.intensity) == ("arithmetic", 0.5, 20.0)
    assert (convolution.bound_ms, convolution.gain_ms) == (1.0, 1.0)
    assert (pool.limit, pool.share, pool.gain_ms, pool.intensity) == ("memory", 0.25, 0.75, 0.0)
    assert (winograd.share, winograd.gain_ms) == (1.5, 0.0) and other.share == 0


def test_shares_are_those_of_explain():
    """Which has Winograd's own products; none of these rows says that it is one."""
    assert [p.share for p in roofline.points(explanation())] == [row.of_bound for row in ROWS]


def test_order_and_sums():
    steps = roofline.points(explanation())
    assert [p.name for p in roofline.by_gain(steps)][:2] == ["convolution", "pool"]
    total = roofline.summary(steps)
    assert total == {"ms": 4.5, "bound_ms": 1.0 + 0.25 + 1.0 + 0.5, "gain_ms": 1.75, "steps_beyond": 1}


def test_without_a_plan_the_reason_is_told():
    with pytest.raises(ValueError, match="no plan, so no steps to draw: it has a hook"):
        roofline.points(Explanation(reason="it has a hook"))


def test_the_chart_holds_every_step_with_arithmetic(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pyplot, drawn = roofline.drawing(), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    roofline.draw(roofline.points(explanation()), 200.0, 40.0, "title", tmp_path / "r.png")
    (axes,) = drawn[0].axes
    assert sum(len(c.get_offsets()) for c in axes.collections) == 2
    roof = axes.lines[0]
    assert list(roof.get_ydata())[1:] == [200.0, 200.0] and roof.get_xdata()[1] == 5.0
    assert (tmp_path / "r.png").stat().st_size > 1000
    monkeypatch.undo()
    pyplot.close(drawn[0])


@native
def test_the_command_draws_and_lists_a_real_plan(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    before = torch.get_num_threads()
    arguments = ["lenet5", "--threads", "1", "--repeats", "2", "--out", str(tmp_path / "new" / "r.png")]
    assert roofline.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] and found["peak_gflops"] > 0 and found["copy_gbps"] > 0
    assert found["ms"] == pytest.approx(sum(step["ms"] for step in found["steps"]))
    assert (tmp_path / "new" / "r.png").is_file() and torch.get_num_threads() == before
    assert roofline.main([*arguments, "--most", "1"]) == 0
    assert f"all {len(found['steps'])} steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["lenet5", "--batch", "0"], "--batch 0: at least 1"),
        (["lenet5", "--threads", "0"], "--threads 0: at least 1"),
        (["lenet5", "--most", "0"], "--most 0: at least 1"),
        (["resnet5O"], "did you mean resnet50"),
    ],
)
def test_options_are_checked(argv, said, capsys):
    pytest.importorskip("matplotlib")
    assert roofline.main(argv) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert roofline.main(["lenet5"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
