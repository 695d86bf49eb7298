"""What the tests of every model family share: peers, trained-looking models, comparisons.

peer("torchvision")             the module, or a skip with the reason
trained(model)                  no batch norm keeps a neutral value
check_same_network(...)         names, strict loading both ways, outputs in eval and through the engine
check_same_features(...)        the same for `features_only`
check_training_step(...)        two steps of SGD, bit for bit
"""

import copy
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def peer(name: str):
    """torchvision or timm, also beside a PyTorch that cannot load torchvision's compiled operators."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    vision = importlib.util.find_spec("torchvision")
    for library in Path(vision.origin).parent.glob("_C*.so") if vision else ():
        try:
            torch.ops.load_library(library)
        except OSError:
            if not hasattr(torch.ops.torchvision, "nms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                peer.stub = torch.library.Library("torchvision", "DEF")  # lives as long as the process
                peer.stub.define(f"nms{schema}")
                peer.stub.define(f"qnms{schema}")
    return importlib.import_module(name)


def image(n=2, c=3, h=64, w=64, seed=0) -> torch.Tensor:
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training: no statistic and no weight keeps its neutral initial value."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.3, 0.3),
                                      (m.running_mean, -0.3, 0.3), (m.running_var, 0.5, 2.0)):  # fmt: skip
                tensor.data.uniform_(low, high, generator=g)
    return model


def as_accurate(fast: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """rms error at most twice PyTorch's own, plus a few epsilons of the rms of the output."""
    scale = exact.square().mean().sqrt()
    error, allowed = ((t.double() - exact).square().mean().sqrt() / scale for t in (fast, plain))
    allowed = 2 * allowed + 4 * torch.finfo(torch.float32).eps
    assert error <= allowed, f"{error:.2e}, allowed are {allowed:.2e}"


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def described(model: nn.Module) -> list:
    return [(k, tuple(v.shape), v.dtype) for k, v in model.state_dict().items()]


def check_same_network(ours: nn.Module, theirs: nn.Module, *shapes: tuple[int, int, int, int]) -> None:
    """State dicts load strictly both ways; logits are equal, and as accurate through the engine.

    `shapes` are the [N, C, H, W] to try. Both models leave in `eval()`, with the weights of `theirs`.
    """
    assert described(ours) == described(theirs)
    ours.load_state_dict(trained(theirs).eval().state_dict(), strict=True)
    theirs.load_state_dict(ours.eval().state_dict(), strict=True)
    exact = copy.deepcopy(theirs).double()
    for n, c, h, w in shapes:
        x = image(n, c, h, w)
        with torch.inference_mode():
            plain, true = theirs(x), exact(x.double())
            as_accurate(ours.forward_modules(x), plain, true)
            as_accurate(ours(x), plain, true)


def check_same_features(ours: nn.Module, theirs: nn.Module, *shapes: tuple[int, int, int, int]) -> None:
    """Channels, reductions and feature maps of two `features_only` models of the same weights."""
    info, other = ours.feature_info, theirs.feature_info
    assert (info.channels(), info.reduction()) == (sorted(other.channels()), sorted(other.reduction()))
    exact = copy.deepcopy(theirs).double()
    for n, c, h, w in shapes:
        x = image(n, c, h, w)
        with torch.inference_mode():
            plain, true, direct, fused = theirs(x), exact(x.double()), ours.forward_modules(x), ours(x)
        assert len(plain) == len(direct) == len(fused) == len(info.channels())
        for tap in zip(direct, plain, true):
            as_accurate(*tap)
        for tap in zip(fused, plain, true):
            as_accurate(*tap)


def check_training_step(ours: nn.Module, theirs: nn.Module, *shape: int, steps: int = 2) -> None:
    """Outputs, gradients and running statistics of SGD on `shape` = N, C, H, W, bit for bit."""
    ours.load_state_dict(theirs.state_dict())
    targets = torch.arange(shape[0]) % 2
    for step in range(steps):
        for model in (theirs, ours):
            torch.manual_seed(step)  # dropout
            sgd = torch.optim.SGD(model.train().parameters(), lr=0.01)
            loss = F.cross_entropy(model(image(*shape, seed=step)), targets)
            loss.backward()
            sgd.step()
            sgd.zero_grad()
    assert [k for k, v in theirs.state_dict().items() if not torch.equal(v, ours.state_dict()[k])] == []
