"""The zoo: rows of networks that are not ours, their report, failures and --resume."""

import json

import pytest
import torch
from fast_backbones.bench import zoo, zoo_models, zoo_report, zoo_row
from fast_backbones.bench.child import ChildFailed
from fast_backbones.bench.subject import calibrate
from torch import nn

import fast_backbones as fb

native = pytest.mark.skipif(not fb.build_info()["native"], reason="the compiled library is absent")
QUIET = lambda share, what: None  # noqa: E731


class Rolled(nn.Module):
    """Two convolutions around an operation that no kernel takes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        return self.second(self.first(x).roll(1, 2)).mean((2, 3))


class Asking(Rolled):
    def forward(self, x):
        y = self.first(x)
        return y if y.sum() > 0 else -y


def made(cls):
    torch.manual_seed(0)
    return calibrate(cls(), torch.randn(2, 3, 16, 16))


@pytest.fixture(scope="module")
def rows():
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="Asking runs its modules"):
        return [
            zoo_row.row_of(f"timm/{cls.__name__}", made(cls), x, 1, None, QUIET) for cls in (Rolled, Asking)
        ]


@native
def test_a_row_says_what_runs_in_kernels_and_what_in_pytorch(rows):
    row = rows[0]
    assert row["parity_2x"] and row["why_not"] is None and row["input"] == [1, 3, 16, 16]
    assert row["left"] == {"aten.roll": 1} and row["declined"] == {"aten.roll": "no kernel for aten.roll"}
    assert (
        row["steps"] - row["native_steps"] == 1 and row["native_macs"] == 1.0 and 0 < row["native_bytes"] < 1
    )
    assert row["gmacs"] == pytest.approx(256 * 9 * (3 * 16 + 16 * 8) / 1e9)


@native
def test_a_model_without_a_plan_says_why(rows):
    row = rows[1]
    assert row["parity_2x"] and "asks for values of tensors" in row["why_not"] and "left" not in row


@native
def test_a_row_with_times(monkeypatch):
    monkeypatch.setattr(zoo_row, "PEERS", ("eager", "ours"))
    row = zoo_row.row_of("timm/Rolled", made(Rolled), torch.randn(1, 3, 16, 16), 1, (0.0, 2), QUIET)
    assert row["parity_2x"] and 0 < row["native_time"] < 1 and row["error"]["rms"] < 1e-5
    assert row["speed"]["peers"]["eager"]["ours_is_faster_by"] > 0


@native
def test_a_run_goes_on_after_a_failure_and_after_an_interruption(rows, tmp_path, monkeypatch):
    found = {row["model"]: row for row in rows}
    asked = []

    def measure(name, options, tell):
        asked.append(name)
        if name not in found:
            raise ChildFailed(["-m", "bench.zoo_row"], "was ended by SIGSEGV", -11, ["the last words"])
        return found[name]

    monkeypatch.setattr(zoo, "measure", measure)
    names = ["timm/Rolled", "torchvision/Crash", "timm/Asking"]
    assert zoo.main([*names, "--no-speed", "--threads", "1", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("zoo-*.json")
    data, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert [row["model"] for row in data["rows"]] == ["timm/Rolled", "timm/Asking"] and asked == names
    assert data["machine"]["cpu"] and data["libraries"].keys() == {"timm", "torchvision"}
    assert "| timm/Rolled | 16 | 0.00 | yes |" in text and "1 aten.roll" in text
    assert (
        "no plan: the forward asks for values" in text
        and "failed: -m bench.zoo_row was ended by SIGSEGV" in text
    )
    found["torchvision/Crash"] = {**rows[0], "model": "torchvision/Crash"}
    assert zoo.main(["--resume", str(path)]) == 0 and asked[3:] == ["torchvision/Crash"]
    assert "failed" not in path.with_suffix(".md").read_text()
    data["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(data))
    assert zoo.main(["--resume", str(path)]) == 2


def test_the_list_is_long_and_options_make_sense(capsys):
    assert len(zoo_models.ZOO) >= 60 and len(set(zoo_models.ZOO)) == len(zoo_models.ZOO)
    assert zoo.main(["resnet50"]) == 2 and zoo.main(["timm/resnet50d", "--batch", "0"]) == 2


def test_no_parameter_keeps_one_value():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4))
    model.gain = nn.Parameter(torch.zeros(4))
    model[0].bias.data.zero_()
    zoo_models.distinguish(model)
    assert all(p.unique().numel() > 1 for p in model.parameters())
    assert model.gain.min() > 0.1


def test_the_report_of_times():
    peers = {
        key: {"status": "timed", "median_ms": ms, "ours_is_faster_by": ms} for key, ms in (("eager", 3.0),)
    }
    peers |= {key: {"status": "failed"} for key in ("channels_last", "compile")}
    peers["ours"] = {"status": "timed", "median_ms": 1.0}
    table = zoo_report.speed_table([{"model": "timm/one", "native_time": 0.5, "speed": {"peers": peers}}])
    assert table[-1] == "| timm/one | 3.00 | failed | failed | 1.00 | 3.00x |  |  | 50.0% |"
