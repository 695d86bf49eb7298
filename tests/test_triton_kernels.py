"""Every Triton kernel, on a GPU or else in Triton's interpreter: exact on integers, and as accurate as
PyTorch.

The layers are those that the C++ kernels are tested with (conv_layers.LAYERS), Winograd's aside.
"""

import pytest
import torch
from conv_layers import LAYERS, NONE, RELU, Layer, Place, layer, separable
from helpers import assert_as_accurate, assert_equal
from helpers import integers as made_integers
from helpers import reals as made_reals
from triton_device import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from fast_backbones.kernels._triton import excitation, ops
from fast_backbones.kernels._triton.launch import is_nhwc, pixel_stride

from fast_backbones.kernels import _gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IN_MODELS_TYPE = ("x", "weight", "depth_weight", "gate", "residual")  # the rest stays float32
MARK = 2048.0  # a number of all three types, in the memory around y


def grouped(why, x, filters, groups, **rest) -> Layer:
    rest = {"padding": 1, "activation": RELU, "kind": "grouped_conv2d"} | rest
    return layer(f"block-diagonal: {why}", x, filters, 3, groups=groups, **rest)


MORE = [
    *(
        grouped(f"{width} to {width * widening}, stride {stride}", (2, 64, *size), 64 * widening, 64 // width,
                stride=stride, residual=stride == 1)
        for widening, widths in ((1, (4, 8, 16, 32)), (2, (2, 4, 8, 16)))
        for width in widths
        for stride, size in ((1, (6, 7)), (2, (9, 6)))
    ),
    grouped("three groups that make no pair", (1, 24, 5, 4), 24, 3),
    layer("one row", (1, 70, 1, 1), 33, kind="linear", activation=RELU),
    layer("more rows than a narrow tile", (37, 70, 1, 1), 33, kind="linear"),
    layer("depthwise 3x3", (2, 40, 7, 9), 40, 3, padding=1, groups=40, kind="depthwise_conv2d",
    activation=RELU),
    layer("depthwise 7x7, stride 2, relu in front", (1, 19, 9, 8), 19, 7, padding=3, stride=2, groups=19,
          kind="depthwise_conv2d", pre_activation=RELU),
    separable("depth with a scale", (2, 20, 6, 5), 24, depth_activation=RELU),
]  # fmt: skip
CASES = [one for one in LAYERS + MORE if one.kind != "winograd_conv2d"]


def run(one: Layer, tensors: dict, wide: bool = False, way: str = "triton", tile: str = "") -> torch.Tensor:
    """The kernel's result; `wide` puts x, residual, gate and y into slices of wider memory."""
    n, dtype = tensors["x"].shape[0], tensors["x"].dtype
    params = one.params(n)
    exact = one.exact(tensors)
    y = Place(torch.empty_like(exact, dtype=dtype), wide, MARK)
    operands = {name: t for name, t in tensors.items() if name.endswith(("scale", "shift", "bias"))}
    for name in ("x", "residual"):
        if name in tensors:
            planar = name == "x" and one.option("nchw_in")
            source = tensors[name].contiguous() if planar else Place(tensors[name], wide, float("nan")).values
            assert planar or is_nhwc(source)
            operands[name] = source
    if "gate" in tensors:
        operands["gate"] = Place(tensors["gate"][:, :, None, None], wide, float("nan")).values[:, :, 0, 0]
    operands["weight"] = _gpu.packed(way, one.kind, params, tensors["weight"])
    if "depth_weight" in tensors:
        operands["depth_weight"] = ops.packed("depthwise_conv2d", params, tensors["depth_weight"])
    _gpu.launch(way, one.kind, params, {**operands, "y": y.values}, tile=tile)()
    assert (y.rest() == MARK).all(), "wrote beside its output"
    return y.values.contiguous()


def typed(tensors: dict, dtype: torch.dtype) -> dict:
    return {name: t.to(DEVICE, dtype if name in IN_MODELS_TYPE else t.dtype) for name, t in tensors.items()}


