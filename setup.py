"""The Python side of the build.

Folders: the rooms named in ROOMS live at the top of the repository and become fast_backbones.<room>.
Native code: CMakeLists.txt describes it; build_ext below drives CMake and puts the products into kernels/.

    FB_NATIVE           0    no native code at all: pure PyTorch
                        1    (default) the CPU library; without a compiler, CMake, ninja, pybind11 or torch,
                             a pure-PyTorch install that says so
    FB_REQUIRE_NATIVE   1    a missing tool is an error instead of a pure-PyTorch install
    FB_CUDA             0    no CUDA library
                        1    the CUDA library; a missing nvcc or a compile error stops the build
                        unset: when nvcc is found; a compile error is recorded and shown by build_info()
    FB_BUILD_TYPE       Release (default), RelWithDebInfo or Debug
    MAX_JOBS            parallel compiler processes (default: CPUs this process may use)
    CXX, CUDA_HOME      compiler and CUDA toolkit to use

Whether this machine has a GPU is never asked: what is built depends on the tools and the switches alone.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ROOMS = ("kernels", "engine", "backbones", "training", "bench")
EXTENSION = "fast_backbones.kernels._C"
FACTS = "_build.json"  # written beside _C: what was built with which tools, or why it was not
CUDA_LIBRARY = "_C_cuda.so"


def switch(name: str) -> str:
    """The value of an on/off environment variable: "0", "1" or "" when unset."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r}: expected 0, 1 or nothing")
    return value


def packages() -> tuple[list[str], dict[str, str]]:
    """Every package of the distribution, and the folder of each room."""
    names = ["fast_backbones", "fast_backbones.cli"]
    rooms = [room for room in ROOMS if (ROOT / room).is_dir()]
    for room in rooms:
        inner = find_packages(str(ROOT / room))
        names += [f"fast_backbones.{room}", *(f"fast_backbones.{room}.{package}" for package in inner)]
    return names, {f"fast_backbones.{room}": room for room in rooms}


def tool(package: str, folder: str, program: str) -> str | None:
    """Path of a program from its pip package (cmake.CMAKE_BIN_DIR, ninja.BIN_DIR), else from PATH."""
    if find_spec(package) is not None:
        module = __import__(package)
        candidate = Path(getattr(module, folder, "")) / program
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return str(candidate)
    return shutil.which(program)


def find_compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    for name in named[:1] or ("g++", "c++", "clang++"):
        if found := shutil.which(name):
            return found
    return None


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (candidate := Path(home) / "bin" / "nvcc").is_file():
            return str(candidate)
    return shutil.which("nvcc")


class MissingTool(Exception):
    """Something the native build needs is not on this machine; the text says what and how to get it."""


