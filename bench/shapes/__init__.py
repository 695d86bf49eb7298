"""Layer shapes of real networks (text files beside this one), read back as `Layer` objects."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Layer:
    """One distinct layer. `count` is how often its network has it; neither count nor why is part of its
    identity."""

    op: str
    c: int
    h: int
    w: int
    k: int
    r: int
    stride: int
    padding: int
    groups: int
    count: int = field(compare=False, default=1)
    why: str = field(compare=False, default="")

    def __str__(self) -> str:
        """Short id for tests: "256x56x56 k64 r1 s1" plus groups when there are any."""
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.c}x{self.h}x{self.w} k{self.k} r{self.r} s{self.stride}{groups}"

    @property
    def p(self) -> int:
        """Rows of the output."""
        return 1 if self.op == "global_avg_pool" else (self.h + 2 * self.padding - self.r) // self.stride + 1

    @property
    def q(self) -> int:
        """Columns of the output."""
        return 1 if self.op == "global_avg_pool" else (self.w + 2 * self.padding - self.r) // self.stride + 1

    def flops(self, batch: int = 1) -> int:
        """Arithmetic of the direct algorithm: two per multiply-accumulate; pools count one per element they
        read, norms one per root and division."""
        if self.op in ("max_pool2d", "avg_pool2d"):
            return batch * self.k * self.p * self.q * self.r * self.r
        if self.op == "local_response_norm":
            return batch * self.c * self.h * self.w * (2 * self.r + 6)
        if self.op == "squeeze_excite":
            return batch * self.c * (2 * self.h * self.w + 4 * self.k)
        if self.op == "global_avg_pool":
            return batch * self.c * self.h * self.w
        if self.op == "separable_conv2d":
            return 2 * batch * self.c * self.p * self.q * (self.r * self.r + self.k)
        return 2 * batch * self.k * self.p * self.q * (self.c // self.groups) * self.r * self.r

    def bytes(self, batch: int = 1) -> int:
        """Float32 bytes of input, weight, bias and output, each once."""
        if self.op == "squeeze_excite":
            return 4 * (2 * batch * self.c * self.h * self.w + (2 * self.c + 1) * self.k + self.c)
        has_weight = self.op not in ("max_pool2d", "avg_pool2d", "global_avg_pool", "local_response_norm")
        weight = self.k * (self.c // self.groups) * self.r * self.r + self.k if has_weight else 0
        if self.op == "separable_conv2d":
            weight = self.c * self.r * self.r + self.c + self.k * self.c + self.k
        return 4 * (batch * self.c * self.h * self.w + weight + batch * self.k * self.p * self.q)


def read(path: Path) -> list[Layer]:
    """The layers of one file. ValueError names file and line of anything that is not a layer."""
    layers = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        op, *values = line.split(maxsplit=10)
        if len(values) != 10:
            raise ValueError(f"{path.name}:{number}: expected 11 columns, found {1 + len(values)}")
        try:
            layers.append(Layer(op, *map(int, values[:9]), why=f"{path.stem} {values[9]}"))
        except ValueError as problem:
            raise ValueError(f"{path.name}:{number}: {problem}") from problem
    return layers


def shapes(op: str, *, full: bool = False) -> list[Layer]:
    """Distinct layers of an op over all networks.

    By default a handful: the costliest layer of each kind. Kernel size, stride and network make the kind; for
    grouped convolutions, kernel size, stride and the channels of a group. With `full` all layers. A layer
    that several networks share appears once, with the largest of their counts and the first one's words.
    """
    files = sorted(HERE.glob("*.txt"))
    layers = [(path.stem, layer) for path in files for layer in read(path) if layer.op == op]
    if not full:
        costliest: dict[tuple, tuple[str, Layer]] = {}
        for network, layer in sorted(layers, key=lambda item: -item[1].count * item[1].flops()):
            kind = layer.c // layer.groups if layer.groups > 1 else network
            costliest.setdefault((layer.r, layer.stride, kind), (network, layer))
        layers = [item for item in layers if item in costliest.values()]
    chosen: dict[Layer, Layer] = {}
    for _, layer in layers:
        known = chosen.get(layer)
        if known is None or layer.count > known.count:
            chosen[layer] = replace(known or layer, count=layer.count)
    return list(chosen.values())
