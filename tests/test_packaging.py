"""What is published: the source archive, the wheel made of it, and the versions that are promised."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from helpers import ROOT

WHEEL = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
NOT_PUBLISHED = r"\.ci/|\.github/|\.gitignore$|bench/results/.*\.json$"
OF_SETUPTOOLS = r"PKG-INFO$|setup\.cfg$|fast_backbones\.egg-info/"


def run(arguments: list, cwd: Path, **environment: str) -> str:
    keep = {key: value for key, value in os.environ.items() if not key.startswith("FB_") and key != "CXX"}
    done = subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env={**keep, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what should be published is not known")
    return run(["git", "ls-files", "-z"], ROOT).rstrip("\0").split("\0")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        if (ROOT / name).is_file():  # one that is deleted and not yet committed is not
            (folder / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "sources" / name)
    run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder],
        folder / "sources",
        FB_NATIVE="0",
    )
    (archive,) = folder.glob("fast_backbones-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    return root


@pytest.fixture(scope="module")
def metadata(sdist) -> Message:
    return email.message_from_string((sdist / "PKG-INFO").read_text())


def environment_with(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment with the wheel, and behind it what is installed here."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], ROOT)
    python = folder / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return python


def check_installed(python: Path, folder: Path, *arguments: str) -> str:
    shutil.copy(ROOT / "tests" / "installed_package.py", folder)
    return run([python, "-I", folder / "installed_package.py", *arguments], folder)


# The source archive


def test_sdist_holds_what_is_tracked_and_nothing_else(sdist):
    inside = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    wanted = {name for name in tracked() if not re.match(NOT_PUBLISHED, name) and (ROOT / name).is_file()}
    assert wanted - inside == set()
    assert {name for name in inside - wanted if not re.match(OF_SETUPTOOLS, name)} == set()


def test_sdist_without_a_compiler_is_a_package_that_says_so(sdist, tmp_path):
    shutil.copytree(sdist, tmp_path / "sources")
    text = run(
        [sys.executable, *WHEEL, tmp_path, "."], tmp_path / "sources", CXX=str(tmp_path / "no" / "g++")
    )
    (wheel,) = tmp_path.glob("*.whl")
    python = environment_with(wheel, tmp_path / "venv")
    code = "import fast_backbones as fb; i = fb.build_info(); print(fb.__file__, i['native'], i['reason'])"
    said = run([python, "-I", "-W", "error", "-c", code], tmp_path)
    assert said.startswith(str(tmp_path / "venv")), text
    assert "False not built: no C++ compiler was found (" in said


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.timeout(3600)
def test_sdist_with_a_compiler_is_a_wheel_with_right_numbers(sdist, tmp_path):
    shutil.copytree(sdist, tmp_path / "sources")
    settings = {"FB_REQUIRE_NATIVE": "1", "FB_CUDA": "0"}
    run([sys.executable, *WHEEL, tmp_path, "."], tmp_path / "sources", **settings)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "content")
    assert not [
        name for name in names if re.search(r"(^|/)(tests?|docs|csrc|build)/|\.(cpp|h|cu|o|inc)$", name)
    ]
    (library,) = (tmp_path / "content").rglob("*.so")
    needed = run(["readelf", "--dynamic", "--wide", library], tmp_path)
    assert not re.search(r"R(UN)?PATH", needed)
    torch_libraries = {
        name for name in re.findall(r"NEEDED.*\[(.*)\]", needed) if "torch" in name or "c10" in name
    }
    assert torch_libraries == {"libtorch_cpu.so"}
    here = [str(tmp_path), str(ROOT), sys.prefix, sys.base_prefix, str(Path.home())]
    for path in (tmp_path / "content").rglob("*"):
        found = [root for root in here if path.is_file() and root.encode() in path.read_bytes()]
        assert not found, f"{path.name} names {found}"
    assert '"native": true' in check_installed(environment_with(wheel, tmp_path / "venv"), tmp_path)


@pytest.mark.slow
def test_pure_package_has_right_numbers(sdist, tmp_path):
    shutil.copytree(sdist, tmp_path / "sources")
    run([sys.executable, *WHEEL, tmp_path, "."], tmp_path / "sources", FB_NATIVE="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert '"native": false' in check_installed(
        environment_with(wheel, tmp_path / "venv"), tmp_path, "--pure"
    )


# What is promised


def test_metadata_names_the_project(metadata):
    import fast_backbones as fb

    assert (metadata["Name"], metadata["Version"]) == ("fast-backbones", fb.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_supported_versions_are_the_same_wherever_they_stand(metadata):
    requires = metadata.get_all("Requires-Dist", [])
    (torch,) = (re.fullmatch(r"torch>=(\d+)\.(\d+)", line) for line in requires if re.match(r"torch\b", line))
    least_torch = f"{torch[1]}.{torch[2]}"
    pythons = re.findall(r":: (3\.\d+)$", "\n".join(metadata.get_all("Classifier", [])), re.MULTILINE)
    assert metadata["Requires-Python"] == f">={pythons[0]}"

    promise = re.search(
        r"Python (3\.\d+) to (3\.\d+) and PyTorch (\d+\.\d+) or newer", (ROOT / "README.md").read_text()
    )
    assert promise is not None
    assert promise.groups() == (pythons[0], pythons[-1], least_torch)

    target = re.search(r"FB_TORCH_TARGET 0x(\d\d)([0-9a-f]{2})0{12}\)", (ROOT / "CMakeLists.txt").read_text())
    assert (int(target[1], 16), int(target[2], 16)) == (int(torch[1]), int(torch[2]))
    wheel_test = re.search(r"^WHEEL_TORCH .*torch==(\d+\.\d+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert wheel_test[1] == least_torch  # the wheel is built with a newer one and tried with the oldest
    assert f'target-version = "py{pythons[0].replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