def integers(sizes, seed):
    return made_integers(sizes, seed).to(DEVICE)


def reals(sizes, seed):
    return made_reals(sizes, seed).to(DEVICE)


def accepted(one: Layer) -> bool:
    return ops.refusal(one.kind, one.params(one.x[0])) == ""


def products(one: Layer) -> int:
    """About how much there is to compute; the interpreter takes seconds for ten million."""
    n, c, h, w = one.x
    r, s = one.dense_kernel()
    return n * h * w * (c // one.groups * r * s * one.filters + c * one.params(1)["r"] * one.params(1)["s"])


def cases(layers: list[Layer]) -> list:
    """Each layer in bfloat16, every fourth in the other types, too; without a GPU the rest is slow."""
    found = []
    for number, one in enumerate(layers):
        for dtype in DTYPES:
            quick = DEVICE == "cuda" or (
                products(one) < 1 << 22 and (dtype is torch.bfloat16 or number % 4 == 0)
            )
            name = f"{one.why}-{str(dtype).removeprefix('torch.')}"
            found.append(pytest.param(one, dtype, id=name, marks=[] if quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize("one, dtype", cases([one for one in CASES if accepted(one) and one.is_exact()]))
def test_integers_to_the_bit(one, dtype, record_property):
    if DEVICE == "cpu":
        record_property("interpreted", one.kind)
    tensors = typed(one.inputs(), dtype)
    expected = one.exact(tensors).to(dtype)
    assert_equal(run(one, tensors), expected)
    if dtype is torch.bfloat16:
        assert_equal(run(one, tensors, wide=True), expected, "slices of wider maps")


def choosable() -> list[Layer]:
    """Where there is more than one way or tile; without a GPU the small ones."""
    found = [one for one in CASES if accepted(one) and one.kind in _gpu.PRODUCTS and one.is_exact()]
    return found[::6] if DEVICE == "cuda" else [one for one in found if products(one) < 1 << 17][::3]


@pytest.mark.parametrize("one, dtype", cases(choosable()))
def test_every_way_and_tile_on_integers_to_the_bit(one, dtype):
    tensors, params = typed(one.inputs(), dtype), one.params(one.x[0])
    expected = one.exact(tensors).to(dtype)
    others = {"residual": 1} if "residual" in tensors else {}
    for way in _gpu.ways(one.kind, {**params, **others}, dtype):
        for tile in _gpu.tiles(way, one.kind, params, dtype) or [""]:
            found = run(one, tensors, way != "cuda", way, tile)  # these slices are not on 16 bytes
            if way == "library":  # rounds the sum before the rest
                assert (found - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
            else:
                assert_equal(found, expected, f"{way} {tile}")


@pytest.mark.skipif(DEVICE != "cuda", reason="the order of a sum in a GPU's instructions")
@pytest.mark.parametrize("one, dtype", cases(choosable()))
def test_all_tiles_give_the_same_bits(one, dtype):
    tensors, params = typed(one.inputs("reals", 0), dtype), one.params(one.x[0])
    found = [
        run(one, tensors, False, "triton", tile) for tile in _gpu.tiles("triton", one.kind, params, dtype)
    ]
    for each in found[1:]:
        assert_equal(each, found[0])


@pytest.mark.parametrize("one, dtype", cases([one for one in CASES if accepted(one)][::3]))
def test_at_most_twice_pytorchs_error(one, dtype):
    """PyTorch computes all of the formula in that type; scales, shifts and sums are float32 here."""
    fast, plain, exact = [], [], []
    for seed in range(2):
        tensors = typed(one.inputs("reals", seed), dtype)
        fast.append(run(one, tensors).flatten())
        plain.append(one.reference({name: t.to(dtype) for name, t in tensors.items()}).flatten())
        exact.append(one.exact(tensors).flatten())
    assert_as_accurate(torch.cat(fast), torch.cat(plain), torch.cat(exact))


def test_few_layers_are_refused():
    refused = {one.why: ops.refusal(one.kind, one.params(one.x[0])) for one in CASES if not accepted(one)}
    assert len(refused) <= 2, refused


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 19, 5, 3), (3, 130, 1, 1), (1, 300, 9, 8)], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["dense", "slice"])
def test_affine(sizes, dtype, wide):
    x, residual = integers(sizes, 0).to(dtype), integers(sizes, 1).to(dtype)
    scale, shift, gate = integers(sizes[1:2], 2), integers(sizes[1:2], 3), integers(sizes[:2], 4).to(dtype)
    column = (slice(None), None, None)
    expected = (x.double() * scale[column] + shift[column]) * gate.double()[
        ..., None, None
    ] + residual.double()
    y = Place(torch.empty_like(x), wide, MARK)
    operands = {
        "weight": scale,
        "bias": shift,
        "gate": gate,
        "residual": Place(residual, wide, float("nan")).values,
    }
    ops.launch(
        "affine", {"activation": RELU}, {"x": Place(x, wide, float("nan")).values, "y": y.values, **operands}
    )()
    assert_equal(y.values.contiguous(), expected.relu().to(dtype))
    assert (y.rest() == MARK).all()
    ops.launch("affine", {"activation": NONE}, {"x": Place(x, wide, float("nan")).values, "y": y.values})()
    assert_equal(y.values.contiguous(), x)


POOLS = [  # sizes, window, stride, padding, ceil mode
    ((2, 19, 7, 9), 3, 2, 1, False),
    ((1, 70, 8, 8), 2, 2, 0, False),
    ((1, 16, 6, 7), 3, 2, 0, True),
    ((1, 16, 6, 7), 3, 1, 1, False),
    ((1, 8, 5, 5), (2, 3), (2, 1), (1, 0), True),
]


def pooled(sizes, window, stride, padding, ceil_mode) -> dict:
    def both(value):
        return (value, value) if isinstance(value, int) else value

    (r, s), (sh, sw), (ph, pw) = both(window), both(stride), both(padding)
    return {
        "r": r,
        "s": s,
        "stride_h": sh,
        "stride_w": sw,
        "pad_h": ph,
        "pad_w": pw,
        "ceil_mode": int(ceil_mode),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", POOLS, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["dense", "slice"])
def test_max_pool2d(case, dtype, wide):
    sizes, *window, ceil_mode = case
    x = reals(sizes, 0).to(dtype)
    x[0, 3, 2, 2] = float("nan")
    expected = torch.nn.functional.max_pool2d(x, *window, ceil_mode=ceil_mode)
    y = Place(torch.empty_like(expected), wide, MARK)
    params = pooled(sizes, *window, ceil_mode)
    ops.launch("max_pool2d", params, {"x": Place(x, wide, float("inf")).values, "y": y.values})()
    assert_equal(y.values.contiguous(), expected)
    assert (y.rest() == MARK).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", POOLS, ids=str)
@pytest.mark.parametrize("counted", [True, False], ids=["with padding", "inside"])
def test_avg_pool2d(case, dtype, counted):
    sizes, *window, ceil_mode = case
    x, bias = integers(sizes, 0).to(dtype), integers(sizes[1:2], 1)
    options = {"ceil_mode": ceil_mode, "count_include_pad": counted}
    exact = torch.nn.functional.avg_pool2d(x.double(), *window, **options)
    y = Place(torch.empty_like(exact, dtype=dtype), True, MARK)
    params = pooled(sizes, *window, ceil_mode) | {"count_include_pad": int(counted)}
    operands = {"x": Place(x, True, float("inf")).values, "y": y.values, "bias": bias}
    ops.launch("avg_pool2d", params, operands)()
    expected = exact.float() + bias[:, None, None]  # one division, rounded once
    assert_equal(y.values.contiguous(), expected.to(dtype))
    assert (y.rest() == MARK).all()
    divisor = {**params, "divisor": 5, "activation": RELU}
    ops.launch("avg_pool2d", divisor, {**operands, "bias": None})()
    exact = torch.nn.functional.avg_pool2d(x.double(), *window, **options, divisor_override=5).relu()
    assert_equal(y.values.contiguous(), exact.float().to(dtype), "divisor")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5)], ids=str)
