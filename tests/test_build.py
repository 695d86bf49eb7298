"""How folders become a package, what a wheel holds, how the build fails, who may include or import whom."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "engine", "backbones", "training", "bench")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NO_BUILD = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]


def run(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    keep = {key: value for key, value in os.environ.items() if not key.startswith("FB_") and key != "CXX"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**keep, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of everything the build reads, without build products."""
    root = tmp_path / "sources"
    root.mkdir()
    for folder in ("fast_backbones", "csrc", *ROOMS):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        )
    for file in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, root / file)
    return root


@pytest.fixture
def tiny(sources) -> Path:
    """The same with a native part that compiles in seconds: the build is under test here, not the kernels."""
    for folder in ("cpu", "torch", "python"):
        shutil.rmtree(sources / "csrc" / folder, ignore_errors=True)
    module = sources / "csrc" / "python" / "module.cpp"
    module.parent.mkdir(parents=True)
    module.write_text(
        "#include <pybind11/pybind11.h>\n"
        'PYBIND11_MODULE(_C, m) { m.def("isa", [] { return "none"; }); '
        'm.def("compiled_isas", [] { return pybind11::list(); }); '
        'm.def("compiler", [] { return __VERSION__; }); }\n'
    )
    return sources


def facts(root: Path) -> dict:
    return json.loads((root / "kernels" / "_build.json").read_text())


# Folders -> package


def test_wheel_holds_the_package_and_nothing_else(sources, tmp_path):
    (sources / "build" / "lib" / "fast_backbones" / "kernels").mkdir(parents=True)
    (sources / "build" / "lib" / "fast_backbones" / "kernels" / "left_over.py").write_text(
        ""
    )  # of an earlier build
    done = run([*NO_BUILD, str(tmp_path / "wheels"), "."], sources, FB_NATIVE="0")
    assert done.returncode == 0, done.stdout
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fast_backbones"}
    for folder in ("fast_backbones", *ROOMS):
        inside = "fast_backbones" if folder == "fast_backbones" else f"fast_backbones/{folder}"
        for path in (ROOT / folder).rglob("*.py"):
            of_pytest = path.name.startswith("bench_") or path.name == "conftest.py"
            assert (f"{inside}/{path.relative_to(ROOT / folder)}" in names) != of_pytest
    assert "fast_backbones/py.typed" in names
    assert not [name for name in names if name.endswith((".pyi", ".cpp", ".h", ".cu")) or "left_over" in name]

    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import fast_backbones as fb, fast_backbones.kernels._ext as ext
assert list(fb.__path__) == [{str(tmp_path / "site" / "fast_backbones")!r}], list(fb.__path__)
assert ext.__file__ == {str(tmp_path / "site" / "fast_backbones" / "kernels" / "_ext.py")!r}, ext.__file__
assert fb.build_info()["native"] is False
"""
    done = run(["-W", "ignore", "-c", code], tmp_path)
    assert done.returncode == 0, done.stdout


def test_editable_install_points_into_the_checkout(sources, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    code = f"import setuptools.build_meta as b; print(b.build_editable({str(tmp_path)!r}))"
    done = run(["-c", code], sources, FB_NATIVE="0")
    assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as archive:
        archive.extractall(site)
    (sources / "kernels" / "added_later.py").write_text("value = 7\n")
    code = f"""
import site, sys
# Forget an editable install of this environment: the finder of ours has the same name.
finders = [name for name in sys.modules if name.startswith("__editable__")]
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") not in finders]
for name in finders:
    del sys.modules[name]
