"""Label smoothing cross entropy, forward and backward, against PyTorch's own (the reference)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast_backbones import kernels

from .compare import error
from .layers import peaks

SHAPES = ((32, 1000), (256, 1000), (32, 10), (32, 21843))  # rows, classes
EPS = 0.1
pytestmark = pytest.mark.benchmark(
    max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2, disable_gc=True
)

Loss = Callable[[Tensor, Tensor], Tensor]


def native(logits: Tensor, target: Tensor) -> Tensor:
    return kernels.softmax_cross_entropy(logits, target, label_smoothing=EPS, backend="native")


def reference(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=EPS)


def inputs(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=draw)
    return logits, torch.randint(0, classes, (rows,), generator=draw)


def loss_and_gradient(loss: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A step as training takes it: the gradient of fresh logits."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    return value.detach(), leaf.grad


def assert_parity(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """The 2x rule for loss and gradient: a kernel that is less accurate gets no time."""
    exact = loss_and_gradient(reference, logits.double(), target)
    own = loss_and_gradient(reference, logits, target)
    for what, mine, plain, true in zip(
        ("loss", "gradient"), loss_and_gradient(loss, logits, target), own, exact
    ):
        found, allowed = error([mine], [true]), error([plain], [true])
        assert found.within(2, allowed), f"{what}: error {found}, PyTorch's own {allowed}"


@pytest.mark.parametrize("loss", [reference, native], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(("rows", "classes"), SHAPES, ids=lambda size: str(size))
def bench_softmax_cross_entropy(benchmark, rows, classes, loss):
    logits, target = inputs(rows, classes)
    if kernels.explain("softmax_cross_entropy", logits, target, backend=loss.__name__).chosen is None:
        pytest.skip("the compiled library is absent")
    assert_parity(loss, logits, target)
    benchmark.group = f"softmax_cross_entropy {rows}x{classes}"
    count = rows * classes
    flops, moved = (
        6 * count,
        3 * 4 * count,
    )  # per logit a difference, exp and sum each way; read twice, written once
    benchmark.extra_info.update(
        op="softmax_cross_entropy",
        layer=f"{rows}x{classes}",
        candidate=loss.__name__,
        batch=rows,
        flops=flops,
        bytes=moved,
        threads=torch.get_num_threads(),
    )
    benchmark(loss_and_gradient, loss, logits, target)
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.median
        rates = {"gflops": flops / seconds * 1e-9, "gbps": moved / seconds * 1e-9}
        benchmark.extra_info.update({name: round(rate, 2) for name, rate in rates.items()}, **peaks())
