"""fb.optimize_ and fb.revert_: somebody else's model gets plans, in place, and nothing else changes."""

import copy
import inspect
import io
import pickle
import warnings
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_bit_equal, needs_native, run_python
from torch import Tensor, nn

import fast_backbones as fb
from fast_backbones import engine

pytestmark = needs_native
Pair = namedtuple("Pair", ["maps", "pooled"])


class Theirs(nn.Module):
    """What a user may have written."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, scale: float = 1.0, *, pooled: bool = True):
        """Their words."""
        y = F.silu(self.bn(self.conv(x))) * scale
        return self.head(y.mean((2, 3))) if pooled else y


class Nested(Theirs):
    def forward(self, batch):
        y = super().forward(batch["image"], pooled=False)
        return {"maps": [y, F.gelu(y)], "pair": Pair(y.relu(), y.mean((2, 3)))}


class Asking(Theirs):
    def forward(self, x):
        y = self.conv(x)
        return y if y.sum() > 0 else -y


class Two(Theirs):
    def forward(self, x, mask):
        return self.conv(x) * mask


def made(cls=Theirs, seed=0):
    torch.manual_seed(seed)
    model = cls().eval()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def image():
    return torch.randn(2, 3, 9, 8)


@torch.no_grad()
def test_results_are_those_of_the_modules_and_by_a_plan(image):
    model = made()
    plain = model(image)
    assert fb.optimize_(model) is model and fb.optimize_(model) is model
    torch.testing.assert_close(model(image), plain)
    assert engine.why_not(model, image) is None
    kernels = {step.kernel for step in engine.plan_for(model, image).steps}
    assert kernels == {"conv2d", "affine", "global_avg_pool", "linear"}


@torch.no_grad()
def test_all_else_stays_as_it_was(image):
    model, seen = made(), []
    model.note = "mine"
    model.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    signature, keys, text = inspect.signature(model.forward), list(model.state_dict()), repr(model)
    fb.optimize_(model)
    assert (
        isinstance(model, Theirs) and type(model).__name__ == "Theirs" and type(model).__module__ == __name__
    )
    assert inspect.signature(model.forward) == signature and model.forward.__doc__ == "Their words."
    assert list(model.state_dict()) == keys and repr(model) == text and model.note == "mine"
    model(image)
    assert seen == [(2, 5)] and engine.why_not(model, image) is None


@torch.no_grad()
def test_revert_gives_the_old_model_to_the_bit(image):
    model = made()
    plain, before = model(image), {k: t.clone() for k, t in model.state_dict().items()}
    fb.optimize_(model)(image)
    assert fb.revert_(model) is model and type(model) is Theirs and engine.guard.ATTRIBUTE not in vars(model)
    assert_bit_equal(model(image), plain)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert type(fb.revert_(model)) is Theirs


def test_a_class_that_came_later_is_not_thrown_away():
    model = fb.optimize_(made())
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(RuntimeError, match="given another class after optimize_"):
        fb.revert_(model)
    assert type(model).__name__ == "Wrapped"


@torch.no_grad()
def test_weights_may_change(image):
    model = fb.optimize_(made())
    model(image)
    other = made(seed=1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(image), other(image))


def test_train_and_gradients_run_the_modules(image):
    model, plain = fb.optimize_(made()), made()
    for one in (model.train(), plain.train()):
        one(image).sum().backward()
    assert_bit_equal(model.conv.weight.grad, plain.conv.weight.grad)
    assert_bit_equal(model.bn.running_mean, plain.bn.running_mean)
    assert_bit_equal(model.eval()(image), plain.eval()(image))  # gradients are on


@torch.no_grad()
def test_constants_of_a_call_belong_to_the_plan(image):
    model, plain = fb.optimize_(made()), made()
    for _ in range(2):
        for call in (
            lambda m: m(image, 2.0),
            lambda m: m(x=image, scale=0.5),
            lambda m: m(image, pooled=False),
            lambda m: m(image, 1, pooled=True),
            lambda m: m(image, True),
        ):
            torch.testing.assert_close(call(model), call(plain))
    assert vars(model)[engine.guard.ATTRIBUTE].captures == 5


@torch.no_grad()
def test_dicts_go_in_and_nested_results_come_out(image):
    model, plain = fb.optimize_(made(Nested)), made(Nested)
    for _ in range(2):
        ours, theirs = model({"image": image}), plain({"image": image})
        assert type(ours["pair"]) is Pair and type(ours["maps"]) is list
        torch.testing.assert_close(ours, theirs)
    assert vars(model)[engine.guard.ATTRIBUTE].captures == 1


@torch.no_grad()
def test_a_forward_that_looks_at_values_runs_its_modules_and_says_so_once(image, capfd):
    model = fb.optimize_(made(Asking))
    with pytest.warns(UserWarning, match="Asking runs its modules.*asks for values of tensors") as caught:
        for _ in range(3):
            assert_bit_equal(model(image), made(Asking)(image))
    assert len(caught) == 1 and capfd.readouterr().err == ""


@torch.no_grad()
def test_calls_that_are_no_single_image_run_the_modules(image):
    model, plain = fb.optimize_(made(Two)), made(Two)
    mask = torch.ones(2, 1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_bit_equal(model(image, mask), plain(image, mask))
    parameter = nn.Parameter(image)
    assert_bit_equal(fb.optimize_(made())(parameter), made()(parameter))


@torch.no_grad()
def test_copies_are_optimized_and_pickles_plain(image):
    model = fb.optimize_(made())
    expected = model(image)
    for other in (copy.deepcopy(model), copy.copy(model)):
        assert type(other) is type(model) and other is not model
        assert_bit_equal(other(image), expected)
        assert engine.why_not(other, image) is None
    assert copy.copy(model).conv is model.conv and copy.deepcopy(model).conv is not model.conv
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is Theirs
    torch.testing.assert_close(loaded(image), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is Theirs


@torch.no_grad()
def test_a_model_inside_another_one(image):
    """Each may be optimized; the outer plan has the inner one's operations."""
    inner, plain = made(), made()
    outer = nn.Sequential(nn.Conv2d(3, 3, 1), inner).eval()
    expected = plain(outer[0](image))
    fb.optimize_(inner)
    torch.testing.assert_close(outer(image), expected)
    fb.optimize_(outer)
    torch.testing.assert_close(outer(image), expected)
    assert len(engine.plan_for(outer, image).steps) >= 4 and type(outer) is not nn.Sequential


