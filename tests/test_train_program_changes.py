"""Backbones in train() that are changed, hooked, shared, copied: the program steps aside where it must."""

import copy
import functools
import gc
import threading
import types
import weakref

import torch
from helpers import assert_bit_equal, needs_native
from torch import nn
from torch.nn.utils import spectral_norm
from train_nets import (
    Net,
    X,
    built,
    dense_net,
    net,
    picture,
    relative,
    same_as_modules,
)

import fast_backbones as fb
from fast_backbones import engine, kernels

pytestmark = needs_native


def test_hooks_of_layers_see_what_they_always_see():
    model, seen = net(), []
    for part in (model.bn1, model.relu, model.conv2):
        part.register_forward_hook(
            lambda module, args, out: seen.append((type(module).__name__, out.detach().clone()))
        )
    assert engine.why_not_fused(model, X) is None
    model(X)
    fused, seen[:] = list(seen), []
    with kernels.backend("reference"):
        model(X)
    assert [name for name, _ in fused] == [name for name, _ in seen]
    for (_, a), (_, b) in zip(fused, seen):
        torch.testing.assert_close(a, b)


def test_a_hook_may_replace_what_a_layer_returns():
    model = net()
    model.bn2.register_forward_hook(lambda module, args, out: out * 0 + 1)
    same_as_modules(model, X)


def test_backward_hooks_of_layers_and_blocks():
    model, seen = net(), []
    model.relu.inplace = False  # PyTorch refuses the two together
    model.bn1.register_full_backward_hook(lambda module, grads, outs: seen.append("bn1"))
    model(X).sum().backward()
    assert seen == ["bn1"]
    handle = model.shortcut.register_full_backward_hook(lambda module, grads, outs: seen.append("shortcut"))
    assert "hooks" in engine.why_not_fused(model, X)
    model(X).sum().backward()
    assert seen == ["bn1", "shortcut", "bn1"]
    handle.remove()
    assert engine.why_not_fused(model, X) is None


def test_a_hook_of_a_block_is_called():
    model, seen = net(), []
    model.shortcut.register_forward_hook(lambda *_: seen.append(1))
    model(X)
    assert seen == [1]


def test_a_hook_may_ask_for_the_gradient_of_what_a_layer_reads():
    """Of all that read it, as the modules hand the same tensor to each."""

    def gradient(model, x, layer):
        seen = []

        def look(module, args):
            args[0].retain_grad()
            seen.append(args[0])

        layer(model).register_forward_pre_hook(look)
        model(x).square().sum().backward()
        return seen[0].grad

    for make, layer in (
        (net, lambda model: model.shortcut[0]),
        (dense_net, lambda model: model.norms[2]),
    ):
        ours = gradient(make(), X, layer)
        with kernels.backend("reference"):
            plain = gradient(make(), X, layer)
            exact = gradient(make().double(), X.double(), layer)
        assert relative(ours, exact) <= 2 * relative(plain, exact) + 2e-6


def test_a_hook_may_change_what_a_norm_reads():
    """A concatenation is that norm's own, as the modules make one for each."""
    model = dense_net()

    def cut(module, args):
        args[0].data.clamp_(max=0.1)

    model.norms[1].register_forward_pre_hook(cut)
    same_as_modules(model, X)


def test_a_changed_model_is_noticed():
    model = net()
    model(X)
    model.relu = nn.Hardswish()
    same_as_modules(model, X)
    model.conv2 = nn.Conv2d(16, 16, 1)
    same_as_modules(model, X)
    model.bn1 = nn.GroupNorm(4, 16)
    same_as_modules(model, X)
    model.forward_head = lambda x, pre_logits=False: x.sum((1, 2, 3))
    assert model(X).shape == (4,)


def replaced_on_the_model(model):
    def features(self, x):
        with torch.no_grad():
            return type(self).forward_features(self, x)

    model.forward_features = types.MethodType(features, model)


def replaced_in_the_class(model, monkeypatch):
    def head(self, x, pre_logits=False):
        with torch.no_grad():
            x = x.mean((2, 3))
        return self.fc(x)

    monkeypatch.setattr(Net, "forward_head", head)


def test_methods_of_others_are_not_traced(monkeypatch):
    """What they do beside calling on tensors would leave no trace."""
    for replace in (replaced_on_the_model, functools.partial(replaced_in_the_class, monkeypatch=monkeypatch)):
        model = net()
        model(X)
        replace(model)
        model(X).sum().backward()
        assert model.conv1.weight.grad is None and model.fc.weight.grad is not None
        assert "of its own" in engine.why_not_fused(model, X)


def test_the_reference_backend_runs_the_modules():
    model = net()
    with kernels.backend("reference"):
        assert "reference" in engine.why_not_fused(model, X)
        a = model(X)
    plain = net().forward_modules(X)
    assert_bit_equal(a.detach(), plain.detach())


