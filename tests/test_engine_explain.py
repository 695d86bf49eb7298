"""What explain() says: shares of the bound, fusions that were missed and why, page and chart."""

import sys
from pathlib import Path

import pytest
import torch
from fast_backbones.engine.explain import Explanation, Row
from helpers import ROOT, needs_native
from PIL import Image
from rich.console import Console
from torch import nn

import fast_backbones as fb
from fast_backbones import engine
from fast_backbones.engine import costs

pytestmark = needs_native


class Missed(nn.Module):
    """A sum that two others read, a squeeze behind an activation, a pool before a norm, columns of a map."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pool, self.norm = nn.MaxPool2d(2), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        y = self.bn(x) + x
        y = torch.relu(self.depthwise(y))
        y = y * torch.sigmoid(y.mean((2, 3), keepdim=True))
        z = torch.relu(self.norm(self.pool(y)))
        return self.head(z), z


@pytest.fixture(scope="module")
def found():
    model = fb.optimize_(Missed().eval())
    with torch.inference_mode():
        return fb.explain(model, torch.randn(1, 3, 12, 12), repeats=1)


def test_each_missed_fusion_has_its_sentence(found):
    said = {row.name: row.missed for row in found.rows if row.missed}
    assert said == {
        "bn": ["no epilogue of conv (conv2d): its result is read twice here"],
        "depthwise": [
            "not one step with what follows: its result goes to global_avg_pool (global_avg_pool) and gate"
            " (affine)"
        ],
        "global_avg_pool": ["not before depthwise (conv2d): it is no plain 1x1 convolution"],
        "sigmoid": ["no epilogue of global_avg_pool (global_avg_pool): it takes none"],
        "gate": [
            "no epilogue of depthwise (conv2d): its result goes to global_avg_pool (global_avg_pool), too"
        ],
        "norm": [
            "no epilogue of pool (max_pool2d): it takes none",
            "no prologue: the caller receives it, too",
        ],
    }


def test_what_the_library_refuses_is_told_as_it_says_it():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.conv = nn.AvgPool2d(3, 1, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            return self.conv(x + self.pool(x))

    model = fb.optimize_(Pooled().eval())
    with torch.inference_mode():
        (row,) = [r for r in fb.explain(model, torch.randn(1, 16, 6, 6), repeats=1).rows if r.missed]
    assert row.missed[0].startswith("no epilogue of pool (avg_pool2d): avg_pool2d: takes no residual and no")


def test_networks_without_missed_fusions_say_nothing():
    model = fb.mobilenetv1_025().eval()
    with torch.inference_mode():
        rows = fb.explain(model, torch.randn(1, 3, 64, 64), repeats=1).rows
    assert [row.name for row in rows if row.missed] == []
    assert {row.isa for row in rows} == {fb.build_info()["isa"]}


def test_every_view_has_every_step_and_sentence(found):
    console = Console(width=400)
    with console.capture() as captured:
        console.print(found)
    for view in (str(found), captured.get(), found.to_html()):
        for row in found.rows:
            assert row.name in view and row.kernel in view and row.isa in view
            assert all(name in view for name in row.fused)
            assert all(f"not fused: {why}" in view for why in row.missed)
        assert "of bound" in view and found.foot()[0] in view and "first call" in view


def test_the_page_is_escaped_and_written(found, tmp_path):
    row = Row("<step>", "aten", ["a & b"], 1.0, 0.0, 0.0, 0.0, "x < y", [], ["<why>"], "PyTorch")
    page = Explanation(plan=found.plan, rows=[row]).to_html(tmp_path / "page.html", title="<title> {x}")
    assert page == (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in (
        "&lt;step&gt;",
        "a &amp; b",
        "x &lt; y",
        "&lt;why&gt;",
        "<h1>&lt;title&gt; {x}</h1>",
        "unknown",
    ):
        assert text in page
    assert "<step>" not in page and "<why>" not in page and "http" not in page


def test_without_a_plan_the_views_say_why(tmp_path):
    nothing = Explanation(reason="it has a hook & a half")
    assert str(nothing) == "no plan: it has a hook & a half"
    assert "no plan: it has a hook &amp; a half" in nothing.to_html() and "<table>" not in nothing.to_html()
    with pytest.raises(ValueError, match="nothing to draw, no plan: it has a hook"):
        nothing.to_png(tmp_path / "chart.png")
    assert not list(tmp_path.iterdir())


def test_the_chart_is_an_image_of_the_steps(found, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional package")
    found.to_png(tmp_path / "chart.png", title="a_$b")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.format == "PNG" and picture.width == 1500 and picture.height > 28 * len(found.rows)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"pip install 'fast-backbones\[plots\]'"):
        found.to_png(tmp_path / "absent.png")
    assert not (tmp_path / "absent.png").exists()


def test_winograd_counts_with_its_own_products():
    assert costs.share_of_products("F(4x1,7x1) fused 3 tasks") == 13 / 28
    assert costs.share_of_products("F(4x4,3x3) at real points, fused 3 tasks") == 1 / 4
    assert costs.share_of_products("direct 4x1 tasks") == 1.0
    with pytest.raises(ValueError, match=r"F\(9x9,3x3\)"):
        costs.share_of_products("F(9x9,3x3)")
    source = Path(ROOT, "csrc/cpu/winograd_conv2d/winograd_conv2d.h").read_text()
    forms = [part.split('"')[1] for part in source.split("= {")[1:] if part.startswith('"F(')]
    assert {form.rstrip(",") for form in forms} == set(costs.WINOGRAD)


def test_the_bound_of_a_winograd_step_is_near_its_time():
    """At the plain algorithm's products its share would be more than twice as large."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)).eval()
    x = torch.randn(1, 64, 56, 56)
    with torch.inference_mode():
        found = engine.explain(fb.optimize_(model), x, repeats=1)
    (row,) = [row for row in found.rows if row.kernel == "winograd_conv2d"]
    plain = row.gflops / found.peak_gflops
    memory = row.gbps / found.copy_gbps
    assert row.of_bound == pytest.approx(max(plain * costs.share_of_products(row.detail), memory))
