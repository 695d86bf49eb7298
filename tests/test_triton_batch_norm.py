"""batch_norm by Triton, forward and backward, on a GPU or else in Triton's interpreter: to the bit where
arithmetic is exact, elsewhere at most twice PyTorch's error."""

import pytest
import torch
from conv_layers import Place
from helpers import assert_as_accurate, assert_equal, integers, reals
from triton_device import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from fast_backbones.kernels._triton import sums

from fast_backbones import kernels
from fast_backbones.kernels import _gpu_batch_norm, _gpu_training, _recompute

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("none", "relu", "relu6")
# 2**k pixels, so that quotients are exact: C = 3, one pixel an image, no multiple of 16, more than one tile.
EXACT_SIZES = [(2, 3, 4, 8), (4, 19, 1, 1), (2, 130, 4, 4), (1, 300, 2, 1)]
SIZES = [(3, 3, 5, 7), (5, 16, 1, 1), (3, 19, 7, 9), (1, 130, 9, 5), (1, 600, 3, 1)]


thorough = [pytest.mark.slow] if DEVICE == "cpu" else []  # what takes the interpreter long


def on_device(t):
    return None if t is None else t.to(DEVICE)


def paired(sizes, seed):
    """1 and -1: the mean is 0 and the variance 1 in every channel and every even run of pixels."""
    n, c, h, w = sizes
    signs = torch.where(integers((n * h * w // 2, c), seed) < 0, -1.0, 1.0)
    return torch.stack([signs, -signs], 1).reshape(n, h, w, c).permute(0, 3, 1, 2)


def run(backend, maps, affine, running, dtype, **options):
    """y, the gradients and the running moments. maps: x, grad, residual or None."""
    x, grad, residual = (None if t is None else t.to(DEVICE, dtype) for t in maps)
    wanted = dtype if dtype is torch.float64 else torch.float32
    weight, bias = (t.to(DEVICE, wanted) for t in affine)
    running = [t.to(DEVICE, wanted, copy=True) for t in running]
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    y = kernels.batch_norm(x, weight, bias, *running, residual=residual, backend=backend, **options)
    found = torch.autograd.grad(y, inputs, grad)
    names = ("x", "weight", "bias", "residual")
    return {"y": y.detach(), **dict(zip(names, found)), "running_mean": running[0], "running_var": running[1]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", EXACT_SIZES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_integers_to_the_bit(sizes, dtype, training):
    c = sizes[1]
    x, grad, residual = paired(sizes, 0), integers(sizes, 1), integers(sizes, 2)
    affine = 2.0 ** (torch.arange(c) % 3), integers((c,), 4)
    running = integers((c,), 5), 4.0 ** (1 + torch.arange(c) % 3) - 3  # with eps 3 roots are exact
    for activation in ACTIVATIONS:
        for shortcut in (None, residual):
            maps = x, grad, shortcut
            options = {"training": training, "momentum": 0.5, "eps": 3.0, "activation": activation}
            found = run("triton", maps, affine, running, dtype, **options)
            exact = run("reference", maps, affine, running, torch.float64, **options)
            assert found.keys() == exact.keys()
            unbiased = found.pop("running_var"), exact.pop("running_var").float()
            torch.testing.assert_close(*unbiased, rtol=2e-7, atol=0)  # pixels / (pixels - 1) is rounded
            for name, value in found.items():
                expected = exact[name].float()  # float32 has it; dx may be one rounding off in 16 bits
                assert_equal(value, expected.to(value.dtype), f"{name} {activation} {shortcut is not None}")


@pytest.mark.parametrize(
    "dtype, activation",
    [
        pytest.param(
            dtype, activation, marks=thorough if dtype is torch.float16 or activation == "none" else []
        )
        for dtype in DTYPES
        for activation in ACTIVATIONS
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("shortcut", [False, True], ids=["plain", "shortcut"])
def test_at_most_twice_pytorchs_error(dtype, activation, training, shortcut):
    found, plain, exact = {}, {}, {}
    for seed, sizes in enumerate(SIZES):
        c = sizes[1]
        maps = [reals(sizes, 10 * seed + i).to(dtype) for i in range(3)]
        maps[0] = maps[0] * 2 + reals((c, 1, 1), 7).to(dtype)
        maps = maps if shortcut else (*maps[:2], None)
        affine = reals((c,), 3), reals((c,), 4)
        running = reals((c,), 5), reals((c,), 6, positive=True)
        options = {"training": training, "activation": activation}
        for results, backend, kind in (
            (found, "triton", dtype), (plain, "reference", dtype), (exact, "reference", torch.float64),
        ):  # fmt: skip
            for name, value in run(backend, maps, affine, running, kind, **options).items():
                results.setdefault(name, []).append(value.flatten())
    for name in found:
        assert_as_accurate(*(torch.cat(results[name]) for results in (found, plain, exact)), name)


@pytest.mark.parametrize("programs", [1, 3, 7])
def test_blocks_of_many_tiles(programs, monkeypatch):
    """Few blocks of rows, each of which goes through several tiles; a last one with few rows."""
    monkeypatch.setattr(sums, "PROGRAMS", programs)
    sizes = (3, 19, 17, 11)
    maps = reals(sizes, 0), reals(sizes, 1), None
    affine, running = (reals((19,), 3), reals((19,), 4)), (reals((19,), 5), reals((19,), 6, positive=True))
    options = {"activation": "relu"}
    found, plain = (run(b, maps, affine, running, torch.float32, **options) for b in ("triton", "reference"))
    exact = run("reference", maps, affine, running, torch.float64, **options)
    for name in found:
        assert_as_accurate(found[name], plain[name], exact[name], name)
    odd = paired((1, 19, 3 * 17, 2), 8)[:, :, :-1]  # and zeros: an odd number of blocks, exact sums
    _, mean, var, *_ = _gpu_batch_norm.forward(
        on_device(odd), None, None, None, None, None, 3.0, "none", False
    )
    assert_equal(mean, torch.zeros_like(mean))
    assert_equal(var, on_device(odd.double().square().mean((0, 2, 3)).float()))


def test_a_large_mean_costs_no_digits():
    sizes = (4, 24, 16, 9)
    x = reals(sizes, 0) + 3000 * reals((24, 1, 1), 1)
    maps, affine = (x, reals(sizes, 2), None), (reals((24,), 3), reals((24,), 4))
    running = torch.zeros(24), torch.ones(24)
    found, plain = (run(b, maps, affine, running, torch.float32) for b in ("triton", "reference"))
    exact = run("reference", maps, affine, running, torch.float64)
    for name in found:
        assert_as_accurate(found[name], plain[name], exact[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_wider_maps(dtype):
    sizes = (2, 21, 5, 3)
    maps = [on_device(reals(sizes, i).to(dtype)) for i in range(3)]
    weight, bias = on_device(reals((21,), 3)), on_device(reals((21,), 4))
    found = []
    for wide in (False, True):
        x, grad, residual = (Place(t, wide, float("nan")).values.detach() for t in maps)
        inputs = x.requires_grad_(), residual.requires_grad_()
        y = kernels.batch_norm(x, weight, bias, residual=residual, activation="relu", backend="triton")
        found.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    for dense, sliced in zip(*found):
        assert_equal(sliced, dense)


def test_results_lie_as_pytorchs():
    x = on_device(reals((2, 5, 4, 3), 0))
    for layout in (torch.contiguous_format, torch.channels_last):
        image = x.to(memory_format=layout)
        assert kernels.batch_norm(image, backend="triton").is_contiguous(memory_format=layout)
    a, b = (kernels.batch_norm(x.to(memory_format=f), backend="triton") for f in
            (torch.contiguous_format, torch.channels_last))  # fmt: skip
    assert_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputation_has_the_same_bits(dtype, activation):
    x = on_device(reals((2, 37, 5, 3), 0).to(dtype)).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = on_device(reals((37,), 1)), on_device(reals((37,), 2))
    y = kernels.batch_norm(x, weight, bias, activation=activation, backend="triton")
    kept, how = _recompute.keep(y)
    assert kept[0] is x
    with torch.no_grad():
        assert_equal(_recompute.restore(kept, how), y.detach())
    with torch.enable_grad():
        assert (_recompute.restore(kept, how) - y).abs().max() < 1e-2  # PyTorch's own, with a graph


def test_nan_stays_and_passes():
    x = on_device(reals((2, 4, 3, 3), 0))
    x[0, 1, 1, 1] = float("nan")
    y = kernels.batch_norm(x.requires_grad_(), activation="relu", backend="triton")
    assert y[:, 1].isnan().all() and not y[:, [0, 2, 3]].isnan().any()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[:, 1].isnan().all() and not dx[:, [0, 2, 3]].isnan().any()


@pytest.mark.parametrize("shortcut", [False, True], ids=["plain", "shortcut"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_derivatives_of_the_gradient(shortcut, training):
    def second(backend, dtype):
        x, residual = (reals((2, 6, 3, 3), i).to(DEVICE, dtype).requires_grad_() for i in (0, 1))
        weight, bias = (reals((6,), i).to(DEVICE, dtype).requires_grad_() for i in (2, 3))
        moments = torch.zeros(6, device=DEVICE, dtype=dtype), torch.ones(6, device=DEVICE, dtype=dtype)
        residual = residual if shortcut else None
        y = kernels.batch_norm(
            x,
            weight,
            bias,
            *moments,
            residual=residual,
            training=training,
            activation="relu",
            backend=backend,
        )
        (first,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight, bias))

    found, plain = second("triton", torch.float32), second("reference", torch.float32)
    for fast, slow, exact in zip(found, plain, second("reference", torch.float64)):
        assert ((fast - exact).norm() / exact.norm()) <= 4 * (slow - exact).norm() / exact.norm() + 1e-6


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["x", "affine", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_needed_is_not_computed(needs, activation):
    tensors = [on_device(reals(size, i)) for i, size in enumerate(((2, 5, 3, 3), (5,), (5,), (2, 5, 3, 3)))]
    for tensor, needed in zip(tensors, (needs[0], needs[1], needs[1], needs[2])):
        tensor.requires_grad_(bool(needed))
    found = []
    for backend in ("triton", "reference"):
        x, weight, bias, residual = tensors
        y = kernels.batch_norm(x, weight, bias, residual=residual, activation=activation, backend=backend)
        found.append(torch.autograd.grad(y.square().sum(), [t for t in tensors if t.requires_grad]))
    for fast, plain in zip(*found):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_refusals_say_why(monkeypatch):
    x = torch.zeros(2, 3, 4, 4)

    def said(*args, **options):
        (verdict,) = [
            v for v in kernels.explain("batch_norm", *args, **options).candidates if v.name == "triton"
        ]
        return verdict.refusal, verdict.declined

    assert "handles [N, C, H, W]" in said(torch.zeros(4, 3))[0]
    assert "torch.float64" in said(x.double())[0]
    assert "subclass" in said(x.as_subclass(Named))[0]
    if DEVICE == "cpu":
        assert said(x) == (None, "Triton's interpreter is for tests")
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert said(x)[0] == "device cpu: the GPU's kernels handle cuda, and cpu with TRITON_INTERPRET=1"


class Named(torch.Tensor):
    pass


def test_a_gpu_waits_for_the_switch(monkeypatch):
    class OnGpu:
        is_cuda = True

    monkeypatch.delenv("FB_GPU_PLANS", raising=False)
    assert "FB_GPU_PLANS=1 switches them on" in _gpu_training.decline(OnGpu())
    monkeypatch.setenv("FB_GPU_PLANS", "1")
    assert _gpu_training.decline(OnGpu()) is None
