"""Backbones in train() under autocast and in 16 bits: fused steps compute what the modules compute.

Gradients of every parameter of every family: test_train_program_parts.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, assert_equal, generator, needs_native
from model_checks import image
from torch import Tensor, nn
from train_nets import Dense, X, built, net, picture, relative

from fast_backbones import engine, kernels
from fast_backbones.engine import train_concat

pytestmark = needs_native

LAST = torch.channels_last
WAYS = {"autocast": torch.bfloat16, "bfloat16": None}  # what autocast is asked for


def autocast(dtype: torch.dtype | None):
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def in_way(way: str, model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Of float32 under autocast, or of bfloat16."""
    return (model, x) if way == "autocast" else (model.bfloat16(), x.bfloat16())


def results_of(
    model: nn.Module, x: Tensor, cast: torch.dtype | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Of one forward and backward: the maps, or logits; gradients and statistics by name."""
    model = copy.deepcopy(model)
    with autocast(cast):
        out = model(x)
    maps = [out] if isinstance(out, Tensor) else list(out)
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = 0.0
    for seed, y in enumerate(maps):  # of the size of one, and not of what a norm keeps constant
        weights = torch.randn(y.shape, generator=generator(seed)) / y.numel() ** 0.5
        loss = loss + (y.to(wide) * weights.to(wide)).sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [y.detach() for y in maps], found | dict(model.named_buffers())


def compared(model: nn.Module, x: Tensor, cast: torch.dtype | None) -> tuple:
    """Ours, PyTorch's own and those of float64; the first two of the same types."""
    with autocast(cast):
        assert engine.why_not_fused(model, x) is None
    ours = results_of(model, x, cast)
    with kernels.backend("reference"):
        plain, exact = results_of(model, x, cast), results_of(copy.deepcopy(model).double(), x.double())
    kinds = [[(y.dtype, y.stride()) for y in maps] for maps, _ in (ours, plain)]
    assert kinds[0] == kinds[1]
    kinds = [{name: t.dtype for name, t in found.items()} for _, found in (ours, plain)]
    assert kinds[0] == kinds[1]
    return ours, plain, exact


def errors(model: nn.Module, x: Tensor, cast: torch.dtype | None) -> dict[str, tuple[float, float]]:
    """Relative errors of gradients and statistics, ours and PyTorch's."""
    (_, ours), (_, plain), (_, exact) = compared(model, x, cast)
    assert ours.keys() == plain.keys() == exact.keys()
    found, largest = {}, max(value.double().norm() for value in exact.values())
    for name, value in exact.items():
        if not value.is_floating_point():
            assert torch.equal(ours[name], plain[name])
        elif value.norm() > 1e-6 * largest:  # a bias before a batch norm has no gradient
            found[name] = relative(ours[name], value), relative(plain[name], value)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["resnext50_32x4d", "densenet121", "mobilenetv1_025", "legacy_seresnext26_32x4d"]
)
def test_logits_and_statistics_of_whole_networks_keep_the_2x_rule(name, way):
    model, x = in_way(way, built(name), picture(name, 4))
    (ours, stats), (plain, plain_stats), (exact, true_stats) = compared(model, x, WAYS[way])
    assert relative(ours[0], exact[0]) <= 2 * relative(plain[0], exact[0])
    moments = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    assert_as_accurate(
        *(torch.cat([found[name] for name in moments]) for found in (stats, plain_stats, true_stats))
    )


