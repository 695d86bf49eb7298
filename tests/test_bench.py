"""The measuring tools themselves: fake clocks for the timing, wrong peers, result files, shape files."""

import itertools
import json
import math
import re

import pytest
import torch
from fast_backbones.bench import (
    child,
    first_call,
    image,
    import_time,
    layers,
    machine,
    memory,
    models,
    peers,
    report,
    show,
    subject,
    timing,
)
from fast_backbones.bench import compare as comparing
from fast_backbones.bench.shapes import Layer, make, read, shapes
from kernel_cases import OPS
from torch import nn

import fast_backbones as fb

native = pytest.mark.skipif(not fb.build_info()["native"], reason="the compiled library is absent")


# timing


class FakeMachine:
    """A clock that moves only when fake work runs; between the `busy` times work takes twice as long."""

    def __init__(self, busy=(math.inf, math.inf)):
        self.now = 0.0
        self.busy = busy
        self.log = []

    def clock(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds * (2 if self.busy[0] <= self.now < self.busy[1] else 1)

        return call

    def guard(self, **options):
        return timing.NoiseGuard(self.work("probe", 0.001), clock=self.clock, **options)

    def measure(self, costs, **options):
        candidates = [timing.Candidate(name, self.work(name, seconds)) for name, seconds in costs.items()]
        return timing.measure(
            candidates, guard=self.guard(), clock=self.clock, settle=lambda: None, **options
        )


def test_medians_and_ratios_of_a_quiet_machine():
    session = FakeMachine().measure({"slow": 0.030, "fast": 0.010}, budget=5)
    assert session.median("slow") == pytest.approx(0.030) and session.median("fast") == pytest.approx(0.010)
    assert session.ratio("slow", "fast") == pytest.approx(3.0)
    assert session.quartiles("slow") == pytest.approx((0.030, 0.030))
    assert session.fastest(["slow", "fast"]) == "fast"
    assert session.disturbed_share == 0.0 and not session.uses_disturbed


def test_calls_per_turn_adapt_to_the_time_of_a_call():
    session = FakeMachine().measure({"long": 2.0, "short": 0.004, "instant": 1e-6}, budget=0, min_rounds=1)
    assert session.calls_per_turn == {"long": 2, "short": 25, "instant": 200}
    assert [len(session.rounds[0].seconds[n]) for n in ("long", "short", "instant")] == [2, 25, 200]


def test_rounds_stop_at_the_budget_but_not_before_the_minimum():
    assert len(FakeMachine().measure({"a": 0.05, "b": 0.05}, budget=0, min_rounds=4).rounds) == 4
    long = FakeMachine().measure({"a": 0.05, "b": 0.05}, budget=10)
    spent = sum(sum(map(sum, r.seconds.values())) for r in long.rounds)
    assert 5 < spent < 11
    assert len(FakeMachine().measure({"a": 0.05}, budget=1e9, max_rounds=7).rounds) == 7


def test_every_candidate_takes_each_place_and_neighbours_change():
    names = ["a", "b", "c"]
    orders = [timing.rotated(names, turn) for turn in range(6)]
    for place in range(3):
        assert {order[place] for order in orders} == set(names)
    followers = {(x, y) for order in orders for x, y in itertools.pairwise(order)}
    assert len(followers) == 6


def test_each_turn_settles_probes_and_leads_in_before_it_times():
    fake, settled = FakeMachine(), []
    candidates = [timing.Candidate("a", fake.work("a", 0.05))]
    timing.measure(
        candidates, budget=0, min_rounds=1, guard=fake.guard(tries=1), clock=fake.clock,
        settle=lambda: settled.append(len(fake.log)),
    )  # fmt: skip
    assert fake.log[-6:] == [
        "a",
        "probe",
        "a",
        "a",
        "a",
        "probe",
    ]  # warm-up | probe, lead-in, two timed | probe
    assert settled == [len(fake.log) - 5, len(fake.log) - 1]


def test_disturbed_rounds_are_flagged_and_left_out():
    fake = FakeMachine(busy=(2.0, 4.0))
    session = fake.measure({"slow": 0.030, "fast": 0.010}, budget=8)
    assert 0.1 < session.disturbed_share < 0.5
    assert len(session.used) == len(session.rounds) - sum(session.disturbed)
    assert max(session.calls("slow")) == pytest.approx(0.030)
    assert not session.uses_disturbed


def test_too_few_quiet_rounds_means_all_count_and_it_says_so():
    rounds = [timing.Round(["a"], {"a": [1.0]}, [0.001]) for _ in range(4)]
    session = timing.Session(["a"], rounds, [True, True, False, True], {"a": 1}, min_rounds=3)
    assert len(session.used) == 4 and session.uses_disturbed and session.disturbed_share == 0.75


def test_guard_judges_by_the_quiet_level_of_the_whole_session():
    guard = timing.NoiseGuard(lambda: None, tolerance=1.2)
    readings = [[1.0, 1.05], [1.0, 1.5], [1.1, 1.15], [3.0, 1.0]]
    rounds = [timing.Round([], {}, r) for r in readings]
    assert guard.disturbed(rounds) == [False, True, False, True]
    assert guard.disturbed([]) == []


def test_wait_until_quiet_waits_for_spinning_threads_and_gives_up():
    cpu = iter([0.0, 0.016, 0.016, 0.024, 0.024, 0.0241])  # two busy windows, then an idle one
    slept = timing.wait_until_quiet(0.008, cpu_clock=lambda: next(cpu), sleep=lambda s: None)
    assert slept == pytest.approx(0.024)
    ever = iter(range(1000))
    assert (
        timing.wait_until_quiet(0.01, give_up=0.1, cpu_clock=lambda: next(ever), sleep=lambda s: None) < 0.12
    )


def test_quantiles_interpolate():
    assert timing.quantile([4, 1, 3, 2], 0.5) == 2.5
    assert timing.quantile([1], 0.9) == 1
    with pytest.raises(ValueError, match="no values"):
        timing.quantile([], 0.5)


def test_measure_refuses_what_it_cannot_tell_apart():
    with pytest.raises(ValueError, match="different names"):
        timing.measure([timing.Candidate("a", int), timing.Candidate("a", int)])
    with pytest.raises(ValueError, match="no candidates"):
        timing.measure([])


# comparison


class Tiny(nn.Module):
    """A network small enough for a test, with what subject.py asks for."""

    def __init__(self):
        super().__init__()
        self.default_cfg = {"input_size": (3, 16, 16)}
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def tiny():
    return subject.calibrate(Tiny(), torch.randn(4, 3, 16, 16))


class Spoiled(peers.Eager):
    """PyTorch eager whose output goes through `spoil`."""

    key, name = "spoiled", "spoiled"

    def __init__(self, spoil, key="spoiled"):
        super().__init__(threads=1)
        self.spoil, self.key = spoil, key

    def prepare(self, model, x):
        call = super().prepare(model, x)
        return lambda: self.spoil(call())


def compare(model, *candidates):
    x = torch.randn(2, 3, 16, 16)
    guard = timing.NoiseGuard(lambda: None)
    everyone = [peers.Eager(1), *candidates]
    return comparing.compare(model, x, everyone, budget=0, min_rounds=2, guard=guard)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda ys: [y * 1.01 for y in ys], "the limit is rms"),
        (lambda ys: [y.index_fill(1, torch.tensor(0), math.nan) for y in ys], "inf"),
        (lambda ys: [y[:, :4] for y in ys], "output shapes [[2, 4]], expected [[2, 5]]"),
        (lambda ys: ys * 2, "output shapes"),
    ],
    ids=["one percent off", "NaN", "another shape", "one output too many"],
)
def test_a_wrong_peer_gets_no_time(tiny, spoil, said):
    found = compare(tiny, Spoiled(spoil))
    entry = found.entry("spoiled")
    assert entry.status == "wrong" and said in entry.sentence
    assert found.timed == ["eager"] and "median_ms" not in found.as_dict()["peers"]["spoiled"]


