"""Whole networks in train(), part by part: gradients of every parameter, of every input, and statistics.

Each part (network_parts.py) is a fused program of its own. It reads what the part before gave in float64,
rounded to the type that part returns, and gets a random gradient from above; so do PyTorch's own modules in
the same types, and those in float64, which the errors of both are measured against.
"""

import copy
import math

import pytest
import torch
from fast_backbones.backbones.layers import SqueezeExcite
from fast_backbones.backbones.resnet import BasicBlock
from helpers import generator, needs_native
from helpers import one_thread as one_thread
from model_checks import image, trained
from network_parts import Part, parts_of
from torch import Tensor, nn
from train_nets import FAMILIES

import fast_backbones as fb
from fast_backbones import engine, kernels
from fast_backbones.backbones import DenseNet, MobileNetV1, ResNet, SENet

pytestmark = needs_native

BATCH, SEEDS = 4, 3
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
WAYS = {"float32": (FLOAT32, None), "autocast": (FLOAT32, BFLOAT16), "bfloat16": (BFLOAT16, None)}
SMALL = {  # the same kinds of blocks, fewer of them
    "densenet121": lambda: DenseNet(16, (2, 4, 4, 3), 32, num_classes=10),
    "inception_resnet_v1": lambda: without_repeats(fb.inception_resnet_v1(num_classes=10)),
    "legacy_seresnext26_32x4d": lambda: SENet("resnext", (1, 1, 1, 1), num_classes=10),
    "resnet18": lambda: ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10),
    "se_mobilenetv1_100": lambda: MobileNetV1(0.25, se_reduction=4, num_classes=10),
    "xception": lambda: without_repeats(fb.xception(num_classes=10)),
}
QUICK = {  # whole, or small
    "bninception": ("autocast",),
    "densenet121": ("autocast", "bfloat16"),
    "inception_resnet_v1": ("float32",),
    "legacy_seresnext26_32x4d": ("autocast",),
    "lenet5": ("float32", "autocast", "bfloat16"),
    "mobilenetv1_025": ("float32", "autocast", "bfloat16"),
    "resnet18": ("float32", "bfloat16"),
    "se_mobilenetv1_100": ("bfloat16",),
    "xception": ("float32", "autocast"),
}
BIAS_BEFORE_NORM = ("vgg11_bn", "bninception")  # in all convolutions; a norm takes it away: no gradient
CHANNELS_LAST = {"memory_format": torch.channels_last}


def without_repeats(model: nn.Module) -> nn.Module:
    """Identities in the place of blocks whose parameters have the sizes of those of an earlier one."""
    for parent in list(model.modules()):
        seen = []
        for name, child in parent.named_children():
            sizes = [parameter.shape for parameter in child.parameters()]
            if len(sizes) > 4 and sizes in seen:
                parent.set_submodule(name, nn.Identity())
            seen.append(sizes)
    return model


def network(name: str, dtype: torch.dtype, whole: bool, seed: int) -> tuple[nn.Module, Tensor]:
    """A network and images. Its norms have weights and biases as after training: behind neutral ones and
    ReLU the next norm would take away what a weight does. Statistics are zero, so that what a step adds to
    them is all there is."""
    torch.manual_seed(seed)
    model = fb.create_model(name, num_classes=10) if whole else SMALL[name]()
    model = trained(model, seed).train().to(dtype, **CHANNELS_LAST)
    x = image(BATCH, 1 if name == "lenet5" else 3, FAMILIES[name], FAMILIES[name], seed).to(dtype)
    settle_gates(model, x)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.zero_()
            module.running_var.zero_()
    return model, x


def settle_gates(model: nn.Module, x: Tensor) -> None:
    """Move biases, by as little as can be, so that no unit of a gate is so near to zero that rounding decides
    about its ReLU. A gate has few: one on the wrong side is an error of 10 %, whoever computes it."""

    def move(fc1: nn.Conv2d, args: tuple, y: Tensor) -> Tensor:
        units = y.flatten(1)
        margin = 0.1 * units.square().mean().sqrt()
        moves = torch.cat([torch.zeros_like(units[:1]), margin - units, -margin - units])
        unsettled = (units + moves[:, None]).abs().amin(1) < 0.99 * margin
        chosen = moves.abs().masked_fill(unsettled, torch.inf).argmin(0, keepdim=True)
        moved = moves.gather(0, chosen)[0]
        if (units + moved).amax() < 0:  # without any unit there is no gradient
            moved[0] = margin - units[:, 0].amin()
        fc1.bias += moved
        return y + moved[:, None, None]

    exact = copy.deepcopy(model).double()
    gates = [m for m in exact.modules() if isinstance(m, SqueezeExcite)]
    if gates:
        for gate in gates:
            gate.fc1.register_forward_hook(move)
        with torch.no_grad():
            exact.forward_modules(x.double())
        model.load_state_dict(exact.state_dict())


