"""torch.export and AOTInductor: what is saved loads in another process and gives the same numbers.

A model of ours is exported as its modules, so that the file needs nothing but PyTorch; a network that calls
fast_backbones.kernels is exported with these operators, and its file needs the library to be imported.
"""

import copy

import pytest
import torch
from engine_nets import settled
from helpers import assert_as_accurate, assert_bit_equal, needs_native, reals, run_python
from test_kernels_tracing import Net
from torch import nn

import fast_backbones as fb
from fast_backbones import engine, kernels

RUN = """
import sys, torch
{imports}
program, case = {load}, torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save([program(x) for x in case], sys.argv[3])
{checks}
"""


def results_elsewhere(folder, package, images, load, imports="", checks=""):
    """What the saved program gives for the images in a fresh process."""
    torch.save(images, folder / "images.pt")
    script = RUN.format(load=load, imports=imports, checks=checks)
    run_python("-c", script, str(package), str(folder / "images.pt"), str(folder / "results.pt"), timeout=600)
    return torch.load(folder / "results.pt", weights_only=True)


def operations(exported):
    return {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}


@torch.no_grad()
@pytest.mark.parametrize("which", [pytest.param("a backbone", marks=pytest.mark.slow), "an optimized model"])
def test_a_model_is_exported_as_its_modules(which, tmp_path):
    """Whether or not a plan runs it; the file needs neither this library nor the model's class."""
    model = settled(fb.mobilenetv1_025(num_classes=10))
    if which == "an optimized model":
        layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)
        )
        model = fb.optimize_(settled(layers))
    images = [reals((batch, 3, 33, 32), batch) for batch in (2, 5)]
    before = [model(x) for x in images]
    exported = torch.export.export(model, (images[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert all(name.startswith("aten.") for name in operations(exported))
    torch.export.save(exported, tmp_path / "model.pt2")
    found = results_elsewhere(
        tmp_path,
        tmp_path / "model.pt2",
        images,
        load="torch.export.load(sys.argv[1]).module()",
        checks='assert not any(name.startswith("fast_backbones") for name in sys.modules)',
    )
    exact = copy.deepcopy(model).double()
    for x, planned, elsewhere in zip(images, before, found, strict=True):
        assert_as_accurate(planned, elsewhere, exact(x.double()), which)
        torch.testing.assert_close(engine.plain_of(model)(x), elsewhere, rtol=1e-5, atol=1e-5)


@needs_native
@torch.no_grad()
def test_our_operators_are_exported_and_give_the_same_bits_elsewhere(tmp_path):
    net, images = Net().eval(), [reals((batch, 3, 33, 37), batch) for batch in (2, 5, 1)]
    exported = torch.export.export(net, (images[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    ours = {name for name in operations(exported) if name.startswith("fast_backbones.")}
    assert len(ours) >= 12 and "fast_backbones.winograd_conv2d.default" in ours
    torch.export.save(exported, tmp_path / "net.pt2")
    found = results_elsewhere(
        tmp_path,
        tmp_path / "net.pt2",
        images,
        imports="import fast_backbones",
        load="torch.export.load(sys.argv[1]).module()",
    )
    for x, elsewhere in zip(images, found, strict=True):
        assert_bit_equal(net(x), elsewhere)


@needs_native
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_aot_inductor_compiles_our_operators(layout, tmp_path):
    """Compiled once, for any batch, loaded where fast_backbones is imported."""
    net = Net().eval()
    images = [reals((batch, 3, 33, 37), batch).contiguous(memory_format=layout) for batch in (2, 5)]
    exported = torch.export.export(net, (images[0],), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "net.pt2"))
    found = results_elsewhere(
        tmp_path,
        package,
        images,
        imports="import fast_backbones, torch._inductor",
        load="torch._inductor.aoti_load_package(sys.argv[1])",
    )
    exact = copy.deepcopy(net).double()
    for x, elsewhere in zip(images, found, strict=True):
        with kernels.backend("reference"):
            plain, truth = net(x), exact(x.double())
        assert_as_accurate(elsewhere, plain, truth, f"AOTInductor, {len(x)} images")
        assert_as_accurate(elsewhere, net(x), truth, "beside eager")
