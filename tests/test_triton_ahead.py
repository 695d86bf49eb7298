"""Triton kernels compiled ahead of time for GPUs that are not here: no spills, shared memory within limits,
matrix products on tensor cores. In a process of its own, because kernels of the interpreter cannot be
compiled."""

import json
from pathlib import Path

import pytest
from helpers import needs_native, run_python
from triton_device import needs_triton

pytestmark = [needs_triton, needs_native]

PRODUCT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
PRODUCTS = ("pointwise_conv2d", "conv2d", "grouped_conv2d", "separable_conv2d")
OTHERS = ("excitation", "max_pool2d", "avg_pool2d", "global_avg_pool", "affine")
# They have every config that a plan of ours may take by rule or by tuning; MORE adds launches, not configs.
MODELS = "lenet5 mobilenetv1_100 resnext50_32x4d densenet121 legacy_seresnet50 inception_v3 legacy_senet154"
MORE = f"{MODELS} legacy_xception vgg16 alexnet"

thorough = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "models, dtypes, each",
    [
        (MODELS, ("bfloat16", "float32"), "rule"),
        pytest.param(MODELS, ("bfloat16", "float32"), "config", marks=thorough),
        pytest.param(MORE, ("bfloat16", "float16", "float32"), "constants", marks=thorough),
        pytest.param(MORE, ("bfloat16",), "launch", marks=thorough),
    ],
    ids=lambda value: value if value in ("rule", "config", "constants", "launch") else "",
)
def test_every_tile_of_whole_models(models, dtypes, each, tmp_path, record_property):
    """Spills and too much shared memory are faults, which the tool itself reports. "rule": only the tiles
    that plans take without tuning, each config once."""
    out = tmp_path / "compiled.json"
    count = "config" if each == "rule" else each
    options = ["--dtype", *dtypes, "--tf32", "neither", "both", "--each", count, "--out", str(out)]
    if each in ("config", "constants"):
        options.append("--tiles")
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    limit = 850 if count == "config" else 2900
    done = run_python("-m", "bench.gpu.ahead", *models.split(), *options, timeout=limit, **settings)
    record_property("covered", done.stdout.splitlines()[-1])
    rows = json.loads(out.read_text())
    assert {row["target"] for row in rows} == set(PRODUCT)
    assert {row["kernel"] for row in rows} >= {*PRODUCTS, *OTHERS}
    for row in rows:  # wgmma and tcgen05 take 64 rows or more; exact float32 products are ordinary fma
        if row["dtype"] != "float32" and row["kernel"] in PRODUCTS:
            narrow = row["tiles"].get("BLOCK_M", 64) < 64
            assert row["product"] == ("mma.sync" if narrow else PRODUCT[row["target"]]), row


TRAINED = {
    *(f"batch_norm_{name}" for name in ("moments", "statistics", "apply", "sums", "gradients", "input")),
    *(f"squeeze_excite_{name}" for name in ("sums", "apply", "input")),
    *(f"{kind}_{what}" for kind in ("depthwise", "grouped")
      for what in ("conv2d", "input_gradient", "weight_gradient")),
    "total",
}  # fmt: skip
IN_TRAINING = "mobilenetv1_100 resnext50_32x4d legacy_seresnet50 legacy_senet154"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "models, dtypes, each",
    [
        (IN_TRAINING, ("bfloat16",), "config"),
        pytest.param(
            f"{IN_TRAINING} densenet121 legacy_xception inception_v3", ("bfloat16", "float16", "float32"),
            "constants", marks=thorough,
        ),
    ],
    ids=["config", "constants"],
)  # fmt: skip
def test_every_kernel_of_training_steps(models, dtypes, each, tmp_path, record_property):
    """On tensors without memory, so no step has waited for a number of the device either."""
    out = tmp_path / "compiled.json"
    options = ["--training", "--dtype", *dtypes, "--tf32", "neither", "both", "--each", each]
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    where = ["--batch", "32", "--out", str(out)]
    done = run_python("-m", "bench.gpu.ahead", *models.split(), *options, *where, timeout=850, **settings)
    record_property("covered", done.stdout.splitlines()[-1])
    rows = json.loads(out.read_text())
    assert {row["target"] for row in rows} == set(PRODUCT)
    assert {row["kernel"] for row in rows} == TRAINED
    for row in rows:  # dw has too few rows for larger instructions
        if row["dtype"] != "float32" and row["kernel"].startswith("grouped"):
            few = row["kernel"] == "grouped_weight_gradient" or row["tiles"]["BLOCK_M"] < 64
            assert row["product"] == PRODUCT[row["target"]] or (few and row["product"]), row


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_on_maps_of_few_pixels_and_channels(tmp_path):
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).with_name("small_maps_ahead.py")
    done = run_python(str(program), "90", timeout=850, **settings)
    count, *spilled = done.stdout.split()
    assert int(count) > 100
    assert not spilled


@pytest.mark.parametrize("target", [90, *(pytest.param(t, marks=pytest.mark.slow) for t in (80, 100))])
def test_calls_find_what_was_compiled_on_all_cores_and_ahead(target, tmp_path):
    """Triton's own way from a call to its compiler: what the test above proves is what a GPU runs."""
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).with_name("stand_in_gpu.py")
    done = run_python(str(program), str(target), "lenet5", "resnet18", timeout=300, **settings)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["launches"] > 10
    assert found["side by side"] == [False] * found["launches"], "each is compiled once"
    assert found["ahead"] == found["calls"] == [True] * found["launches"]
