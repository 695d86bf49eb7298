"""Label smoothing cross entropy and the loss of networks with auxiliary classifiers."""

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, generator, reals

import fast_backbones as fb
from fast_backbones.training import (
    GOOGLENET_AUX_WEIGHT,
    INCEPTION_V3_AUX_WEIGHT,
    LabelSmoothingCrossEntropy,
    auxiliary_loss,
    label_smoothing_cross_entropy,
)

GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])
InceptionOutputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])


def labels(shape, classes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, classes, shape, generator=generator(seed))


def with_gradient(loss, logits: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of each row, and the gradient of their sum weighted by `upstream`."""
    logits = logits.detach().clone().requires_grad_()
    losses = loss(logits)
    (losses * upstream.to(losses.dtype)).sum().backward()
    return losses.detach(), logits.grad


# ---- against PyTorch ----


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["spread logits", "confident logits"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
def test_as_accurate_as_pytorch(eps, scale, weighted):
    rows, classes = 512, 1000
    logits = reals((rows, classes), 1) * scale
    target = labels((rows,), classes, 2)
    target[::7] = -100
    weight = torch.rand(classes, generator=generator(3)) if weighted else None
    upstream = reals((rows,), 4)

    def ours(x):
        w = None if weight is None else weight.to(x.dtype)
        return label_smoothing_cross_entropy(x, target, label_smoothing=eps, weight=w, reduction="none")

    def theirs(x):
        w = None if weight is None else weight.to(x.dtype)
        return F.cross_entropy(x, target, weight=w, label_smoothing=eps, reduction="none")

    exact = with_gradient(theirs, logits.double(), upstream)
    for what, mine, plain, true in zip(
        ("loss", "gradient"),
        with_gradient(ours, logits, upstream),
        with_gradient(theirs, logits, upstream),
        exact,
    ):
        assert_as_accurate(mine, plain, true, what)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "shape", [(5,), (4, 5), (4, 1), (2, 5, 3), (2, 5, 3, 2), (0, 5)], ids=lambda s: "x".join(map(str, s))
)
def test_shapes_weights_and_reductions_are_pytorchs(shape, weighted, reduction):
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = reals(shape, 1, dtype=torch.float64).requires_grad_()
    target = labels((), classes, 2) if len(shape) == 1 else labels((shape[0], *shape[2:]), classes, 2)
    if target.dim() > 1:
        target[0] = 3
    weight = torch.rand(classes, generator=generator(3), dtype=torch.float64) if weighted else None
    options = {"weight": weight, "ignore_index": 3, "reduction": reduction, "label_smoothing": 0.1}
    ours = label_smoothing_cross_entropy(logits, target, **options)
    theirs = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    if not theirs.isnan().any():
        (mine,) = torch.autograd.grad(ours.sum(), logits)
        (other,) = torch.autograd.grad(theirs.sum(), logits)
        torch.testing.assert_close(mine, other)


def test_the_gradient_is_p_minus_q():
    logits, target, eps = reals((3, 4), 1, dtype=torch.float64).requires_grad_(), torch.tensor([0, 3, 1]), 0.1
    label_smoothing_cross_entropy(logits, target, label_smoothing=eps, reduction="sum").backward()
    smoothed = F.one_hot(target, 4) * (1 - eps) + eps / 4
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1) - smoothed)


def test_all_ignored_has_mean_nan_and_sum_zero():
    logits, target = reals((3, 4), 1), torch.full((3,), -100)
    assert label_smoothing_cross_entropy(logits, target).isnan()
    assert label_smoothing_cross_entropy(logits, target, reduction="sum") == 0


# ---- derivatives ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_first_and_second_derivatives(weighted, reduction):
    logits = reals((4, 5), 1, dtype=torch.float64).requires_grad_()
    target = torch.tensor([0, 4, -100, 2])
    weight = torch.rand(5, generator=generator(3), dtype=torch.float64) if weighted else None

    def loss(x):
        return label_smoothing_cross_entropy(x, target, weight=weight, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


def test_the_gradient_is_the_same_with_and_without_its_own_graph():
    logits = reals((64, 10), 1, dtype=torch.float64).requires_grad_()
    loss = label_smoothing_cross_entropy(logits, labels((64,), 10, 2))
    (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (with_graph,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert with_graph.requires_grad and not plain.requires_grad
    torch.testing.assert_close(plain, with_graph.detach())


def test_gradients_of_single_samples():
    logits, target = reals((6, 5), 1, dtype=torch.float64), labels((6,), 5, 2)
    each = torch.func.vmap(torch.func.grad(label_smoothing_cross_entropy))(logits, target)
    smoothed = F.one_hot(target, 5) * 0.9 + 0.1 / 5
    torch.testing.assert_close(each, logits.softmax(1) - smoothed)


def test_compiles_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(label_smoothing_cross_entropy, backend="aot_eager", fullgraph=True)
    target = labels((6,), 5, 2)
    logits = reals((6, 5), 1).requires_grad_()
    (mine,) = torch.autograd.grad(compiled(logits, target), logits)
    (plain,) = torch.autograd.grad(label_smoothing_cross_entropy(logits, target), logits)
    torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_are_summed_in_float32(dtype):
    logits, target = (reals((64, 1000), 1) * 4).to(dtype).requires_grad_(), labels((64,), 1000, 2)
    losses = label_smoothing_cross_entropy(logits, target, reduction="none")
    wide = logits.detach().float().requires_grad_()
    with fb.backend("reference"):  # both by the formula
        expected = label_smoothing_cross_entropy(wide, target, reduction="none")
    assert losses.dtype == dtype
    assert torch.equal(losses, expected.to(dtype))  # rounded once, at the end
    losses.sum().backward()
    expected.sum().backward()
    assert logits.grad.dtype == dtype
    assert torch.equal(logits.grad, wide.grad.to(dtype))


def test_autocast_gives_float32():
    logits, target = reals((4, 5), 1).bfloat16(), labels((4,), 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert label_smoothing_cross_entropy(logits, target).dtype == torch.float32


def test_infinite_logits_without_smoothing():
    """A class that is ruled out costs nothing where it has no share of the target."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]]).requires_grad_()
    loss = label_smoothing_cross_entropy(logits, torch.tensor([1]), label_smoothing=0.0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), F.cross_entropy(logits.detach(), torch.tensor([1])))
    assert torch.equal(logits.grad[0, 2], torch.tensor(0.0))
    assert label_smoothing_cross_entropy(logits, torch.tensor([1])).isinf()


