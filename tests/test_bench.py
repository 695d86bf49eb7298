"""The measuring tools themselves: result files, rows, summaries, fresh processes, photographs."""

import json
import math
import re
import subprocess

import pytest
import torch
from fast_backbones.bench import (
    child,
    first_call,
    image,
    import_time,
    machine,
    memory,
    models,
    peers,
    report,
    rows,
    show,
    subject,
    summary,
)
from fast_backbones.bench import compare as comparing
from test_bench_compare import Tiny

import fast_backbones as fb

native = pytest.mark.skipif(not fb.build_info()["native"], reason="the compiled library is absent")


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
        patch.setattr(rows, "make_model", lambda name: subject.calibrate(Tiny(), torch.randn(4, 3, 16, 16)))
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
        "code",
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


@pytest.mark.parametrize("options", [[], ["--ratios"]], ids=["images per second", "ratios"])
def test_plot_draws(results, tmp_path, options):
    pytest.importorskip("matplotlib")
    (tmp_path / "r.json").write_text(json.dumps(results[1]))
    picture = tmp_path / "r.svg"
    assert report.main([str(tmp_path / "r.json"), "--plot", str(picture), *options]) == 0
    assert picture.stat().st_size > 1000


def test_the_chart_of_ratios_has_a_line_at_one_and_a_bar_for_each_batch(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pyplot, drawn = report.drawing(), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    won = {comparing.BEST: {"peer": "openvino", "ratio": 1.5}}
    lost = {comparing.BEST: {"peer": "mnn", "ratio": 0.5}}
    comparisons = [
        {"model": "a", "batch": 1, "claims": won},
        {"model": "a", "batch": 16, "claims": lost},
        {"model": "b", "batch": 1, "claims": {}},
    ]
    report.plot_ratios({"machine": results[1]["machine"], "comparisons": comparisons}, tmp_path / "r.png")
    (axes,) = drawn[0].axes
    assert [bar.get_height() for bar in axes.patches] == [1.5, 0.0, 0.5, 0.0]
    assert [line.get_ydata()[0] for line in axes.lines] == [1.0]
    assert {t.get_text() for t in axes.texts} == {"1.50 OpenVINO", "0.50 MNN", ""}
    monkeypatch.undo()
    pyplot.close(drawn[0])


def test_ratios_without_a_plot_is_an_error(results, tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(results[1]))
    assert report.main([str(tmp_path / "r.json"), "--ratios"]) == 2
    assert "give --plot FILE too" in capsys.readouterr().err


# many models


def row(model, batch, **ratios):
    """A comparison of a result file, as far as summaries look at it."""
    best = min(ratios, key=ratios.get)
    return {
        "model": model,
        "batch": batch,
        "peers": {key: {"ours_is_faster_by": ratio} for key, ratio in ratios.items()},
        "claims": {comparing.BEST: {"peer": best, "ratio": ratios[best]}},
    }


def test_summary_is_a_geometric_mean_with_wins_and_losses():
    assert summary.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        summary.geometric_mean([1.0, 0.0])
    comparisons = [row("a", 1, eager=4.0, mnn=2.0), row("b", 1, eager=1.0), row("c", 16, eager=3.0)]
    comparisons[1]["peers"]["mnn"] = {"status": "failed"}
    found = {(r["batch"], r["against"]): r for r in summary.summarise(comparisons)}
    best = found[1, comparing.BEST]
    assert best["geometric_mean"] == pytest.approx(math.sqrt(2), rel=1e-3) and best["faster"] == 1
    assert best["slower"] == [{"model": "b", "ratio": 1.0, "peer": "eager"}]
    assert found[1, "eager NCHW"]["largest"] == {"model": "a", "ratio": 4.0, "peer": "eager"}
    assert (found[1, "MNN"]["models"], found[1, "MNN"]["without"]) == (1, 1)
    assert found[16, comparing.BEST]["geometric_mean"] == 3.0
    said = summary.losses(list(found.values()), comparing.BEST)
    assert said[0] == "batch 1: slower than the best peer on 1 of 2 models: b 1.00x (eager NCHW)"
    assert said[1] == "batch 16: slower than the best peer on 0 of 1 models"


def test_one_member_of_every_family_is_measured():
    families = {fb.backbones.model_info(name).family for name in subject.FLAGSHIPS}
    assert families == set(fb.backbones.list_families())


def test_a_comparison_survives_its_file(results):
    for stored in results[1]["comparisons"]:
        again = comparing.Comparison.from_dict(stored).as_dict()
        assert again["timing"] == stored["timing"] and again["claims"].keys() == stored["claims"].keys()
        for key, entry in again["peers"].items():
            expected = dict(stored["peers"][key])
            for rounded in ("median_ms", "quartiles_ms", "ours_is_faster_by"):
                assert entry.pop(rounded) == pytest.approx(expected.pop(rounded), abs=2e-4), (key, rounded)
            assert entry == expected


HOW = rows.How(["eager", "mnn"], 1, 0.0, 2)


def test_a_crashed_stack_gets_a_line_and_the_others_are_measured(results, monkeypatch):
    asked = []

    def fake(arguments, *, timeout, listen):
        asked.append(arguments[arguments.index("--peers") + 1 :])
        assert not listen("some warning")
        if "mnn" in asked[-1]:
            assert listen(rows.PROGRESS + json.dumps([0.2, "preparing MNN"]))
            raise child.ChildFailed(["-m", "x"], child.ended(-11), -11, [])
        return results[1]["comparisons"][0]

    monkeypatch.setattr(rows, "run_child", fake)
    found = rows.isolated("resnet18", 1, HOW, lambda share, what: None)
    assert asked == [["eager", "mnn"], ["eager"]]
    entry = found["peers"]["mnn"]
    assert (entry["status"], entry["sentence"]) == (
        "failed",
        "the process was ended by SIGSEGV while preparing MNN",
    )
    assert found["peers"]["eager"]["status"] == "timed"


@pytest.mark.parametrize(
    "code, doing", [(1, "preparing MNN"), (-9, "float64 reference"), (None, "timing MNN")]
)
def test_other_failures_of_a_row_are_raised(monkeypatch, code, doing):
    def fake(arguments, *, timeout, listen):
        listen(rows.PROGRESS + json.dumps([0.2, doing]))
        raise child.ChildFailed(["-m", "x"], "ended", code, ["why"])

    monkeypatch.setattr(rows, "run_child", fake)
    with pytest.raises(child.ChildFailed, match="why"):
        rows.isolated("resnet18", 1, HOW, lambda share, what: None)


def test_progress_names_the_peer():
    keys = list(peers.PEERS)
    for key, peer in peers.PEERS.items():
        for doing in (
            f"preparing {peer.name}{peer.patience}",
            f"timing {peer.name}",
            f"timing warm-up: {key}",
        ):
            assert rows.named_in(doing, keys) == key
    assert rows.named_in("float64 reference", keys) is None and rows.named_in("", keys) is None


def test_a_row_in_a_process_of_its_own():
    heard = []
    found = rows.isolated("lenet5", 2, rows.How(["eager"], 1, 0.0, 2), lambda *told: heard.append(told))
    assert (found["model"], found["batch"]) == ("lenet5", 2)
    assert found["peers"]["eager"]["status"] == "timed" and heard[-1] == (1.0, "done")


def interrupted_run(folder, monkeypatch):
    """A run over two models that is interrupted in the second: (its file, what was asked for so far)."""
    asked = []

    def measure(model_name, batch, how, tell):
        asked.append(model_name)
        if asked == ["lenet5", "alexnet"]:
            raise KeyboardInterrupt
        model = subject.calibrate(Tiny(), torch.randn(4, 3, 16, 16))
        x = torch.randn(batch, 3, 16, 16)
        found = comparing.compare(model, x, peers.make_peers(how.peers, how.threads), budget=0, min_rounds=2)
        return {"model": model_name, **found.as_dict(), "core_round_trip_ns": [None, None]}

    monkeypatch.setattr(models, "measure_here", measure)
    options = ["--peers", "eager", "channels_last", "--threads", "1", "--out", str(folder)]
    assert models.main(["lenet5", "alexnet", *options]) == 130
    (path,) = folder.glob("models-*.json")
    return path, asked


def test_a_cap_on_instructions_is_said(monkeypatch):
    for name in machine.CAPS:
        monkeypatch.delenv(name, raising=False)
    assert machine.describe(1)["caps"] == {}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    facts = machine.describe(1)
    assert facts["caps"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in machine.headline(facts)


def test_results_documents_and_tests_are_not_code(tmp_path):
    """What a run may go on after; what it measures may not change."""

    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *name, *arguments], check=True, capture_output=True)

    def add(path, text="1"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        git("add", ".")
        git("commit", "-m", path)
        return machine.commit(tmp_path), machine.code(tmp_path)

    assert machine.commit(tmp_path) is machine.code(tmp_path) is None
    git("init")
    seen = [add("csrc/a.cpp"), *map(add, ("docs/a.md", "tests/a.py", "bench/results/a.json"))]
    assert len({commit for commit, _ in seen}) == 4 and len({code for _, code in seen}) == 1
    assert add("engine/a.py")[1] != seen[0][1]
    (tmp_path / "docs/a.md").write_text("2")
    assert machine.commit(tmp_path).endswith("+changes") and not machine.code(tmp_path).endswith("+changes")
    changed = set()
    for text in "23":
        (tmp_path / "csrc/a.cpp").write_text(text)
        changed.add(machine.code(tmp_path))
    assert len(changed) == 2 and all(code.endswith("+changes") for code in changed)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    path, asked = interrupted_run(tmp_path, monkeypatch)
    assert f"--resume {path} goes on" in capsys.readouterr().err.replace("\n", "")
    first = json.loads(path.read_text())["comparisons"]
    assert [c["model"] for c in first] == ["lenet5"]
    assert models.main(["--resume", str(path)]) == 0
    results = json.loads(path.read_text())
    assert asked == ["lenet5", "alexnet", "alexnet"] and results["comparisons"][0] == first[0]
    assert [c["model"] for c in results["comparisons"]] == ["lenet5", "alexnet"]
    assert len(results["resumed"]) == 1 and results["failures"] == []
    assert models.main(["--resume", str(path)]) == 0 and len(asked) == 3
    results["comparisons"][1]["timing"]["disturbed_share"] = 0.5
    path.write_text(json.dumps(results))
    assert summary.disturbed(results["comparisons"])[-1] == ("alexnet", 1)
    assert "alexnet batch 1" in summary.disturbed_line(results["comparisons"])
    results["comparisons"][0]["timing"]["disturbed_share"] = 0.0
    path.write_text(json.dumps(results))
    assert models.main(["--resume", str(path), "--redo-disturbed"]) == 0
    assert (
        asked[3:] == ["alexnet"]
        and json.loads(path.read_text())["comparisons"][0] == results["comparisons"][0]
    )


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda r: r["machine"].update(code="0"), "code was 0, here it is"),
        (lambda r: r["machine"].update(cpu="another"), "cpu was another"),
        (lambda r: r["comparisons"][0]["peers"]["eager"].update(version="0.1"), "eager was 0.1, here it is"),
        (lambda r: r.pop("options"), "not a result file"),
        (lambda r: r["options"].pop("budget"), "its options lack budget"),
    ],
    ids=["code", "machine", "version of a peer", "no options", "old options"],
)
def test_a_run_goes_on_only_where_it_began(tmp_path, monkeypatch, capsys, spoil, said):
    path, _ = interrupted_run(tmp_path, monkeypatch)
    results = json.loads(path.read_text())
    spoil(results)
    path.write_text(json.dumps(results))
    capsys.readouterr()
    assert models.main(["--resume", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_failed_row_does_not_stop_the_others(tmp_path, monkeypatch, results, capsys):
    def isolated(model_name, batch, how, tell):
        if model_name == "lenet5":
            raise child.ChildFailed(["-m", "x"], "ended with 1", 1, ["out of luck"])
        return results[1]["comparisons"][0] | {"model": model_name}

    monkeypatch.setattr(models, "isolated", isolated)
    assert models.main(["lenet5", "alexnet", "--isolate", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("models-*.json")
    stored = json.loads(path.read_text())
    assert [f["model"] for f in stored["failures"]] == ["lenet5"]
    assert [c["model"] for c in stored["comparisons"]] == ["alexnet"]
    assert "lenet5, batch 1 failed: -m x ended with 1: / out of luck" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "option, expected", [("--all", list(subject.FLAGSHIPS)), ("--every", fb.list_models())]
)
def test_all_and_every_select_models_and_batches(option, expected):
    options = models.settle(models.parser().parse_args([option]))
    assert (options.models, options.batch, options.isolate) == (expected, [1, 16], True)
    assert models.settle(models.parser().parse_args([option, "--batch", "4"])).batch == [4]


def test_several_models_end_with_a_summary(results):
    comparisons = [row("a", 1, eager=4.0, mnn=2.0), row("b", 1, eager=1.0, mnn=0.5)]
    found = report.summary_lines({"summary": summary.summarise(comparisons)})
    assert "| 1 | the best peer | 2 | 1.00x | 0.50x b | 2.00x a | 1 | 1 |" in found
    assert "- batch 1: slower than the best peer on 1 of 2 models: b 0.50x (MNN)" in found
    assert "over the models" not in results[2]


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
        ([], "give either names of models, or --all"),
        (["resnet18", "--redo-disturbed"], "--redo-disturbed goes with --resume FILE"),
        (["resnet18", "--all"], "give either names of models, or --all"),
        (
            ["--resume", "x.json", "--batch", "16", "--first-call"],
            "takes --batch, --first-call from the file",
        ),
        (["--resume", "no-such-file.json"], "not a result file of this program (FileNotFoundError"),
    ],
)
def test_options_are_checked_before_anything_runs(argv, said, capsys):
    assert models.main(argv) == 2
    assert said in capsys.readouterr().err


def test_machine_facts_come_from_cpuinfo():
    text = "processor : 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 fma avx512f made_up\n"
    assert machine.cpu_facts(text) == ("Some CPU @ 2GHz", ["avx2", "fma", "avx512f"])
    assert machine.cpu_model(text) is None
    numbered = "model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\n"
    assert machine.cpu_model(numbered) == "family 25, model 17"
    facts = {"cpu": "AMD EPYC(TM) 9B45 Processor @ 2GHz", "threads": 2}
    now = models.datetime.datetime(2026, 1, 2, 3, 4, 5)
    assert models.stem(facts, "highest", now) == "models-amd-epyc-9b45-2t-20260102-030405"
    assert models.stem(facts, "bfloat16", now) == "models-bfloat16-amd-epyc-9b45-2t-20260102-030405"


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


def test_child_is_heard_while_it_runs_and_is_stopped_when_late():
    heard = []
    script = "import sys; print('one', file=sys.stderr); print('two', file=sys.stderr); sys.exit(3)"
    with pytest.raises(child.ChildFailed) as failure:
        child.run_child(["-c", script], listen=lambda line: heard.append(line) or line == "one")
    assert heard == ["one", "two"] and str(failure.value).endswith("ended with 3:\ntwo")
    with pytest.raises(child.ChildFailed, match=r"took more than 0 s") as failure:
        child.run_child(["-c", "import time; time.sleep(60)"], timeout=0.3)
    assert failure.value.code is None
    with pytest.raises(child.ChildFailed, match="was ended by SIGKILL") as failure:
        child.run_child(["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    assert failure.value.code == -9


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


@native
def test_the_way_between_cores_is_told_where_there_are_two_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert machine.core_round_trip_ns() > 10
        torch.set_num_threads(1)
        assert machine.core_round_trip_ns() is None
    finally:
        torch.set_num_threads(before)


@native
def test_the_speed_table_tells_the_way_between_cores(results):
    _, data, _ = results
    comparison = data["comparisons"][0]
    assert len(comparison["core_round_trip_ns"]) == 2
    told = {**data, "comparisons": [{**comparison, "core_round_trip_ns": [97, None]}]}
    assert report.speed_table(told)[2].endswith("| 97 |")
