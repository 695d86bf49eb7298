"""Batch norm and squeeze-and-excitation on maps of 16 bits: at PyTorch's accuracy, the same bits anywhere.

Run as a program,

    python tests/test_kernels_narrow_maps.py OUT.pt

it saves results of real data; a test starts it once per instruction set.
"""

import sys

import pytest
import test_kernels_batch_norm as norms
import test_kernels_squeeze_excite as gates
import torch
import torch.nn.functional as F
from helpers import (
    LAYOUTS,
    assert_as_accurate,
    assert_bit_equal,
    assert_equal,
    generator,
    integers,
    layout_name,
    needs_native,
    poisoned,
    reals,
    refusal,
    results_of_isas,
    threads,
)
from helpers import one_thread as one_thread

from fast_backbones import kernels
from fast_backbones.kernels import batch_norm, batch_norm_ref, squeeze_excite, squeeze_excite_ref

pytestmark = needs_native

DTYPES = (torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "relu6")
OPS = torch.ops.fast_backbones


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def rounded(data, dtype, small=torch.float32):
    """The maps (four dimensions) in `dtype`, what belongs to channels in `small`."""
    return [t.to(dtype if t.dim() == 4 else small) for t in data]


def norm(op, data, exact=False, **options):
    """Results of a step by name."""
    data = [t.double() for t in data] if exact else data
    *tensors, grad = data
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:4]]
    mean, var = tensors[4].clone(), tensors[5].clone()
    y = op(*leaves[:3], mean, var, residual=leaves[3], **options)
    y.backward(grad)
    return dict(zip(norms.NAMES, (y.detach(), *(leaf.grad for leaf in leaves), mean, var)))


def gate(op, data, exact=False, **options):
    data = [t.double() for t in data] if exact else data
    *tensors, grad = data
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = op(*leaves[:5], residual=leaves[5], **options)
    y.backward(grad)
    return dict(zip(gates.NAMES, (y.detach(), *(leaf.grad for leaf in leaves))))


def fast_norm(*args, **options):
    return batch_norm(*args, backend="native", **options)


def fast_gate(*args, **options):
    return squeeze_excite(*args, backend="native", **options)


def check_like(found, plain):
    """Types, sizes and strides of PyTorch's own results."""
    assert found.keys() == plain.keys()
    for name, t in found.items():
        assert (t.dtype, t.shape, t.stride()) == (
            plain[name].dtype,
            plain[name].shape,
            plain[name].stride(),
        ), name


# ---- the 2x rule ----


