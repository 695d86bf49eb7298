"""Weights that are refused: one readable sentence, and the model as it was."""

import io
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from weights_checks import CLASSES, fresh, refused, sha256, written
from weights_checks import saved as saved
from weights_checks import source as source

from fast_backbones import backbones
from fast_backbones.backbones import WeightsError, load_weights


class Code:
    def __reduce__(self):
        return os.mkdir, ("pickled-code-ran",)


def test_missing_file_and_folder(tmp_path):
    model = fresh()
    with refused(model, "there is no weights file .*nowhere.pth"):
        load_weights(model, tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        load_weights(model, "~/nowhere.pth")
    with refused(model, "is not a file"):
        load_weights(model, tmp_path)
    with pytest.raises(TypeError, match="path, a URL, a hub id or a state dict"):
        load_weights(model, 3)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999], ids=["head", "half", "nearly all"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind, keep, source, tmp_path):
    whole = io.BytesIO()
    if kind == "safetensors":
        save = pytest.importorskip("safetensors.torch").save
        whole.write(save(source))
    else:
        torch.save(source, whole, _use_new_zipfile_serialization=kind == "zip")
    data = whole.getvalue()
    path = written(tmp_path / "x.bin", data[: int(len(data) * keep)])
    with refused(model := fresh(), "truncated or damaged|not a complete .safetensors file"):
        load_weights(model, path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.pth", b"", "is empty"),
        ("page.pth", b"<!DOCTYPE html><html>404</html>", "is not a checkpoint"),
        ("noise.pth", bytes(range(255, 0, -1)) * 40, "is not a checkpoint"),
        ("page.safetensors", b"<!DOCTYPE html><html>404</html>", "not a complete .safetensors"),
        ("list.pth", [torch.ones(2)], "holds a list, not a state dict"),
        ("tensor.pth", torch.ones(2), "holds a Tensor, not a state dict"),
        ("nothing.pth", {}, "empty state dict"),
        ("numbers.pth", {"conv1.weight": torch.ones(1), "lr": 0.1}, "no tensors: lr"),
        ("integers.pth", {1: torch.ones(2)}, "no tensors: 1"),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v and " " not in v else "",
)
def test_files_that_are_no_checkpoint(name, content, message, tmp_path):
    with refused(model := fresh(), message):
        load_weights(model, written(tmp_path / name, content))


def test_other_archives(tmp_path):
    model = fresh()
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with refused(model, "truncated or damaged"):
        load_weights(model, tmp_path / "x.pth")


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*TorchScript archive.*:UserWarning"
)
def test_torchscript_archives(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "x.pt")
    with refused(model := fresh(), "TorchScript archive"):
        load_weights(model, tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "whole model"])
def test_pickled_code_is_refused_and_not_run(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "pickle":
        Path("x.pth").write_bytes(pickle.dumps({"conv1.weight": Code()}))
    elif kind == "whole model":
        torch.save(fresh(), "x.pth")
    else:
        torch.save({"conv1.weight": Code()}, "x.pth", _use_new_zipfile_serialization=kind == "zip")
    with refused(model := fresh(), "and was refused") as caught:
        load_weights(model, "x.pth")
    assert not Path("pickled-code-ran").exists()
    if kind in ("zip", "legacy"):
        assert "mkdir" in str(caught.value)


def test_wrong_architecture_names_a_handful_and_counts_the_rest(source):
    model = backbones.resnet50(num_classes=CLASSES)
    with refused(model, "does not fit resnet50") as caught:
        load_weights(model, source)
    text = str(caught.value)
    assert " of 320 entries are missing (layer1.0.conv3.weight, " in text and ", and 2" in text
    assert "have another shape (layer1.0.conv1.weight [64, 64, 3, 3], expected [64, 64, 1, 1], " in text
    grouped = backbones.resnext50(num_classes=CLASSES)
    with refused(grouped, r"does not fit resnext50_32x4d: \d+ have another shape"):
        load_weights(grouped, model.state_dict())
    with refused(small := fresh(), "2 are unexpected .extra.weight, extra.bias."):
        load_weights(small, {**source, "extra.weight": torch.ones(1), "extra.bias": torch.ones(1)})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.index_fill(0, torch.tensor([1]), float("nan")),
            "conv1.weight has 147 non-finite of 9408",
        ),
        (lambda t: t / 0, "conv1.weight has 9408 non-finite"),
        (lambda t: t.double(), "conv1.weight is float64, the model has float32, cast=True would narrow it"),
        (lambda t: t.to(torch.int64), "conv1.weight is int64, the model has float32"),
        (lambda t: t > 0, "conv1.weight is bool"),
        (lambda t: t.to(torch.complex64), "conv1.weight is complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "conv1.weight is float8_e4m3fn"),
        (lambda t: t.to("meta"), "not a plain dense tensor"),
        (lambda t: t.to_sparse(), "not a plain dense tensor"),
        (lambda t: t.to_mkldnn(), "not a plain dense tensor"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "not a plain dense tensor"),
        (lambda t: torch.nested.nested_tensor([t, t]), "not a plain dense tensor"),
        (lambda t: t.numpy().astype(np.longdouble), "entries that are no tensors: conv1.weight"),
        (lambda t: t.numpy().astype(object), "entries that are no tensors: conv1.weight"),
    ],
    ids=[
        "nan",
        "inf",
        "float64",
        "int64",
        "bool",
        "complex",
        "float8",
        "meta",
        "sparse",
        "mkldnn",
        "quantized",
        "nested",
        "longdouble",
        "objects",
    ],
)
def test_unusable_values(change, message, source):
    with refused(model := fresh(), message):
        load_weights(model, {**source, "conv1.weight": change(source["conv1.weight"])})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("key", ["fc.weight", "bn1.num_batches_tracked"])