def test_other_threads_run_modules_while_one_traces():
    """torch.fx patches nn.Module for the whole process."""
    stop, errors = threading.Event(), []
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

    def work():
        while not stop.is_set():
            try:
                layers(X)
            except Exception as error:
                errors.append(error)
                return

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            assert engine.why_not_fused(built("resnet18"), picture("resnet18")) is None
    finally:
        stop.set()
        worker.join()
    assert not errors


def test_threads_share_the_program_that_one_of_them_makes():
    model = built("resnet18")
    workers = [threading.Thread(target=model, args=(picture("resnet18"),)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert engine.state.EngineState.of(model).programs == 1


def test_structures_that_take_turns_are_traced_once():
    model = net()
    state = engine.state.EngineState.of(model)
    for _ in range(3):
        for frozen in (model.bn1, model.bn2, None):
            model.train()
            if frozen is not None:
                frozen.eval()
            model(X).sum().backward()
    assert state.programs == len(state.trained) == 3


def test_layers_that_were_replaced_are_let_go():
    model = net()
    model(X)
    old = weakref.ref(model.conv2.weight)
    model.conv2 = copy.deepcopy(model.conv2)
    model(X)
    gc.collect()
    assert old() is None


def test_parameters_that_are_results_are_not_held():
    """torch.func.functional_call puts them into the model for one call."""
    model = net()
    model(X)
    program = engine.state.EngineState.of(model).trained[0]
    fast = {name: p * 1 for name, p in model.named_parameters()}
    torch.func.functional_call(model, fast, (X,)).sum().backward()
    assert model.conv1.weight.grad is not None
    alive = weakref.ref(fast["conv1.weight"])
    del fast
    gc.collect()
    assert alive() is None
    model(X)
    assert engine.state.EngineState.of(model).trained[0] is program


def test_weights_that_hooks_make_anew_are_not_traced_again_and_again():
    """Those of the older weight_norm, spectral_norm and prune."""
    model = net()
    spectral_norm(model.conv2)
    state = engine.state.EngineState.of(model)
    for _ in range(3):
        model(X).sum().backward()
    assert state.programs <= 1 and "conv2.weight" in engine.why_not_fused(model, X)


def test_copies_and_pickles_of_a_model_that_was_trained(tmp_path):
    model, x = built("mobilenetv1_025"), picture("mobilenetv1_025")
    model(x)
    again = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (again, loaded):
        assert_bit_equal(other(x).detach(), copy.deepcopy(model)(x).detach())


def test_a_model_is_freed_when_nobody_holds_it():
    model = net()
    gc.collect()
    gc.disable()
    try:
        model(X).sum().backward()
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


class Foreign(nn.Module):
    """A block that does what no trace shows."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            return self.norm(x)


def test_blocks_of_others_are_called_as_they_are():
    model = net()
    model.bn1 = Foreign(model.bn1)
    assert engine.why_not_fused(model, X) is None
    for _ in range(2):
        model(X).sum().backward()
    assert model.bn1.calls == 2 and model.bn1.norm.weight.grad is None and model.conv1.weight.grad is None
    same_as_modules(model, X)


def test_models_of_others_run_their_modules():
    class Mine(Net):
        pass

    assert "Mine is not one of this library's" in engine.why_not_fused(Mine().train(), X)


def test_hooks_of_layers_of_ours_are_called():
    model, seen = fb.create_model("mobilenetv1_025", pad_type="same").train(), []
    x = picture("mobilenetv1_025")
    assert engine.why_not_fused(model, x) is None
    handle = model.conv_stem.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen == [1]
    handle.remove()
    model.conv_stem.register_full_backward_hook(lambda *_: seen.append(2))
    model(x.requires_grad_()).sum().backward()
    assert seen == [1, 2]


def test_global_backward_hooks_are_called():
    seen = []
    handle = nn.modules.module.register_module_full_backward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        model, x = built("lenet5"), picture("lenet5")  # nothing in place, which PyTorch refuses beside these
        assert "global" in engine.why_not_fused(model, x)
        model(x).sum().backward()
    finally:
        handle.remove()
    assert seen.count("Conv2d") >= 2


def test_inference_mode_and_empty_batches_run_the_modules():
    model, x = built("densenet121"), picture("densenet121")
    with torch.inference_mode():
        assert "inference mode" in engine.why_not_fused(model, x)
        assert model(x).shape == (2, 10)
    assert "empty" in engine.why_not_fused(model, x[:0])


def test_a_model_that_changes_at_every_call_stops_being_traced():
    model = net()
    for i in range(engine.state.MAX_PROGRAMS + 2):
        model.drop_rate = i / 1000
        model(X)
    assert "changes too often" in engine.why_not_fused(model, X)
    same_as_modules(model, X)
