"""The runner of tasks under stress and under ThreadSanitizer, in C++."""

import os
import shutil
import subprocess

import pytest
from helpers import ROOT
from test_kernels_ranges import compiled_kernels


@pytest.mark.parametrize("sanitizer", ["none", "thread"])
def test_chains_of_steps_give_the_values_of_one_thread(sanitizer, tmp_path):
    """Two phases, all kinds of waits, helpers, more and fewer threads than expected, failures."""
    compiler = os.environ.get("CXX", "").split()[:1] or [shutil.which("g++") or shutil.which("clang++")]
    if compiler[0] is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc' / 'cpu'}"]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer != "none" else []
    watched = [ROOT / "tests" / "native" / "task_list.cpp", ROOT / "csrc" / "cpu" / "runner.cpp"]
    others = [path for path in compiled_kernels() if "/cpu/runner.cpp" not in path]
    program = tmp_path / "task_list"
    command = [*compiler, *flags, *map(str, watched), *others, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if sanitizer != "none" and "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
