"""The loss kernel: values and gradients of PyTorch's cross entropy, the same bits in all circumstances.

Run as a program,

    python tests/test_kernels_softmax_cross_entropy.py OUT.pt

it saves results of real data; the tests start it once per instruction set.
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import (
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    generator,
    needs_native,
    poisoned,
    reals,
    results_of_isas,
    threads,
)
from helpers import one_thread as one_thread
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fast_backbones import kernels
from fast_backbones.kernels import softmax_cross_entropy, softmax_cross_entropy_ref

CLASSES = (1, 2, 10, 1000, 1001, 21843)
SIZES = (1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 511, 512, 513, 1001)  # around vectors, groups and blocks
REDUCTIONS = ("mean", "sum", "none")


def labels(rows: int, classes: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, classes, (rows,), generator=generator(seed))


def weights(classes: int, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(classes, generator=generator(3)).to(dtype)


def value_and_gradient(loss, logits: torch.Tensor, *args, upstream=1.0, **options):
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, *args, **options)
    (value * upstream).sum().backward()
    return value.detach(), leaf.grad


def native(logits, target, **options):
    return softmax_cross_entropy(logits, target, backend="native", **options)


def operators():
    return torch.ops.fast_backbones


# ---- accuracy ----


def error_free_parts(rows: int, classes: int, scale: float, weighted: bool, eps: float, seed: int):
    """Loss and gradient by the kernel, by PyTorch in float32, and by PyTorch in float64."""
    logits = reals((rows, classes), seed) * scale
    target = labels(rows, classes, seed + 1)
    target[::7] = -100
    upstream = reals((rows,), seed + 2)
    options = {"label_smoothing": eps, "reduction": "none"}
    w = weights(classes) if weighted else None
    ours = value_and_gradient(native, logits, target, weight=w, upstream=upstream, **options)
    plain = value_and_gradient(F.cross_entropy, logits, target, weight=w, upstream=upstream, **options)
    w, upstream = None if w is None else w.double(), upstream.double()
    exact = value_and_gradient(
        F.cross_entropy, logits.double(), target, weight=w, upstream=upstream, **options
    )
    return ours, plain, exact


@needs_native
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("scale", [1.0, 20.0, 1e4], ids=["spread", "confident", "huge"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("classes", CLASSES)
def test_as_accurate_as_pytorch(classes, eps, scale, weighted):
    rows = max(16, min(2048, 200_000 // classes))
    parts = [error_free_parts(rows, classes, scale, weighted, eps, seed) for seed in (1, 11)]
    for i, what in enumerate(("loss", "gradient")):
        ours, plain, exact = (torch.cat([part[who][i] for part in parts]) for who in range(3))
        assert_as_accurate(ours, plain, exact, f"{what}, {classes} classes")


@needs_native
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_every_size_and_reduction_is_pytorchs(reduction, weighted):
    """Every tail of a vector, a group and a block; memory that is not written holds NaN."""
    for classes in SIZES:
        logits, target = reals((9, classes), classes), labels(9, classes)
        target[4] = 5  # ignored, whether it is a class or not
        w = weights(classes) if weighted else None
        options = {"weight": w, "ignore_index": 5, "reduction": reduction, "label_smoothing": 0.1}
        expected = value_and_gradient(F.cross_entropy, logits.double(), target, **double(options))
        with poisoned():
            actual = value_and_gradient(native, logits, target, **options)
        for mine, true in zip(actual, expected):
            torch.testing.assert_close(mine, true.float(), rtol=2e-6, atol=2e-6, equal_nan=True)


def double(options: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@needs_native
def test_easy_rows_are_exact():
    """One class costs nothing; equal logits cost log K and have gradients that float32 holds."""
    logits, target = reals((5, 1), 1), torch.zeros(5, dtype=torch.long)
    for eps in (0.0, 0.1, 1.0):
        for w in (None, torch.tensor([0.3])):
            value, gradient = value_and_gradient(native, logits, target, weight=w, label_smoothing=eps)
            assert value == 0 and torch.equal(gradient, torch.zeros(5, 1))
    for classes in (2, 16, 1024):
        for height in (0.0, -7.5, 1e4):
            logits = torch.full((3, classes), height)
            value, gradient = value_and_gradient(
                native, logits, labels(3, classes), label_smoothing=0.5, reduction="sum"
            )
            exact = torch.full((3, classes), 1 / classes - 0.5 / classes, dtype=torch.float64)
            exact[torch.arange(3), labels(3, classes)] -= 0.5
            assert torch.equal(gradient, exact.float()), classes
            assert value.item() == torch.tensor(3 * math.log(classes)).item()
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, -300.0, -400.0]])  # certain, and right
    value, gradient = value_and_gradient(native, logits, torch.tensor([0, 0]))
    assert value == 0 and torch.equal(gradient, torch.zeros(2, 3))


@needs_native
def test_the_mean_of_many_rows_is_rounded_once():
    logits, target = reals((20_000, 10), 1), labels(20_000, 10)
    each = native(logits, target, label_smoothing=0.1, reduction="none").double()
    assert abs(native(logits, target, label_smoothing=0.1) - each.mean()) <= 2**-24 * each.mean()
    assert abs(native(logits, target, label_smoothing=0.1, reduction="sum") / each.sum() - 1) <= 2**-23


# ---- special values ----

SPECIAL = {
    "one -inf": [0.5, -math.inf, 1.0, -2.0],
    "all but one -inf": [-math.inf, -math.inf, 3.0, -math.inf],
    "all -inf": [-math.inf] * 4,
    "one +inf": [0.5, math.inf, 1.0, -2.0],
    "both infinities": [math.inf, -math.inf, 0.0, 1.0],
    "one NaN": [0.5, math.nan, 1.0, -2.0],
    "all NaN": [math.nan] * 4,
    "NaN and +inf": [math.nan, 1.0, math.inf, 0.0],
    "the largest numbers": [3.4e38, -3.4e38, 3.4e38, 0.0],
    "signed zeros": [-0.0, 0.0, -0.0, 0.0],
    "far below": [0.0, -87.5, -103.5, -1e30],
}


@needs_native
@pytest.mark.parametrize("width", [4, 40, 600], ids=["tail", "groups", "blocks"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "with zero weights"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
def test_special_logits_go_where_pytorch_lets_them_go(values, eps, weighted, width):
    """The row itself, ignored rows of the kind, and its neighbours; every class as the target."""
    logits = reals((2 * len(values) + 1, width), 1)
    if max(values) == -math.inf:
        logits[:-1] = -math.inf
    places = torch.arange(4) * (width // 4) + width % 4
    logits[: 2 * len(values), places] = torch.tensor(values)
    target = torch.cat([places, torch.full((4,), -100), torch.tensor([1])])
    w = weights(width) if weighted else None
    if weighted:
        w[places[1]] = 0.0
    options = {"weight": w, "label_smoothing": eps, "reduction": "none"}
    expected = value_and_gradient(F.cross_entropy, logits, target, **options)
    actual = value_and_gradient(native, logits, target, **options)
    for what, mine, true in zip(("loss", "gradient"), actual, expected):
        assert_equal(mine.isnan(), true.isnan(), f"NaN in the {what}")
        torch.testing.assert_close(mine, true, rtol=2e-6, atol=2e-6, equal_nan=True)


@needs_native
def test_special_upstream_gradients():
    logits, target = reals((4, 50), 1), labels(4, 50)
    logits[1, 3] = -math.inf
    for value in (math.inf, -math.inf, math.nan, 0.0):
        upstream = torch.tensor([1.0, value, value, -2.0])
        options = {"label_smoothing": 0.1, "reduction": "none", "upstream": upstream}
        _, mine = value_and_gradient(native, logits, target, **options)
        _, true = value_and_gradient(F.cross_entropy, logits, target, **options)
        assert_equal(mine.isfinite(), true.isfinite(), str(value))
        torch.testing.assert_close(mine[[0, 3]], true[[0, 3]])


@needs_native
def test_no_rows_and_ignored_rows():
    for reduction in REDUCTIONS:
        for rows in (0, 3):
            logits, target = reals((rows, 5), 1), torch.full((rows,), -100)
            options = {"label_smoothing": 0.1, "reduction": reduction}
            mine = value_and_gradient(native, logits, target, **options)
            true = value_and_gradient(F.cross_entropy, logits, target, **options)
            assert_equal(mine[0], true[0], reduction)
            assert_equal(mine[1], torch.zeros(rows, 5), reduction)


# ---- the same bits ----


@needs_native
@pytest.mark.parametrize("classes", [1, 10, 1001, 21843])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_threads_do_not_change_bits(classes, weighted):
    rows = max(300_000 // classes, 3)
    logits, target = reals((rows, classes), 1), labels(rows, classes)
    options = {"label_smoothing": 0.1, "weight": weights(classes) if weighted else None}
    for reduction in REDUCTIONS:
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(value_and_gradient(native, logits, target, reduction=reduction, **options))
        for other in results[1:]:
            assert_bit_equal(other[0], results[0][0], f"{reduction}: loss")
            assert_bit_equal(other[1], results[0][1], f"{reduction}: gradient")


@needs_native
@pytest.mark.parametrize("classes", [3, 1000, 9000])
def test_a_row_alone_equals_the_row_in_a_batch(classes):
    logits, target, upstream = reals((21, classes), 1), labels(21, classes), reals((21,), 4)
    options = {"label_smoothing": 0.1, "reduction": "none", "weight": weights(classes)}
    together = value_and_gradient(native, logits, target, upstream=upstream, **options)
    for row in range(21):
        part = slice(row, row + 1)
        alone = value_and_gradient(native, logits[part], target[part], upstream=upstream[part], **options)
        assert_bit_equal(together[0][part], alone[0], f"loss of row {row}")
        assert_bit_equal(together[1][part], alone[1], f"gradient of row {row}")
        one = native(logits[row], target[row], **options)
        assert one.shape == () and torch.equal(one, alone[0][0])


@needs_native
def test_memory_of_all_kinds():
    logits, target, w = reals((6, 37), 1), labels(6, 37), weights(37)
    wide = torch.full((6, 50), math.nan)
    wide[:, 5:42] = logits
    flat = torch.empty(6 * 37 + 1)
    flat[1:] = logits.flatten()
    views = {
        "columns of a wider matrix": wide[:, 5:42],
        "transposed": logits.t().contiguous().t(),
        "every second row": logits.repeat_interleave(2, 0)[::2],
        "every second column": logits.repeat_interleave(2, 1)[:, ::2],
        "4 bytes off alignment": flat[1:].view(6, 37),
        "negative bit": torch._neg_view(-logits),
    }
    upstream = reals((6,), 5)
    options = {"weight": w, "label_smoothing": 0.1, "reduction": "none"}
    expected = value_and_gradient(native, logits, target, upstream=upstream, **options)
    for name, view in views.items():
        leaf = view.detach().requires_grad_()
        losses = native(leaf, target, **options)
        (gradient,) = torch.autograd.grad(losses, leaf, upstream)
        assert_bit_equal(losses.detach(), expected[0], name)
        assert_bit_equal(gradient, expected[1], name)
    spread = torch.stack([upstream, -upstream], 1)[:, 0]
    leaf = logits.detach().requires_grad_()
    losses = native(leaf, target.to(torch.int32), **options | {"weight": torch.stack([w, -w], 1)[:, 0]})
    (gradient,) = torch.autograd.grad(losses, leaf, spread)
    assert_bit_equal(gradient, expected[1], "strided weight and gradient, int32 target")
    strided = torch.stack([target, -target], 1)[:, 0]
    assert_bit_equal(native(logits, strided, **options), expected[0], "strided target")
    row = logits[:1].expand(6, 37)
    assert_bit_equal(native(row, target, **options), native(row.contiguous(), target, **options), "expanded")


def real_results() -> dict[str, torch.Tensor]:
    results = {}
    for classes in (1, 2, 10, 17, 1000, 1001, 21843):
        for scale in (1.0, 30.0):
            logits, target = reals((11, classes), classes) * scale, labels(11, classes)
            logits[3, : classes // 2] = -math.inf
            for w in (None, weights(classes)):
                for eps in (0.0, 0.1):
                    for reduction in REDUCTIONS:
                        options = {"label_smoothing": eps, "weight": w, "reduction": reduction}
                        both = value_and_gradient(native, logits, target, **options)
                        name = f"{classes} classes x {scale}, eps {eps}, {w is None}, {reduction}"
                        results[f"{name}: loss"], results[f"{name}: gradient"] = both
    return results


@needs_native
def test_instruction_sets_give_the_same_bits(tmp_path):
    found = results_of_isas(
        "tests/test_kernels_softmax_cross_entropy.py", tmp_path, 1e-5, 1e-6, equal_nan=True
    )
    assert len(found) == 7 * 2 * 2 * 2 * 3 * 2


# ---- derivatives ----


@needs_native
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_second_derivatives_are_pytorchs(weighted, reduction):
    logits, target = reals((7, 6), 1), labels(7, 6)
    target[2] = -100
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": weights(6) if weighted else None}
    upstream, direction = reals((7,) if reduction == "none" else (), 5), reals((7, 6), 6)

    def twice(loss, dtype):
        x, g = logits.to(dtype).requires_grad_(), upstream.to(dtype).requires_grad_()
        value = loss(x, target, **(double(options) if dtype == torch.float64 else options))
        (first,) = torch.autograd.grad(value, x, g, create_graph=True)
        return first, *torch.autograd.grad(first, (x, g), direction.to(dtype))

    for mine, true in zip(twice(native, torch.float32), twice(F.cross_entropy, torch.float64)):
        torch.testing.assert_close(mine, true.float(), rtol=1e-5, atol=1e-6)


@needs_native
def test_the_gradient_is_that_of_its_own_graph():
    logits = reals((64, 100), 1).requires_grad_()
    loss = native(logits, labels(64, 100), label_smoothing=0.1)
    (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (with_graph,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert with_graph.requires_grad and not plain.requires_grad
    torch.testing.assert_close(plain, with_graph.detach(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode(dtype, reduction):
    """torch.func and dual numbers take the formula; forward over reverse gives Hessians."""
    logits, tangent, target = reals((5, 7), 1, dtype=dtype), reals((5, 7), 2, dtype=dtype), labels(5, 7)
    target[3] = -100

    def ours(x):
        return softmax_cross_entropy(x, target, label_smoothing=0.1, reduction=reduction)

    def theirs(x):
        return F.cross_entropy(x, target, label_smoothing=0.1, reduction=reduction)

    expected = torch.func.jvp(theirs, (logits,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(ours, (logits,), (tangent,)), expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(logits, tangent)))
    torch.testing.assert_close((dual.primal, dual.tangent), expected)
    mine, true = (torch.func.hessian(lambda x, f=f: f(x).sum())(logits) for f in (ours, theirs))
    torch.testing.assert_close(mine, true)


@needs_native
def test_nothing_is_recorded_where_no_gradient_is_wanted():
    logits, target = reals((4, 9), 1), labels(4, 9)
    leaf = logits.clone().requires_grad_()
    assert not native(logits, target).requires_grad
    with torch.no_grad():
        quiet = native(leaf, target)
    recorded = native(leaf, target)
    assert not quiet.requires_grad and recorded.requires_grad
    assert_bit_equal(quiet, recorded.detach())


@needs_native
def test_checkpointed():
    target, layer = labels(8, 30), torch.nn.Linear(12, 30)
    x = reals((8, 12), 1)
    for reentrant in (False, True):
        gradients = []
        for run in (lambda f, t: f(t), lambda f, t, r=reentrant: checkpoint(f, t, use_reentrant=r)):
            leaf = x.clone().requires_grad_()
            run(lambda t: native(layer(t), target, label_smoothing=0.1), leaf).backward()
            gradients.append(leaf.grad)
        assert_bit_equal(gradients[1], gradients[0], f"use_reentrant={reentrant}")


@needs_native
def test_logits_that_changed_after_forward_are_noticed():
    logits = reals((4, 5), 1).requires_grad_()
    twice = logits * 2
    loss = native(twice, labels(4, 5))
    twice.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- tracing ----


@needs_native
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(reduction):
    ops = operators()
    kinds = [reals((6, 5), 1), reals((5, 6), 1).t(), reals((6, 9), 1)[:, 2:7]]
    if reduction != "mean":  # of no rows that is NaN, which opcheck compares with ==
        kinds.append(reals((0, 5), 1))
    for logits in kinds:
        rows = len(logits)
        for w in (None, weights(5)):
            target = labels(rows, 5)
            options = (0.1, -100, reduction)
            torch.library.opcheck(ops.softmax_cross_entropy.default, (logits, target, w, *options))
            loss, kept = ops.softmax_cross_entropy(logits, target, w, *options)
            grad = torch.ones_like(loss)
            arguments = (grad, logits, target, w, kept, *options)
            torch.library.opcheck(ops.softmax_cross_entropy_backward.default, arguments)


@needs_native
def test_compiled_code_calls_the_kernels():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph)

    def loss(x, target):
        return softmax_cross_entropy(x * 2, target, label_smoothing=0.1, weight=weight)

    weight, target = weights(7), labels(6, 7)
    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    for rows in (6, 4):
        mine = value_and_gradient(compiled, reals((rows, 7), 1), target[:rows])
        plain = value_and_gradient(loss, reals((rows, 7), 1), target[:rows])
        assert_bit_equal(mine[0], plain[0])
        assert_bit_equal(mine[1], plain[1])
    assert "fast_backbones.softmax_cross_entropy.default" in graphs[0]
    assert "fast_backbones.softmax_cross_entropy_backward.default" in graphs[1]


# ---- the choice ----


@needs_native
def test_what_the_kernel_refuses_and_who_runs_instead():
    logits, target = reals((4, 5), 1), labels(4, 5)

    def verdict(*args, **options):
        explanation = kernels.explain(softmax_cross_entropy, *args, **options)
        return explanation.chosen, explanation.candidates[0].refusal

    assert verdict(logits, target, weight=weights(5, torch.float64)) == ("native", None)
    assert verdict(logits[0], target[0]) == ("native", None)
    assert verdict(logits.double(), target) == ("reference", "torch.float64: native handles torch.float32")
    assert verdict(logits.bfloat16(), target)[0] == "reference"
    assert verdict(reals((4, 5, 2), 1), labels(8, 5).view(4, 2)) == (
        "reference",
        "3 dimensions: native handles [N, K]",
    )
    with pytest.raises(RuntimeError, match="asked for by name and refuses"):
        native(logits.double(), target)
    with kernels.backend("reference"):
        assert_bit_equal(softmax_cross_entropy(logits, target), softmax_cross_entropy_ref(logits, target))


def test_the_reference_is_pytorchs():
    logits, target = reals((4, 5, 3), 1), labels(12, 5).view(4, 3)
    for reduction in REDUCTIONS:
        options = {"label_smoothing": 0.1, "weight": weights(5), "reduction": reduction}
        mine = value_and_gradient(softmax_cross_entropy_ref, logits, target, **options)
        true = value_and_gradient(F.cross_entropy, logits, target, **options)
        torch.testing.assert_close(mine, true)
    assert softmax_cross_entropy_ref(logits[0, :, 0], target[0, 0], reduction="none").shape == ()


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: reals((3,), 1)}, "logits has sizes"),
        ({0: reals((3, 5), 1).double()}, "logits must be float32"),
        ({0: reals((3, 0), 1)}, "at least one class"),
        ({1: torch.zeros(3)}, "target must be int64"),
        ({1: torch.zeros(2, dtype=torch.long)}, "target has sizes \\[2\\], expected \\[3\\]"),
        ({1: torch.tensor([0, 1, 5])}, "target 5 is not a class from 0 to 4 \\(row 2\\)"),
        ({2: torch.ones(4)}, "weight has sizes \\[4\\], expected \\[5\\]"),
        ({3: -0.1}, "label_smoothing is -0.1"),
        ({3: math.nan}, "label_smoothing is nan"),
        ({5: "max"}, 'reduction is "max"'),
    ],
)
def test_the_operator_checks_what_it_is_handed(changes, message):
    arguments = [reals((3, 5), 1), labels(3, 5), None, 0.1, -100, "mean"]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        operators().softmax_cross_entropy(*arguments)
    with pytest.raises(RuntimeError, match=message):
        operators().softmax_cross_entropy_backward(
            torch.ones(()), *arguments[:3], torch.ones(3, 2), *arguments[3:]
        )


@needs_native
def test_the_gradient_operator_checks_what_it_is_handed():
    options = (0.1, -100, "none")
    logits, target, kept = reals((3, 5), 1), labels(3, 5), torch.ones(3, 2)
    backward = operators().softmax_cross_entropy_backward
    with pytest.raises(RuntimeError, match="grad has sizes \\[2\\], expected \\[3\\]"):
        backward(torch.ones(2), logits, target, None, kept, *options)
    with pytest.raises(RuntimeError, match="kept has sizes \\[2, 2\\], expected \\[3, 2\\]"):
        backward(torch.ones(3), logits, target, None, kept[:2], *options)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([1.0, 2.0], torch.tensor(0)), {}, TypeError, "logits must be a tensor, got a list"),
        ((torch.zeros(3), 1), {}, TypeError, "target must be a tensor, got a int"),
        (
            (torch.zeros(3), torch.tensor(0)),
            {"weight": [1.0]},
            TypeError,
            "weight must be a tensor or None",
        ),
        (
            (torch.zeros(3), torch.tensor(0)),
            {"label_smoothing": math.nan},
            ValueError,
            "from 0 to 1, got nan",
        ),
    ],
)
def test_refusals_say_what_came(args, options, error, message):
    with pytest.raises(error, match=message):
        softmax_cross_entropy(*args, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(real_results(), sys.argv[1])