def step(part: Part, x: Tensor, above: torch.dtype, cast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The result of a forward, and the gradient of x of a backward from random ones of type `above`."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(0)  # dropout draws the same in all types
    with torch.autocast("cpu", cast, enabled=cast is not None):
        y = part(x)
    y.backward((torch.randn(y.shape, generator=generator(0)) / y.numel() ** 0.5).to(above).to(y.dtype))
    return y.detach(), x.grad


def results_of_a_step(
    name: str, way: str, whole: bool, seed: int
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Maps and gradients of all parts, gradients of all parameters, and statistics, by name: ours, PyTorch's
    and those of float64."""
    dtype, cast = WAYS[way]
    ours, x = network(name, dtype, whole, seed)
    models = ours, copy.deepcopy(ours), copy.deepcopy(ours).double()
    given, found, before = {None: x}, {}, None
    for fast, reference, truth in zip(*map(parts_of, models), strict=True):
        x = given[fast.source or before].repeat(1, 1, fast.tiles, fast.tiles).contiguous(**CHANNELS_LAST)
        with torch.autocast("cpu", cast, enabled=cast is not None):
            assert engine.why_not_fused(fast, x) is None, fast.name
        results = [step(fast, x, cast or dtype, cast)]
        with kernels.backend("reference"):
            results += [step(reference, x, cast or dtype, cast), step(truth, x.double(), cast or dtype)]
        for what, *values in zip(("y", "dx"), *results):
            found[f"{fast.name}: {what}"] = values
        given[fast.name] = results[2][0].to(results[1][0].dtype)
        before = before if fast.source else fast.name
    tensors = [{n: p.grad for n, p in m.named_parameters()} | dict(m.named_buffers()) for m in models]
    return found | {key: [each[key] for each in tensors] for key in tensors[0]}


def errors_of_a_step(name: str, way: str, whole: bool, seed: int) -> dict[str, tuple[float, float, float]]:
    """Relative errors, ours and PyTorch's, and a rounding of the result's type."""
    found = {}
    results = results_of_a_step(name, way, whole, seed)
    for key, (ours, plain, exact) in results.items():
        assert exact is not None, f"no part reads {key}"
        assert ours.dtype == plain.dtype and ours.isfinite().all(), key
        if not exact.is_floating_point():
            assert torch.equal(ours, plain), key
            continue
        size = exact.norm()
        weight = results.get(key.replace(".bias", ".weight"), (exact,))[-1]
        without_gradient = name in BIAS_BEFORE_NORM and key.endswith(".bias") and weight.dim() == 4
        if without_gradient:
            size = weight.norm()
            assert exact.norm() < 1e-9 * size, key
        assert size > 0, f"{key} is zero"
        errors = [((value.double() - exact).norm() / size).item() for value in (ours, plain)]
        assert errors[0] < 0.01 or not without_gradient, f"{key} has a gradient"
        found[key] = *errors, torch.finfo(ours.dtype).eps / 4
    return found


def cases():
    """Every family in every way: whole, and by default what takes some seconds."""
    for name in FAMILIES:
        for way in WAYS:
            quick, small = way in QUICK.get(name, ()), name in SMALL
            marks = () if quick and not small else pytest.mark.slow
            yield pytest.param(name, way, True, id=f"{name}-{way}", marks=marks)
            if quick and small:
                yield pytest.param(name, way, False, id=f"small-{name}-{way}")


@pytest.mark.parametrize("name, way, whole", list(cases()))
def test_gradients_of_every_parameter_keep_the_2x_rule(name, way, whole):
    """The middle of three errors against PyTorch's largest: in a small map a few values on the other side of
    ReLU decide how far off a gradient is, and either computation has them by chance. In the mean over all
    parameters chance is gone, and ours may not be the larger errors."""
    runs = [errors_of_a_step(name, way, whole, seed) for seed in range(SEEDS)]
    found = {key: [sorted(each) for each in zip(*(run[key] for run in runs))] for key in runs[0]}
    middle = SEEDS // 2
    usual = sorted(theirs[middle] for _, theirs, _ in found.values())
    assert usual[len(usual) // 2] < 0.1 and usual[-1] < 0.5, "what PyTorch computes says nothing"
    for key, (ours, theirs, rounding) in found.items():
        allowed = 2 * theirs[-1] + rounding[0]
        assert ours[middle] <= allowed, f"{key}: {ours[middle]:.3g}, PyTorch {theirs[-1]:.3g}"
    ratios = [math.log((ours[middle] + 1e-7) / (theirs[middle] + 1e-7)) for ours, theirs, _ in found.values()]
    assert math.exp(sum(ratios) / len(ratios)) <= 1.25


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_parts_make_up_the_network(name):
    """Called one after the other they give the bits of the network's forward."""
    torch.manual_seed(0)
    model = fb.create_model(name, num_classes=10, **({"aux_logits": False} if name == "inception_v3" else {}))
    x = image(2, 1 if name == "lenet5" else 3, FAMILIES[name], FAMILIES[name])
    maps, before = {None: x}, None
    with torch.no_grad(), kernels.backend("reference"):
        torch.manual_seed(0)
        expected = model.train()(x)
        torch.manual_seed(0)
        for part in parts_of(model):
            maps[part.name] = part(maps[part.source or before])
            before = before if part.source else part.name
    heads = [maps[before], *(maps[head] for head in reversed(getattr(model, "auxiliary_heads", {}).values()))]
    for y, logits in zip(heads, [expected] if isinstance(expected, Tensor) else expected, strict=True):
        assert torch.equal(y, logits)
