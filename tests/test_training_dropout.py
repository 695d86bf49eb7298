"""Drop rates act in train() and nowhere else, in one model of every family."""

import pytest
import torch
from helpers import reals

import fast_backbones as fb
from fast_backbones.backbones import list_families

LIGHT = {"SENet": "legacy_seresnet18", "MobileNet": "mobilenetv1_025"}
QUICK = {"DenseNet", "LeNet", "MobileNet", "ResNet", "SENet"}  # the rest is large, and marked slow
SIZES = {"LeNet": 32, "Inception": 96, "Inception-ResNet": 96, "SE-Inception": 96, "Xception": 96}


def one_of_each():
    """One model of each family, as pytest parameters."""
    cases = []
    for family in list_families():
        name = LIGHT.get(family) or fb.list_models(family=family)[0]
        marks = [] if family in QUICK else [pytest.mark.slow]
        cases.append(pytest.param(name, SIZES.get(family, 64), marks=marks, id=name))
    return cases


def logits(model, x: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.forward_modules(x)
    return out[0] if isinstance(out, tuple) else out  # auxiliary heads drop out at rates of their own


@pytest.mark.parametrize(("name", "size"), one_of_each())
def test_drop_rate_acts_in_train_only(name, size):
    torch.manual_seed(0)
    with_dropout = fb.create_model(name, num_classes=10, drop_rate=0.5)
    without = fb.create_model(name, num_classes=10, drop_rate=0.0)
    without.load_state_dict(with_dropout.state_dict())
    x = reals((2, with_dropout.in_chans, size, size), 1)

    with_dropout.eval()
    without.eval()
    assert torch.equal(logits(with_dropout, x, 1), logits(without, x, 2))

    with_dropout.train()
    without.train()
    assert not torch.equal(logits(with_dropout, x, 1), logits(with_dropout, x, 2))
    assert torch.equal(logits(without, x, 1), logits(without, x, 2))
