"""The kernel microbenchmarks: shape files, costs of layers, candidates that must be right."""

import pytest
from fast_backbones.bench import layers
from fast_backbones.bench.shapes import Layer, make, read, shapes
from kernel_cases import OPS

import fast_backbones as fb


def test_shape_files_are_what_the_models_say():
    assert make.main(["--check"]) == 0


def test_shape_files_cover_every_op():
    for op in set(OPS) - {"l2_normalize", "squared_distances"}:  # a microsecond each, at one network's end
        assert shapes(op), op
        assert len(shapes(op, full=True)) >= len(shapes(op))


def test_a_line_that_is_no_layer_is_named(tmp_path):
    path = tmp_path / "net.txt"
    path.write_text("# comment\n\nconv2d 3 8 8 4 3 1 1 1 2 conv1: first\nconv2d 3 8 eight 4 3 1 1 1 2 x\n")
    with pytest.raises(ValueError, match=r"net\.txt:4: .*'eight'"):
        read(path)
    path.write_text("conv2d 3 8 8\n")
    with pytest.raises(ValueError, match=r"net\.txt:1: expected 11 columns, found 4"):
        read(path)


def test_costs_of_a_layer():
    conv = Layer("conv2d", 3, 8, 10, 4, 3, 2, 1, 1)
    assert (conv.p, conv.q) == (4, 5)
    assert conv.flops(2) == 2 * 2 * (4 * 4 * 5) * 3 * 9
    assert conv.bytes(2) == 4 * (2 * 3 * 80 + 4 * 27 + 4 + 2 * 4 * 20)
    assert Layer("linear", 10, 1, 1, 5, 1, 1, 0, 1).flops() == 100
    assert Layer("global_avg_pool", 6, 7, 7, 6, 1, 1, 0, 1).bytes() == 4 * (6 * 49 + 6)


SMALL = [
    Layer("pointwise_conv2d", 16, 6, 5, 32, 1, 1, 0, 1),
    Layer("pointwise_conv2d", 16, 6, 5, 32, 1, 2, 0, 1),
    Layer("conv2d", 16, 6, 5, 32, 3, 1, 1, 1),
    Layer("grouped_conv2d", 32, 6, 5, 32, 3, 2, 1, 8),
    Layer("stem_conv2d", 3, 12, 11, 16, 7, 2, 3, 1),
    Layer("max_pool2d", 16, 6, 5, 16, 3, 2, 1, 1),
    Layer("avg_pool2d", 16, 6, 5, 16, 3, 2, 1, 1),
    Layer("depthwise_conv2d", 16, 6, 5, 16, 3, 2, 1, 16),
    Layer("separable_conv2d", 16, 6, 5, 24, 3, 1, 1, 1),
    Layer("local_response_norm", 16, 6, 5, 16, 5, 1, 2, 1),
    Layer("squeeze_excite", 16, 6, 5, 4, 1, 1, 0, 1),
    Layer("global_avg_pool", 16, 6, 5, 16, 1, 1, 0, 1),
    Layer("linear", 20, 1, 1, 7, 1, 1, 0, 1),
]


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: f"{layer.op} {layer}")
def test_every_candidate_of_a_layer_is_benchmarked_and_right(layer):
    names = layers.candidates(layer, batch=2)
    assert names[0] == "reference"
    if (
        fb.build_info()["native"] and layer.op != "squeeze_excite"
    ):  # four kernels: a plan fuses them elsewhere
        assert any(name.endswith(layers.PACKED) for name in names)
    call = layers.inputs(layer, 2)
    for name in names:
        layers.assert_parity(layer, 2, name, layers.bind(layer, call, name)())


def test_a_wrong_kernel_gets_no_time():
    layer = SMALL[2]
    right = layers.bind(layer, layers.inputs(layer, 1), "reference")()
    with pytest.raises(AssertionError, match="PyTorch's own"):
        layers.assert_parity(layer, 1, "wrong", right * 1.0001)
    with pytest.raises(AssertionError, match="expected"):
        layers.assert_parity(layer, 1, "wrong", right[:, :1])
