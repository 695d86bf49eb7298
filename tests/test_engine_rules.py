"""When a plan must not be used and the modules run instead: one test a rule."""

import warnings

import pytest
import torch
from engine_nets import Tap, Tiny, assert_current, assert_planned
from fast_backbones.engine.state import EngineState
from helpers import assert_bit_equal, needs_native
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fast_backbones as fb
from fast_backbones import engine
from fast_backbones.engine import rules, state

pytestmark = needs_native


def assert_refused(model, x, words):
    assert words in (engine.why_not(model, x) or "a plan is used")
    before = EngineState.of(model).runners.copy()
    model(x)
    assert EngineState.of(model).runners == before


def test_training_mode(model, x):
    assert_refused(model.train(), x, "training mode")


def test_an_inner_module_in_training_mode(model, x):
    model.bn.train()
    with torch.no_grad():
        assert_refused(model, x, "bn is in training mode")


def test_grad_enabled_and_parameters_require_it(model, x):
    assert_refused(model, x, "grad is enabled")
    assert model(x).grad_fn is not None


def test_grad_enabled_after_a_plan_was_made(model, x):
    assert_planned(model, x)
    model(x).sum().backward()
    assert model.conv.weight.grad is not None


def test_grad_enabled_and_nobody_wants_it(model, x):
    model.requires_grad_(False)
    assert engine.why_not(model, x) is None
    assert model(x).grad_fn is None


def test_the_input_requires_grad(model, x):
    assert_refused(model.requires_grad_(False), x.requires_grad_(), "input requires grad")
    assert model(x).grad_fn is not None
    with torch.no_grad():
        assert engine.why_not(model, x) is None


def test_inference_mode(model, x):
    with torch.inference_mode():
        assert engine.why_not(model, x) is None
        assert model(x).is_inference()
        first = model(x)
    with torch.no_grad():
        assert_bit_equal(model(x), first)
        assert not model(x).is_inference()


@torch.no_grad()
def test_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        assert_refused(model, x, "autocast")
        assert model(x).dtype is torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        assert engine.why_not(model, x) is None


@torch.no_grad()
def test_reference_backend(model, x):
    with fb.backend("reference"):
        assert_refused(model, x, "'reference'")
    assert engine.why_not(model, x) is None


@torch.no_grad()
def test_absent_library(model, x, monkeypatch):
    monkeypatch.setattr(rules._ext, "native", lambda: None)
    monkeypatch.setattr(rules._ext, "why_not", lambda: "never built")
    assert_refused(model, x, "native library is absent: never built")
    assert_current(model, x)


@torch.no_grad()
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_inner_modules(model, x, register):
    assert_planned(model, x)
    calls = []
    handle = getattr(model.body[0], register)(lambda *_: calls.append(1))
    assert_refused(model, x, "body.0 has forward hooks")
    assert calls
    handle.remove()
    assert_planned(model, x)


@torch.no_grad()
def test_hooks_on_the_root_run_around_the_plan(model, x):
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append("before"))
    model.register_forward_hook(lambda _, args, y: calls.append("after") or y + 1)
    plain = model.forward_modules(x)
    assert engine.why_not(model, x) is None and not calls
    torch.testing.assert_close(model(x), plain + 1)
    assert calls == ["before", "after"]


