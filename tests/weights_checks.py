"""What the tests of weights share: a small network, a checkpoint, and that a refusal changes nothing."""

import contextlib
import hashlib
from pathlib import Path

import pytest
import torch
from fast_backbones.backbones._weights import build_with_weights
from torch import nn

from fast_backbones.backbones import WeightsError, resnet

CLASSES = 5


def fresh(seed: int = 0, num_classes: int = CLASSES, **options) -> nn.Module:
    """A ResNet with two blocks in all, so that building, saving and hashing it takes milliseconds."""
    torch.manual_seed(seed)
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 0, 0), num_classes=num_classes, **options).eval()


def built(weights, **options) -> nn.Module:
    """The same network, built as the model functions build theirs when they get `weights=`."""
    return build_with_weights(
        resnet.ResNet, weights, options, block=resnet.BasicBlock, layers=(1, 1, 0, 0)
    ).eval()


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    """A complete state dict that no freshly built model has."""
    return {k: v + 1 if k.endswith("running_mean") else v for k, v in fresh(seed=1).state_dict().items()}


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(source, path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def holds(model: nn.Module, state: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[k], state[k].to(own[k].dtype)) for k in own if not k.startswith(but or "-"))


@contextlib.contextmanager
def refused(model: nn.Module, match: str):
    """The block raises one readable WeightsError, and the model keeps every bit and every module."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = dict(model.named_modules())
    config = dict(getattr(model, "default_cfg", {}))
    with pytest.raises(WeightsError, match=match) as caught:
        yield caught
    assert len(str(caught.value)) < 900
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert dict(model.named_modules()) == modules and getattr(model, "default_cfg", {}) == config


def written(path: Path, what: object) -> Path:
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        torch.save(what, path)
    return path