class NativeBuild(build_ext):
    """Runs CMake in build/native-<tag>, which is kept between calls, and copies the libraries to kernels/."""

    def run(self):
        target = ROOT / "kernels" if self.inplace else Path(self.build_lib) / "fast_backbones" / "kernels"
        target.mkdir(parents=True, exist_ok=True)
        facts = {"native": False, "reason": None, "cuda": False, "cuda_reason": None}
        try:
            self.build_native(target, facts)
        except MissingTool as missing:
            if switch("FB_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"fast_backbones: FB_REQUIRE_NATIVE=1, but {missing}") from missing
            facts["reason"] = str(missing)
            facts["cuda_reason"] = "the native library was not built"
            for stale in (f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", CUDA_LIBRARY):
                (target / stale).unlink(missing_ok=True)
            say(
                f"WARNING: fast_backbones is built without fused kernels: {missing}. It runs through PyTorch."
            )
        (target / FACTS).write_text(json.dumps(facts, indent=1) + "\n")

    def build_native(self, target: Path, facts: dict) -> None:
        compiler, cmake, ninja = self.find_tools()
        tag = sysconfig.get_config_var("SOABI") or f"python{sys.version_info.major}{sys.version_info.minor}"
        build = ROOT / "build" / f"native-{tag}"
        build.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc() if switch("FB_CUDA") != "0" else None
        with locked(build / ".lock"):
            settings = {
                "CMAKE_CXX_COMPILER": compiler,
                "CMAKE_MAKE_PROGRAM": ninja,
                "CMAKE_BUILD_TYPE": os.environ.get("FB_BUILD_TYPE", "Release"),
                "FB_PYTHON": sys.executable,
                "FB_NVCC": nvcc or "",
            }
            configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
            self.call([*configure, *(f"-D{key}={value}" for key, value in settings.items())])
            suffix = sysconfig.get_config_var("EXT_SUFFIX")
            self.call([cmake, "--build", str(build), "--target", "_C", "--parallel", str(jobs())])
            place(build / f"_C{suffix}", target)
            facts.update(
                native=True,
                compiler=line_of([compiler, "--version"]),
                cmake=line_of([cmake, "--version"]),
                build_type=settings["CMAKE_BUILD_TYPE"],
                python=sysconfig.get_platform() + " " + sys.version.split()[0],
                torch=metadata.version("torch"),
            )
            self.build_cuda(cmake, build, nvcc, target, facts)

    def build_cuda(self, cmake: str, build: Path, nvcc: str | None, target: Path, facts: dict) -> None:
        """The CUDA library is a target of its own, so that its failure leaves the CPU library in place."""
        wanted = switch("FB_CUDA")
        (target / CUDA_LIBRARY).unlink(missing_ok=True)
        if wanted == "0":
            facts["cuda_reason"] = "switched off by FB_CUDA=0 when it was built"
        elif nvcc is None:
            facts["cuda_reason"] = "no nvcc on PATH and none in CUDA_HOME when it was built"
            if wanted == "1":
                raise SystemExit(f"fast_backbones: FB_CUDA=1, but {facts['cuda_reason']}")
        elif not any((ROOT / "csrc" / "cuda").glob("*.cu")):
            facts["cuda_reason"] = "this source tree has no CUDA kernels"
        else:
            command = [cmake, "--build", str(build), "--target", "_C_cuda", "--parallel", str(jobs())]
            if wanted == "1":
                self.call(command)
            else:
                done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                sys.stderr.write(done.stdout)
                if done.returncode != 0:
                    lines = [line for line in done.stdout.splitlines() if re.search(r"error|fatal", line)]
                    facts["cuda_reason"] = f"the CUDA build failed: {(lines or ['no message'])[0].strip()}"
                    say(f"WARNING: fast_backbones is built without CUDA kernels: {facts['cuda_reason']}")
                    return
            place(build / CUDA_LIBRARY, target)
            facts.update(cuda=True, nvcc=line_of([nvcc, "--version"], "release"))

    def find_tools(self) -> tuple[str, str, str]:
        if not (ROOT / "csrc" / "python" / "module.cpp").is_file():
            raise MissingTool("this source tree has no csrc/python/module.cpp")
        compiler = find_compiler()
        if compiler is None:
            wanted = os.environ.get("CXX") or "g++, c++ or clang++"
            raise MissingTool(f"no C++ compiler was found ({wanted}); on Debian, `apt install g++`")
        cmake = tool("cmake", "CMAKE_BIN_DIR", "cmake")
        ninja = tool("ninja", "BIN_DIR", "ninja")
        if cmake is None or ninja is None:
            name = "cmake" if cmake is None else "ninja"
            raise MissingTool(f"{name} was not found; `pip install {name}`")
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise MissingTool("Python.h was not found; on Debian, `apt install python3-dev`")
        if find_spec("pybind11") is None:
            raise MissingTool("pybind11 was not found; `pip install pybind11`")
        if find_spec("torch") is None:
            raise MissingTool(
                "torch was not found; install it first, then `pip install --no-build-isolation`"
            )
        return compiler, cmake, ninja

    def call(self, command: list[str]) -> None:
        done = subprocess.run(command, stdout=sys.stderr)
        if done.returncode != 0:
            text = " ".join(command[:3])
            raise SystemExit(f"fast_backbones: `{text} ...` failed; FB_NATIVE=0 installs without native code")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "fast_backbones" / "kernels"
        return [str(path) for path in (*folder.glob("_C*.so"), folder / FACTS) if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class FreshPython(build_py):
    """Starts from an empty folder, so that a wheel never carries a file that has left the sources, nor what
    only pytest runs."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fast_backbones", ignore_errors=True)
        super().run()

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [found for found in modules if not re.match(r"(bench_|test_|conftest$)", found[1])]


@contextlib.contextmanager
def locked(path: Path):
    """One build at a time in a build folder."""
    import fcntl

    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def place(library: Path, folder: Path) -> None:
    """Copy by rename: a process that has the old library open keeps it whole."""
    draft = folder / f".{library.name}.new"
    shutil.copy2(library, draft)
    os.replace(draft, folder / library.name)


def jobs() -> int:
    value = os.environ.get("MAX_JOBS", "")
    return int(value) if value else len(os.sched_getaffinity(0))


def line_of(command: list[str], word: str = "") -> str:
    """The first line of a program's output that has the word in it."""
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next((line.strip() for line in lines if word in line and line.strip()), "unknown")


names, folders = packages()
native = switch("FB_NATIVE") != "0"
if not native and switch("FB_REQUIRE_NATIVE") == "1":
    raise SystemExit("fast_backbones: FB_NATIVE=0 and FB_REQUIRE_NATIVE=1 contradict each other")
setup(
    packages=names,
    package_dir=folders,
    package_data={"fast_backbones": ["py.typed"], "fast_backbones.bench": ["shapes/*.txt"]},
    exclude_package_data={"fast_backbones": ["*.pyi"]},
    include_package_data=False,
    ext_modules=[Extension(EXTENSION, sources=[], optional=True)] if native else [],
    cmdclass={"build_ext": NativeBuild, "build_py": FreshPython},
    zip_safe=False,
)
