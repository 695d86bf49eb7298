"""`--precision` of the whole-model benchmark: what each stack is given, and what is asked of ours."""

import importlib.util

import pytest
import torch
from fast_backbones.bench import compare as comparing
from fast_backbones.bench import models, peers, precision, report, rows, timing
from helpers import needs_native

import fast_backbones as fb


def compared(key: str, *everyone):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = fb.create_model("resnet18").eval()
    guard = timing.NoiseGuard(lambda: None)
    found = comparing.compare(model, x, everyone, budget=0, min_rounds=2, guard=guard, precision=key)
    assert next(model.parameters()).dtype is torch.float32, "the caller's model was cast"
    return found


def test_stacks_get_model_and_input_in_bfloat16():
    seen = []

    class Seen(peers.Eager):
        def prepare(self, model, x):
            seen.extend([x.dtype, *{t.dtype for t in model.parameters()}])
            return super().prepare(model, x)

    found = compared("bfloat16", Seen(1))
    assert seen == [torch.bfloat16] * 2
    assert found.entry("eager").timed
    assert 1e-3 < found.own.rms < 0.1  # PyTorch's own error is that of bfloat16


@needs_native
@pytest.mark.parametrize("key", precision.PRECISIONS)
def test_ours_is_exact_enough_and_the_setting_is_put_back(key):
    before = torch.get_float32_matmul_precision()
    found = compared(key, peers.Eager(1), peers.Ours(1))
    assert found.entry("ours").timed and found.parity
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="ONNX Runtime is not installed")
def test_who_has_no_bfloat16_says_so():
    entry = compared("bfloat16", peers.OnnxRuntime(1)).entry("onnxruntime")
    assert entry.status == "refused" and "no torch.bfloat16" in entry.sentence


@pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="OpenVINO is not installed")
def test_openvino_is_told_to_use_bfloat16():
    entry = compared("bfloat16", peers.OpenVino(1)).entry("openvino")
    assert entry.timed and entry.settings["INFERENCE_PRECISION_HINT"] == "bf16"


def test_a_stack_that_is_too_inexact_gets_no_time():
    class Off(peers.Eager):
        key = name = "ours"

        def prepare(self, model, x):
            call = super().prepare(model, x)
            return lambda: [y + 1e-4 * y.abs().max() for y in call()]

    assert compared("highest", Off(1)).entry("ours").status == "wrong"
    assert "more than 16 times" in compared("high", Off(1)).entry("ours").sentence


def test_the_report_says_at_which_precision(tmp_path):
    argv = ["lenet5", "--peers", "eager", "--threads", "1", "--budget", "0", "--rounds", "2"]
    assert models.main([*argv, "--precision", "bfloat16", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("models-bfloat16-*.md")
    assert "Median milliseconds of a forward, bfloat16;" in path.read_text()
    assert report.precision_of({"options": {}}).words == "float32"  # files from before there was a choice


def test_a_row_in_a_process_of_its_own_has_the_precision():
    found = rows.isolated("lenet5", 1, rows.How(["eager"], 1, 0.0, 2, "bfloat16"), lambda share, what: None)
    assert found["eager_error"]["rms"] > 1e-4