# ---- what it refuses ----

LOGITS, TARGET = torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        (LOGITS, TARGET, {"label_smoothing": 1.5}, ValueError, "from 0 to 1, got 1.5"),
        (LOGITS, TARGET, {"reduction": "max"}, ValueError, "'mean', 'sum' or 'none', got 'max'"),
        (LOGITS.long(), TARGET, {}, ValueError, "floating point, got \\[2, 3\\] int64"),
        (LOGITS.sum(), TARGET[0], {}, ValueError, "logits must be"),
        (LOGITS, LOGITS, {}, TypeError, "class indices, got \\[2, 3\\] float32"),
        (LOGITS, TARGET[:1], {}, ValueError, "target must be \\[2\\] for logits \\[2, 3\\], got \\[1\\]"),
        (LOGITS[:, :0], TARGET, {}, ValueError, "no classes"),
        (LOGITS, TARGET, {"weight": torch.ones(2)}, ValueError, "weight must be \\[3\\]"),
        (LOGITS, TARGET, {"weight": torch.ones(3).requires_grad_()}, ValueError, "must not require"),
        (LOGITS, torch.tensor([0, 3]), {}, IndexError, "target 3 is not a class from 0 to 2"),
        (LOGITS, torch.tensor([0, -1]), {}, IndexError, "target -1 is not a class from 0 to 2"),
    ],
)
def test_refusals_say_what_came(logits, target, options, error, message):
    with pytest.raises(error, match=message):
        label_smoothing_cross_entropy(logits, target, **options)


def test_module_is_the_function_and_its_weight_moves():
    logits, target, weight = reals((4, 5), 1), labels((4,), 5, 2), torch.rand(5)
    module = LabelSmoothingCrossEntropy(0.2, weight=weight, ignore_index=1, reduction="sum")
    expected = label_smoothing_cross_entropy(
        logits, target, label_smoothing=0.2, weight=weight, ignore_index=1, reduction="sum"
    )
    assert torch.equal(module(logits, target), expected)
    assert module.double().weight.dtype == torch.float64
    assert "label_smoothing=0.2" in repr(module)
    with pytest.raises(ValueError, match="from 0 to 1"):
        LabelSmoothingCrossEntropy(-0.1)