@torch.no_grad()
def test_global_hooks(model, x):
    assert_planned(model, x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert_refused(model, x, "global module hooks")
    finally:
        handle.remove()
    assert model.bn in seen
    assert_planned(model, x)


@torch.no_grad()
def test_forward_of_an_inner_instance(model, x):
    assert_planned(model, x)
    model.relu.forward = torch.tanh
    assert_refused(model, x, "relu has a forward of its own")
    assert_current(model, x)


@torch.no_grad()
def test_parametrized_weights(model, x):
    assert_planned(model, x)
    nn.utils.parametrizations.weight_norm(model.conv)
    assert_refused(model, x, "conv is parametrized")
    assert_current(model, x)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_by_hook(model, x):
    assert_planned(model, x)
    nn.utils.weight_norm(model.fc)
    with torch.no_grad():
        assert_refused(model, x, "fc has forward hooks")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(model, x, dtype):
    assert_planned(model, x)
    assert_refused(model.to(dtype), x.to(dtype), f"the input is {dtype}")
    assert model(x.to(dtype)).dtype is dtype
    assert_planned(model.to(torch.float32), x)


@torch.no_grad()
def test_one_parameter_of_another_dtype(model, x):
    model.fc.double()
    assert "fc.weight is torch.float64" in engine.why_not(model, x)


@torch.no_grad()
def test_parameters_on_another_device(model, x):
    model.fc.to("meta")
    assert "fc.weight is on meta" in engine.why_not(model, x)


def test_parameters_born_in_inference_mode(x):
    with torch.inference_mode():
        model = Tiny().eval()
        assert_refused(model, x, "inference tensor")


@torch.no_grad()
def test_subclass_parameters(model, x):
    class Special(nn.Parameter):
        pass

    model.fc.weight = Special(model.fc.weight.detach())
    assert_refused(model, x, "fc.weight is a Special")


@torch.no_grad()
def test_lazy_and_compiled_modules(model, x):
    model.body.compile(backend="eager")
    assert "body is compiled" in engine.why_not(model, x)


@torch.no_grad()
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda x: x[0], "3 dimensions"),
        (lambda x: x[:0], "empty"),
        (lambda x: nn.Parameter(x), "Parameter"),
        (lambda x: torch._neg_view(x), "negated"),
    ],
    ids=["unbatched", "batch 0", "a parameter", "a negated view"],
)
def test_inputs_for_the_modules(x, make, words):
    model = Tap().eval()
    model.bn = nn.Identity()
    x = make(x)
    assert_refused(model, x, words)
    torch.testing.assert_close(model(x), model.forward_modules(x))


@torch.no_grad()
def test_wrong_inputs_fail_as_in_pytorch(model):
    for bad in (torch.randn(2, 4, 9, 7), torch.randn(2, 3), torch.randint(0, 9, (2, 3, 9, 7))):
        with pytest.raises(RuntimeError) as plain:
            model.forward_modules(bad)
        with pytest.raises(RuntimeError) as ours, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(bad)
        assert str(ours.value) == str(plain.value)


@torch.no_grad()
def test_modes_and_transforms(model, x):
    assert_planned(model, x)

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Count() as count:
        model(x)
    assert count.calls > 5, "a dispatch mode sees the modules' operations"
    with Watch():
        assert "TorchFunctionMode" in engine.why_not(model, x)
    with torch.device("cpu"):
        assert engine.why_not(model, x) is None
    plain = model.forward_modules(x)
    each = torch.func.vmap(lambda image: model(image[None])[0])(x)
    torch.testing.assert_close(each, plain, rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in engine.why_not(model, x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert type(model(mode.from_tensor(x))).__name__ == "FakeTensor"


def test_forward_mode_derivative(model, x):
    tangent = torch.randn_like(x)
    _, ours = torch.func.jvp(model, (x,), (tangent,))
    _, plain = torch.func.jvp(model.forward_modules, (x,), (tangent,))
    torch.testing.assert_close(ours, plain)


@torch.no_grad()
def test_a_new_layer_may_be_in_training_mode_where_that_means_nothing(model, x):
    """model.fc = nn.Linear(...) after eval() is the usual way to a new classifier."""
    assert_planned(model, x)
    model.fc = nn.Linear(16, 3)
    model.conv = nn.Conv2d(3, 16, 3, padding=1)
    assert_planned(model, x)
    model.body.append(nn.Dropout())
    assert_refused(model, x, "body.2 is in training mode")


@torch.no_grad()
def test_tracers_see_the_modules(model, x):
    plain = model.forward_modules(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), plain)
    program = torch.export.export(model, (x,))
    assert "aten.conv2d.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), plain)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain)


@torch.no_grad()
def test_what_cannot_be_captured_runs_its_modules_and_warns_once(x):
    class Branch(Tiny):
        def forward_modules(self, x):
            return super().forward_modules(x if x.mean() > 0 else -x)

    model = Branch().eval()
    with pytest.warns(UserWarning, match="Branch runs its modules, without a plan: the forward asks"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_current(model, x)
        assert_current(model, x[:1])
    assert engine.why_not(model, x).startswith("the forward asks for values of tensors")
    for width in range(4, 12):
        assert_current(model, torch.randn(1, 3, 5, width))
    assert EngineState.of(model).captures == state.MAX_FAILURES, "it is the model, not the shape"
    with pytest.raises(RuntimeError, match="there is no plan: the forward asks"):
        engine.plan_for(model, x)
    assert "no plan: the forward asks" in str(engine.explain(model, x))
