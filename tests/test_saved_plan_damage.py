"""Plan files that are damaged, of another kind, or forged: a sentence with the path, and never a crash."""

import copy
import json
import random
import shutil

import pytest
import torch
from engine_nets import Tiny
from fast_backbones.engine.plan_file import Content
from helpers import needs_native
from safetensors.torch import save_file
from test_saved_plan import Nested, settled

import fast_backbones as fb
from fast_backbones.engine import PlanFileError, PlanFileNotFoundError, plan_file
from fast_backbones.kernels import _ext

pytestmark = needs_native
FLIPS = 12  # in each region


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "net.plan"
    fb.save_plan(settled(Nested()), (2, 3, 9, 8), path)
    return path


def regions(raw):
    """The file's parts, as ranges of bytes."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    digest, plan = raw.index(b'"sha256":"') + 10, raw.index(b'"plan":"')
    text, start = raw.rindex(b"}", 0, 8 + length) + 1, 8 + length
    packed = max(e["data_offsets"][1] for name, e in header.items() if name.startswith("packed."))
    yield "length", 0, 8
    yield "magic", 8, digest
    yield "digest", digest, digest + 64
    yield "program", plan, text - 2000
    yield "names of tensors", text - 2000, text
    if text < start:
        yield "spaces", text, start
    yield "packed weights", start, start + packed
    yield "plain weights", start + packed, len(raw)


def refused(path):
    """The sentence about it, without the path."""
    with pytest.raises(PlanFileError) as caught:
        fb.load_plan(path)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "")


def test_every_region_has_one_bit_flipped(good, tmp_path):
    raw, path, places = good.read_bytes(), tmp_path / "net.plan", random.Random(0)
    fb.load_plan(good)
    seen = set()
    for name, first, end in regions(raw):
        seen.add(name)
        for at in {first, end - 1, *(places.randrange(first, end) for _ in range(FLIPS))}:
            damaged = bytearray(raw)
            damaged[at] ^= 1 << places.randrange(8)
            path.write_bytes(damaged)
            said = refused(path)
            assert "is damaged" in said or "is no plan file" in said, f"{name}, byte {at}: {said}"
    assert seen >= {"length", "digest", "program", "packed weights", "plain weights"}


def test_truncated_and_longer(good, tmp_path):
    raw, path = good.read_bytes(), tmp_path / "net.plan"
    length = int.from_bytes(raw[:8], "little")
    for size in (0, 1, 7, 8, 9, 60, 200, length, length + 8, length + 9, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        said = refused(path)
        assert "is damaged" in said or (size < 200 and "is no plan file" in said), f"{size}: {said}"
    path.write_bytes(raw + b"\0")
    assert "is damaged: the SHA-256 of its content" in refused(path)


def test_what_is_no_plan_file(tmp_path):
    path = tmp_path / "other"
    save_file({"weight": torch.zeros(3)}, path)
    assert "is no plan file" in refused(path)
    torch.save({"weight": torch.zeros(3)}, path)
    assert "is no plan file" in refused(path)
    path.write_text("not this either")
    assert "is no plan file" in refused(path)
    assert "cannot be read (Is a directory), expected a file of fb.save_plan" in refused(tmp_path)
    missing = tmp_path / "missing.plan"
    assert "does not exist, expected a file of fb.save_plan" in refused(missing)
    with pytest.raises(PlanFileNotFoundError):
        fb.load_plan(missing)
    with pytest.raises(FileNotFoundError):
        fb.load_plan(str(missing))


# ---- forged: the digest is right, the content is not what save_plan writes ----


@pytest.fixture
def forge(good, tmp_path):
    """Writes the good file again with its JSON changed; returns the path."""
    content = plan_file.read(good, _ext.require())

    def write(change):
        plan = copy.deepcopy(content.plan)
        change(plan)
        plan_file.write(tmp_path / "forged.plan", Content(plan, content.tensors))
        return tmp_path / "forged.plan"

    return write


def test_another_format(good, tmp_path, monkeypatch):
    shutil.copy(good, tmp_path / "net.plan")
    monkeypatch.setattr(plan_file, "FORMAT", "2")
    assert "has format '1', expected '2': save it with this library" in refused(tmp_path / "net.plan")


@pytest.mark.parametrize(
    "fact, value, expected",
    [
        ("library", "0.0.9", "packed for library 0.0.9, and this process has 0.1.0"),
        ("instruction set", "avx10", "packed for instruction set avx10, and this process has"),
        ("probe", "0" * 64, "this build of the library packs them in another way"),
    ],
)
def test_packed_for_another_library(forge, fact, value, expected):
    """Packed weights alone are refused; with plain ones beside them they are packed anew."""
    x = torch.randn(2, 3, 9, 8)

    def other(plan):
        plan["packed for"][fact] = value

    def alone(plan):
        other(plan)
        plan["weights"] = "packed"

    result = fb.load_plan(forge(lambda plan: None))(x)
    assert torch.equal(fb.load_plan(forge(other))(x)["pair"].pooled[0], result["pair"].pooled[0])
    said = refused(forge(alone))
    assert expected in said and 'with weights="both"' in said


@pytest.mark.parametrize(
    "name, reason",
    [
        ("aten::save.default", "whose argument"),
        ("aten::from_file.default", "whose argument filename is a str"),
        ("aten::_foreach_exp.default", "which is an inner operation"),
        ("aten::fbgemm_linear_fp16_weight.default", "which is an inner operation"),
        ("fast_backbones::max_pool2d_backward.default", "which is an inner operation"),
        ("os::system.default", "expected an operation of aten or fast_backbones"),
        ("aten::__class__.default", "expected|does not have|inner"),
        ("aten::relu.__init__", "does not have"),
        ("aten::no_such_operation.default", "does not have"),
    ],
)
def test_operations_that_no_file_may_name(forge, name, reason):
    import re

    def change(plan):
        rows = plan["kinds"][0]["programs"][0][1]["instructions"]
        next(row for row in rows if row[0] == "call_function")[4] = name

    said = refused(forge(change))
    assert re.search(reason, said) and f"calls {name}" in said.replace("'", ""), said


def places_in(tree, path=()):
    """Every leaf of nested lists and dicts, by the way to it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path
        return
    for key, item in items:
        yield from places_in(item, (*path, key))


