"""The native step that takes a call like the last one from its conditions to its result."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from engine_nets import Tap, Tiny, assert_current, assert_planned
from fast_backbones.engine.state import EngineState
from helpers import assert_bit_equal, needs_native
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fast_backbones as fb
from fast_backbones import engine

pytestmark = needs_native


class Watch(TorchFunctionMode):
    """Lets everything pass, and says what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def taken(model, x, plain=None):
    """What the shortcut says to this call, None for the long way."""
    shortcut = EngineState.of(model).runners.shortcut
    return shortcut.call(model, x, plain or model.forward_modules)


@contextlib.contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def test_same_bits_as_the_long_way_in_memory_of_its_own(model, x):
    long_way = model(x)
    assert EngineState.of(model).runners.shortcut is not None
    first, second = taken(model, x), taken(model, x)
    assert_bit_equal(first, long_way)
    assert first.data_ptr() != second.data_ptr() and first.stride() == long_way.stride()
    other = torch.randn_like(x)
    (runner,) = EngineState.of(model).runners.values()
    assert_bit_equal(taken(model, other), runner(other))
    assert_bit_equal(first, long_way)


@pytest.mark.parametrize(
    "surroundings",
    [
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: fb.backend("reference"),
        lambda: precision("medium"),
        global_hook,
        TorchDispatchMode,
        Watch,
        torch.autograd.forward_ad.dual_level,
        engine.capture.plain_path,
    ],
    ids=["grad", "autocast", "backend", "precision", "hooks", "dispatch", "function", "dual", "capture"],
)
@torch.no_grad()
def test_other_surroundings_take_the_long_way(model, x, surroundings):
    model(x)
    assert taken(model, x) is not None
    with surroundings():
        assert taken(model, x) is None
    assert taken(model, x) is not None


@torch.no_grad()
def test_a_mode_of_torch_functions_does_not_see_the_questions(model, x):
    model(x)
    with Watch() as watch:
        assert taken(model, x) is None
    assert not watch.seen


@torch.no_grad()
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_trace_after_a_plan_was_made_sees_the_modules_alone(model, x):
    model(x)
    traced = torch.jit.trace(model, x)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("aten::_convolution") == 2 and not {"aten::size", "aten::eq", "aten::stride"} & {
        *kinds
    }
    torch.testing.assert_close(traced(x), model.forward_modules(x))


@torch.no_grad()
def test_transforms_after_a_plan_was_made(model, x):
    model(x)
    each = torch.func.vmap(lambda image: model(image[None])[0])(x)
    torch.testing.assert_close(each, model.forward_modules(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_interrupt_is_no_answer(model, x, monkeypatch):
    """Ctrl-C may arrive in a question that is asked in Python: it goes on to the caller."""
    from fast_backbones.engine import rules

    class Flag:
        raised = KeyboardInterrupt

        def get(self):
            raise self.raised

    model(x)
    monkeypatch.setitem(rules.capturing.__globals__, "_capturing", Flag())
    with pytest.raises(KeyboardInterrupt):
        taken(model, x)
    Flag.raised = LookupError
    assert taken(model, x) is None


@torch.no_grad()
def test_a_call_that_began_before_tuning_leaves_no_shortcut_of_its_plan(model, x, monkeypatch):
    model(x)
    state = EngineState.of(model)
    state.runners.shortcut = None
    (runner,) = state.runners.values()
    run = type(runner).__call__

    def tuned_meanwhile(self, *args):
        result = run(self, *args)
        state.runners = type(state.runners)()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(type(runner), "__call__", tuned_meanwhile)
        model(x)
    assert state.runners.shortcut is None
    model(x)
    assert state.runners.shortcut is not runner.shortcut


@torch.no_grad()
def test_other_inputs_take_the_long_way(model, x):
    model(x)
    assert taken(model, x.clone()) is not None
    inputs = {
        "batch": x[:1],
        "strides": x.contiguous(memory_format=torch.channels_last),
        "dtype": x.double(),
        "device": x.to("meta"),
        "sparse": x.to_sparse(),
        "negated view": torch._neg_view(x),
        "subclass": nn.Parameter(x),
        "list": [x],
        "nothing": None,
    }
    assert {name: taken(model, other) for name, other in inputs.items()} == dict.fromkeys(inputs)


@torch.no_grad()
def test_another_plain_forward_takes_the_long_way(model, x):
    model(x)
    assert taken(model, x, model.forward) is None
    assert taken(model, x, lambda image: image) is None


@torch.no_grad()
def test_another_model_takes_the_long_way(model, x):
    model(x)
    other = Tiny().eval()
    call = EngineState.of(model).runners.shortcut.call
    assert call(other, x, other.forward_modules) is None
    twin = copy.deepcopy(model)
    assert call(twin, x, twin.forward_modules) is None


@torch.no_grad()
def test_a_class_that_changes_and_changes_back(x, monkeypatch):
    """Python's number of a class version has gone for good; then the methods themselves are compared."""

    class Helper(Tiny):
        def forward_modules(self, x):
            return super().forward_modules(x) + 1

    model = Helper().eval()
    model(x)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", lambda self, x: self._conv_forward(x, 2 * self.weight, self.bias))
        assert taken(model, x) is None
        assert_current(model, x)
    assert_current(model, x)
    Helper.version = 2
    assert taken(model, x) is not None, "no method has changed"
    Helper.forward_modules = lambda self, x: Tiny.forward_modules(self, x) + 2
    assert_current(model, x)


@torch.no_grad()
@pytest.mark.parametrize("container", [[1.0, 2.0], {1.0, 2.0}], ids=["list", "set"])
def test_elements_of_containers(x, container):
    model = Tiny().eval()
    model.scales = container
    assert_planned(model, x)
    assert taken(model, x) is not None
    if isinstance(container, list):
        container[1] = 3.0
    else:
        container.remove(2.0)
    assert taken(model, x) is None
    assert_planned(model, x)


@torch.no_grad()
def test_results_that_are_not_one_fresh_tensor_have_no_shortcut(x):
    class Both(Tap):
        def forward_modules(self, x):
            return {"map": super().forward_modules(x)}

    model = Both().eval()
    for _ in range(3):
        torch.testing.assert_close(model(x)["map"], model.forward_modules(x)["map"])
    assert engine.why_not(model, x) is None and EngineState.of(model).runners.shortcut is None


@torch.no_grad()
def test_other_models_steps_are_no_obstacle_for_long(model, x):
    model(x)
    student = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    optimizer.step()
    assert taken(model, x) is None, "whose parameters it held has to be asked"
    assert_current(model, x)
    assert taken(model, x) is not None


@torch.no_grad()
def test_a_model_whose_child_knows_it_is_collected(x):
    model = Tiny().eval()
    model.body.__dict__["parent"] = model
    model(x)
    assert taken(model, x) is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_calls_by_the_shortcut_are_counted(model, x):
    model(x)
    before = EngineState.of(model).calls
    model(x)
    assert EngineState.of(model).calls == before + 1
