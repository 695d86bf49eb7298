"""What `import fast_backbones` costs and touches, and what it says when the compiled library is absent."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fast_backbones as fb

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "engine", "backbones", "training")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# Measured in modules, not in seconds: a busy machine cannot make this fail, and a failure names the culprit.
HEAVY = (
    "torchvision", "timm", "triton", "matplotlib", "rich", "typer", "PIL", "sklearn", "scipy", "safetensors",
    "huggingface_hub", "onnx", "onnxruntime", "openvino", "torch._dynamo", "torch._inductor", "torch.export",
    "torch.onnx", "requests", "http.client", "ssl",
)  # fmt: skip


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new interpreter that sees the packages in cwd before anything installed."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("FB_")}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=cwd,
        env={**keep, "PYTHONPATH": str(cwd), **environment},
        text=True,
        capture_output=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A copy of the Python sources on which no build has ever run."""
    root = tmp_path_factory.mktemp("bare")
    for folder in ("fast_backbones", *ROOMS):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        )
    return root


def test_import_brings_in_nothing_heavy():
    code = """
import json, sys, torch
before = set(sys.modules)
import fast_backbones
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr
    new = json.loads(done.stdout)
    heavy = [name for name in new if any(name == h or name.startswith(h + ".") for h in HEAVY)]
    assert not heavy


def test_import_starts_no_process_and_opens_no_connection():
    code = """
import sys, torch
seen = []
watched = (
    "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"
)
sys.addaudithook(lambda event, args: seen.append(event) if event in watched else None)
import fast_backbones as fb
fb.build_info()
assert not seen, seen
"""
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr


def test_import_leaves_cuda_and_threads_alone():
    code = """
import torch
threads = torch.get_num_threads()
import fast_backbones as fb
fb.build_info()
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads
"""
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr


def test_import_warns_about_nothing():
    done = python("import torch, warnings; warnings.simplefilter('error'); import fast_backbones", ROOT)
    assert done.returncode == 0, done.stderr


USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import fast_backbones as fb
    assert not [w for w in caught if "fast_backbones" in str(w.message)], "warned at import, before any use"
    x = torch.randn(1, 8, 6, 6)
    for _ in range(2):
        y = fb.kernels.max_pool2d(x, 2)
assert torch.equal(y, torch.nn.functional.max_pool2d(x, 2))
info = fb.build_info()
assert info["native"] is False, info
print(len([w for w in caught if "fused kernels" in str(w.message)]))
print(info["reason"])
"""


def test_without_a_build_everything_runs_and_one_warning_says_so(bare):
    done = python(USE, bare)
    assert done.returncode == 0, done.stderr
    warned, reason = done.stdout.splitlines()
    assert warned == "1"
    assert reason.startswith("not built: run `make build`")


def test_switched_off_is_silent(bare):
    done = python(USE, bare, FB_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0", "switched off by FB_NATIVE=0"]


def test_a_library_that_does_not_load_is_told_from_one_that_is_absent(bare, tmp_path):
    shutil.copytree(bare, tmp_path, dirs_exist_ok=True)
    (tmp_path / "kernels" / f"_C{SUFFIX}").write_bytes(b"not a library")
    done = python(USE, tmp_path)
    assert done.returncode == 0, done.stderr
    warned, reason = done.stdout.splitlines()
    assert warned == "1"
    assert reason.startswith("failed to load: ")
    assert f"_C{SUFFIX}" in reason


def test_a_library_of_another_interpreter_is_named(bare, tmp_path):
    shutil.copytree(bare, tmp_path, dirs_exist_ok=True)
    (tmp_path / "kernels" / "_C.cpython-30-x86_64-linux-gnu.so").write_bytes(b"")
    done = python(USE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not built for this interpreter: found _C.cpython-30-x86_64-linux-gnu.so" in done.stdout


@pytest.mark.skipif(
    not (ROOT / "kernels" / f"_C{SUFFIX}").is_file(), reason="no compiled library in this checkout"
)
def test_a_library_of_other_sources_is_not_used(bare, tmp_path):
    """After an update without a rebuild: Python asks for operators that the old library does not have."""
    shutil.copytree(bare, tmp_path, dirs_exist_ok=True)
    shutil.copy(ROOT / "kernels" / f"_C{SUFFIX}", tmp_path / "kernels")
    source = tmp_path / "kernels" / "_ext.py"
    newer = source.read_text().replace("_INTERFACE = ", "_INTERFACE = 1000 + ")
    source.write_text(newer)
    done = python(USE, tmp_path)
    assert done.returncode == 0, done.stderr
    warned, reason = done.stdout.splitlines()
    assert warned == "1"
    assert reason.startswith("built from other sources: interface ") and "make build" in reason


def test_a_whole_model_runs_without_a_build(bare):
    code = """
import torch, fast_backbones as fb
model = fb.resnet18(num_classes=10).eval()
with torch.inference_mode():
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
"""
    done = python(code, bare)
    assert done.returncode == 0, done.stderr


def test_require_native_makes_absence_an_error(bare):
    done = python("import fast_backbones", bare, FB_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "ImportError: FB_REQUIRE_NATIVE=1, but the compiled library" in done.stderr
    assert "not built" in done.stderr


@pytest.mark.skipif(not fb.build_info()["native"], reason="the compiled library is not built here")
def test_require_native_accepts_a_build():
    done = python(
        "import fast_backbones as fb; assert fb.build_info()['native']", ROOT, FB_REQUIRE_NATIVE="1"
    )
    assert done.returncode == 0, done.stderr


def test_build_info_is_plain_data():
    info = fb.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == fb.__version__
    assert (info["reason"] is None) == info["native"]
    assert (info["cuda_reason"] is None) == info["cuda"]


def test_cuda_says_why_not():
    from fast_backbones.kernels import _ext

    assert _ext.cuda() == (_ext.cuda_why_not() is None)
    if not _ext.cuda():
        assert len(_ext.cuda_why_not().split()) >= 4  # a sentence