@by_dtype
@pytest.mark.parametrize("small", ["float32", "same"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norms_at_most_twice_pytorchs_error(activation, training, layout, small, dtype):
    options = {"training": training, "activation": activation, "momentum": 0.3}
    for sizes in norms.SIZES[:3]:
        runs = []
        for seed in (0, 20, 40):
            data = norms.inputs(sizes, activation, seed, layout)
            data = rounded(data, dtype, torch.float32 if small == "float32" else dtype)
            found, plain = norm(fast_norm, data, **options), norm(batch_norm_ref, data, **options)
            check_like(found, plain)
            runs.append((found, plain, norm(batch_norm_ref, data, exact=True, **options)))
        for name in norms.NAMES:
            assert_as_accurate(*(torch.cat([run[i][name].flatten() for run in runs]) for i in range(3)), name)


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cast", [False, True], ids=["same", "autocast"])
def test_gates_at_most_twice_pytorchs_error(cast, activation, layout, dtype):
    for sizes in gates.SIZES:
        runs = []
        for seed in range(0, 80, 20):
            data = gates.inputs(sizes, activation, seed, layout)
            data = rounded(data, dtype, torch.float32 if cast else dtype)
            with torch.autocast("cpu", dtype, enabled=cast):
                found = gate(fast_gate, data, activation=activation)
                plain = gate(squeeze_excite_ref, data, activation=activation)
            check_like(found, plain)
            runs.append((found, plain, gate(squeeze_excite_ref, data, exact=True, activation=activation)))
        for name in gates.NAMES:
            assert_as_accurate(*(torch.cat([run[i][name].flatten() for run in runs]) for i in range(3)), name)


# ---- exact ----


def everything_of(dtype: torch.dtype) -> torch.Tensor:
    """Every value of the type, in a map of 1000 channels and of all tails."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return F.pad(bits, (0, 464)).view(66, 1000, 1, 1).view(dtype).contiguous(memory_format=LAYOUTS[1])


@by_dtype
@pytest.mark.parametrize("factor", [1.0, 1.0 + 2**-7, 1 / 3, 3e-8, 2e38], ids=str)
def test_every_value_is_read_and_rounded_as_pytorch_does(factor, dtype):
    """Subnormal ones and ties included; what overflows becomes infinite."""
    x = everything_of(dtype)
    scale = torch.full((1000,), factor)
    moments = torch.zeros(1000), torch.ones(1000)
    found = fast_norm(x, scale, None, *moments, training=False, eps=0.0)
    expected = x.float() * factor + 0.0  # the norm adds its bias: -0 becomes 0
    assert_equal(found.float(), expected.to(dtype).float())
    assert torch.equal(found.isnan(), x.isnan())


@by_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", (1, 4, 8, 15, 16, 17, 33, 64, 200))
def test_norms_are_exact_where_arithmetic_is(channels, activation, dtype):
    """x - mean is 3/4 to either side, and 9/16 + eps is 1: all but the unbiased variance fits 8 bits."""
    n, h, w = 4, 16, 8
    sign = torch.ones(n * h * w, channels)
    for c in range(channels):
        sign[torch.randperm(n * h * w, generator=generator(c))[: n * h * w // 2], c] = -1.0

    def as_map(rows):
        return rows.reshape(n, h, w, channels).permute(0, 3, 1, 2)

    x = 0.75 * sign + integers((channels,), 1, limit=8)
    residual, grad = integers(x.shape, 2, limit=6), integers(x.shape, 3, limit=2, multiple=512)
    weight, bias = integers((channels,), 4, limit=2, multiple=2), integers((channels,), 5, limit=3)
    data = (
        as_map(x),
        weight,
        bias,
        as_map(residual),
        torch.zeros(channels),
        torch.ones(channels),
        as_map(grad),
    )
    options = {"eps": 7 / 16, "activation": activation, "momentum": 0.5}
    found = norm(fast_norm, rounded(data, dtype), **options)
    exact = norm(batch_norm_ref, data, exact=True, **options)
    for name in norms.NAMES[:-1]:
        assert_equal(found[name], exact[name].to(found[name].dtype), name)


@by_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", (1, 4, 8, 15, 16, 17, 33, 64, 200))
def test_gates_are_exact_where_arithmetic_is(channels, activation, dtype):
    """Means are multiples of 1/32, gates 0, 1/2 or 1; residuals keep sums off 0 and 6."""
    n, h, w, hidden = 4, 4, 8, 7
    maps = [integers((n, channels, h, w), seed).contiguous(memory_format=LAYOUTS[1]) for seed in range(3)]
    weight1, bias1 = integers((hidden, channels), 3, limit=2), integers((hidden,), 4, limit=2)
    weight2 = integers((channels, hidden), 5, limit=1, multiple=256 * 32)
    bias2 = integers((channels,), 6, limit=1, multiple=256)
    data = (maps[0], weight1, bias1, weight2, bias2, maps[1] + 0.25, maps[2])
    with torch.autocast("cpu", dtype):
        found = gate(fast_gate, rounded(data, dtype), activation=activation)
    exact = gate(squeeze_excite_ref, data, exact=True, activation=activation)
    for name in gates.NAMES:  # the other gradients fit float32, these are rounded once
        assert_equal(found[name], exact[name].float().to(found[name].dtype), name)


@by_dtype
def test_maps_of_32_bits_rounded_once(dtype):
    """What the kernels compute is what those of float32 compute from the same values."""
    data = rounded(norms.inputs((3, 70, 12, 11), "relu"), dtype)
    found = norm(fast_norm, data, activation="relu")
    wide = norm(fast_norm, [t.float() for t in data], activation="relu")
    for name in norms.NAMES:
        assert_bit_equal(found[name].float(), wide[name].to(found[name].dtype).float(), name)
    data = rounded(gates.inputs((3, 70, 12, 11, 40)), dtype, dtype)
    found = gate(fast_gate, data, activation="relu")
    wide = gate(fast_gate, [t.float() for t in data], activation="relu")
    for name in gates.NAMES:
        assert_bit_equal(found[name].float(), wide[name].to(found[name].dtype).float(), name)


# ---- the same bits ----


@by_dtype
def test_same_bits_for_any_number_of_threads(dtype):
    norm_data = rounded(norms.inputs((5, 70, 33, 21), "relu"), dtype)
    gate_data = rounded(gates.inputs((5, 70, 33, 21, 12)), dtype, dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            both = (
                norm(fast_norm, norm_data, activation="relu"),
                gate(fast_gate, gate_data, activation="relu"),
            )
            results.append({f"{i} {name}": t for i, each in enumerate(both) for name, t in each.items()})
    for other in results[1:]:
        for name, t in results[0].items():
            assert_bit_equal(other[name].float(), t.float(), name)


@by_dtype
def test_an_image_has_the_same_bits_in_any_batch(dtype):
    x, *layers, residual, _ = rounded(gates.inputs((6, 200, 3, 2, 130)), dtype, dtype)
    together = fast_gate(x, *layers, residual=residual, activation="relu")
    frozen = rounded(norms.inputs((6, 40, 5, 3), "relu"), dtype)
    normed = fast_norm(*frozen[:3], *frozen[4:6], training=False)
    for i in range(6):
        alone = fast_gate(x[i : i + 1], *layers, residual=residual[i : i + 1], activation="relu")
        assert_bit_equal(alone.float(), together[i : i + 1].float())
        alone = fast_norm(frozen[0][i : i + 1], *frozen[1:3], *frozen[4:6], training=False)
        assert_bit_equal(alone.float(), normed[i : i + 1].float())


def real_results():
    found = {}
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            for sizes in norms.SIZES:
                some = norm(fast_norm, rounded(norms.inputs(sizes, activation), dtype), activation=activation)
                found |= {f"norm {dtype} {sizes} {activation} {name}": t for name, t in some.items()}
            for sizes in gates.SIZES:
                data = rounded(gates.inputs(sizes, activation), dtype, dtype)
                some = gate(fast_gate, data, activation=activation)
                found |= {f"gate {dtype} {sizes} {activation} {name}": t for name, t in some.items()}
        scale, moments = torch.full((1000,), 1 / 3), (torch.zeros(1000), torch.ones(1000))
        found[f"all {dtype}"] = fast_norm(everything_of(dtype), scale, None, *moments, training=False)
    return {name: t.float() for name, t in found.items()}


def test_instruction_sets_give_the_same_bits(tmp_path):
    """The portable kernels round products on their own, and a bit of float32 may cross to the next of 16."""
    found = results_of_isas("tests/test_kernels_narrow_maps.py", tmp_path, 2**-7, 1e-2, equal_nan=True)
    each = len(norms.SIZES) * len(norms.NAMES) + len(gates.SIZES) * len(gates.NAMES)
    assert len(found) == len(DTYPES) * (len(ACTIVATIONS) * each + 1)


# ---- what surrounds them ----


@by_dtype
def test_running_moments_of_16_bits_move_as_those_of_the_module(dtype):
    module = torch.nn.BatchNorm2d(24, momentum=0.2)
    module.running_mean.uniform_(-2, 2, generator=generator(0))
    module.to(dtype)
    mean, var = module.running_mean.clone(), module.running_var.clone()
    exact = torch.nn.BatchNorm2d(24, momentum=0.2).to(dtype)
    exact.load_state_dict(module.state_dict())
    exact = exact.double()
    x = (reals((4, 24, 6, 6), 1) * 3).to(dtype)
    module(x)
    exact(x.double())
    fast_norm(x, module.weight, module.bias, mean, var, momentum=0.2)
    for found, plain, true in (
        (mean, module.running_mean, exact.running_mean),
        (var, module.running_var, exact.running_var),
    ):
        assert_as_accurate(found, plain, true)
        assert_equal(found, true.to(dtype))  # rounded once


@by_dtype
def test_backward_keeps_its_input_and_a_bit_of_each_element(dtype):
    x, weight, bias, residual, mean, var, _ = rounded(norms.inputs((4, 64, 14, 14), "relu"), dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        fast_norm(x.requires_grad_(), weight, bias, mean, var, residual=residual, activation="relu")
    assert sum(kept) <= x.nbytes * (1 + 1 / 16) + 4 * weight.nbytes


@by_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_convolution_keeps_what_its_input_is_made_of(activation, dtype):
    from fast_backbones.kernels import _conv_narrow

    weight, bias = reals((12,), 1).requires_grad_(), reals((12,), 2).requires_grad_()
    filters = reals((8, 12, 3, 3), 3).requires_grad_()
    x = reals((2, 12, 9, 7), 0).to(dtype).contiguous(memory_format=LAYOUTS[1]).requires_grad_()
    gradients, sizes = [], []
    for convolve in (_conv_narrow.convolve, F.conv2d):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.setdefault(t.data_ptr(), t), lambda t: t
        ):
            y = batch_norm(x, weight, bias, activation=activation)
            taken = filters if convolve is _conv_narrow.convolve else filters.to(dtype)
            z = convolve(y, taken, None, (1, 1), (1, 1), (1, 1), 1)
        sizes.append(sum(t.nbytes for t in kept.values() if t.dim() == 4 and t.shape[1:] == y.shape[1:]))
        assert z.dtype is dtype
        z.square().float().sum().backward()
        gradients.append([t.grad.clone() for t in (x, weight, bias, filters)])
        for t in (x, weight, bias, filters):
            t.grad = None
    assert sizes == [x.nbytes, 2 * x.nbytes]
    for ours, plain in zip(*gradients):
        assert_equal(ours, plain)


@by_dtype
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_a_map_that_is_passed_on_gets_the_sum_of_its_gradients(training, dtype):
    """And known moments are those that would be computed."""
    from fast_backbones.kernels.batch_norm import fused

    runs = []
    for seed in (0, 20, 40):
        x, weight, bias, later, mean, var, grad = rounded(norms.inputs((3, 70, 12, 11), "relu", seed), dtype)
        known = OPS.batch_norm_affine(x, None, None, None, None, 1.0)[:2] if training else None

        def gradients(op, kind, inputs=(x, weight, bias, mean, var), uses=(grad, later), known=known):
            x, weight, bias, mean, var = (t.to(kind) if kind else t.clone() for t in inputs)
            leaves = [t.requires_grad_() for t in (x, weight, bias)]
            options = {"training": training, "activation": "relu"}
            if op is fused:
                y, passed = fused(*leaves, mean, var, moments=known, passes=True, **options)
            else:
                y, passed = op(*leaves, mean, var, **options), leaves[0]
            ((y * uses[0]).to(torch.float64).sum() + (passed * uses[1]).to(torch.float64).sum()).backward()
            return [y.detach(), mean, var, *(leaf.grad for leaf in leaves)]

        ours, again = gradients(fused, None), gradients(fused, None, known=None)
        for a, b in zip(ours, again, strict=True):
            assert_as_accurate(a, b, b.double())
        exact = gradients(batch_norm_ref, torch.float64)
        runs.append((ours, gradients(batch_norm_ref, None), exact))
    for i, name in enumerate(("y", "running_mean", "running_var", "dx", "dweight", "dbias")):
        assert_as_accurate(*(torch.cat([run[who][i].flatten() for run in runs]) for who in range(3)), name)


@by_dtype
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)], ids=str)
def test_depthwise_gradients_at_most_twice_pytorchs_error(stride, dtype):
    from fast_backbones.kernels import _conv_narrow

    runs = []
    for seed in range(4):
        x = reals((2, 24, 13, 11), seed).to(dtype).contiguous(memory_format=LAYOUTS[1])
        weight = reals((24, 1, 3, 3), seed + 10).to(dtype)
        window = stride, (1, 1), (1, 1), 24
        grad = reals(F.conv2d(x.float(), weight.float(), None, *window).shape, seed + 20).to(dtype)
        found = []
        for op, kind in ((_conv_narrow.convolve, dtype), (F.conv2d, dtype), (F.conv2d, torch.float64)):
            leaves = [t.to(kind).requires_grad_() for t in (x.detach(), weight.detach())]
            op(*leaves, None, *window).backward(grad.to(kind))
            found.append([leaf.grad for leaf in leaves])
        assert [t.dtype for t in found[0]] == [dtype, dtype]
        assert [t.stride() for t in found[0]] == [t.stride() for t in found[1]]
        runs.append(found)
    for i, name in enumerate(("dx", "dweight")):
        assert_as_accurate(*(torch.cat([run[who][i].flatten() for run in runs]) for who in range(3)), name)


@by_dtype
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_second_derivatives(training, dtype):
    data = rounded(norms.inputs((2, 5, 4, 4), "relu"), dtype)

    def second(op, data):
        x, weight, bias, residual, mean, var, grad = data
        leaves = [t.clone().requires_grad_() for t in (x, weight, residual, grad)]
        how = {"training": training, "activation": "relu"}
        y = op(*leaves[:2], bias, mean.clone(), var.clone(), residual=leaves[2], **how)
        first = torch.autograd.grad(y, leaves[:2], leaves[3], create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves[:2] + leaves[3:])

    found, exact = second(fast_norm, data), second(batch_norm_ref, [t.double() for t in data])
    for mine, true in zip(found, exact):
        assert (mine - true).norm() <= 4 * torch.finfo(dtype).eps * true.norm()


@by_dtype
def test_slices_of_wider_maps(dtype):
    data = rounded(norms.inputs((2, 24, 7, 7), "relu"), dtype)
    wide = torch.zeros(2, 40, 7, 7, dtype=dtype).contiguous(memory_format=LAYOUTS[1])
    wide[:, 8:32] = data[0]
    expected = fast_norm(*data[:3], activation="relu")
    assert_equal(fast_norm(wide[:, 8:32], *data[1:3], activation="relu"), expected)


@by_dtype
def test_everything_is_written(dtype):
    data = rounded(norms.inputs((2, 19, 5, 3), "relu"), dtype)
    clean = norm(fast_norm, data, activation="relu")
    with poisoned():
        found = norm(fast_norm, data, activation="relu")
    for name in norms.NAMES:
        assert_equal(found[name], clean[name], name)


@by_dtype
def test_empty_maps_have_the_type_and_lie_in_memory_of_ours(dtype):
    x = torch.zeros(1, 3, 5, 7, dtype=dtype)
    room = kernels.memory.empty_map(x, 9)
    assert room.dtype is dtype and room.shape == (1, 9, 5, 7)
    assert room.is_contiguous(memory_format=LAYOUTS[1])


def test_maps_of_two_types_run_as_the_formula():
    x, weight, bias, residual, *_ = norms.inputs((2, 8, 5, 5), "relu")
    mixed = {"residual": residual, "activation": "relu"}
    with pytest.raises(RuntimeError, match=r"residual is torch.float32, expected torch.bfloat16"):
        batch_norm(x.bfloat16(), weight, bias, **mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert "residual torch.float32" in refusal(
            "batch_norm", "native", x.bfloat16(), weight, bias, **mixed
        )
        found = batch_norm(x.bfloat16(), weight, bias, **mixed)
        assert_equal(found, batch_norm_ref(x.bfloat16(), weight, bias, **mixed))
    assert found.dtype is torch.float32


def test_refusals_say_why():
    x, weight = torch.ones(2, 3, 4, 4).double(), torch.ones(3).double()
    assert "torch.float64: native handles maps of" in refusal("batch_norm", "native", x, weight)


@pytest.mark.parametrize(
    "x, weight, words",
    [
        (torch.float32, torch.bfloat16, "weight is torch.bfloat16, expected torch.float32, x being"),
        (torch.bfloat16, torch.float16, "torch.float16, expected torch.bfloat16 or torch.float32, x being"),
    ],
)
def test_types_that_pytorch_does_not_mix_are_named(x, weight, words):
    with pytest.raises(RuntimeError, match=words):
        batch_norm(torch.ones(2, 3, 4, 4, dtype=x), torch.ones(3, dtype=weight))


def test_gates_of_another_type_than_autocasts_run_as_the_formula():
    x, *layers, _, _ = gates.inputs((2, 8, 5, 5, 4))
    with torch.autocast("cpu", torch.float16):
        for dtype in (torch.float32, torch.bfloat16):
            assert "torch.float16" in refusal("squeeze_excite", "native", x.to(dtype), *layers)
            assert (
                squeeze_excite(x.to(dtype), *layers).dtype is squeeze_excite_ref(x.to(dtype), *layers).dtype
            )


def test_doors_name_what_does_not_fit():
    x, weight, bias, residual, *_ = norms.inputs((2, 8, 5, 5), "relu")
    with pytest.raises(RuntimeError, match="residual is of another type than x"):
        OPS.batch_norm(x.bfloat16(), weight, bias, residual, None, None, 1e-5, "relu", False)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        OPS.batch_norm(x.double(), weight, bias, None, None, None, 1e-5, "relu", False)
    with pytest.raises(RuntimeError, match="weight must be float32"):
        OPS.batch_norm(x.bfloat16(), weight.bfloat16(), bias, None, None, None, 1e-5, "relu", False)


@by_dtype
@pytest.mark.parametrize("activation", ("none", "relu"))
def test_the_operators_keep_what_their_schemas_say(activation, dtype):
    checks = ("test_schema", "test_faketensor")
    x, weight, bias, residual, mean, var, grad = rounded(norms.inputs((2, 20, 4, 5), activation), dtype)
    args = (x, weight, bias, residual, None, None, 1e-5, activation, True)
    torch.library.opcheck(OPS.batch_norm.default, args, test_utils=checks)
    mask = OPS.batch_norm(*args)[4] if activation != "none" else None
    for needs in ((True, True, True), (False, True, False)):
        args = (grad, x, mask, weight, mean, var, 1e-5, False, *needs)
        torch.library.opcheck(OPS.batch_norm_backward.default, args, test_utils=checks)
    torch.library.opcheck(OPS.batch_norm_again.default, (x, mean, var, bias, activation), test_utils=checks)
    x, *layers, residual, grad = rounded(gates.inputs((2, 20, 4, 5, 6), activation), dtype)
    args = (x, *layers, residual, activation, True)
    torch.library.opcheck(OPS.squeeze_excite.default, args, test_utils=checks)
    _, means, hidden, made, mask = OPS.squeeze_excite(*args)
    kept = grad, x, mask if activation != "none" else None, layers[0], layers[2], means, hidden, made
    for needs in ((True,) * 6, (False, True, False, True, False, False)):
        torch.library.opcheck(OPS.squeeze_excite_backward.default, (*kept, *needs), test_utils=checks)
    torch.library.opcheck(OPS.empty_map.default, (x, 7), test_utils=("test_schema",))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(real_results(), sys.argv[1])
