"""torch.compile(model, backend="fast_backbones"): what has a plan runs by it, the rest as it is."""

import importlib.metadata
import logging

import pytest
import torch
from fast_backbones.engine.guard import ATTRIBUTE
from helpers import assert_bit_equal, needs_native
from torch import nn

from fast_backbones.engine import compile_backend

pytestmark = needs_native


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))


class Broken(nn.Module):
    """A graph break lies between its blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.first, self.second = Block(), Block()

    def forward(self, x):
        x = self.first(self.stem(x))
        torch._dynamo.graph_break()
        return {"y": self.second(x), "pooled": x.mean((2, 3))}


@pytest.fixture
def parts(monkeypatch):
    """What the backend made of the graphs it was given."""
    made, start = [], compile_backend.Part.__init__
    monkeypatch.setattr(compile_backend.Part, "__init__", lambda p, *args: made.append(p) or start(p, *args))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def plans(part):
    states = [vars(module).get(ATTRIBUTE) for module in part.modules.values()]
    return [sorted(runner.plan.batch for runner in state.runners.values()) for state in states if state]


def compiled(model, **options):
    return torch.compile(model, backend=compile_backend.fast_backbones, options=options or None)


def image(batch=2):
    return torch.randn(batch, 3, 9, 8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_batches_of_any_size(parts, mode):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block(), nn.Flatten(), nn.Linear(8 * 72, 4)).eval()
    fast = compiled(model)
    with mode():
        for batch in (2, 5, 3, 2):
            x = image(batch)
            torch.testing.assert_close(fast(x), model(x))
    assert [plans(part) for part in parts] == [[[2]], [[2, 3, 5]]]


@torch.no_grad()
def test_graphs_on_both_sides_of_a_break(parts):
    model = Broken().eval()
    fast, x = compiled(model), image()
    for _ in range(2):
        torch.testing.assert_close(fast(x), model(x))
    assert [plans(part) for part in parts if plans(part)] == [[[2]], [[2]]]


@torch.no_grad()
def test_one_graph_of_blocks_that_are_alike(parts):
    blocks = [Block().eval() for _ in range(3)]
    for block in blocks:
        block.compile(backend=compile_backend.fast_backbones)
    x = torch.randn(1, 8, 6, 6)
    for block in blocks:
        torch.testing.assert_close(block(x), block.forward(x))
    assert sum(len(part.modules) for part in parts) == 3


@torch.no_grad()
def test_weights_may_change(parts):
    model = Block().eval()
    fast, x = compiled(model), torch.randn(2, 8, 6, 6)
    fast(x)
    model.conv.weight.mul_(2.0)
    model.bn.running_var.fill_(3.0)
    torch.testing.assert_close(fast(x), model(x))


def test_training_is_left_to_pytorch(parts, caplog):
    model, plain = Block(), Block()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 8, 6, 6)
    with caplog.at_level(logging.INFO, logger=compile_backend.__name__):
        compiled(model)(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(model.conv.weight.grad, plain.conv.weight.grad)
    assert "goes to eager" in caplog.text and not any(map(plans, parts))


@torch.no_grad()
def test_what_has_no_plan_may_go_to_inductor(parts, monkeypatch, caplog):
    from torch._inductor import compile_fx

    seen = []
    monkeypatch.setattr(
        compile_fx, "compile_fx", lambda graph, inputs: seen.append(len(inputs)) or graph.forward
    )
    rows = torch.randn(3, 4)
    layer = nn.Linear(4, 2)
    with caplog.at_level(logging.INFO, logger=compile_backend.__name__):
        assert_bit_equal(compiled(layer, fallback="inductor")(rows), layer(rows))
    assert seen == [3] and "goes to inductor: the input has 2 dimensions" in caplog.text


@pytest.mark.parametrize(
    "options, words",
    [({"fallback": "nothing"}, "fallback is 'nothing'"), ({"speed": 2}, "unknown option 'speed'")],
)
def test_options_that_make_no_sense(options, words):
    graph = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(ValueError, match=words):
        compile_backend.fast_backbones(graph, [image()], options=options)


def test_the_entry_point_names_it():
    """Where the package is installed, torch.compile finds it by name."""
    found = [
        p
        for p in importlib.metadata.entry_points(group="torch_dynamo_backends")
        if p.name == "fast_backbones"
    ]
    if not found:
        pytest.skip("the package is not installed")
    assert found[0].load() is compile_backend.fast_backbones
    assert "fast_backbones" in torch._dynamo.list_backends()