sys.path.insert(0, {str(site)!r})
site.addsitedir({str(site)!r})
import fast_backbones.kernels._ext as ext, fast_backbones.kernels.added_later as later, fast_backbones.bench
assert ext.__file__ == {str(sources / "kernels" / "_ext.py")!r}, ext.__file__
assert later.value == 7
"""
    done = run(["-W", "ignore", "-c", code], tmp_path)
    assert done.returncode == 0, done.stdout


def test_bare_checkout_works_at_its_root(sources):
    done = run(["-W", "ignore", "-c", "import fast_backbones.kernels as k; print(k.__file__)"], sources)
    assert done.stdout.strip() == str(sources / "kernels" / "__init__.py")


# How the build fails


def test_no_compiler_is_a_warning_and_a_working_install(tiny, tmp_path):
    nothing = tmp_path / "empty"
    nothing.mkdir()
    done = run(["setup.py", "build_ext", "--inplace"], tiny, PATH=str(nothing))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("WARNING: fast_backbones is built without fused kernels: no C++ compiler") == 1
    assert facts(tiny)["native"] is False
    code = "import fast_backbones as fb; print(fb.build_info()['reason'])"
    done = run(["-c", code], tiny)
    assert done.stdout.startswith("not built: no C++ compiler was found (g++, c++ or clang++)"), done.stdout


def test_no_compiler_is_an_error_where_native_is_required(tiny):
    done = run(["setup.py", "build_ext", "--inplace"], tiny, CXX="no-such-compiler", FB_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "FB_REQUIRE_NATIVE=1, but no C++ compiler was found (no-such-compiler)" in done.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FB_NATIVE": "yes"}, "FB_NATIVE='yes': expected 0, 1 or nothing"),
        ({"FB_NATIVE": "0", "FB_REQUIRE_NATIVE": "1"}, "contradict each other"),
    ],
    ids=["a switch that is neither 0 nor 1", "off and required"],
)
def test_bad_switches_are_named(sources, settings, message):
    done = run(["setup.py", "build_ext", "--inplace"], sources, **settings)
    assert done.returncode != 0
    assert message in done.stdout


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


@needs_compiler
def test_a_failing_nvcc_leaves_the_cpu_library(tiny, tmp_path):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal : unsupported compiler' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    build = ["setup.py", "build_ext", "--inplace"]
    library = tiny / "kernels" / f"_C{SUFFIX}"

    done = run(build, tiny, CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode == 0, done.stdout
    assert library.is_file()
    assert not (tiny / "kernels" / "_C_cuda.so").exists()
    assert facts(tiny)["cuda_reason"] == "the CUDA build failed: nvcc fatal : unsupported compiler"

    done = run(build, tiny, CUDA_HOME=str(tmp_path / "cuda"), FB_CUDA="1")
    assert done.returncode != 0

    first = library.stat().st_mtime_ns
    done = run(build, tiny, FB_CUDA="0")
    assert done.returncode == 0, done.stdout
    assert "Building CXX" not in done.stdout  # incremental: nothing was compiled again
    assert library.stat().st_mtime_ns == first
    assert facts(tiny)["cuda_reason"] == "switched off by FB_CUDA=0 when it was built"


@needs_compiler
def test_a_compile_error_stops_the_build(tiny):
    (tiny / "csrc" / "python" / "module.cpp").write_text("this is not C++\n")
    done = run(["setup.py", "build_ext", "--inplace"], tiny, FB_CUDA="0")
    assert done.returncode != 0
    assert "FB_NATIVE=0 installs without native code" in done.stdout


@pytest.mark.slow
@needs_compiler
def test_cpu_kernels_alone_stay_inside_their_buffers(tmp_path):
    """csrc/cpu without torch and Python, under AddressSanitizer, on buffers of exactly the promised size."""
    cmake = shutil.which("cmake") or pytest.skip("no cmake on PATH")
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DFB_TORCH=OFF", "-DFB_SANITIZE=address"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [cmake, "--build", str(tmp_path), "--parallel", "2"], check=True, stdout=subprocess.DEVNULL
    )
    assert (tmp_path / "libfb_cpu.a").is_file()
    for isa in ("portable", "avx2", "avx512"):
        environment = {**os.environ, "FB_MAX_ISA": isa}
        done = subprocess.run(
            [tmp_path / "fb_check"], env=environment, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr


# Who may include or import whom


def native_files(folder: str) -> list[Path]:
    return [path for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file()]


def test_kernels_know_no_torch():
    doors = {path for path in native_files("cuda") if path.name.startswith("torch_")}
    for path in {*native_files("cpu"), *native_files("cuda"), *native_files("python")} - doors:
        found = re.findall(r'#\s*include\s*[<"]((?:torch|ATen|c10|caffe2)/[^>"]*)', path.read_text())
        assert not found, f"{path.relative_to(ROOT)} includes {found}"


def test_doors_use_the_stable_interface_alone():
    doors = [path for path in native_files("cuda") if path.name.startswith("torch_")]
    for path in [*doors, *native_files("torch")]:
        for header in re.findall(r'#\s*include\s*[<"]((?:torch|ATen|c10|caffe2)/[^>"]*)', path.read_text()):
            stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
            assert header.startswith(stable), f"{path.relative_to(ROOT)} includes {header}"


def test_no_instruction_set_flag_in_the_build():
    for name in ("CMakeLists.txt", "setup.py"):
        text = re.sub(r"#.*", "", (ROOT / name).read_text())
        assert not re.search(r"-m(arch|cpu|tune|avx|fma|sse)|-ffast-math|-Ofast", text), name


MAY_IMPORT = {  # room -> the rooms it may use
    "kernels": set(),
    "engine": {"kernels"},
    "backbones": {"kernels", "engine"},
    "training": {"kernels"},
}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_downwards(room):
    for path in (ROOT / room).rglob("*.py"):
        package = ("fast_backbones", *path.relative_to(ROOT).parts[:-1])
        for node in ast.walk(ast.parse(path.read_text())):
            for target in imported(node, package):
                parts = target.split(".")
                if parts[0] in (*ROOMS, "tests"):
                    pytest.fail(f"{path.relative_to(ROOT)} imports {target}: use a relative import")
                if parts[0] == "fast_backbones" and len(parts) > 1 and parts[1] in ROOMS:
                    assert parts[1] in MAY_IMPORT[room] | {room}, f"{path.relative_to(ROOT)} imports {target}"


def imported(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Absolute names of the modules an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        module = ".".join(filter(None, [base, node.module]))
        return [f"{module}.{alias.name}" for alias in node.names]
    return []


def test_the_compiled_library_has_one_loader():
    loads = re.compile(r'import _C\b|["\']\.?(?:fast_backbones\.kernels\.)?_C["\']|import_module\([^)]*_C\b')
    found = {
        str(path.relative_to(ROOT))
        for room in ("fast_backbones", *ROOMS)
        for path in (ROOT / room).rglob("*.py")
        if loads.search(path.read_text())
    }
    assert found == {"kernels/_ext.py"}


def test_torch_ops_stay_in_kernels():
    for room in ("fast_backbones", "engine", "backbones", "training"):
        for path in (ROOT / room).rglob("*.py"):
            assert "torch.ops.fast_backbones" not in path.read_text(), path.relative_to(ROOT)


def test_triton_stays_in_its_room():
    """And nobody imports that room at the top of a file: importing the package loads no Triton."""
    for path in (path for room in ("fast_backbones", *ROOMS) for path in (ROOT / room).rglob("*.py")):
        package = ("fast_backbones", *path.relative_to(ROOT).parts[:-1])
        inside = ROOT / "kernels" / "_triton" in path.parents
        tree = ast.parse(path.read_text())
        named = [target for node in ast.walk(tree) for target in imported(node, package)]
        assert inside or not any(target.split(".")[0] == "triton" for target in named), path
        early = [target for node in tree.body for target in imported(node, package)]
        tools = "bench/gpu" in str(path)
        assert inside or tools or not any("_triton" in target for target in early), path


# CUDA: index arithmetic on the CPU


@needs_compiler
def test_cuda_index_arithmetic(tmp_path):
    program = tmp_path / "cuda_index"
    source = ROOT / "tests" / "native" / "cuda_index.cpp"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{ROOT / 'csrc'}",
            str(source),
            "-o",
            str(program),
        ],
        check=True,
    )
    done = subprocess.run([str(program)], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