def test_ours_is_held_to_the_2x_rule(tiny, monkeypatch):
    slightly_off = Spoiled(lambda ys: [y + 1e-5 * y.std() for y in ys], key="ours")
    found = compare(tiny, slightly_off)
    assert found.parity is False and found.entry("ours").status == "wrong"
    assert "more than twice PyTorch's own" in found.entry("ours").sentence
    fine = compare(tiny, Spoiled(lambda ys: ys, key="ours"))
    assert fine.parity is True and fine.timed == ["eager", "ours"]
    assert compare(tiny).parity is None


def test_a_stack_that_fails_becomes_a_line_but_our_own_failure_is_raised(tiny):
    def explode(ys):
        raise RuntimeError("no such operator")

    entry = compare(tiny, Spoiled(explode)).entry("spoiled")
    assert entry.status == "failed" and "RuntimeError: no such operator" in entry.sentence
    with pytest.raises(RuntimeError, match="no such operator"):
        compare(tiny, Spoiled(explode, key="ours"))


def test_an_absent_package_is_a_line(tiny, monkeypatch):
    monkeypatch.setattr(peers.OpenVino, "packages", (("no_such_module", "openvino"),))
    entry = compare(tiny, peers.OpenVino(1)).entry("openvino")
    assert (entry.status, entry.sentence) == ("absent", "not installed: pip install openvino")