def test_strange_tensors_where_rules_and_heads_look_at_shapes(key, source):
    for strange in (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.eye(3).to_sparse()):
        with refused(model := fresh(), "not a plain dense tensor"):
            load_weights(model, {**source, key: strange}, head="adopt")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.bool])
def test_counters_of_narrower_integers_load(dtype, source):
    load_weights(model := fresh(), {**source, "bn1.num_batches_tracked": torch.tensor(1).to(dtype)})
    assert model.bn1.num_batches_tracked == 1


def test_counters_of_wider_integers_are_refused(source):
    with refused(model := fresh(), "bn1.num_batches_tracked is uint64, the model has int64"):
        load_weights(model, {**source, "bn1.num_batches_tracked": torch.tensor(1).to(torch.uint64)})


def test_the_last_tensor_is_checked_before_the_first_is_copied(source):
    with refused(model := fresh(num_classes=9), "fc.bias has 5 non-finite"):
        load_weights(model, {**source, "fc.bias": source["fc.bias"] * float("inf")}, head="adopt")


def test_narrowing_that_overflows_is_refused(source):
    with refused(model := fresh().half(), "non-finite"):
        load_weights(model, {**source, "fc.bias": torch.full((CLASSES,), 1e6)}, cast=True)


def test_digests_of_local_files(saved, source, tmp_path):
    digest = sha256(saved)
    for expected in (digest, digest.upper(), digest[:8]):
        load_weights(fresh(), saved, sha256=expected)
    model = fresh()
    with refused(model, "has SHA-256 .*, expected 0{64}"):
        load_weights(model, saved, sha256="0" * 64)
    with pytest.raises(ValueError, match="hexadecimal"):
        load_weights(model, saved, sha256="1234")
    with pytest.raises(TypeError, match="state dict"):
        load_weights(model, source, sha256=digest)
    assert load_weights(model, shutil.copy(saved, tmp_path / f"net-{digest[:8]}.pth")).sha256 in (
        digest,
        None,
    )
    with refused(model, "its name promises deadbeef"):
        load_weights(model, shutil.copy(saved, tmp_path / "net-deadbeef.pth"))
    load_weights(model, shutil.copy(saved, tmp_path / "net-20250131.pth"))  # a date, not a digest


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_load_or_are_refused(kind, tmp_path):
    """Bytes changed at random: a flipped bit inside a tensor goes unseen, the rest is a WeightsError."""
    model = nn.Sequential(nn.Linear(8, 4))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    whole = io.BytesIO()
    if kind == "safetensors":
        whole.write(pytest.importorskip("safetensors.torch").save(state))
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "zip")
    dice, refusals = random.Random(0), 0
    for _ in range(150):
        data = bytearray(whole.getvalue())
        for _ in range(dice.choice((1, 3, 20))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path = written(tmp_path / "x.bin", bytes(data))
        try:
            load_weights(model, path)
        except WeightsError:
            refusals += 1
            assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        else:
            model.load_state_dict(state)
    assert 50 < refusals < 150
