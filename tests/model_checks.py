"""What the tests of every model family share: peers, trained-looking models, comparisons.

peer("torchvision")             the module, or a skip with the reason
trained(model)                  no batch norm keeps a neutral value
filled(build)                   a model built without its own slow initialisation, activations of size one
check_same_network(...)         names, strict loading both ways, outputs in eval and through the engine
check_same_features(...)        the same for `features_only`
check_training_step(...)        two steps of SGD, bit for bit
check_facts(...)                a row of the published table of sizes
check_common_face(...)          classifier, features, every tap alone and all together
check_tracing(...)              TorchScript, FX, Dynamo, export
"""

import copy
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.bench.exact import float64
from helpers import assert_as_accurate
from torch import nn

from fast_backbones import backbones, backend


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


def filled(build, seed: int = 0) -> nn.Module:
    """`build()` on the meta device, then uniform weights of He's variance; in `eval()`."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            bound = (6 / m.weight[0].numel()) ** 0.5
            m.weight.data.uniform_(-bound, bound, generator=g)
            if m.bias is not None:
                m.bias.data.uniform_(-0.1, 0.1, generator=g)
        elif isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.reset_parameters()
    return trained(model, seed).eval()


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
            plain, true = theirs(x), float64(exact, x)
            assert_as_accurate(ours.forward_modules(x), plain, true)
            assert_as_accurate(ours(x), plain, true)


def check_same_features(ours: nn.Module, theirs: nn.Module, *shapes: tuple[int, int, int, int]) -> None:
    """Channels, reductions and feature maps of two `features_only` models of the same weights."""
    info, other = ours.feature_info, theirs.feature_info
    assert (info.channels(), info.reduction()) == (sorted(other.channels()), sorted(other.reduction()))
    exact = copy.deepcopy(theirs).double()
    for n, c, h, w in shapes:
        x = image(n, c, h, w)
        with torch.inference_mode():
            plain, true, direct, fused = theirs(x), float64(exact, x), ours.forward_modules(x), ours(x)
        assert len(plain) == len(direct) == len(fused) == len(info.channels())
        for tap in zip(direct, plain, true):
            assert_as_accurate(*tap)
        for tap in zip(fused, plain, true):
            assert_as_accurate(*tap)


def check_training_step(ours: nn.Module, theirs: nn.Module, *shape: int, steps: int = 2) -> None:
    """Outputs, gradients and running statistics of SGD on `shape` = N, C, H, W, bit for bit: our modules,
    whose numbers the fused steps of train() have within rounding (tests/test_train_program.py)."""
    ours.load_state_dict(theirs.state_dict())
    targets = torch.arange(shape[0]) % 2
    for step in range(steps):
        for model in (theirs, ours):
            torch.manual_seed(step)  # dropout
            sgd = torch.optim.SGD(model.train().parameters(), lr=0.01)
            with backend("reference"):
                loss = F.cross_entropy(model(image(*shape, seed=step)), targets)
            loss.backward()
            sgd.step()
            sgd.zero_grad()
    assert [k for k, v in theirs.state_dict().items() if not torch.equal(v, ours.state_dict()[k])] == []


def check_facts(row: tuple, family: str, input_size: tuple[int, int, int]) -> None:
    """A row `(name, M params, GMACs, taps, strides of the taps)` of the published table."""
    name, params, gmacs, taps, strides = row
    info = backbones.model_info(name)
    assert abs(info.params / 1e6 - params) < 0.00501, f"{name} has {info.params} parameters"
    digits = 0.000051 if gmacs < 0.01 else 0.00051 if gmacs < 1.0 else 0.0051  # of the table
    assert abs(info.gmacs - gmacs) < digits, f"{name} has {info.macs} MACs"
    assert (info.name, info.family, info.input_size) == (name, family, input_size)
    assert (info.tap_channels, info.tap_reductions) == (taps, strides)
    assert info.paper and info.compatible_with
    assert callable(getattr(backbones, name)) and name in backbones.__all__


def check_common_face(build, *shape: int, activated: tuple[str, ...] = ()) -> None:
    """What every backbone promises about classifier, features and taps, on images of `shape` = N, C, H, W.

    `build(**options)` makes the model. Taps are the outputs of the modules that `feature_info` names, behind
    a ReLU for those in `activated`. A model that stops early keeps what its taps need and nothing else.
    """
    model, x = trained(build(num_classes=7)).eval(), image(*shape)
    with torch.inference_mode():
        y = model.forward_modules(x)
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert y.shape == (shape[0], 7) and pooled.shape == (shape[0], model.num_features)
        assert torch.equal(model.forward_head(features), y)
        assert torch.equal(model.get_classifier()(pooled), y)
        exact = copy.deepcopy(model).double()
        assert_as_accurate(model(x), y, float64(exact.forward_modules, x))
        headless = build(num_classes=0).eval()
        backbones.load_weights(headless, model.state_dict())
        assert torch.equal(headless.forward_modules(x), pooled)
        assert isinstance(headless.get_classifier(), nn.Identity) and headless.default_cfg["num_classes"] == 0
    _check_taps(build, model, x, activated)
    model.reset_classifier(3)
    assert model(x).shape == (shape[0], 3) and model.get_classifier().training is False
    model.reset_classifier(0)
    assert torch.equal(model.forward_modules(x), pooled)
    wide = build(in_chans=5, features_only=True, out_indices=(0,)).eval()
    assert wide(torch.ones(1, 5, *shape[2:])).pop().shape[1] == wide.feature_info.channels()[0]
    assert wide.default_cfg["input_size"][0] == 5 == len(wide.default_cfg["mean"])


def _check_taps(build, model: nn.Module, x: torch.Tensor, activated: tuple[str, ...]) -> None:
    seen: dict[int, torch.Tensor] = {}
    hooks = []
    for tap in model.feature_info:

        def keep(module, inputs, y, tap=tap):
            seen[tap["index"]] = y.relu() if tap["module"] in activated else y.clone()

        hooks.append(model.get_submodule(tap["module"]).register_forward_hook(keep))
    with torch.inference_mode():
        model.forward_modules(x)
    for hook in hooks:
        hook.remove()
    for index, tap in enumerate(model.feature_info):
        part = build(features_only=True, out_indices=(index,)).eval()
        backbones.load_weights(part, model.state_dict())
        (y,) = part.forward_modules(x)
        assert torch.equal(y, seen[index]), f"tap {index} is not the output of {tap['module']}"
        assert y.shape[1] == tap["num_chs"] == part.num_features
        assert part.feature_info.channels() == [tap["num_chs"]]
        y.sum().backward()
        unused = [name for name, p in part.named_parameters() if p.grad is None]
        assert unused == [], f"tap {index} does not need {unused}"
        with pytest.raises(RuntimeError, match="features_only"):
            part.reset_classifier(3)
    every = build(features_only=True, out_indices=None).eval()
    backbones.load_weights(every, model.state_dict())
    with torch.inference_mode():
        assert same(every.forward_modules(x), [seen[i] for i in range(len(seen))])
        exact = float64(copy.deepcopy(every).double().forward_modules, x)
        for fused, true, plain in zip(every(x), exact, every.forward_modules(x)):
            assert_as_accurate(fused, plain, true)


def check_tracing(model: nn.Module, *shape: int) -> None:
    """TorchScript, FX, Dynamo and export with a free batch size (N > 1) give what the modules give."""
    n, *image_shape = shape
    one, several = image(n, *image_shape), image(n + 1, *image_shape)
    with torch.inference_mode(False):
        dynamic = ({0: torch.export.Dim("n", min=1, max=16)},)
        want = model.forward_modules(several)
        torch._dynamo.reset()
        traced = {
            "script": torch.jit.script(model)(several),
            "fx": torch.fx.symbolic_trace(model)(several),
            "compile": torch.compile(model, backend="eager", fullgraph=True)(several),
            "export": torch.export.export(model, (one,), dynamic_shapes=dynamic, strict=False).module()(
                several
            ),
        }
    for how, got in traced.items():
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, msg=lambda text, how=how: f"{how}: {text}")