def test_sizes_that_do_not_fit_reach_no_kernel(forge):
    """The output of the first convolution is said to be larger, and smaller, than it is."""
    for factor in (4, 0.5):

        def change(plan, factor=factor):
            for _, program in plan["kinds"][0]["programs"]:
                row = next(r for r in program["instructions"] if r[4].startswith("aten::conv2d"))
                shape, stride = row[7]["tensor"][:2]
                shape[2], stride[0:2] = int(shape[2] * factor), [int(s * factor) for s in stride[0:2]]

        said = refused(forge(change))
        assert "cannot be used" in said or "is not what fb.save_plan writes" in said


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_forgeries_are_refused_or_run(count, forge, good):
    """Numbers, words and whole branches of the JSON replaced at random. What loads may be called: it gives
    something, or a Python exception."""
    chance, x = random.Random(count), torch.randn(2, 3, 9, 8)
    ways = list(places_in(plan_file.read(good, _ext.require()).plan))
    ways = [way for way in ways if way[0] in ("kinds", "packed", "plain")]
    values = [0, 1, 2, 3, 5, 17, 64, 4096, -1, 1 << 20, 1 << 40, None, "", "relu", [], {}, 0.5, True]
    outcomes = {"refused": 0, "ran": 0, "raised": 0}

    for _ in range(count):

        def change(plan):
            for _ in range(chance.choice((1, 1, 2, 4))):
                way = chance.choice(ways)
                way = way[: chance.choice((len(way), len(way), len(way), max(1, len(way) - 1)))]
                place = plan
                try:
                    for key in way[:-1]:
                        place = place[key]
                    place[way[-1]] = chance.choice(values)
                except (KeyError, IndexError, TypeError):  # an earlier change has removed this branch
                    continue

        try:
            plan = fb.load_plan(forge(change))
        except PlanFileError:
            outcomes["refused"] += 1
            continue
        try:
            plan(x)
            outcomes["ran"] += 1
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            outcomes["raised"] += 1
    assert outcomes["refused"] > count / 3 and outcomes["ran"] > 0, outcomes


def test_a_tensor_outside_the_file(tmp_path):
    fb.save_plan(settled(Tiny()), (1, 3, 9, 8), tmp_path / "net.plan")
    raw = (tmp_path / "net.plan").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for entry in (
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [8], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [2, 18]},
        {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        "nothing",
    ):
        header["weights.conv.weight"] = entry
        header["__metadata__"]["sha256"] = "0" * 64
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        whole = len(text).to_bytes(8, "little") + text + raw[8 + length :]
        digest = plan_file.hashlib.sha256(whole).hexdigest().encode()
        (tmp_path / "net.plan").write_bytes(whole.replace(b"0" * 64, digest, 1))
        assert "is no plan file" in refused(tmp_path / "net.plan")