def test_adaptive_average(size, dtype):
    x = integers((2, 40, 7, 9), 0).to(dtype)
    exact = torch.nn.functional.adaptive_avg_pool2d(x.double(), size)
    y = Place(torch.empty_like(exact, dtype=dtype), True, MARK)
    params = {"out_h": size[0], "out_w": size[1], "activation": NONE}
    ops.launch("avg_pool2d", params, {"x": Place(x, True, float("inf")).values, "y": y.values})()
    assert_equal(y.values.contiguous(), exact.float().to(dtype))
    assert (y.rest() == MARK).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 70, 7, 7), (3, 130, 9, 5)], ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["map", "rows"])
def test_global_avg_pool(sizes, dtype, rows):
    x = integers(sizes, 0).to(dtype)
    expected = x.double().mean((2, 3), keepdim=not rows).float().to(dtype)
    y = torch.full_like(expected, float("nan"))
    ops.launch("global_avg_pool", {}, {"x": Place(x, True, float("inf")).values, "y": y})()
    assert_equal(y, expected)


def test_strides_of_maps():
    wide = torch.empty(2, 5, 6, 40)[..., 3:20].permute(0, 3, 1, 2)
    assert is_nhwc(wide) and pixel_stride(wide) == 40
    assert not is_nhwc(torch.empty(2, 17, 5, 6)) and not is_nhwc(wide[:, :, ::2])
    assert is_nhwc(torch.empty(3, 8, 1, 1)) and pixel_stride(torch.empty(3, 8, 1, 1)) == 8


