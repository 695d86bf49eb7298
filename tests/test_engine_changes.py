"""What changes in a model must show in its next call, whatever plan there is.

A stale plan is the worst bug this library can have: most tests use a plan, change the model in some way, and
compare the next call with the model's own modules.
"""

import copy
import gc

import numpy as np
import pytest
import torch
from engine_nets import Tap, Tiny, assert_current, assert_planned
from fast_backbones.engine.state import EngineState
from helpers import needs_native
from torch import nn

from fast_backbones import engine
from fast_backbones.engine import guard

pytestmark = needs_native


def in_place(model):
    with torch.no_grad():
        model.conv.weight.mul_(2)


def load_state_dict(model):
    model.load_state_dict({k: v + 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def load_and_assign(model):
    load = {k: v + 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(load, assign=True)


def data_copy(model):
    model.fc.weight.data.copy_(torch.randn(5, 16))


def numpy_view(model):
    model.fc.bias.detach().numpy()[:] = np.arange(5)


def step(optimizer, **options):
    def change(model):
        model.train()
        loss = model(torch.randn(4, 3, 9, 7)).square().sum()
        loss.backward()
        optimizer(model.parameters(), lr=0.1, **options).step()
        model.eval()

    return change


def statistics(model):
    model.bn.train()
    model.bn(torch.randn(4, 16, 5, 5) + 3)
    model.bn.eval()


def running_var(model):
    model.bn.running_var.fill_(4.0)


def replace_buffer(model):
    model.bn.running_mean = torch.full((16,), 0.7)


def set_data(model):
    model.conv.weight.data = torch.randn(16, 3, 3, 3)


def replace_parameter(model):
    model.conv.weight = nn.Parameter(torch.randn(16, 3, 3, 3))


def replace_module(model):
    model.body[0] = nn.Conv2d(16, 16, 3, padding=1)


def append_module(model):
    model.body.append(nn.Sigmoid())


def other_activation(model):
    model.relu = nn.Identity()


def attribute(model):
    model.conv.stride = (2, 2)


def epsilon(model):
    model.bn.eps = 0.5


def delete_and_add(model):
    del model.bn.eps
    model.bn.momentum_of_old = 1
    model.bn.eps = 0.25


def list_of_attributes(model):
    model.scales.append(-0.5)


def round_trip(model):
    model.double().float()
    model.conv.weight.data.mul_(1.5)


def channels_last(model):
    model.to(memory_format=torch.channels_last)


def shared_memory(model):
    model.share_memory()
    model.fc.weight.data.add_(1)


def swap_modules(model):
    first = model.body[0]
    model.body[0] = copy.deepcopy(first)
    nn.init.ones_(model.body[0].weight)


def reset(model):
    model.fc.reset_parameters()


def train_and_eval(model):
    model.train()
    model(torch.randn(4, 3, 9, 7))
    model.eval()


CHANGES = {
    "weight changed in place": in_place,
    "load_state_dict": load_state_dict,
    "load_state_dict(assign=True)": load_and_assign,
    "p.data.copy_()": data_copy,
    "numpy view": numpy_view,
    "SGD": step(torch.optim.SGD),
    "SGD, foreach": step(torch.optim.SGD, foreach=True),
    "SGD, fused": step(torch.optim.SGD, fused=True),
    "Adam, fused": step(torch.optim.Adam, fused=True),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "statistics of a norm in training": statistics,
    "a running variance in place": running_var,
    "buffer replaced": replace_buffer,
    "p.data = t": set_data,
    "parameter replaced": replace_parameter,
    "module replaced": replace_module,
    "module appended": append_module,
    "activation replaced": other_activation,
    "stride changed": attribute,
    "epsilon changed": epsilon,
    "an attribute deleted, others added": delete_and_add,
    "an element of a list": list_of_attributes,
    ".double().float()": round_trip,
    "channels_last weights": channels_last,
    "shared memory": shared_memory,
    "a copy in place of a module": swap_modules,
    "reset_parameters": reset,
    "train() and eval()": train_and_eval,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_model(model, x, change):
    assert_planned(model, x)
    assert EngineState.of(model).runners.shortcut is not None
    with torch.no_grad():
        before = model(x)
    change(model)
    assert_current(model, x)
    assert_planned(model, x)
    with torch.no_grad():
        moved = not torch.equal(model(x), before)
    assert moved or change is channels_last, "this change was to change the result"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_step_of_an_optimizer_that_is_gone(model, x, optimizer):
    assert_planned(model, x)
    step(optimizer, fused=True)(model)
    gc.collect()
    assert_planned(model, x)


def test_value_changes_keep_the_plan_and_structure_changes_make_a_new_one(model, x):
    with torch.no_grad():
        plan = engine.plan_for(model, x)
        in_place(model)
        assert engine.plan_for(model, x) is plan, "new numbers, same steps: no second capture"
        replace_module(model)
        assert engine.plan_for(model, x) is not plan


def test_other_peoples_optimizers_leave_a_plan_alone(model, x):
    """The teacher of a distillation is not packed again at each step of its student."""
    assert_planned(model, x)
    owner = EngineState.of(model)
    store = owner.store
    student = Tiny()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        student(x).sum().backward()
        optimizer.step()
        assert_planned(model, x)
        assert owner.store is store


def test_optimizer_steps_are_attributed():
    steps = guard.OptimizerSteps()
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    steps._stepped(optimizer, (), {})
    assert steps.touched(frozenset([id(parameter)]), since=0)
    assert not steps.touched(frozenset([id(parameter)]), since=steps.epoch)
    assert not steps.touched(frozenset([1]), since=0)
    del optimizer
    gc.collect()
    assert steps.touched(frozenset([1]), since=0), "nobody knows any more whose parameters it held"


def test_a_single_value_far_from_the_samples_needs_refresh(model, x, monkeypatch):
    """What sampling cannot see, refresh() forgets, and FB_WEIGHT_SAMPLES=full sees."""
    assert_planned(model, x)
    model.conv.weight.detach().numpy()[7, 1, 2, 0] += 100.0
    engine.refresh(model)
    assert_planned(model, x)
    monkeypatch.setenv("FB_WEIGHT_SAMPLES", "full")
    engine.refresh(model)
    assert_planned(model, x)
    model.conv.weight.detach().numpy()[7, 1, 2, 0] -= 50.0
    assert_planned(model, x)


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_bad_number_of_samples(text, monkeypatch):
    monkeypatch.setenv("FB_WEIGHT_SAMPLES", text)
    with pytest.raises(ValueError, match="FB_WEIGHT_SAMPLES"):
        guard.samples_per_tensor()


def test_class_forward_replaced(model, x, monkeypatch):
    assert_planned(model, x)
    monkeypatch.setattr(
        nn.Conv2d, "forward", lambda self, x: self._conv_forward(x, self.weight * 2, self.bias)
    )
    assert_current(model, x)


def test_method_of_a_users_class_replaced(x, monkeypatch):
    class Helper(Tiny):
        def head(self, x):
            return self.fc(x)

        def forward_modules(self, x):
            return self.head(self.relu(self.bn(self.conv(x))).mean((2, 3)))

    model = Helper().eval()
    assert_planned(model, x)
    monkeypatch.setattr(Helper, "head", lambda self, x: self.fc(x) * 2)
    assert_current(model, x)
    assert_planned(model, x)


def test_data_of_an_integer_buffer_replaced(x):
    class Gather(Tap):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", torch.arange(16))

        def forward_modules(self, x):
            return super().forward_modules(x)[:, self.order]

    model = Gather().eval()
    assert_planned(model, x)
    model.order.data = torch.arange(16).flip(0)
    assert_current(model, x)
    assert_planned(model, x)
    model.order.numpy()[:] = 3
    assert_current(model, x)
    assert_planned(model, x)


def test_strides_of_the_weights_decide_the_strides_of_the_result(x):
    """A channels_last convolution answers a contiguous image in channels_last, as in eager."""
    model = Tap().eval()
    with torch.no_grad():
        assert model(x).is_contiguous()
        model.to(memory_format=torch.channels_last)
        assert model(x).stride() == model.forward_modules(x).stride() != model(x).contiguous().stride()
        assert engine.why_not(model, x) is None