def test_error_is_relative_to_the_rms_of_the_reference():
    exact = [torch.full((2, 2), 10.0, dtype=torch.float64)]
    found = comparing.error([torch.tensor([[10.0, 10.0], [10.0, 11.0]])], exact)
    assert found == comparing.Error(pytest.approx(0.1), pytest.approx(0.05))
    own = comparing.Error(1e-6, 1e-7)
    assert comparing.Error(2e-6, 2e-7).within_twice(own)
    assert not comparing.Error(3e-6, 1e-7).within_twice(own) and not comparing.Error(1e-6, 1e-6).within_twice(
        own
    )


def test_claims_take_the_better_of_a_group():
    rounds = [timing.Round([], {"eager": [3.0], "channels_last": [2.0], "openvino": [1.5], "ours": [1.0]})]
    session = timing.Session(["eager"], rounds, [False], {}, min_rounds=1)
    entries = [comparing.Entry(k, k, "", {}, "timed") for k in rounds[0].seconds]
    entries.append(comparing.Entry("compile", "compile", "", {}, "absent"))
    found = comparing.Comparison(1, entries, comparing.Error(0, 0), session, True)
    assert found.claims() == {
        "eager, better layout": ("channels_last", 2.0),
        "ONNX Runtime or OpenVINO, the better": ("openvino", 1.5),
        comparing.BEST: ("openvino", 1.5),
    }


def test_all_peers_must_have_the_same_threads(tiny):
    with pytest.raises(ValueError, match="same number of threads"):
        comparing.compare(tiny, torch.randn(1, 3, 16, 16), [peers.Eager(1), peers.EagerChannelsLast(2)])


def test_calibration_gives_batch_norms_the_statistics_of_activations():
    model, x = Tiny(), torch.randn(8, 3, 16, 16)
    subject.calibrate(model, x)
    y = model.conv(x)
    torch.testing.assert_close(model.bn.running_mean, y.mean((0, 2, 3)))
    assert not model.training and model.bn.momentum == 0.1


def test_peers_by_key():
    assert [p.key for p in peers.make_peers()] == list(peers.PEERS)
    assert [p.key for p in peers.make_peers(["ours", "eager"])] == ["eager", "ours"]
    with pytest.raises(ValueError, match="unknown peer tvm; known: eager"):
        peers.make_peers(["tvm"])


@pytest.mark.peer
@pytest.mark.parametrize("key", ["onnxruntime", "openvino"])
def test_runtimes_agree_with_float64(tiny, key):
    peer = peers.PEERS[key](threads=1)
    if peer.missing():
        pytest.skip(peer.missing())
    found = compare(tiny, peer)
    assert found.entry(key).status == "timed", found.entry(key).sentence
    assert found.entry(key).error.rms < 1e-5