# ---- auxiliary classifiers ----


def test_googlenets_heads_count_three_tenths_each():
    main, aux2, aux1 = (reals((4, 5), seed) for seed in range(3))
    target = labels((4,), 5, 9)
    loss = auxiliary_loss(GoogLeNetOutputs(main, aux2, aux1), target)
    each = [F.cross_entropy(x, target) for x in (main, aux2, aux1)]
    torch.testing.assert_close(loss, each[0] + 0.3 * each[1] + 0.3 * each[2])
    assert GOOGLENET_AUX_WEIGHT == 0.3


def test_inception_v3s_head_counts_four_tenths_and_is_smoothed_too():
    main, aux = reals((4, 5), 1), reals((4, 5), 2)
    target = labels((4,), 5, 9)
    loss = auxiliary_loss(InceptionOutputs(main, aux), target, label_smoothing=0.1)
    each = [F.cross_entropy(x, target, label_smoothing=0.1) for x in (main, aux)]
    torch.testing.assert_close(loss, each[0] + 0.4 * each[1])
    assert INCEPTION_V3_AUX_WEIGHT == 0.4


def test_every_head_gets_its_gradient():
    outputs = GoogLeNetOutputs(*(reals((2, 3), seed).requires_grad_() for seed in range(3)))
    auxiliary_loss(outputs, TARGET).backward()
    for scale, head in zip((1.0, 0.3, 0.3), outputs):
        expected = (head.detach().softmax(1) - F.one_hot(TARGET, 3)) / 2
        torch.testing.assert_close(head.grad, scale * expected)


def test_absent_heads_and_plain_tensors_have_the_main_loss():
    main = reals((2, 3), 1)
    expected = F.cross_entropy(main, TARGET)
    torch.testing.assert_close(auxiliary_loss(main, TARGET), expected)
    torch.testing.assert_close(auxiliary_loss(GoogLeNetOutputs(main, None, None), TARGET), expected)
    torch.testing.assert_close(auxiliary_loss(InceptionOutputs(main, None), TARGET), expected)


def test_other_weights_and_criteria():
    main, aux = reals((2, 3), 1), reals((2, 3), 2)
    loss = auxiliary_loss((main, aux), TARGET, aux_weight=0.5, criterion=F.multi_margin_loss)
    each = [F.multi_margin_loss(x, TARGET) for x in (main, aux)]
    torch.testing.assert_close(loss, each[0] + 0.5 * each[1])


@pytest.mark.parametrize(
    ("outputs", "options", "error", "message"),
    [
        ((LOGITS, LOGITS), {}, ValueError, "pass aux_weight"),
        ([LOGITS, LOGITS], {}, TypeError, "a tensor or a tuple"),
        ((None, LOGITS), {"aux_weight": 0.3}, TypeError, "a tensor or a tuple that starts with one"),
        ((LOGITS, 3), {"aux_weight": 0.3}, TypeError, "tensors or None"),
        (LOGITS, {"criterion": F.cross_entropy, "label_smoothing": 0.1}, ValueError, "or a criterion"),
    ],
)
def test_auxiliary_loss_refuses(outputs, options, error, message):
    with pytest.raises(error, match=message):
        auxiliary_loss(outputs, TARGET, **options)


@pytest.mark.parametrize(
    ("name", "size", "scales"),
    [
        ("googlenet", 64, (1.0, 0.3, 0.3)),
        pytest.param("googlenet_2014", 224, (1.0, 0.3, 0.3), marks=pytest.mark.slow),
        pytest.param("inception_v3", 299, (1.0, 0.4), marks=pytest.mark.slow),
    ],
)
def test_outputs_of_the_models(name, size, scales):
    model = fb.create_model(name, num_classes=10)
    x, target = reals((2, 3, size, size), 1), labels((2,), 10, 2)
    outputs = model.train()(x)
    expected = sum(scale * F.cross_entropy(head, target) for scale, head in zip(scales, outputs, strict=True))
    torch.testing.assert_close(auxiliary_loss(outputs, target), expected)
    with torch.no_grad():
        plain = model.eval()(x)
    torch.testing.assert_close(auxiliary_loss(plain, target), F.cross_entropy(plain, target))
