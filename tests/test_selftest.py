"""fast-backbones selftest: what it covers, that it finds what is wrong, and what it says."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, needs_native, run_python
from typer.testing import CliRunner

from fast_backbones import cli, kernels, selftest, selftest_checks
from fast_backbones.engine import candidates
from fast_backbones.selftest import Result
from fast_backbones.selftest_checks import Failed

OF_PLANS_AND_OPS = {  # kinds of the library that are candidates of an op, by the names that have them
    "conv2d", "winograd_conv2d", "grouped_conv2d", "depthwise_conv2d", "separable_conv2d", "linear",
    "max_pool2d", "avg_pool2d", "global_avg_pool", "local_response_norm", "l2_normalize", "squared_distances",
}  # fmt: skip


def test_every_kernel_of_the_library_has_a_check():
    source = Path(ROOT, "csrc/cpu/op.cpp").read_text()
    kinds = set(re.findall(r'spec_?\.kind == "(\w+)"', source))
    assert kinds == OF_PLANS_AND_OPS | {*selftest_checks.PLAN_KERNELS}
    names = [check.name for check in selftest_checks.kernel_checks()]
    native = [
        (op, c) for op, entry in kernels.ops().items() for c in entry.candidates if c.family == "native"
    ]
    assert len(names) == len(set(names)) == len(native)
    assert {"conv2d (winograd)", "grouped_conv2d (rows)", "batch_norm"} <= set(names)
    assert {*candidates.BY_OP} - {"pad", "affine", "shuffle", "multiply"} <= kinds | {"layer_norm"}


@needs_native
@pytest.mark.parametrize("op", sorted(kernels.ops()))
def test_every_candidate_has_a_case(op):
    for candidate in kernels.ops()[op].candidates:
        if candidate.family == "native":
            taken = [c for c in selftest_checks.CASES if c.op == op]
            assert any(selftest_checks.accepts(case, candidate.name) for case in taken), candidate.name


@needs_native
def test_a_right_kernel_passes_and_a_wrong_one_does_not(monkeypatch):
    words = selftest_checks.check_kernel("linear", "native")
    assert words == "equal on whole numbers, within twice PyTorch's error on real ones"
    linear = kernels.linear
    for wrong, said in ((1 + 1e-5, "whole numbers: "), (-1.0, "whole numbers: ")):
        monkeypatch.setattr(kernels, "linear", lambda *a, wrong=wrong, **k: linear(*a, **k) * wrong)
        with pytest.raises(Failed, match=said):
            selftest_checks.check_kernel("linear", "native")
    norm = kernels.batch_norm
    monkeypatch.setattr(kernels, "batch_norm", lambda *a, **k: norm(*a, **k) * (1 + 1e-5))
    with pytest.raises(Failed, match=r"result: (max|rms) error"):
        selftest_checks.check_kernel("batch_norm", "native")


@needs_native
def test_a_wrong_gradient_is_found(monkeypatch):
    linear = kernels.linear

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-4)

    monkeypatch.setattr(kernels, "linear", lambda *a, **k: Wrong.apply(linear(*a, **k)))
    with pytest.raises(Failed, match="gradient 0: "):
        selftest_checks.check_kernel("linear", "native")


@needs_native
def test_a_model_that_is_wrong_is_found(monkeypatch):
    check = selftest_checks.check_model
    digests = {}
    assert "the same bits with one thread" in check("lenet5", 32, {}, digests, True)
    assert len(digests["lenet5"]) == 16
    monkeypatch.setattr(selftest_checks, "as_list", lambda y: [y * (1 + 1e-4)])
    with pytest.raises(Failed, match="PyTorch's own"):
        check("lenet5", 32, {}, {}, False)
    assert torch.get_num_threads() in (1, 2)
    torch.set_num_threads(1)


def script(tmp_path, monkeypatch, *lines):
    """Instead of Python, a program that prints these lines of shell."""
    program = tmp_path / "python"
    program.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    return list(selftest.results_of("avx2", True, {}))


def test_a_process_that_dies_is_a_failed_check(tmp_path, monkeypatch):
    good = '{"name": "one", "ok": true, "words": "fine", "seconds": 0.1, "digests": {}}'
    lines = ["echo '{\"total\": 2}'", f"echo '{good}'", 'echo \'{"running": "two"}\'']
    first, second = script(tmp_path, monkeypatch, *lines, "echo oh dear >&2", "kill -SEGV $$")
    assert first == Result("avx2", "one", True, "fine", 0.1, {})
    assert (second.name, second.ok) == ("two", False)
    assert second.words == "the process ended by SIGSEGV: oh dear"
    (failed,) = script(tmp_path, monkeypatch, "echo no module >&2", "exit 3")
    assert (failed.name, failed.words) == ("start", "the process ended with 3: no module")
    assert script(tmp_path, monkeypatch, "exit 0") == []


def test_instruction_sets_must_agree():
    results = [
        Result(isa, "model a", True, "", 0.0, {"a": "1", "b": digest})
        for isa, digest in (("avx2", "2"), ("avx512", "2"), ("portable", "3"))
    ]
    assert selftest.same_bits(results).ok
    results[1].digests["b"] = "4"
    found = selftest.same_bits(results)
    assert not found.ok and found.words == "differ on b"


def invoke(monkeypatch, results, *arguments):
    def run(tell):
        for i, result in enumerate(results):
            tell(i + 1, len(results), result)
        return results

    monkeypatch.setattr(selftest, "run", run)
    return CliRunner().invoke(cli.app, ["selftest", *arguments])


GOOD, BAD = Result("avx2", "linear", True, "equal [0]", 0.25), Result("avx2", "conv2d", False, "max error 1")


def test_it_says_what_passed(monkeypatch):
    result = invoke(monkeypatch, [GOOD])
    assert result.exit_code == 0 and "1/1  ok  avx2 linear: equal [0] (0.2 s)" in result.stdout
    assert "1 checks by avx2 in" in result.stdout and "all passed" in result.stdout


def test_it_says_what_failed_and_what_to_report(monkeypatch):
    result = invoke(monkeypatch, [GOOD, BAD])
    assert result.exit_code == 1 and "2/2  FAILED  avx2 conv2d: max error 1" in result.stdout
    assert "1 FAILED: avx2 conv2d" in result.stdout and "fast-backbones env" in result.stdout


def test_as_json(monkeypatch):
    result = invoke(monkeypatch, [GOOD, BAD], "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["checks"] == 2 and found["failed"] == ["avx2 conv2d"]
    assert found["results"][1]["words"] == "max error 1" and "2/2" in result.stderr


def test_without_a_library_the_reason_is_a_failed_check(monkeypatch):
    from fast_backbones.kernels import _ext

    monkeypatch.setattr(_ext, "_module", None)
    monkeypatch.setattr(_ext, "_reason", "nobody built it")
    told = []
    (result,) = selftest.run(lambda *each: told.append(each))
    assert not result.ok and "nobody built it" in result.words and told == [(1, 1, result)]


@pytest.mark.slow
@needs_native
def test_the_whole_selftest_passes():
    done = run_python("-m", "fast_backbones", "selftest", "--json", timeout=1800)
    found = json.loads(done.stdout)
    assert found["failed"] == [] and found["instruction_sets"] == selftest.isas()
    assert found["checks"] > 25 * len(selftest.isas())
