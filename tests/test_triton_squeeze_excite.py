"""squeeze_excite by Triton, forward and backward, on a GPU or else in Triton's interpreter: to the bit where
arithmetic is exact, elsewhere at most twice PyTorch's error."""

import pytest
import torch
from conv_layers import Place
from helpers import assert_as_accurate, assert_equal, integers, reals
from triton_device import DEVICE
from triton_device import exact_products as exact_products

pytest.importorskip("triton", reason="Triton is not installed")

from fast_backbones.kernels._triton import squeeze_excite as passes

from fast_backbones import kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("none", "relu", "relu6")
SIZES = [((2, 3, 5, 7), 2), ((3, 16, 1, 1), 4), ((2, 19, 9, 9), 3), ((1, 130, 4, 3), 16)]


def run(backend, maps, small, dtype, autocast=None, **options):
    """y and the gradients of x, the layers and the residual. maps: x, grad, residual or None."""
    x, grad, residual = (None if t is None else t.to(DEVICE, dtype) for t in maps)
    kind = dtype if autocast is None else torch.float32
    small = [None if t is None else t.to(DEVICE, kind) for t in small]
    inputs = [t.requires_grad_() for t in (x, *small, residual) if t is not None]
    names = [n for n, t in zip(NAMES, (x, *small, residual)) if t is not None]
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        y = kernels.squeeze_excite(x, *small, residual=residual, backend=backend, **options)
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, inputs, grad.to(y.dtype))))}


NAMES = ("x", "weight1", "bias1", "weight2", "bias2", "residual")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, exact_products):
    """Images of several blocks, blocks of several tiles."""
    monkeypatch.setattr(passes, "PIXELS", 48)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 4, 8), (4, 19, 1, 1), (2, 130, 8, 8)], ids=str)
def test_integers_to_the_bit(sizes, dtype):
    """Gates of 1/2: weights of the second layer are zero, so that its gradient is what shows the sums."""
    c = sizes[1]
    maps = [integers(sizes, i) for i in range(3)]
    small = integers((4, c), 3, limit=1), integers((4,), 4), torch.zeros(c, 4), torch.zeros(c)
    for activation in ACTIVATIONS:
        for shortcut in (None, maps[2]):
            args = (*maps[:2], shortcut), small
            found = run("triton", *args, dtype, activation=activation)
            exact = run("reference", *args, torch.float64, activation=activation)
            for name, value in found.items():
                assert_equal(value, exact[name].float().to(value.dtype), f"{name} {activation}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shortcut", [False, True], ids=["plain", "shortcut"])
def test_at_most_twice_pytorchs_error(dtype, activation, shortcut):
    found, plain, exact = {}, {}, {}
    for seed, (sizes, hidden) in enumerate(SIZES):
        c = sizes[1]
        maps = [reals(sizes, 10 * seed + i).to(dtype) for i in range(3)]
        maps = maps if shortcut else (*maps[:2], None)
        small = [reals(size, 10 * seed + 3 + i).to(dtype) for i, size in
                 enumerate(((hidden, c), (hidden,), (c, hidden), (c,)))]  # fmt: skip
        for results, backend, kind in (
            (found, "triton", dtype), (plain, "reference", dtype), (exact, "reference", torch.float64),
        ):  # fmt: skip
            for name, value in run(backend, maps, small, kind, activation=activation).items():
                results.setdefault(name, []).append(value.flatten())
    for name in found:
        assert_as_accurate(*(torch.cat(results[name]) for results in (found, plain, exact)), name)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(dtype):
    """Maps in 16 bits, layers in float32: closer to float64 than PyTorch, which rounds between them."""
    sizes, hidden = (3, 40, 6, 5), 10
    maps = [reals(sizes, i).to(dtype) for i in range(3)]
    small = reals((hidden, 40), 3), reals((hidden,), 4), reals((40, hidden), 5), reals((40,), 6)
    found, plain = (run(b, maps, small, dtype, dtype, activation="relu") for b in ("triton", "reference"))
    exact = run("reference", maps, small, torch.float64, activation="relu")
    assert found["weight1"].dtype is torch.float32 and found["y"].dtype is dtype
    for name, value in found.items():
        ours, theirs = ((each[name].double() - exact[name]).norm().item() for each in (found, plain))
        assert ours <= theirs + torch.finfo(value.dtype).eps * exact[name].norm().item(), name


