"""The CUDA operators: on a GPU against PyTorch, and without one as far as a library can be examined."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fast_backbones as fb
from fast_backbones.kernels import _ext

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "kernels" / "_C_cuda.so"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
built = pytest.mark.skipif(
    not fb.build_info()["cuda"], reason=f"no CUDA library: {fb.build_info()['cuda_reason']}"
)


@built
@pytest.mark.skipif(
    torch.version.cuda is not None, reason="a CUDA build of torch: the tests on the GPU say more"
)
def test_library_fits_this_torch_without_a_gpu():
    """Loads it lazily beside a CPU torch: its data symbols must resolve and both doors register.

    In a process of its own: the product loads it only where torch has CUDA.
    """
    code = f"""
import ctypes, os, torch
import fast_backbones.kernels._ext as ext
ext.require()
ctypes.CDLL({str(LIBRARY)!r}, mode=os.RTLD_LAZY)
for name in ("max_pool2d", "global_avg_pool", "depthwise_conv2d_into", "grouped_conv2d_into"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fast_backbones::" + name, "CUDA"), name
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def resources_of(library):
    """(architecture, function, registers, bytes of local memory, bytes of shared memory), by cuobjdump."""
    from triton import knobs

    text = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", library],
        text=True, capture_output=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    arch = name = ""
    for line in text.splitlines():
        if line.startswith("arch ="):
            arch = line.split("=")[1].strip()
        elif "Function" in line:
            name = line.split("Function ")[1].rstrip(":")
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            yield arch, name, used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"]


@built
def test_kernels_stay_within_their_budgets(record_property):
    """On every target: no spills, registers for as many blocks as a kernel asks for, static shared memory."""
    registers = {"depthwise_strips": 168, "grouped_kernel": 168, "max_pool2d": 64}
    kernels = {}
    for arch, name, used, local, shared in resources_of(LIBRARY):
        assert local == 0, (arch, name, local)
        assert shared <= 48 << 10, (arch, name, shared)
        most = next((most for part, most in registers.items() if part in name), 64)
        assert used <= most, (arch, name, used)
        kernels.setdefault(name, set()).add(arch)
    targets = ", ".join(sorted(set().union(*kernels.values())))
    record_property("covered", f"{len(kernels)} CUDA C++ kernels for {targets}: none spills")
    assert set(map(frozenset, kernels.values())) == {frozenset({"sm_80", "sm_90a", "sm_100"})}
    for name in ("max_pool2d", "global_avg_pool", "depthwise_strips", "depthwise_any", "grouped_kernel"):
        assert any(name in kernel for kernel in kernels), name


POOLS = [  # N C H W, window, stride, padding, ceil mode, why
    ((2, 64, 112, 112), 3, 2, 1, False, "resnet stem"),
    ((3, 24, 15, 13), 3, 2, 0, True, "ceil mode, odd image"),
    ((1, 5, 7, 9), (2, 3), (1, 2), (1, 1), False, "channels that fill no vector, another window each way"),
    ((2, 8, 1, 1), 3, 1, 1, False, "one pixel, all padding around it"),
    ((0, 8, 6, 6), 2, 2, 0, False, "empty batch"),
]


@gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", POOLS, ids=lambda c: c[-1])
def test_max_pool2d_equals_torch(case, dtype, layout):
    assert _ext.cuda(), _ext.cuda_why_not()
    sizes, window, stride, padding, ceil_mode, _ = case
    pair = lambda v: list(v) if isinstance(v, tuple) else [v, v]  # noqa: E731
    x = torch.randn(sizes, device="cuda").to(dtype).to(memory_format=layout)
    if sizes[0]:
        x[-1, -1, 0, 0] = float("nan")
    y = torch.ops.fast_backbones.max_pool2d(x, pair(window), pair(stride), pair(padding), ceil_mode)
    expected = F.max_pool2d(x, window, stride, padding, ceil_mode=ceil_mode)
    assert torch.equal(y.nan_to_num(7777), expected.nan_to_num(7777))
    assert y.dtype == dtype
    assert y.stride() == expected.stride()


@gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(2, 2048, 7, 7), (3, 5, 9, 1), (1, 8, 1, 1), (0, 8, 3, 3)],
    ids=["resnet", "odd", "one pixel", "empty"],
)
def test_global_avg_pool_is_as_accurate_as_torch(sizes, dtype, layout):
    assert _ext.cuda(), _ext.cuda_why_not()
    x = torch.randn(sizes, device="cuda").to(dtype).to(memory_format=layout)
    y = torch.ops.fast_backbones.global_avg_pool(x)
    exact = x.double().mean((2, 3))
    plain = F.adaptive_avg_pool2d(x, 1).flatten(1)
    assert y.shape == plain.shape
    assert y.dtype == dtype
    if x.numel():
        room = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max() + room


@gpu
def test_integers_give_exact_sums_and_a_sample_does_not_depend_on_its_batch():
    assert _ext.cuda(), _ext.cuda_why_not()
    x = torch.randint(-8, 9, (70000, 3, 2, 2), device="cuda").float().to(memory_format=torch.channels_last)
    y = torch.ops.fast_backbones.global_avg_pool(x)
    assert torch.equal(y, x.mean((2, 3)))  # 70000 images: more than one grid in y
    x = torch.randn(9, 40, 7, 5, device="cuda").to(memory_format=torch.channels_last)
    whole = torch.ops.fast_backbones.global_avg_pool(x)
    assert torch.equal(whole[4:5], torch.ops.fast_backbones.global_avg_pool(x[4:5]))


@gpu
def test_runs_on_the_current_stream():
    assert _ext.cuda(), _ext.cuda_why_not()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.zeros(64, 64, 112, 112, device="cuda").to(memory_format=torch.channels_last)
        for _ in range(50):
            x.add_(1)
        y = torch.ops.fast_backbones.global_avg_pool(x)
    stream.synchronize()
    assert torch.equal(y, torch.full_like(y, 50))


def test_job_script_is_rehearsed_to_its_end(tmp_path):
    script = ROOT / "bench" / "gpu" / "run.sh"
    done = subprocess.run(
        [script, tmp_path / "out", "--dry-run"],
        text=True, capture_output=True, timeout=500, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    tools = re.findall(r"launches ready, \d+ ways", done.stdout)
    assert len(tools) == 4, done.stdout
    assert len(re.findall(r"launches of a training step ready", done.stdout)) == 2, done.stdout
    assert len(re.findall(r"tests? collected", done.stdout)) == 3, done.stdout
    steps = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    for part in (
        "setup.py --quiet build_ext --inplace", "pytest tests/test_cuda.py tests/test_cuda_kernels.py",
        "bench.gpu.tune",
        "pytest tests/test_gpu_models.py", "bench.gpu.layers resnet50", "bench.gpu.models",
        "pytest tests/test_triton_batch_norm.py", "bench.gpu.train --peers",
    ):  # fmt: skip
        assert any(part in step for step in steps), done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["machine.json"]