REFUSED = [
    ("winograd_conv2d", {}, "no Winograd"),
    ("depthwise_conv2d", {"r": 9, "s": 9}, "up to 49 taps"),
    ("separable_conv2d", {"r": 3, "s": 3, "pre_activation": 3}, "zero must stay zero"),
    ("conv2d", {"c": 64, "nchw_in": 1}, "planar"),
    ("nonsense", {}, "unknown kind"),
]


@pytest.mark.parametrize("kind, params, words", REFUSED, ids=[kind for kind, _, _ in REFUSED])
def test_refusals_say_why(kind, params, words):
    assert words in ops.refusal(kind, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, c, hidden, k", [(3, 70, 9, 33), (17, 64, 16, 128), (2, 30, 120, 20)])
def test_excitation(n, c, hidden, k, dtype):
    x, weight1, weight2 = integers((n, c), 0), integers((hidden, c), 1), integers((k, hidden), 2)
    x, weight1, weight2 = x.sign().to(dtype), weight1.sign().to(dtype), weight2.sign().to(dtype)
    vectors = {f"{name}{i}": integers((size,), 3 + i).float()
               for i, size in ((1, hidden), (2, k)) for name in ("scale", "bias")}  # fmt: skip
    wide = torch.full((n, k + 16), MARK, dtype=dtype, device=DEVICE)
    excitation.launch(x, weight1, weight2, wide[:, 8 : 8 + k], **vectors, activation1=RELU)()
    h = (x.double() @ weight1.double().t() * vectors["scale1"] + vectors["bias1"]).relu()
    assert_equal(h.to(dtype).double(), h, "the test's own numbers are exact")
    exact = h @ weight2.double().t() * vectors["scale2"] + vectors["bias2"]
    assert_equal(wide[:, 8 : 8 + k], exact.to(dtype))
    assert (wide[:, :8] == MARK).all()
    assert (wide[:, 8 + k :] == MARK).all()