def test_slices_layouts_and_missing_biases():
    sizes = (2, 21, 5, 3)
    maps = [reals(sizes, i) for i in range(3)]
    small = reals((4, 21), 3), None, reals((21, 4), 4), None
    expected = run("triton", maps, small, torch.float32, activation="relu6")
    wide = [Place(t, True, float("nan")).values.detach() for t in maps]
    planar = run("triton", wide, small, torch.float32, activation="relu6")
    for name, value in expected.items():
        assert_equal(planar[name], value, name)
    exact = run("reference", maps, small, torch.float64, activation="relu6")
    for name, value in expected.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5)
    for layout in (torch.contiguous_format, torch.channels_last):
        image = maps[0].to(DEVICE).to(memory_format=layout)
        args = [None if t is None else t.to(DEVICE) for t in small]
        y = kernels.squeeze_excite(image, *args, backend="triton")
        assert y.is_contiguous(memory_format=layout)


def test_a_sample_has_the_same_bits_in_any_batch():
    x, small = reals((5, 24, 13, 11), 0).to(DEVICE), [
        t.to(DEVICE) for t in (reals((24, 24), 1), reals((24,), 2), reals((24, 24), 3), reals((24,), 4))
    ]  # fmt: skip
    whole = passes_of(x)
    assert_equal(passes_of(x[2:3]), whole[2:3])
    assert whole.shape[1] > 1
    assert kernels.squeeze_excite(x, *small, backend="triton").shape == x.shape


def passes_of(x):
    sums = torch.empty(x.shape[0], passes.image_blocks(x), x.shape[1], device=DEVICE)
    passes.image_sums(x.contiguous(memory_format=torch.channels_last), sums)()
    return sums


@pytest.mark.parametrize("shortcut", [False, True], ids=["plain", "shortcut"])
def test_derivatives_of_the_gradient(shortcut):
    def second(backend, dtype):
        x, residual = (reals((2, 6, 3, 3), i).to(DEVICE, dtype).requires_grad_() for i in (0, 1))
        sizes = (3, 6), (3,), (6, 3), (6,)
        small = [reals(s, 2 + i).to(DEVICE, dtype).requires_grad_() for i, s in enumerate(sizes)]
        options = {"residual": residual if shortcut else None, "activation": "relu", "backend": backend}
        y = kernels.squeeze_excite(x, *small, **options)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, *small))

    for fast, exact in zip(second("triton", torch.float32), second("reference", torch.float64)):
        assert (fast - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("needs", ["x", "weight1", "residual"])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_what_is_not_needed_is_not_computed(needs, activation):
    sizes = {"x": (2, 6, 3, 3), "weight1": (3, 6), "bias1": (3,), "weight2": (6, 3), "bias2": (6,)}
    tensors = {name: reals(size, i).to(DEVICE) for i, (name, size) in enumerate(sizes.items())}
    tensors["residual"] = reals(sizes["x"], 7).to(DEVICE)
    tensors[needs].requires_grad_()
    found = []
    for backend in ("triton", "reference"):
        y = kernels.squeeze_excite(**tensors, activation=activation, backend=backend)
        found.append(torch.autograd.grad(y.square().sum(), tensors[needs])[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_refusals_say_why():
    x, w = torch.zeros(1, 4, 3, 3, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match="gate tanh: triton handles sigmoid"):
        kernels.squeeze_excite(x, w, None, w, None, gate="tanh", backend="triton")
    with pytest.raises(RuntimeError, match=r"torch.float64: the GPU's kernels handle float32"):
        kernels.squeeze_excite(x.double(), w.double(), None, w.double(), None, backend="triton")
