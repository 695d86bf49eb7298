"""The runner of tasks under stress and under ThreadSanitizer, in C++."""

import subprocess

import pytest
from native_programs import build_program


@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_chains_of_steps_give_the_values_of_one_thread(sanitizer, tmp_path):
    """Two phases, all kinds of waits, helpers, more and fewer threads than expected, failures."""
    program = build_program("task_list", tmp_path, sanitizer=sanitizer, anew="runner.cpp")
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
