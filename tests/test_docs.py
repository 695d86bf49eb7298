"""The documentation is true: its code runs, its pictures are of these kernels, its links lead somewhere."""

import ast
import importlib.util
import re
import sys

import pytest
from helpers import ROOT
from model_checks import peer

import fast_backbones as fb
from fast_backbones import training

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = ("console", "text")  # commands, and what is no program
OPTIONAL = ("timm", "torchvision")  # a block that imports one of these is left out where it is absent


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def programs(page: str) -> list[str]:
    return [code for language, code in FENCE.findall(text_of(page)) if language == "python"]


def imported(code: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.fixture
def registry():
    """What a page registers is gone behind it."""
    from fast_backbones.backbones import _registry

    entries, aliases = dict(_registry._entries), dict(_registry._aliases)
    yield
    for now, before in ((_registry._entries, entries), (_registry._aliases, aliases)):
        now.clear()
        now.update(before)
    _registry._measure.cache_clear()


@pytest.mark.parametrize("page", [page for page in PAGES if programs(page)])
def test_code_runs_in_order(page, tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FB_CACHE_DIR", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", type(sys)("page"))  # where classes of a page say they come from
    for code in programs(page):
        others = imported(code) & {*OPTIONAL}
        if any(importlib.util.find_spec(name) is None for name in others):
            continue
        for name in others:
            peer(name)  # torchvision imports beside any PyTorch behind this
        exec(compile(code, page, "exec"), names)


def test_every_block_says_what_it_is():
    for page in PAGES:
        for language, code in FENCE.findall(text_of(page)):
            assert language in ("python", *NOT_RUN), f"{page}: a block of {language!r}: {code[:60]}"
    with_programs = [page for page in PAGES if programs(page)]
    assert len(with_programs) >= 8 and "README.md" in with_programs


def anchors(page: str) -> set[str]:
    """Of the headings, as the site and GitHub make them from plain words."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower())) for heading in headings}


def test_links_lead_somewhere_in_the_repository_and_on_the_site():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), f"{page} links to {target}"
            if page.startswith("docs/"):  # on the site there is nothing else
                assert (ROOT / "docs") in there.resolve().parents, f"{page} links to {target}"
            if anchor:
                assert anchor in anchors(str(there.resolve().relative_to(ROOT))), f"{page} links to {target}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.removeprefix("docs/") for page in PAGES if page != "README.md"}


def test_pictures_are_what_the_program_draws():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "kernels" / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    sys.modules["draw"] = draw  # dataclasses look there
    spec.loader.exec_module(draw)
    folder = ROOT / "docs" / "kernels"
    assert {path.stem for path in folder.glob("*.svg")} == set(draw.NESTS)
    for name in draw.NESTS:
        assert (folder / f"{name}.svg").read_text() == draw.draw(name), "python docs/kernels/draw.py"
        assert f"](kernels/{name}.svg)" in text_of("docs/kernels.md")


def test_numbers_of_the_pictures_are_those_of_the_kernels():
    """A constant that changes in C++ changes the drawing, too."""
    draw = (ROOT / "docs" / "kernels" / "draw.py").read_text()
    for file, constant, words in [
        ("conv2d/conv2d.h", "kMaxBlock = 128;", "block of up to 128 input channels"),
        ("conv2d/conv2d.h", "kMaxWinogradBlock = 64;", "block of up to 64 channels"),
        ("conv2d/cut.cpp", "kTaskProducts = 3 << 20;", "3 M multiply-adds"),
        ("conv2d/avx512.cpp", "{kPanel, 14, 1,", "tile of up to 14 pixels"),
        ("conv2d/avx2.cpp", "{kPanel, 6, 1,", "(AVX2: 6)"),
        ("winograd_conv2d/winograd_conv2d.cpp", "kTiles = 52;", "up to 52 tiles"),
        ("winograd_conv2d/winograd_conv2d.h", '{"F(4x4,3x3)", 4, 4, 3, 3, 46}', "for point i of 46"),
        ("grouped_conv2d/grouped_conv2d.cpp", "kCopyBytes = 28 * 1024;", "28 KB: stays in L1"),
        ("grouped_conv2d/grouped_conv2d.cpp", "kTaskProducts = 3 << 19;", "1.5 M multiply-adds"),
        ("grouped_conv2d/avx512.cpp", "kWidestTile = 14;", "tile of 14 pixels"),
        ("grouped_conv2d/avx2.cpp", "kWidestTile = 8;", "(AVX2: 8;"),
        ("depthwise_conv2d/depthwise_conv2d.cpp", "kChannelBlock = 128;", "block of 128 channels"),
        ("depthwise_conv2d/depthwise_conv2d.cpp", "kTaskProducts = 1 << 19;", "0.5 M multiply-adds"),
        ("depthwise_conv2d/generic.h", "kTile = 7;", "tile of 7 pixels"),
        ("squeeze_excite/generic.h", "kRun = 8;", "run of 8 pixels"),
        ("squeeze_excite/generic.h", "kDotLanes = 16;", "16 partial sums"),
        ("batch_norm/batch_norm.cpp", "kPieceRows = 128;", "piece of up to 128 rows"),
        ("batch_norm/batch_norm.cpp", "kWidth = 512;", "up to 512 channels"),
        ("batch_norm/generic.h", "kRun = 8;", "run of 8 rows"),
    ]:
        assert constant in (ROOT / "csrc" / "cpu" / file).read_text(), f"{file} has another {constant}"
        assert words in draw


def test_the_page_of_training_names_every_part():
    wanted = {name for name in training.__all__ if not name.isupper() and name != "Recipe"}
    assert not [name for name in wanted if name not in text_of("docs/training.md")]


def test_the_page_of_kernels_names_the_sources_of_each_picture():
    for folder in re.findall(r"`csrc/cpu/(\w+)`", text_of("docs/kernels.md")):
        assert (ROOT / "csrc" / "cpu" / folder).is_dir(), folder
    assert fb.kernels.ops()
