"""Capture and rewrites: each on the smallest network that shows it, run by plain PyTorch, no native code.

Every case computes the rewritten plan in float64 and compares it with the float64 modules: what is left is
rounding of 1e-16, so a wrong rewrite has nowhere to hide.
"""

import pytest
import torch
import torch.nn.functional as F
from fast_backbones.engine.capture import Uncapturable, capture
from fast_backbones.engine.convert import convert
from fast_backbones.engine.fuse import fuse
from fast_backbones.engine.lower import lower
from fast_backbones.engine.recipes import Norm, Recipe, fold
from torch import nn

from fast_backbones.engine import run_reference, select


def accept(kind, params):
    return ""


def graph_of(model, x):
    return convert(capture(model, model.forward, x))


def plan_of(model, x, refusal=accept):
    graph = graph_of(model, x)
    rewrites = fuse(graph, refusal)
    plan = select.make_plan(graph, x.is_contiguous(), refusal)
    plan.rewrites = rewrites
    lower(plan)
    return plan


def tensors_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def settle(model):
    """Eval mode, batch norm statistics far from the initial ones."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def assert_same_function(model, plan, x):
    """Plan and modules agree in float64, whole and in an arena full of NaN."""
    tensors = tensors_of(model)
    got = run_reference.run(plan, x, tensors, torch.float64)
    in_arena = run_reference.run_in_arena(
        plan, x, tensors, torch.full((plan.arena_bytes // 4 + 1,), torch.nan)
    )
    with torch.no_grad():
        plain = model(x)
        exact = model.double()(x.double())
    model.float()
    for ours, theirs in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(exact)):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.utils._pytree.tree_leaves(in_arena), torch.utils._pytree.tree_leaves(plain)
    ):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """Layers by name, and a forward given as a function of (self, x)."""

    def __init__(self, body, **layers):
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.body(self, x)


def conv(c=8, k=8, r=3, **options):
    return nn.Conv2d(c, k, r, padding=r // 2, bias=options.pop("bias", False), **options)


def norm(channels=8):
    return nn.BatchNorm2d(channels)


def bottleneck(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    y = m.bn2(m.conv2(y))
    y += x
    return m.relu(y)


def downsample(m, x):
    y = m.bn1(m.conv1(x))
    shortcut = m.bn2(m.conv2(x))
    y += shortcut
    return m.relu(y)


def tail(m, x):
    return m.fc(m.dropout(torch.flatten(m.pool(x), 1)))


def relu():
    return nn.ReLU(inplace=True)


NETS = {  # why: (network, kernels in order without layout copies, names fused into each step)
    "convolution, norm, activation": (
        Net(lambda m, x: m.relu(m.bn(m.conv(x))), conv=conv(), bn=norm(), relu=relu()),
        ["conv2d"],
        [["bn", "relu"]],
    ),
    "a bias in front of the norm": (
        Net(lambda m, x: m.bn(m.conv(x)), conv=conv(bias=True), bn=norm()),
        ["conv2d"],
        [["bn"]],
    ),
    "a norm without weight and bias": (
        Net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=nn.BatchNorm2d(8, affine=False)),
        ["conv2d"],
        [["bn"]],
    ),
    "two norms in a row": (
        Net(lambda m, x: m.b(m.a(m.conv(x))), conv=conv(), a=nn.BatchNorm2d(8), b=nn.BatchNorm2d(8)),
        ["conv2d"],
        [["a", "b"]],
    ),
    "residual added in place": (
        Net(bottleneck, conv1=conv(), bn1=norm(), conv2=conv(), bn2=norm(), relu=relu()),
        ["conv2d", "conv2d"],
        [["bn1", "relu"], ["bn2", "add", "relu"]],
    ),
    "residual on the left": (
        Net(lambda m, x: torch.relu(x + m.conv(x)), conv=conv()),
        ["conv2d"],
        [["add", "relu"]],
    ),
    "both terms are convolutions: the later one takes the sum": (
        Net(downsample, conv1=conv(), bn1=norm(), conv2=conv(), bn2=norm(), relu=relu()),
        ["conv2d", "conv2d"],
        [["bn1"], ["bn2", "add", "relu"]],
    ),
    "a convolution with a second reader keeps its result": (
        Net(lambda m, x: (lambda y: torch.sigmoid(y) + m.bn(y))(m.conv(x)), conv=conv(), bn=norm()),
        ["conv2d", "affine", "affine"],
        [[], [], ["add"]],
    ),
    "a sum with itself": (
        Net(lambda m, x: (lambda y: y + y)(m.conv(x)), conv=conv()),
        ["conv2d", "affine"],
        [[], []],
    ),
    "activation before the sum": (
        Net(lambda m, x: x + torch.relu(m.conv(x)), conv=conv()),
        ["conv2d", "affine"],
        [["relu"], []],
    ),
    "norm after the activation": (
        Net(lambda m, x: m.bn(torch.relu(m.conv(x))), conv=conv(), bn=norm()),
        ["conv2d", "affine"],
        [["relu"], []],
    ),
    "a second sum finds no free convolution": (
        Net(lambda m, x: (m.conv(x) + x) + x, conv=conv()),
        ["conv2d", "affine"],
        [["add"], []],
    ),
    "a scaled residual is a step of its own": (
        Net(lambda m, x: torch.add(m.conv(x), x, alpha=2), conv=conv()),
        ["conv2d", "affine"],
        [[], []],
    ),
    "a broadcast sum is no residual": (
        Net(lambda m, x: m.conv(x) + m.pool(x), conv=conv(), pool=nn.AdaptiveAvgPool2d(1)),
        ["conv2d", "global_avg_pool", "aten"],
        [[], [], []],
    ),
    "the tail": (
        Net(tail, pool=nn.AdaptiveAvgPool2d(1), dropout=nn.Dropout(0.5), fc=nn.Linear(8, 5)),
        ["global_avg_pool", "linear"],
        [["flatten"], []],
    ),
    "the tail as a mean": (
        Net(lambda m, x: m.fc(x.mean([-1, -2])), fc=nn.Linear(8, 5)),
        ["global_avg_pool", "linear"],
        [[], []],
    ),
    "the tail as a window of the whole map": (
        Net(lambda m, x: m.fc(F.avg_pool2d(x, 10).view(x.shape[0], -1)), fc=nn.Linear(8, 5)),
        ["global_avg_pool", "linear"],
        [["flatten"], []],
    ),
    "a pooled map with a second reader": (
        Net(
            lambda m, x: (lambda p: m.fc(p.flatten(1)).sum() + p.sum())(m.pool(m.conv(x))),
            conv=conv(), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(8, 5),
        ),
        ["conv2d", "global_avg_pool", "linear", "aten", "aten", "aten"],
        [[], [], [], [], [], []],
    ),
    "activation of a linear layer": (
        Net(lambda m, x: m.fc(x.mean((2, 3))).relu(), fc=nn.Linear(8, 5)),
        ["global_avg_pool", "linear"],
        [[], ["relu"]],
    ),
    "squeeze and excite behind a convolution that does not commute with the mean": (
        Net(
            lambda m, x: (lambda y: y * torch.sigmoid(m.gate(m.pool(y))))(m.conv(x)),
            conv=conv(), pool=nn.AdaptiveAvgPool2d(1), gate=conv(r=1, bias=True),
        ),
        ["conv2d", "global_avg_pool", "linear", "affine"],
        [[], [], ["sigmoid"], []],
    ),
    "operations without a kernel": (
        Net(lambda m, x: m.conv(F.softmax(m.conv(x), 1).cumsum(1)), conv=conv()),
        ["conv2d", "aten", "aten", "conv2d"],
        [[], [], [], []],
    ),
    "views of a feature map": (
        Net(
            lambda m, x: torch.cat([m.conv(part.contiguous()) for part in m.first(x).chunk(2, 1)], 1),
            first=conv(), conv=conv(4, 4),
        ),
        ["conv2d", "conv2d", "conv2d"],
        [[], [], []],
    ),
    "a dropped check and a cast to the same type": (
        Net(lambda m, x: m.conv(x.to(m.conv.weight.dtype)).to(x.dtype).contiguous().clone(), conv=conv()),
        ["conv2d"],
        [[]],
    ),
    "padding by name": (
        Net(lambda m, x: m.b(m.a(x)),
            a=nn.Conv2d(8, 8, 3, padding="same", dilation=2), b=nn.Conv2d(8, 8, 3, padding="valid"),
        ),
        ["conv2d", "conv2d"],
        [[], []],
    ),
    "max pool": (
        Net(lambda m, x: m.pool(m.conv(x)), conv=conv(), pool=nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        ["conv2d", "max_pool2d"],
        [[], []],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("why", NETS)
def test_rewrites_keep_the_function(why, layout):
    model, kernels, fused = NETS[why]
    settle(model)
    x = torch.randn(3, 8, 10, 10).contiguous(memory_format=layout)
    plan = plan_of(model, x)
    steps = [s for s in plan.steps if s.kernel not in ("to_nhwc", "to_nchw")]
    assert [s.kernel for s in steps] == kernels
    assert [len(s.fused) for s in steps] == list(map(len, fused))
    for step, names in zip(steps, fused):
        assert all(
            want == got or want in ("add", "relu", "flatten", "sigmoid")
            for want, got in zip(names, step.fused)
        )
    assert_same_function(model, plan, x)


def test_rewrites_report_how_often_they_fitted():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8)
            self.relu, self.fc, self.drop = relu(), nn.Linear(8, 3), nn.Dropout()

        def forward(self, x):
            return self.drop(self.fc(torch.flatten(F.adaptive_avg_pool2d(bottleneck(self, x), 1), 1)))

    graph = graph_of(settle(Block()), torch.randn(1, 8, 6, 6))
    counts = {name: count for name, count in fuse(graph, accept).items() if count}
    assert counts == {"drop_identity": 1, "fuse_epilogues": 5, "fuse_tail": 1}
    assert [n.op for n in graph.nodes] == ["input", "conv2d", "conv2d", "global_avg_pool", "linear"]


def test_folding_is_done_in_float64():
    """One rounding: the folded weight is the float32 nearest to the exact product."""
    torch.manual_seed(0)
    tensors = {name: torch.rand(64) + 0.3 for name in ("mean", "var", "gamma", "beta", "bias")}
    tensors["w"] = torch.randn(64, 32, 3, 3)
    recipe = Recipe("w", "bias", (Norm("mean", "var", 1e-5, "gamma", "beta"),))
    weight, bias = fold(recipe, tensors)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    scale = exact["gamma"] / (exact["var"] + 1e-5).sqrt()
    assert torch.equal(weight, (exact["w"] * scale.view(-1, 1, 1, 1)).float())
    assert torch.equal(bias, ((exact["bias"] - exact["mean"]) * scale + exact["beta"]).float())
    assert set(recipe.names()) == set(tensors)


def test_a_norm_with_negative_variance_gives_nan_as_pytorch_does():
    model = settle(NETS["convolution, norm, activation"][0])
    model.bn.running_var[3] = -1.0
    x = torch.randn(1, 8, 5, 5)
    got = run_reference.run(plan_of(model, x), x, tensors_of(model))
    assert got.isnan()[:, 3].all()
    assert torch.equal(got.isnan(), model(x).isnan())


def test_norm_in_training_mode_is_not_folded():
    """track_running_stats=False normalises by the batch also in eval mode."""
    model = Net(
        lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=nn.BatchNorm2d(8, track_running_stats=False)
    ).eval()
    x = torch.randn(4, 8, 6, 6)
    plan = plan_of(model, x)
    assert [s.kernel for s in plan.steps] == ["conv2d", "aten"]
    assert_same_function(model, plan, x)


def test_weights_computed_from_parameters_alone_are_packed_once():
    """A standardised weight, a table of connections: evaluated when weights are packed, not in every call."""

    def body(m, x):
        weight = m.conv.weight - m.conv.weight.mean()
        scale = m.bn.weight.view(1, -1, 1, 1)
        return F.conv2d(x, weight) * scale + m.bn.bias.view(-1, 1, 1)

    model = settle(Net(body, conv=conv(), bn=norm()))
    x = torch.randn(2, 8, 6, 6)
    plan = plan_of(model, x)
    assert [s.kernel for s in plan.steps if s.op == "conv2d"] == ["conv2d"]
    assert all(s.native for s in plan.steps) and len(plan.computed) >= 3
    assert_same_function(model, plan, x)


def test_weights_that_depend_on_the_image_or_on_chance_stay_with_pytorch():
    for body in (
        lambda m, x: F.conv2d(x, m.conv.weight * x.mean()),
        lambda m, x: F.conv2d(x, m.conv.weight + 0 * torch.rand_like(m.conv.weight)),
    ):
        model = Net(body, conv=conv()).eval()
        x = torch.randn(2, 8, 6, 6)
        plan = plan_of(model, x)
        assert [s.kernel for s in plan.steps if s.call and "conv2d" in str(s.call[0])] == ["aten"]
        assert_same_function(model, plan, x)


def test_a_map_whose_first_dimension_is_not_the_batch_stays_with_pytorch():
    """Kernels are told how many images the model was given."""
    model = Net(lambda m, x: m.conv(m.conv(x).view(-1, 8, 5, 5)).view(x.shape).relu(), conv=conv()).eval()
    x = torch.randn(2, 8, 10, 10)
    plan = plan_of(model, x)
    assert [s.kernel for s in plan.steps if s.op in ("conv2d", "affine")] == ["conv2d", "affine"]
    assert sum(s.kernel == "aten" for s in plan.steps) == 3
    assert_same_function(model, plan, x)


def test_return_values_keep_their_structure():
    def body(m, x):
        y = m.conv(x)
        return {
            "maps": [y, torch.relu(y)],
            "none": None,
            "number": 3,
            "image": x,
            "pair": (y.mean([2, 3]), y),
        }

    model = Net(body, conv=conv()).eval()
    x = torch.randn(2, 8, 6, 6)
    plan = plan_of(model, x)
    got, expected = run_reference.run(plan, x, tensors_of(model)), model(x)
    assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(expected)
    torch.testing.assert_close(got, expected)
    assert got["image"] is x and got["maps"][0] is got["pair"][1]


class TestRefusedCaptures:
    """Programs whose meaning a functional graph would not keep."""

    @staticmethod
    def reason(body, **layers):
        with pytest.raises(Uncapturable) as error:
            graph_of(Net(body, **layers).eval(), torch.randn(2, 8, 6, 6))
        return str(error.value)

    def test_input_changed_in_place(self):
        assert "input" in self.reason(lambda m, x: m.conv(x.relu_()), conv=conv())

    def test_buffer_changed_in_place(self):
        def body(m, x):
            m.bn.running_mean.add_(1)
            return m.conv(x)

        assert "buffer" in self.reason(body, conv=conv(), bn=nn.BatchNorm2d(8))

    def test_in_place_through_a_view(self):
        def body(m, x):
            y = m.conv(x)
            left, _ = y.chunk(2, 1)
            left.relu_()
            return y

        assert "another tensor" in self.reason(body, conv=conv())

    def test_in_place_beside_dropout(self):
        """In eval mode dropout returns its input itself, so z changes with y."""

        def body(m, x):
            y = m.conv(x)
            z = F.dropout(y, 0.5, False)
            y.relu_()
            return z

        assert "another tensor" in self.reason(body, conv=conv())

    def test_a_constant_tensor(self):
        assert "neither" in self.reason(lambda m, x: m.conv(x) * torch.tensor(2.0), conv=conv())

    def test_a_returned_parameter(self):
        assert "parameters" in self.reason(lambda m, x: (m.conv(x), m.conv.weight), conv=conv())

    def test_what_torch_export_cannot_trace(self):
        reason = self.reason(lambda m, x: m.conv(x) if x.sum() > 0 else x, conv=conv())
        assert reason.startswith("the forward asks for values of tensors")
        reason = self.reason(lambda m, x: m.conv(x).nothing(), conv=conv())
        assert reason.startswith("torch.export: AttributeError")


def test_capture_leaves_the_model_alone():
    model = settle(NETS["residual added in place"][0])
    before = {name: (id(t), t.data_ptr(), t._version) for name, t in tensors_of(model).items()}
    keys = set(model.__dict__)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append("hook"))
    graph = graph_of(model, torch.randn(1, 8, 6, 6))
    handle.remove()
    assert {name: (id(t), t.data_ptr(), t._version) for name, t in tensors_of(model).items()} == before
    assert set(model.__dict__) == keys and not calls, "hooks of the root run around a plan, not inside"
    assert {node.attrs["recipe"].weight for node in graph.nodes if node.op == "conv2d"} == {
        "conv1.weight",
        "conv2.weight",
    }


class TestSelect:
    """The kernel depends on the layer alone."""

    @staticmethod
    def kernel(layer, size=16, refusal=accept):
        model = Net(lambda m, x: m.conv(x), conv=layer).eval()
        plan = plan_of(model, torch.randn(1, layer.in_channels, size, size), refusal)
        return plan.steps[0]

    def test_3x3_goes_to_winograd_from_32_channels_on(self):
        assert self.kernel(conv(32, 32)).kernel == "winograd_conv2d"
        assert self.kernel(conv(31, 32)).kernel == "conv2d"
        assert self.kernel(conv(32, 31)).kernel == "conv2d"

    def test_5x5_goes_to_winograd_where_there_are_tiles_enough(self):
        assert self.kernel(conv(32, 32, r=5)).kernel == "winograd_conv2d"
        few = self.kernel(conv(32, 32, r=5), size=12)
        assert few.kernel == "conv2d" and "tiles of 4 outputs: pays from 40 on" in few.refusals[0]

    def test_a_small_output_stays_direct(self):
        step = self.kernel(conv(64, 64), size=3)
        assert step.kernel == "conv2d" and "3x3" in step.refusals[0]

    @pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"r": 9}, {"r": 1}])
    def test_other_shapes_are_no_case_for_winograd(self, options):
        step = self.kernel(conv(64, 64, **options))
        assert step.kernel == "conv2d" and not step.refusals

    @pytest.mark.parametrize("width", [4, 8, 16, 32])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_grouped(self, width, stride):
        assert self.kernel(conv(64, 64, groups=64 // width, stride=stride)).kernel == "grouped_conv2d"
        assert self.kernel(conv(32, 64, groups=64 // width, stride=stride)).kernel == "grouped_conv2d"

    def test_grouped_declines_in_words(self):
        step = self.kernel(conv(64, 192, groups=8))
        assert step.kernel == "conv2d" and step.refusals == [
            "grouped_conv2d: 8 channels a group, 64 to 192 channels"
        ]

    def test_what_the_library_says_is_kept(self):
        def refusal(kind, params):
            return "" if kind == "conv2d" else "not today"

        step = self.kernel(conv(64, 64), refusal=refusal)
        assert step.kernel == "conv2d" and step.refusals == ["winograd_conv2d: not today"]

    def test_no_kernel_at_all(self):
        model = settle(NETS["convolution, norm, activation"][0])
        x = torch.randn(2, 8, 6, 6)
        plan = plan_of(model, x, lambda kind, params: "no")
        assert [s.kernel for s in plan.steps] == ["aten"] and plan.steps[0].refusals[-1] == "conv2d: no"
        assert_same_function(model, plan, x)

    def test_a_planar_image_is_read_in_place_where_the_kernel_can(self):
        def refusal(kind, params):
            return "planar" if params.get("nchw_in") else ""

        model = Net(lambda m, x: m.conv(x), conv=conv()).eval()
        x = torch.randn(2, 8, 6, 6)
        assert plan_of(model, x).steps[0].params["nchw_in"] == 1
        copied = plan_of(model, x, refusal)
        assert [s.kernel for s in copied.steps] == ["to_nhwc", "conv2d", "to_nchw"]
        assert_same_function(model, copied, x)
