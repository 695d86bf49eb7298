"""Triton kernels compiled ahead of time for GPUs that are not here: no spills, shared memory within limits,
matrix products on tensor cores. In a process of its own, because kernels of the interpreter cannot be
compiled."""

import json

import pytest
from helpers import needs_native, run_python
from triton_device import needs_triton

pytestmark = [needs_triton, needs_native]

PRODUCT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
PRODUCTS = ("pointwise_conv2d", "conv2d", "grouped_conv2d", "separable_conv2d")
FEW = "lenet5 mobilenetv1_100 resnext50_32x4d"
MANY = f"{FEW} densenet121 legacy_senet154 legacy_xception legacy_seresnet50 inception_v3 vgg16 alexnet"


@pytest.mark.parametrize(
    "models, dtype, few",
    [
        (FEW, "bfloat16", True),
        pytest.param(FEW, "float16", True, marks=pytest.mark.slow),
        pytest.param(MANY, "bfloat16", False, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
        pytest.param(MANY, "float32", True, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_kernels_of_whole_models(models, dtype, few, tmp_path):
    out = tmp_path / "compiled.json"
    options = ["--dtype", dtype, "--batch", "256", "1", "--out", str(out), *(["--few"] if few else [])]
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python("-m", "bench.gpu.ahead", *models.split(), *options, timeout=2900, **settings)
    print(done.stdout.splitlines()[-1])  # how many of what; a fault makes it fail
    rows = json.loads(out.read_text())
    assert {row["target"] for row in rows} == set(PRODUCT)
    assert {row["kernel"] for row in rows} >= {*PRODUCTS, "max_pool2d", "global_avg_pool", "affine"} - (
        {"affine"} if few else set()
    )
    if dtype != "float32":  # exact float32 products are ordinary fma
        for row in rows:
            narrow = row["tiles"].get("BLOCK_M", 64) < 64  # wgmma and tcgen05 take 64 rows or more
            if row["kernel"] in PRODUCTS:
                assert row["product"] == ("mma.sync" if narrow else PRODUCT[row["target"]]), row
