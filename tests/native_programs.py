"""Builds the C++ programs of tests/native, which use the kernels without Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

SOURCES = sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))
HEADERS = [path for pattern in ("*.h", "*.inc") for path in (ROOT / "csrc" / "cpu").rglob(pattern)]


def compiled_kernels() -> list[str]:
    """The object files of the build in this checkout when it is newer than the sources, else the sources."""
    newest = max(path.stat().st_mtime for path in SOURCES + HEADERS)
    for folder in ROOT.glob("build/native-*/CMakeFiles/fb_cpu.dir"):
        objects = [folder / f"{path.relative_to(ROOT)}.o" for path in SOURCES]
        if all(map(Path.is_file, objects)) and max(path.stat().st_mtime for path in objects) >= newest:
            return [str(path) for path in objects]
    return [str(path) for path in SOURCES]


def build_program(name: str, folder: Path, *, sanitizer: str | None = None, anew: str | None = None) -> Path:
    """tests/native/<name>.cpp with the kernels, in `folder`; skips the test without a compiler.

    sanitizer: of the compiler, for this program and for csrc/cpu/<anew>, which is compiled again for it.
    """
    compiler = os.environ.get("CXX", "").split()[:1] or [shutil.which("g++") or shutil.which("clang++")]
    if compiler[0] is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc' / 'cpu'}"]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
    sources, kernels = [str(ROOT / "tests" / "native" / f"{name}.cpp")], compiled_kernels()
    if anew is not None:
        sources.append(str(ROOT / "csrc" / "cpu" / anew))
        kernels = [path for path in kernels if f"/cpu/{anew}" not in path]
    program = folder / name
    command = [*compiler, *flags, *sources, *kernels, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if sanitizer and "cannot find" in done.stderr:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    assert done.returncode == 0, done.stderr
    return program
