"""A network cut into parts of a few convolutions, each of which runs as a model of its own.

parts_of(model)    the parts, in order; together they make every call of the network's forward
Part               one of them: `engine.why_not_fused(part, x)` speaks of its own program

Through a whole network that nobody has trained, gradients of 16 bits are wrong by 20 to 100 % in any
computation, as ReLU falls on the other side for a hundredth of all values. In a part they are not.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from fast_backbones.backbones._chain import Chain
from fast_backbones.backbones.bninception import MODULES
from fast_backbones.backbones.densenet import DenseBlock
from torch import Tensor, nn

from fast_backbones import backbones
from fast_backbones.backbones import BNInception, DenseNet

CONVOLUTIONS = 3  # of a part, or more where a block has more; linear layers count as well
DENSE_LAYERS = 3  # of a dense block in a part

Call = Callable[[Tensor], Tensor]


class Part(backbones.Backbone):
    """Some calls of a network, as a model. It holds the whole network, whose weights it reads.

    Args:
        name: of the module that it begins with. calls: what it does, one after the other.
        source: the part whose result it reads; None for the part before. tiles: how often it reads that side
            by side in each direction, where a head wants larger maps than small images give.
    """

    __module__ = "fast_backbones.backbones.part"  # others' forwards are not traced

    def __init__(
        self, model: nn.Module, name: str, calls: list[Call], source: str | None = None, tiles: int = 1
    ):
        super().__init__()
        self.model, self.name, self.calls, self.source, self.tiles = model, name, calls, source, tiles

    def forward_modules(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = call(x)
        return x


def parts_of(model: backbones.Backbone) -> list[Part]:
    """A part begins in front of a convolution, once the part before has enough of them."""
    parts: list[Part] = []
    enough = True
    for name, call, convolutions in _calls(model):
        if enough and convolutions:
            parts.append(Part(model, name, []))
            count = 0
        parts[-1].calls.append(call)
        count += convolutions
        enough = count >= CONVOLUTIONS
    if isinstance(model, Chain) and model.aux_logits:
        for stage, head in model.auxiliary_heads.items():
            place = next(i for i, part in enumerate(parts, 1) if part.name == stage)
            tiles = 4 if hasattr(model, "AuxLogits") else 1
            parts.insert(place, Part(model, head, [model.get_submodule(head)], stage, tiles))
    return parts


def _calls(model: backbones.Backbone) -> Iterator[tuple[str, Call, int]]:
    """Name, call and number of convolutions of all that a forward does, in order."""
    if isinstance(model, BNInception):
        yield from _calls_of_bninception(model)
    else:
        last = model.feature_info[-1]["module"].split(".")[0]
        for name, child in model.named_children():
            if name not in getattr(model, "auxiliary_heads", {}).values():
                yield from _opened(name, child)
            if name == last:
                break
    if isinstance(model, DenseNet):
        yield "relu", F.relu, 0
    yield "head", model.forward_head, 1


def _opened(name: str, module: nn.Module) -> Iterator[tuple[str, Call, int]]:
    """A block or a layer; those in a sequence, one by one; some layers of a dense block at a time."""
    if type(module) is nn.Sequential:
        for inner, child in module.named_children():
            yield from _opened(f"{name}.{inner}", child)
    elif isinstance(module, DenseBlock):
        layers = list(module.values())
        for i in range(0, len(layers), DENSE_LAYERS):
            yield f"{name}.{i}", partial(_dense, layers[i : i + DENSE_LAYERS]), 2 * DENSE_LAYERS
    else:
        yield name, module, sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in module.modules())


def _dense(layers: list[nn.Module], x: Tensor) -> Tensor:
    """Some layers of a dense block: all maps before them are one."""
    features = [x]
    for layer in layers:
        features.append(layer(features))
    return torch.cat(features, 1)


def _calls_of_bninception(model: nn.Module) -> Iterator[tuple[str, Call, int]]:
    yield "conv1_7x7_s2", partial(model.conv, "conv1_7x7_s2"), 1
    yield "pool1_3x3_s2", model.pool1_3x3_s2, 0
    yield "conv2_3x3_reduce", partial(model.conv, "conv2_3x3_reduce"), 1
    yield "conv2_3x3", partial(model.conv, "conv2_3x3"), 1
    yield "pool2_3x3_s2", model.pool2_3x3_s2, 0
    for name in MODULES:
        yield f"inception_{name}", partial(model.inception, f"inception_{name}"), 6