def test_tracers_see_the_modules(image):
    model, plain = fb.optimize_(made()), made()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, image)(image), plain(image))
        exported = torch.export.export(model, (image,)).module()
        torch.testing.assert_close(exported(image), plain(image))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(image), plain(image))


def test_backbones_of_this_library_stay_as_they_are():
    model = fb.lenet5().eval()
    kind = type(model)
    assert fb.optimize_(model) is model and type(model) is kind and type(fb.revert_(model)) is kind


@pytest.mark.parametrize(
    "model, words",
    [
        ("resnet18", "model is a str, expected an nn.Module"),
        (torch.jit.script(nn.Sequential(nn.ReLU())), "whose code is fixed"),
        (torch.compile(nn.Sequential(nn.ReLU())), "OptimizedModule, whose code is fixed"),
    ],
    ids=["str", "TorchScript", "torch.compile"],
)
def test_what_cannot_be_optimized_says_why(model, words):
    with pytest.raises(TypeError, match=words):
        fb.optimize_(model)


def test_without_the_library_the_modules_run():
    code = (
        "import torch, fast_backbones as fb; m = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval();"
        "x = torch.ones(1, 3, 5, 5); y = m(x); assert torch.equal(fb.optimize_(m)(x), y)"
    )
    run_python("-c", code, FB_NATIVE="0")
