"""The checks of `fast-backbones selftest`: each returns words about what was found, or raises Failed.

Kernels: on whole numbers, whose arithmetic has no rounding, equal to the formula in float64; on real numbers
the 2x rule, for the result and for every gradient. Models: the 2x rule against the plain modules, the same
bits with one thread and with two, alone and in a batch. Training: the 2x rule for the gradient of a step.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast_backbones as fb

from . import engine, kernels
from .bench import parity
from .bench.compare import eager_error, error, exact_outputs
from .bench.exact import depthwise_by_taps
from .bench.peer import as_list
from .bench.subject import make_input, make_model

MODELS = (  # one of each style: name, pixels of a side, options
    ("lenet5", 32, {}),  # plain convolutions, few channels
    ("resnet18", 64, {}),  # shortcuts, Winograd
    ("legacy_seresnext26_32x4d", 64, {}),  # grouped, squeeze and excitation
    ("mobilenetv1_025", 64, {}),  # separable
    ("googlenet", 64, {}),  # branches and concatenations
    ("densenet121", 64, {"block_config": (2, 2, 2, 2)}),  # growing concatenations, norms before convolutions
)
# On every instruction set.
COMPARED = ("lenet5", "legacy_seresnext26_32x4d", "mobilenetv1_025", "densenet121")
NARROW = "legacy_seresnext26_32x4d"
TRAINED = ("resnet18", "mobilenetv1_025", "legacy_seresnext26_32x4d")
TRAINED_SIDE = 32
SEEDS = 3  # of a training step; the middle one counts: rounding may send a ReLU to its other side
FLOOR = 1e-6  # of the relative error of a whole gradient


class Failed(Exception):
    """A check found what must not be; the message says what."""


@dataclass(frozen=True)
class Check:
    """run() returns a few words. digests: filled by it, results whose bits other instruction sets share."""

    name: str
    run: Callable[[], str]
    digests: dict[str, str] = field(default_factory=dict)


# ---- kernels ----


@dataclass(frozen=True)
class Case:
    """A call of an op: `tensors` by shape (in the order of its arguments), then plain arguments."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    plain: tuple[Any, ...] = ()
    exact: bool = True  # whether whole numbers stay whole
    multiples: tuple[int, ...] = ()  # of the whole numbers in each tensor
    limit: int = 2

    def tensors(self, data: str, seed: int = 0) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        if data == "integers":
            multiples = [*self.multiples, *(1,) * len(self.shapes)]
            return [
                torch.randint(-self.limit, self.limit + 1, shape, generator=draw).float() * multiple
                for shape, multiple in zip(self.shapes, multiples)
            ]
        found = [torch.randn(shape, generator=draw) for shape in self.shapes]
        for i, tensor in enumerate(found[1:], 1):
            if tensor.dim() > 1 and tensor.shape != found[0].shape:
                found[i] = tensor / tensor[0].numel() ** 0.5
        return found

    def call(self, function: Callable[..., Tensor], tensors: list[Tensor], **more: Any) -> Tensor:
        named = {}
        if "residual" in self.options:
            *tensors, named["residual"] = tensors
        options = {key: value for key, value in self.options.items() if key != "residual"}
        return function(*tensors, *self.plain, **options, **named, **more)


