"""RMSPropTF against its recurrence, written once more in numpy, and against PyTorch's RMSprop."""

import copy

import numpy as np
import pytest
import torch
from helpers import reals
from torch import nn

from fast_backbones.training import RMSPropTF

STEPS = 7


def recurrence(p, gradients, *, lr, alpha, eps, momentum, decay) -> np.ndarray:
    """The formula, element by element in float64; `lr` is a list, one for each step."""
    p = p.astype(np.float64).copy()
    square, move = np.ones_like(p), np.zeros_like(p)
    for rate, g in zip(lr, gradients):
        g = g.astype(np.float64) + decay * p
        square = alpha * square + (1 - alpha) * g**2
        move = momentum * move + rate * g / np.sqrt(square + eps)
        p = p - move
    return p


def trained(optimizer, parameter, gradients, rates) -> np.ndarray:
    for rate, gradient in zip(rates, gradients):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach().numpy()


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("eps", [1.0, 1e-3])
def test_follows_the_recurrence(eps, momentum, decay):
    parameter = nn.Parameter(reals((5, 7), 1, dtype=torch.float64))
    start = parameter.detach().numpy().copy()
    gradients = [reals((5, 7), 10 + i, dtype=torch.float64) for i in range(STEPS)]
    rates = [0.045 * 0.94 ** (i // 2) for i in range(STEPS)]
    optimizer = RMSPropTF([parameter], 0.045, eps=eps, momentum=momentum, weight_decay=decay)
    result = trained(optimizer, parameter, gradients, rates)
    expected = recurrence(
        start, [g.numpy() for g in gradients], lr=rates, alpha=0.9, eps=eps, momentum=momentum, decay=decay
    )
    np.testing.assert_allclose(result, expected, rtol=1e-13, atol=1e-13)
    assert ("momentum_buffer" in optimizer.state[parameter]) == (momentum > 0)


def test_float32_stays_near_the_recurrence():
    parameter = nn.Parameter(reals((64, 64), 1))
    start = parameter.detach().numpy().copy()
    gradients = [reals((64, 64), 10 + i) for i in range(STEPS)]
    result = trained(RMSPropTF([parameter]), parameter, gradients, [0.045] * STEPS)
    expected = recurrence(
        start, [g.numpy() for g in gradients], lr=[0.045] * STEPS, alpha=0.9, eps=1.0, momentum=0.9, decay=0.0
    )
    np.testing.assert_allclose(result, expected, rtol=0, atol=STEPS * np.finfo(np.float32).eps * 4)


def test_first_step_by_hand():
    """g = 2: ms = 0.9 + 0.1 * 4 = 1.3, p = 1 - 0.5 * 2 / sqrt(1.3 + 1)."""
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    parameter.grad = torch.tensor([2.0], dtype=torch.float64)
    RMSPropTF([parameter], 0.5).step()
    assert parameter.item() == pytest.approx(1 - 0.5 * 2 / 2.3**0.5, rel=1e-15)


def one_step(kind, **options) -> float:
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    parameter.grad = torch.tensor([2.0], dtype=torch.float64)
    kind([parameter], 0.5, alpha=0.9, momentum=0.9, **options).step()
    return 1.0 - parameter.item()


def test_differs_from_pytorchs_where_the_formulas_do():
    theirs, ours = one_step(torch.optim.RMSprop, eps=1.0), one_step(RMSPropTF, eps=1.0)
    assert theirs == pytest.approx(0.5 * 2 / (0.4**0.5 + 1), rel=1e-12)  # ms from 0, eps outside the root
    assert ours == pytest.approx(0.5 * 2 / (1.3 + 1) ** 0.5, rel=1e-12)


def test_agrees_with_pytorchs_once_the_start_is_forgotten():
    """With eps 0, equal rates and after many steps the two formulas are one."""
    ours, theirs = (nn.Parameter(torch.zeros(100, dtype=torch.float64)) for _ in range(2))
    mine = RMSPropTF([ours], 0.01, eps=0.0, momentum=0.0)
    other = torch.optim.RMSprop([theirs], 0.01, alpha=0.9, eps=0.0)
    for step in range(400):
        ours.grad = theirs.grad = reals((100,), step, dtype=torch.float64)
        before = ours.detach().clone(), theirs.detach().clone()
        mine.step()
        other.step()
    moves = [p.detach() - b for p, b in zip((ours, theirs), before)]
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-8, atol=0)


def test_the_rate_is_inside_the_momentum():
    """Half the rate halves the new part of the buffer only; PyTorch's would halve the old part too."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = RMSPropTF([parameter], 1.0)
    parameter.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    first = -parameter.item()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert -parameter.item() - first == pytest.approx(0.9 * first, rel=1e-15)


# ---- what an optimizer must do ----


def test_groups_have_their_own_options():
    fast, slow, frozen = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    groups = [{"params": [fast], "lr": 1.0}, {"params": [slow, frozen], "momentum": 0.0}]
    optimizer = RMSPropTF(groups, 0.1)
    fast.grad, slow.grad = torch.ones(3), torch.ones(3)  # frozen has none
    optimizer.step()
    torch.testing.assert_close(fast.detach(), 10 * slow.detach())
    assert torch.equal(frozen.detach(), torch.zeros(3)) and frozen not in optimizer.state
    assert "momentum_buffer" not in optimizer.state[slow]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_continues_from_its_state_dict(momentum, tmp_path):
    first = nn.Linear(4, 3)
    optimizer = RMSPropTF(first.parameters(), momentum=momentum, weight_decay=0.01)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            model(reals((8, 4), seed)).square().sum().backward()
            optimizer.step()

    steps(first, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pth")
    second = copy.deepcopy(first)
    resumed = RMSPropTF(second.parameters(), lr=7.0)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pth", weights_only=True))
    steps(first, optimizer, range(3, 6))
    steps(second, resumed, range(3, 6))
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_closure_is_called_with_gradients_and_its_loss_returned():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = RMSPropTF([parameter])

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (parameter < 1).all()
    assert optimizer.step() is None


def test_keeps_the_layout_of_its_parameter():
    parameter = nn.Parameter(reals((4, 3, 2, 2), 1).contiguous(memory_format=torch.channels_last))
    parameter.grad = torch.ones_like(parameter)
    optimizer = RMSPropTF([parameter])
    optimizer.step()
    for tensor in optimizer.state[parameter].values():
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.requires_grad


def test_a_tensor_as_rate():
    plain, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    plain.grad = other.grad = torch.full((3,), 2.0)
    RMSPropTF([plain], 0.25).step()
    RMSPropTF([other], torch.tensor(0.25)).step()
    assert torch.equal(plain, other)


def test_sparse_gradients_are_refused_before_anything_moves():
    table, dense = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3))
    optimizer = RMSPropTF([dense, table.weight])
    table(torch.tensor([1, 2])).sum().backward()
    dense.grad = torch.ones(3)
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not take sparse gradients"):
        optimizer.step()
    assert torch.equal(before, table.weight) and torch.equal(dense, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize(
    "options",
    [{"lr": -1}, {"alpha": 1.5}, {"eps": -1e-3}, {"momentum": 1.0}, {"weight_decay": -1.0}],
    ids=lambda o: next(iter(o)),
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is out of range"):
        RMSPropTF([nn.Parameter(torch.zeros(1))], **options)
    with pytest.raises(ValueError, match="is out of range"):
        RMSPropTF([{"params": [nn.Parameter(torch.zeros(1))], **options}])


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="real parameters"):
        RMSPropTF([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
