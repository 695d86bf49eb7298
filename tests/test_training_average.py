"""The running average of weights: its values, and that a model gets its own weights back."""

import copy

import pytest
import torch
from helpers import needs_native, reals
from torch import nn

import fast_backbones as fb
from fast_backbones import engine
from fast_backbones.training import ExponentialMovingAverage


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def disturb(model: nn.Module, seed: int) -> None:
    """Other weights, and other statistics."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(reals(p.shape, seed + i, dtype=p.dtype))
    model.train()
    model(reals((4, 1, 4, 4), seed, dtype=next(model.parameters()).dtype))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_averages_parameters_and_copies_buffers():
    model = small_net().double()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = ExponentialMovingAverage(model, 0.9)
    for step in range(5):
        disturb(model, 10 * step)
        average.update()
        for name, p in model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach()
    for name, tensor in expected.items():
        torch.testing.assert_close(average.average[name], tensor, rtol=1e-13, atol=1e-13)
    for name, buffer in model.named_buffers():
        assert torch.equal(average.average[name], buffer)
    assert average.average["1.num_batches_tracked"] == 5
    assert average.updates == 5


def test_the_papers_decay_is_the_default():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = ExponentialMovingAverage(model)
    nn.init.ones_(model.weight)
    average.update()
    assert average.average["weight"].item() == pytest.approx(1e-4, rel=1e-6)


def test_warmup_starts_with_short_averages():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = ExponentialMovingAverage(model, 0.9999, warmup=True)
    nn.init.ones_(model.weight)
    average.update()  # decay 1/10
    assert average.average["weight"].item() == pytest.approx(0.9)
    average.update()  # decay 2/11
    assert average.average["weight"].item() == pytest.approx(1 - 0.1 * 2 / 11)


def test_narrow_parameters_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    average = ExponentialMovingAverage(model, 0.9999)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        average.update()
    assert average.average["weight"].dtype == torch.float32
    assert average.average["weight"].item() == pytest.approx(2 - 0.9999**100, rel=1e-4)
    with average.applied():
        assert model.weight.dtype == torch.bfloat16


def test_applied_swaps_and_gives_back_to_the_bit():
    model = small_net()
    average = ExponentialMovingAverage(model, 0.5)
    disturb(model, 1)
    average.update()
    disturb(model, 2)
    own, parameters = values(model), list(model.parameters())
    with average.applied() as inside:
        assert inside is model
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, average.average[name])
            assert not torch.equal(tensor, own[name])
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters()))


def test_applied_gives_back_after_an_exception():
    model = small_net()
    average = ExponentialMovingAverage(model, 0.5)
    disturb(model, 1)
    own = values(model)
    with pytest.raises(ZeroDivisionError), average.applied():
        1 / 0  # noqa: B018
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    with average.applied():  # and can be entered again
        pass


def test_no_update_and_no_second_swap_inside():
    average = ExponentialMovingAverage(small_net())
    with average.applied():
        with pytest.raises(RuntimeError, match="holds the average"):
            average.update()
        with pytest.raises(RuntimeError, match="already holds"), average.applied():
            pass


def test_training_goes_on_through_the_averages():
    """Averages have no graph, and taking them between backward and step disturbs nothing."""
    model = small_net()
    average = ExponentialMovingAverage(model)
    model(reals((4, 1, 4, 4), 1)).sum().backward()
    average.update()
    assert not any(tensor.requires_grad for tensor in average.average.values())
    assert all(p.grad is not None for p in model.parameters())


def test_copy_to_another_model():
    model = small_net()
    average = ExponentialMovingAverage(model, 0.5)
    disturb(model, 1)
    average.update()
    other = small_net()
    average.copy_to(other)
    assert all(torch.equal(t, average.average[n]) for n, t in other.state_dict().items())


def test_continues_from_its_state_dict(tmp_path):
    model = small_net()
    average = ExponentialMovingAverage(model, 0.75, warmup=True)
    disturb(model, 1)
    average.update()
    torch.save(average.state_dict(), tmp_path / "average.pth")
    resumed = ExponentialMovingAverage(copy.deepcopy(model), 0.1)
    resumed.load_state_dict(torch.load(tmp_path / "average.pth", weights_only=True))
    resumed.model = model
    disturb(model, 2)
    average.update()
    resumed.update()
    assert resumed.updates == 2
    assert all(torch.equal(average.average[n], t) for n, t in resumed.average.items())


def test_a_broken_state_dict_changes_nothing():
    average = ExponentialMovingAverage(small_net(), 0.5)
    before = average.state_dict()
    broken = ExponentialMovingAverage(small_net(), 0.75).state_dict()
    del broken["updates"]
    with pytest.raises(KeyError, match="updates"):
        average.load_state_dict(broken)
    assert average.decay == 0.5
    assert all(torch.equal(t, average.average[n]) for n, t in before["average"].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_may_move_and_its_averages_stay():
    model = small_net()
    average, start = ExponentialMovingAverage(model, 0.5), values(model)
    model.cuda()
    average.update()
    assert all(t.device.type == "cpu" for t in average.average.values())
    assert all(torch.equal(t, start[n]) for n, t in average.average.items())
    with average.applied():
        assert model[0].weight.is_cuda


def test_a_checkpoint_of_the_averages_is_the_state_dict_inside():
    """Shared parameters and buffers that are not persistent, as the 1998 LeNet has them."""
    model = fb.lenet5_1998()
    average = ExponentialMovingAverage(model, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update()
    with average.applied():
        saved = values(model)
    other = fb.lenet5_1998()
    other.load_state_dict(saved)
    assert all(torch.equal(p, average.average[n]) for n, p in other.named_parameters())


def test_a_state_dict_is_a_copy():
    model = small_net()
    average = ExponentialMovingAverage(model, 0.5)
    saved = average.state_dict()["average"]["0.weight"]
    before = saved.clone()
    disturb(model, 1)
    average.update()
    assert torch.equal(saved, before)


def test_other_models_are_refused_and_change_nothing():
    average = ExponentialMovingAverage(small_net())
    before = average.state_dict()
    with pytest.raises(RuntimeError, match=r"differ in 0\.bias"):
        average.load_state_dict(ExponentialMovingAverage(nn.Linear(2, 2)).state_dict())
    wide = ExponentialMovingAverage(nn.Sequential(nn.Conv2d(1, 3, 3), *list(small_net())[1:]))
    with pytest.raises(RuntimeError, match=r"0\.weight is \[3, 1, 3, 3\] in the state dict, \[2, 1, 3, 3\]"):
        average.load_state_dict(wide.state_dict())
    with pytest.raises(RuntimeError, match="differ in"):
        average.copy_to(nn.Linear(2, 2))
    assert all(torch.equal(t, average.average[n]) for n, t in before["average"].items())
    average.model[4] = nn.Identity()
    with pytest.raises(RuntimeError, match=r"differ in 4\.bias"):
        average.update()


def test_decay_out_of_range():
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="decay must be in"):
            ExponentialMovingAverage(nn.Linear(1, 1), decay)


@needs_native
def test_the_engine_sees_every_swap():
    """A plan made from the model's own weights is not used for the averages, nor the other way round."""
    model = fb.resnet18(num_classes=10).eval()
    average = ExponentialMovingAverage(model, 0.5)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.mul_(1 + 0.1 * reals(p.shape, i))
    x = reals((1, 3, 64, 64), 1)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            assert engine.why_not(model, x) is None
            return model(x), model.forward_modules(x)

    fused, plain = both()
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3)
    with average.applied():
        inside, plain_inside = both()
    torch.testing.assert_close(inside, plain_inside, rtol=1e-3, atol=1e-3)
    assert (inside - fused).abs().max() > 0.01
    assert torch.equal(both()[0], fused)