def test_float16_with_a_scaler_trains_as_the_modules_do():
    """Loss scaling, its steps and its skipped steps."""

    def trained(model, dtype, cast):
        model = copy.deepcopy(model).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2, enabled=cast is not None)
        scales = []
        for seed in range(5):
            x = image(4, 3, 9, 11, seed).to(dtype)
            with autocast(cast):
                loss = F.cross_entropy(model(x * (torch.inf if seed == 2 else 1.0)), torch.arange(4))
            optimizer.zero_grad()
            if seed != 2 or cast is not None:  # what overflows is a step that the scaler skips
                scaler.scale(loss).backward()
                scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return torch.cat([p.detach().flatten() for p in model.parameters()]), scales

    model = net()
    with autocast(torch.float16):
        assert engine.why_not_fused(model, X) is None
    ours, scales = trained(model, torch.float32, torch.float16)
    with kernels.backend("reference"):
        plain, plain_scales = trained(model, torch.float32, torch.float16)
        exact, _ = trained(model, torch.float64, None)
    assert scales == plain_scales == [2.0**14, 2.0**15, 2.0**14, 2.0**14, 2.0**15]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert_as_accurate(ours - start, plain - start, exact - start.double())


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """In maps that autograd keeps between forward and backward; not weights, nor what they are cast to."""
    storages = {}

    def pack(t):
        if t.shape not in weights:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    weights = {p.shape for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out is not None
    return sum(storages.values())


@pytest.mark.parametrize(
    "name, most", [("resnext50_32x4d", 0.8), ("mobilenetv1_025", 0.76), ("densenet121", 0.6)]
)
def test_saved_memory_is_less(name, most):
    """A bit of each element is a sixteenth of a map here."""
    model, x = built(name), picture(name, 4)
    with autocast(torch.bfloat16):
        ours = kept_bytes(model, x)
        with kernels.backend("reference"):
            theirs = kept_bytes(model, x)
    assert ours <= most * theirs, ours / theirs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_growing_concatenations(layout, way):
    torch.manual_seed(0)
    model, x = in_way(way, Dense().train().to(memory_format=layout), X.contiguous(memory_format=layout))
    for _ in range(2):  # the first run learns how wide the last one is
        for name, (ours, theirs) in errors(model, x, WAYS[way]).items():
            assert ours <= 2 * theirs + 2 * torch.finfo(torch.bfloat16).eps, name
        with torch.no_grad(), autocast(WAYS[way]):
            model(x)


def test_growing_concatenations_share_one_buffer(monkeypatch):
    model, x, rooms = built("densenet121"), picture("densenet121"), []
    room = train_concat.Room
    with autocast(torch.bfloat16):
        model(x)
        monkeypatch.setattr(train_concat, "Room", lambda *args: rooms.append(room(*args)) or rooms[-1])
        model(x)
    assert len(rooms) == 4 and {room.map.dtype for room in rooms} == {torch.bfloat16}


def test_moments_of_a_growing_concatenation_are_computed_once_for_each_channel(monkeypatch):
    model, x, seen = built("densenet121"), picture("densenet121"), []
    compute = torch.ops.fast_backbones.batch_norm_affine
    with autocast(torch.bfloat16):
        model(x)
        monkeypatch.setattr(
            torch.ops.fast_backbones,
            "batch_norm_affine",
            lambda x, *rest: seen.append(x.shape[1]) or compute(x, *rest),
        )
        model(x)
    # the last map of the last block is read by a norm alone, without a convolution
    assert sum(seen) == 64 + 32 * 6 + 128 + 32 * 12 + 256 + 32 * 24 + 512 + 32 * 15


def test_hooks_of_layers_see_the_types_they_always_see():
    model, seen = net(), []
    for part in (model.conv1, model.bn1, model.relu, model.conv2):
        part.register_forward_hook(lambda module, args, out: seen.append((type(module).__name__, out.dtype)))
    with autocast(torch.bfloat16):
        model(X)
        fused, seen[:] = list(seen), []
        with kernels.backend("reference"):
            model(X)
    assert fused == seen and {dtype for _, dtype in seen} == {torch.bfloat16}


def test_a_shortcut_of_another_type_is_promoted_as_by_the_modules():
    """A stage that was taken out of autocast gives float32."""
    model = net()
    model.shortcut[1].register_forward_hook(lambda module, args, out: out.float())
    with autocast(torch.bfloat16):
        ours = model(X)
        with kernels.backend("reference"):
            plain = net_like(model)(X)
    assert ours.dtype is plain.dtype
    torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.05)


def net_like(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for mine, norm in zip(other.modules(), model.modules()):
        if isinstance(mine, nn.BatchNorm2d):
            mine.reset_running_stats()
            norm.reset_running_stats()
    return other


def test_autocast_inside_and_outside_of_a_model_give_the_same():
    """Weights are cast by the rule of the call, not by that of an earlier one."""
    model = net()
    for cast in (torch.bfloat16, None, torch.float16, torch.bfloat16):
        with autocast(cast):
            assert engine.why_not_fused(model, X) is None
            ours = model(X)
            with kernels.backend("reference"):
                assert model(X).dtype is ours.dtype is (cast or torch.float32)


def test_checkpoint_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    found = []
    for recompute in (False, True):
        model = net()
        with autocast(torch.bfloat16):
            out = checkpoint(model, X, use_reentrant=False) if recompute else model(X)
        out.float().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert_equal(a, b)


def test_compile_traces_it_whole():
    model = net()
    with autocast(torch.bfloat16):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(X)
        expected = net()(X)
    out.float().sum().backward()
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None for p in model.parameters())


def test_what_has_neither_16_nor_32_bits_runs_the_modules():
    assert "float64" in engine.why_not_fused(net().double(), X.double())
    assert engine.why_not_fused(net().bfloat16(), X.bfloat16()) is None