@native
def test_our_peer_runs_the_plan_and_refuses_to_time_anything_else(tiny):
    model = fb.resnet18(num_classes=7).eval()
    x = torch.randn(1, 3, 64, 64)
    call = peers.Ours(1).prepare(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(call()[0], model.forward_modules(x), rtol=1e-4, atol=1e-4)
    model.layer1[0].register_forward_hook(lambda *_: None)
    with pytest.raises(peers.Refused, match="hook"):
        peers.Ours(1).prepare(model, x)


# result files


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One run of bench.models on the tiny network: (exit code, JSON, Markdown)."""
    folder = tmp_path_factory.mktemp("results")
    argv = [
        "resnet18",
        "--batch",
        "1",
        "3",
        "--peers",
        "eager",
        "channels_last",
        "--budget",
        "0",
        "--rounds",
        "2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "make_model", lambda name: subject.calibrate(Tiny(), torch.randn(4, 3, 16, 16)))
        code = models.main([*argv, "--threads", "1", "--out", str(folder)])
    (data,) = folder.glob("models-*.json")
    return code, json.loads(data.read_text()), data.with_suffix(".md").read_text()


def test_result_file_says_everything(results):
    code, data, _ = results
    assert code == 0 and [c["batch"] for c in data["comparisons"]] == [1, 3]
    assert data["machine"].keys() >= {
        "cpu",
        "cpus",
        "isa",
        "torch",
        "threads",
        "commit",
        "date",
        "fast_backbones",
    }
    first = data["comparisons"][0]
    assert first["model"] == "resnet18" and first["parity_2x"] is None
    for key in ("eager", "channels_last"):
        row = first["peers"][key]
        assert row["status"] == "timed" and row["version"] == torch.__version__
        assert row["median_ms"] > 0 and row["error"]["rms"] < 1e-5 and row["settings"]["threads"]
        assert all(r["ms"][key] for r in first["timing"]["rounds"])
    assert len(first["timing"]["rounds"]) >= 2 and first["timing"]["rounds"][0]["probe_ms"]


def test_markdown_has_a_row_for_each_comparison(results):
    _, data, text = results
    assert len(re.findall(r"^\| resnet18 \| [13] \|", text, re.MULTILINE)) == 4  # times and errors
    assert "eager channels_last" in text and data["machine"]["cpu"] in text
    assert report.markdown(data) == text


def test_report_command(results, tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(results[1]))
    capsys.readouterr()
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out == results[2]
    assert report.main([str(tmp_path / "absent.json")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_plot_needs_matplotlib_and_says_so(results, tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(results[1]))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert report.main([str(path), "--plot", str(tmp_path / "r.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_plot_draws(results, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(results[1], tmp_path / "r.svg")
    assert (tmp_path / "r.svg").stat().st_size > 1000


def test_memory_and_first_call_reach_the_report():
    row = {"forward_mib": 10.0, "first_mib": 20.0, "kept_mib": 5.0}
    rows = [{"model": "m", "batch": 2, "peers": {"eager": row, "ours": row}, "ours_share_of_eager": 1.0}]
    assert report.memory_table(rows)[-1] == "| m | 2 | fast_backbones | 10 | 20 | 5 | 100% |"
    calls = [{"model": "m", "batch": 1, "first_s": 1.5, "later_s": 0.02, "stages_s": {"capture": 1.25}}]
    assert report.first_call_table(calls)[-1] == "| m | 1 | 1.50 | 1.25 | 20.0 |"


def test_kernel_benchmarks_have_a_table(results, tmp_path, capsys):
    layer = {"op": "conv2d", "layer": "3x8x8 k4 r3 s1", "batch": 1, "gbps": 2.0, "peak_gflops": 200.0}
    rows = [("reference", 2e-3, 50.0), ("winograd, packed", 1e-3, 100.0)]
    stats = [
        {"extra_info": {**layer, "candidate": c, "gflops": g}, "stats": {"median": s, "q1": s, "q3": s}}
        for c, s, g in rows
    ]
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"machine": results[1]["machine"], "benchmarks": stats}))
    capsys.readouterr()
    assert report.main([str(path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| conv2d | 3x8x8 k4 r3 s1 | winograd, packed | 1 | 1 .. 1 | 100 | 2.0 | 50% | 2.00x |"
    assert report.main([str(path), "--plot", "x.png"]) == 2


@pytest.mark.parametrize(
    "argv, said",
    [
        (["resnet5O"], "did you mean resnet50"),
        (["resnet18", "--peers", "tvm"], "unknown peer tvm"),
        (["resnet18", "--batch", "0"], "batch sizes start at 1"),
        (["resnet18", "--threads", "0"], "at least 1"),
    ],
)
def test_options_are_checked_before_anything_runs(argv, said, capsys):
    assert models.main(argv) == 2
    assert said in capsys.readouterr().err


def test_machine_facts_come_from_cpuinfo():
    text = "processor : 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 fma avx512f made_up\n"
    assert machine.cpu_facts(text) == ("Some CPU @ 2GHz", ["avx2", "fma", "avx512f"])
    facts = {"cpu": "AMD EPYC(TM) 9B45 Processor @ 2GHz", "threads": 2}
    assert (
        models.stem(facts, models.datetime.datetime(2026, 1, 2, 3, 4, 5))
        == "models-amd-epyc-9b45-2t-20260102-030405"
    )


def test_progress_without_a_terminal_prints_each_step_once():
    import io

    out = io.StringIO()
    with show.progress(show.Console(file=out), "m") as tell:
        for what in ("float64 reference", "timing a", "timing b", "timing a", "done"):
            tell(0.5, what)
    assert out.getvalue().splitlines() == ["m: float64 reference", "m: timing in turns", "m: done"]


def test_progress_on_a_terminal_draws_and_cleans_up():
    import io

    out = io.StringIO()
    with show.progress(show.Console(file=out, force_terminal=True, width=80), "m [bold]") as tell:
        for share, what in ((0.1, "preparing [x]"), (0.6, "timing a"), (0.8, "timing b")):
            tell(share, what)
    assert "preparing [x]" in out.getvalue() and "timing b" in out.getvalue()


# fresh processes


def test_child_returns_the_last_line_and_reports_failures():
    assert child.run_child(["-c", "print('noise'); print('{\"a\": 1}')"]) == {"a": 1}
    with pytest.raises(child.ChildFailed, match="ended with 3:\nwhy"):
        child.run_child(["-c", "import sys; sys.stderr.write('why'); sys.exit(3)"])


def test_peak_memory_sees_an_allocation():
    assert memory.status_kib("VmRSS") > 10_000
    peak = memory.peak_of(lambda: torch.ones(16 << 20))  # 64 MiB
    assert 60_000 < peak < 90_000


@native
def test_memory_counts_what_the_engine_holds():
    model, x = fb.resnet18().eval(), torch.randn(1, 3, 64, 64)
    assert memory.held_bytes(model, 2) == 0
    with torch.inference_mode():
        model(x)
        plan = fb.engine.plan_for(model, x)
    assert memory.held_bytes(model, 2) >= plan.arena_bytes > 0


@native
def test_first_call_reports_stages(monkeypatch):
    monkeypatch.setattr(subject, "make_input", lambda model, batch: torch.randn(batch, 3, 64, 64))
    found = first_call.measure_here("resnet18", 1, 2)
    assert found["why_not"] is None and found["first_s"] > found["third_s"] > 0
    assert {"capture", "pack"} <= found["stages_s"].keys()
    assert sum(found["stages_s"].values()) <= found["first_s"]


def test_import_time_compares_processes(monkeypatch):
    def fake(module):
        ours = module == "fast_backbones"
        return {
            "seconds": 1.1 if ours else 1.0,
            "cuda": False,
            "loaded": ["rich", "triton"] if ours else ["triton"],
        }

    monkeypatch.setattr(import_time, "one", fake)
    found = import_time.import_times(runs=2)
    assert (
        found["added_s"] == pytest.approx(0.1) and found["forbidden_modules"] == ["rich"] and not found["ok"]
    )


# shapes and kernel benchmarks


def test_shape_files_are_what_the_models_say():
    assert make.main(["--check"]) == 0


def test_shape_files_cover_every_op():
    for op in OPS:
        assert shapes(op), op
        assert len(shapes(op, full=True)) >= len(shapes(op))


def test_a_line_that_is_no_layer_is_named(tmp_path):
    path = tmp_path / "net.txt"
    path.write_text("# comment\n\nconv2d 3 8 8 4 3 1 1 1 2 conv1: first\nconv2d 3 8 eight 4 3 1 1 1 2 x\n")
    with pytest.raises(ValueError, match=r"net\.txt:4: .*'eight'"):
        read(path)
    path.write_text("conv2d 3 8 8\n")
    with pytest.raises(ValueError, match=r"net\.txt:1: expected 11 columns, found 4"):
        read(path)


def test_costs_of_a_layer():
    conv = Layer("conv2d", 3, 8, 10, 4, 3, 2, 1, 1)
    assert (conv.p, conv.q) == (4, 5)
    assert conv.flops(2) == 2 * 2 * (4 * 4 * 5) * 3 * 9
    assert conv.bytes(2) == 4 * (2 * 3 * 80 + 4 * 27 + 4 + 2 * 4 * 20)
    assert Layer("linear", 10, 1, 1, 5, 1, 1, 0, 1).flops() == 100
    assert Layer("global_avg_pool", 6, 7, 7, 6, 1, 1, 0, 1).bytes() == 4 * (6 * 49 + 6)


SMALL = [
    Layer("pointwise_conv2d", 16, 6, 5, 32, 1, 1, 0, 1),
    Layer("pointwise_conv2d", 16, 6, 5, 32, 1, 2, 0, 1),
    Layer("conv2d", 16, 6, 5, 32, 3, 1, 1, 1),
    Layer("grouped_conv2d", 32, 6, 5, 32, 3, 2, 1, 8),
    Layer("stem_conv2d", 3, 12, 11, 16, 7, 2, 3, 1),
    Layer("max_pool2d", 16, 6, 5, 16, 3, 2, 1, 1),
    Layer("avg_pool2d", 16, 6, 5, 16, 3, 2, 1, 1),
    Layer("depthwise_conv2d", 16, 6, 5, 16, 3, 2, 1, 16),
    Layer("separable_conv2d", 16, 6, 5, 24, 3, 1, 1, 1),
    Layer("local_response_norm", 16, 6, 5, 16, 5, 1, 2, 1),
    Layer("squeeze_excite", 16, 6, 5, 4, 1, 1, 0, 1),
    Layer("global_avg_pool", 16, 6, 5, 16, 1, 1, 0, 1),
    Layer("linear", 20, 1, 1, 7, 1, 1, 0, 1),
]


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: f"{layer.op} {layer}")
def test_every_candidate_of_a_layer_is_benchmarked_and_right(layer):
    names = layers.candidates(layer, batch=2)
    assert names[0] == "reference"
    if (
        fb.build_info()["native"] and layer.op != "squeeze_excite"
    ):  # four kernels: a plan fuses them elsewhere
        assert any(name.endswith(layers.PACKED) for name in names)
    call = layers.inputs(layer, 2)
    for name in names:
        layers.assert_parity(layer, 2, name, layers.bind(layer, call, name)())


def test_a_wrong_kernel_gets_no_time():
    layer = SMALL[2]
    right = layers.bind(layer, layers.inputs(layer, 1), "reference")()
    with pytest.raises(AssertionError, match="PyTorch's own"):
        layers.assert_parity(layer, 1, "wrong", right * 1.0001)
    with pytest.raises(AssertionError, match="expected"):
        layers.assert_parity(layer, 1, "wrong", right[:, :1])


# photographs


def test_preprocessing_is_resize_crop_normalise():
    Image = pytest.importorskip("PIL.Image")
    picture = Image.new("RGB", (60, 40), (255, 0, 51))
    config = {"input_size": (3, 20, 20), "crop_pct": 0.5, "mean": (0.5, 0.0, 0.0), "std": (0.5, 1.0, 0.2)}
    x = image.preprocess(picture, config)
    assert x.shape == (1, 3, 20, 20) and x.dtype == torch.float32 and x.is_contiguous()
    torch.testing.assert_close(x[0, :, 3, 4], torch.tensor([1.0, 0.0, 1.0]))
    grey = image.preprocess(picture, {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)})
    assert grey.shape == (1, 1, 8, 8)
    with pytest.raises(image.ImageError, match="5 channels"):
        image.preprocess(picture, {"input_size": (5, 8, 8)})


def test_preprocessing_crops_the_centre():
    Image = pytest.importorskip("PIL.Image")
    picture = Image.new("L", (90, 30), 0)
    picture.paste(255, (30, 0, 60, 30))
    x = image.preprocess(picture, {"input_size": (1, 30, 30), "crop_pct": 1.0, "mean": (0.0,), "std": (1.0,)})
    assert x.min() == 1.0