def conv(
    op: str, x: tuple[int, ...], k: int, kernel: tuple[int, int], q: tuple[int, int], **options: Any
) -> Case:
    """With bias, residual (but for stems) and ReLU; q: height and width of the result."""
    groups = options.get("groups", 1)
    shapes = (x, (k, x[1] // groups, *kernel), (k,), (x[0], k, *q))
    options |= {"activation": "relu"}
    if op == "stem_conv2d":
        return Case(op, shapes[:3], options, multiples=(1, 4))
    return Case(op, shapes, options | {"residual": True}, multiples=(1, 4))


CASES = (
    conv("conv2d", (2, 35, 13, 11), 37, (3, 3), (13, 11), padding=1),
    conv("conv2d", (2, 64, 17, 19), 64, (3, 3), (17, 19), padding=1),
    conv("conv2d", (1, 40, 18, 18), 48, (5, 5), (18, 18), padding=2),
    conv("conv2d", (1, 40, 20, 20), 48, (1, 7), (20, 20), padding=(0, 3)),
    conv("conv2d", (1, 40, 20, 20), 48, (7, 1), (20, 20), padding=(3, 0)),
    conv("conv2d", (2, 33, 12, 13), 40, (3, 3), (6, 7), stride=2, padding=1),
    conv("conv2d", (2, 64, 13, 11), 64, (3, 3), (13, 11), padding=1, groups=16),
    conv("grouped_conv2d", (2, 64, 13, 11), 64, (3, 3), (7, 6), padding=1, stride=2, groups=8),
    conv("grouped_conv2d", (1, 32, 9, 9), 48, (3, 3), (9, 9), padding=1, groups=8),
    conv("pointwise_conv2d", (2, 70, 9, 7), 85, (1, 1), (9, 7)),
    conv("stem_conv2d", (2, 3, 33, 31), 64, (7, 7), (17, 16), stride=2, padding=3),
    Case("depthwise_conv2d", ((2, 35, 13, 11), (35, 1, 3, 3), (35,)), {"padding": 1, "activation": "relu"}),
    Case("depthwise_conv2d", ((2, 35, 13, 12), (35, 1, 5, 5), (35,)), {"padding": 2, "stride": 2}),
    Case(
        "separable_conv2d", ((2, 24, 11, 9), (24, 1, 3, 3), (40, 24, 1, 1), (24,), (40,)),
        {"depth_activation": "relu", "activation": "relu"},
    ),
    Case("max_pool2d", ((2, 67, 13, 11),), {"stride": 2, "padding": 1}, (3,)),
    Case("avg_pool2d", ((2, 64, 12, 10),), {"stride": 2}, (2,)),
    Case("global_avg_pool", ((3, 67, 8, 8),), multiples=(64,)),
    Case("linear", ((5, 131), (67, 131), (67,)), {"activation": "relu"}),
    Case("local_response_norm", ((2, 37, 9, 9),), {"alpha": 1e-4, "beta": 0.75, "k": 2.0}, (5,), exact=False),
    Case("l2_normalize", ((64, 130),), exact=False),
    Case("squared_distances", ((33, 84), (10, 84))),
    Case(
        "squeeze_excite", ((2, 64, 8, 8), (8, 64), (8,), (64, 8), (64,)),
        multiples=(64, 1, 1, 256, 256), limit=1,
    ),
    Case("batch_norm", ((4, 35, 13, 11), (35,), (35,)), {"activation": "relu"}, exact=False),
    Case(
        "batch_norm_conv2d",
        ((4, 32, 13, 11), (32,), (32,), (48, 32, 3, 3)), {"padding": 1}, exact=False,
    ),
    Case("softmax_cross_entropy", ((130, 37),), {"label_smoothing": 0.1}, exact=False),
)  # fmt: skip
SKIPPED = {"batch_norm": 3, "batch_norm_conv2d": 3}  # running statistics: None, None behind so many tensors


def arguments(case: Case, tensors: list[Tensor]) -> list[Any]:
    """With what only some ops want between their tensors."""
    if case.op in SKIPPED:
        return [*tensors[: SKIPPED[case.op]], None, None, *tensors[SKIPPED[case.op] :]]
    if case.op == "softmax_cross_entropy":
        return [*tensors, torch.arange(len(tensors[0])) % tensors[0].shape[1]]
    return tensors


def kernel_checks() -> Iterator[Check]:
    """One check for each compiled candidate of each op."""
    for op, entry in sorted(kernels.ops().items()):
        for candidate in entry.candidates:
            if candidate.family == "native":
                label = op if candidate.name == "native" else f"{op} ({candidate.name})"
                yield Check(label, partial(check_kernel, op, candidate.name))


def check_kernel(op: str, candidate: str) -> str:
    fast, formula = getattr(kernels, op), getattr(kernels, f"{op}_ref")
    taken = [case for case in CASES if case.op == op and accepts(case, candidate)]
    if not taken:
        raise Failed("no case of the selftest reaches this kernel")
    words = []
    for case in taken:
        if case.exact:
            tensors = case.tensors("integers")
            expected = case.call(formula, arguments(case, [t.double() for t in tensors])).float()
            for layout in (torch.contiguous_format, torch.channels_last):
                given = [t.to(memory_format=layout) if t.dim() == 4 else t for t in tensors]
                insist(parity.equal(case.call(fast, given, backend=candidate), expected), "whole numbers")
            words = ["equal on whole numbers"]
        compare_reals(case, fast, formula, candidate)
    return ", ".join([*words, "within twice PyTorch's error on real ones"])


def accepts(case: Case, candidate: str) -> bool:
    verdicts = case.call(partial(kernels.explain, case.op), arguments(case, case.tensors("reals"))).candidates
    return next(v.refusal for v in verdicts if v.name == candidate) is None


def compare_reals(case: Case, fast: Any, formula: Any, candidate: str) -> None:
    """The result by this candidate, and all gradients by whatever computes them, over several seeds."""
    results: list[list[list[Tensor]]] = []
    for seed in range(2):
        tensors = case.tensors("reals", seed)
        runs = (
            differentiated(case, partial(fast, backend=candidate), tensors),
            differentiated(case, formula, tensors),
            differentiated(case, formula, [t.double() for t in tensors]),
        )
        results.append(runs)
    for position, name in enumerate(["result", *(f"gradient {i}" for i in range(len(case.shapes)))]):
        ours, plain, exact = (
            torch.cat([runs[who][position].flatten() for runs in results]) for who in range(3)
        )
        if exact.abs().max() > 0:
            insist(parity.within_twice(ours, plain, exact), name)


def differentiated(case: Case, function: Any, tensors: list[Tensor]) -> list[Tensor]:
    """The result, and its gradients for seeded gradients of the result. Without gradients where a candidate
    has none: the result is computed without, too."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        result = case.call(function, arguments(case, tensors))
    automatic = function.func if isinstance(function, partial) else function
    y = case.call(automatic, arguments(case, leaves))
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return [result, *torch.autograd.grad(y, leaves, direction)]


def insist(said: str, what: str) -> None:
    if said:
        raise Failed(f"{what}: {said}")


# ---- kernels that only plans have ----


class Exact(nn.Module):
    """Whole numbers stay whole: a border, a shuffle, a product, a leaky ReLU, an upsampling, a sum."""

    kinds = ("pad2d", "channel_shuffle", "multiply", "leaky_relu", "upsample_nearest2d", "affine", "to_nchw")

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.pad(x, (1, 0, 1, 0), value=1.0), 2, 1)
        n, c, h, w = x.shape
        y = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = F.leaky_relu(y * x, 0.5)
        return F.relu(F.interpolate(y, scale_factor=2.0) + F.interpolate(x, scale_factor=2.0))


class Norms(nn.Module):
    """Layer norm over the channels of a map, group norm."""

    kinds = ("layer_norm", "group_norm", "to_nhwc")

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group = nn.LayerNorm(24), nn.GroupNorm(4, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.group(self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


PLAN_KERNELS = (*Exact.kinds, *Norms.kinds)


def check_plan_kernels(kind: type[nn.Module], data: str) -> str:
    model, draw = fb.optimize_(kind().eval()), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        if data == "integers":
            x = torch.randint(-3, 4, (2, 24, 9, 7), generator=draw).float()
        else:
            x = torch.randn(4, 24, 19, 17, generator=draw)
        require_plan(model, x)
        missing = {*kind.kinds} - {step.kernel for step in engine.plan_for(model, x).steps}
        if missing:
            raise Failed(f"its plan has no kernel {', '.join(sorted(missing))}")
        plain = copy.deepcopy(fb.revert_(copy.deepcopy(model)))
        y, exact = model(x), plain.double()(x.double())
        if data == "integers":
            insist(parity.equal(y, exact.float()), "whole numbers")
            return f"{', '.join(kind.kinds)}: equal on whole numbers"
        insist(parity.within_twice(y, plain.float()(x), exact), "real numbers")
    return f"{', '.join(kind.kinds)}: within twice PyTorch's error"


def require_plan(model: nn.Module, x: Tensor) -> None:
    reason = engine.why_not(model, x)
    if reason is not None:
        raise Failed(f"no plan: {reason}")


# ---- models ----


def check_model(name: str, side: int, options: dict[str, Any], digests: dict[str, str], whole: bool) -> str:
    """whole: also other threads and another batch."""
    model = make_model(name, **options)
    x = make_input(model, 3)[:, :, :side, :side].contiguous()
    with torch.inference_mode():
        require_plan(model, x)
        torch.set_num_threads(2)
        y = model(x)
        digests[name] = hashlib.sha256(y.numpy().tobytes()).hexdigest()[:16]
        said = compare_with_float64(model, x, y)
        if not whole:
            return said
        torch.set_num_threads(1)
        insist(parity.bit_equal(model(x), y), "one thread instead of two")
        insist(parity.bit_equal(model(x[1:]), y[1:]), "another batch")
    return f"{said}; the same bits with one thread and in another batch"


def check_narrow(name: str, side: int) -> str:
    """Weights and maps of bfloat16, by products of bfloat16 where the processor has them."""
    model = make_model(name)
    x = make_input(model, 3)[:, :, :side, :side].contiguous().to(torch.bfloat16)
    model = model.to(torch.bfloat16)
    with torch.inference_mode():
        require_plan(model, x)
        return compare_with_float64(model, x, model(x))


def compare_with_float64(model: nn.Module, x: Tensor, y: Any) -> str:
    """The errors of y and of eager PyTorch, in words. Failed where the 2x rule is broken."""
    exact = exact_outputs(model, x)
    ours, own = error(as_list(y), exact), eager_error(model, x, exact)
    said = f"error {ours}, PyTorch's own {own}"
    if not ours.within(2, own):
        raise Failed(said)
    return said


def check_training(name: str) -> str:
    """A forward and backward in train(), by fused steps: the whole gradient as one vector."""
    ratios, said = [], []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = (
            fb.create_model(name, num_classes=10, drop_rate=0.0).train().to(memory_format=torch.channels_last)
        )
        x = torch.randn(4, 3, TRAINED_SIDE, TRAINED_SIDE).to(memory_format=torch.channels_last)
        reason = engine.why_not_fused(copy.deepcopy(model), x)
        if reason is not None:
            raise Failed(f"no fused step: {reason}")
        ours = gradient(model, x)
        with kernels.backend("reference"), depthwise_by_taps():
            plain, exact = gradient(model, x), gradient(copy.deepcopy(model).double(), x.double())
        far, own = (((g.double() - exact).norm() / exact.norm()).item() for g in (ours, plain))
        if not far < 1e-2:
            raise Failed(f"seed {seed}: the gradient is off by {far:.2g}, PyTorch's own by {own:.2g}")
        ratios.append((far + FLOOR) / (own + FLOOR))
        said.append(f"{far:.1e} and {own:.1e}")
    if median(ratios) > 2:
        raise Failed(f"errors of the gradient, ours and PyTorch's own: {'; '.join(said)}")
    return f"errors of the gradient, ours and PyTorch's own: {said[ratios.index(median(ratios))]}"


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    loss = F.cross_entropy(model(x), torch.arange(len(x)))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# ---- all of them ----


def checks(best: bool) -> list[Check]:
    """best: of the instruction set in use; the others leave out what says the same again."""
    found = list(kernel_checks())
    for kind, data in ((Exact, "integers"), (Norms, "reals")):
        found.append(Check(f"plans: {kind.__name__.lower()}", partial(check_plan_kernels, kind, data)))
    for name, side, options in MODELS:
        if best or name in COMPARED:
            digests: dict[str, str] = {}
            run = partial(check_model, name, side, options, digests, best)
            found.append(Check(f"model {name}", run, digests))
    if best:
        found.append(Check(f"model {NARROW} in bfloat16", partial(check_narrow, NARROW, 64)))
        found += [Check(f"training step of {name}", partial(check_training, name)) for name in TRAINED]
    return found
