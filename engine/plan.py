"""A network as plain data: what is computed, where it lies, in which order, and what waits for what.

    Value      a tensor that flows between steps
    Step       one kernel call (or a PyTorch call), with its parameters and the recipe of its weights
    Loop       a part of the schedule that runs over the batch in chunks of images
    Place      where a value lies: arena, model input, output; its pixel stride
    Instance   a step on the images [n0, n1)
    Plan       all of it

Nothing here computes: run_cpu.py runs a plan with the kernels, run_reference.py with plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .deps import Columns, Extent
from .recipes import Filters

ARENA, INPUT = 0, 1  # slots of a native plan; outputs follow
FLOAT = 4  # bytes

CONVOLUTIONS = ("conv2d", "winograd_conv2d", "grouped_conv2d", "depthwise_conv2d")
OPERANDS = {"x": "ldx", "residual": "ldr", "gate": "ldg"}  # of a kernel, and the parameter with its stride


@dataclass(frozen=True)
class Ref:
    """Stands for a value in the arguments of a PyTorch call."""

    value: int


@dataclass
class Value:
    """`home` is where it lives while the plan runs:

    arena    NHWC floats (or rows [N, C]) inside the arena
    output   the same, in a tensor that the caller receives
    planar   contiguous NCHW, in a tensor that the caller receives
    input    the model's input, as it came
    object   any PyTorch result that no kernel reads
    """

    id: int
    name: str
    shape: tuple[int, ...] | None
    stride: tuple[int, ...] | None = None  # eager PyTorch's, for what the caller receives
    home: str = "arena"
    same_as: int | None = None  # shows the bytes of another value: a slice of its channels, or a flatten
    channel: int = 0  # where in it
    gap: int = 0  # channels at the start that nobody writes

    @property
    def pixels(self) -> int:
        """Per image."""
        assert self.shape is not None
        return self.shape[2] * self.shape[3] if len(self.shape) == 4 else 1

    @property
    def is_external(self) -> bool:
        """Whether a kernel writes it into a tensor that the caller receives."""
        return self.home in ("output", "planar") and self.same_as is None

    @property
    def channels(self) -> int:
        assert self.shape is not None
        return self.shape[1]


@dataclass
class Step:
    """inputs: value ids, whose roles `roles` tells. output: a value id.

    kernel: a kind of the native library, or "aten" for a call through PyTorch.
    params: the kernel's parameters that do not depend on the batch and the placement.
    recipes: where its constant operands come from, by the parts in weights.OPERANDS.
    """

    op: str
    kernel: str
    name: str
    inputs: list[int]
    output: int
    params: dict[str, Any] = field(default_factory=dict)
    recipes: dict[str, Filters] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # kernels that declined, and why
    missed: list[str] = field(default_factory=list)  # rewrites that left this a step of its own, and why
    call: tuple[Any, Any, Any] | None = None  # target, args, kwargs of an ATen call; values are Refs
    roles: tuple[str, ...] = ("x", "residual")  # of as many inputs as there are
    attrs: dict[str, Any] = field(default_factory=dict)  # what the formula in plain PyTorch needs

    def input(self, role: str) -> int | None:
        return dict(zip(self.roles, self.inputs)).get(role)

    @property
    def native(self) -> bool:
        return self.kernel != "aten"


@dataclass
class Loop:
    """Run the body over the images in chunks: all of the body for one chunk, then for the next."""

    chunk: int
    body: list[int | Loop]

    def steps(self) -> list[int]:
        found: list[int] = []
        for item in self.body:
            found += item.steps() if isinstance(item, Loop) else [item]
        return found


@dataclass(frozen=True)
class Place:
    """Where the owner of the bytes lies, and the first channel of this value in each of its pixels.

    offset: of image 0 of the loop at `depth` (0: of the batch).
    pixel_stride: floats from pixel to pixel; of rows [N, C], from row to row.
    gap: channels at the start of each of the owner's pixels that nobody writes.
    """

    slot: int
    offset: int
    image_bytes: int
    pixel_stride: int
    depth: int = 0
    channel: int = 0
    channels: int = 0  # 0: all
    gap: int = 0

    @property
    def image_stride(self) -> int:
        """Floats from image to image."""
        return self.image_bytes // FLOAT


@dataclass(frozen=True)
class Instance:
    """A step on the images [first, last). starts[d]: first image of the current chunk of loop depth d."""

    step: int
    first: int
    last: int
    starts: tuple[int, ...]

    def address(self, place: Place) -> tuple[int, int]:
        """(slot, byte offset) of this instance's first image."""
        start = self.starts[place.depth]
        offset = place.offset + (self.first - start) * place.image_bytes
        return place.slot, offset + place.channel * FLOAT

    def extent(self, place: Place) -> Extent:
        """Which bytes of the owner these images are, and which channels of them are meant."""
        first = place.offset + (self.first - self.starts[place.depth]) * place.image_bytes
        last = first + (self.last - self.first) * place.image_bytes
        return Extent(place.slot, first, last, columns_of(place))


def columns_of(place: Place) -> Columns:
    stride, first = place.pixel_stride, place.channel
    return Columns(
        (place.offset % (stride * FLOAT), stride), first, first + (place.channels or stride), place.gap
    )


@dataclass
class Output:
    """One leaf of what the model returns: a value, or a constant when `value` is None."""

    value: int | None
    constant: Any = None


@dataclass
class Plan:
    batch: int
    values: list[Value]
    steps: list[Step]
    input: int
    outputs: list[Output]
    out_spec: Any
    planar_input: bool
    on_gpu: bool = False  # for the kernels of a GPU, in the model's own type
    narrow: bool = False  # the model's tensors are bfloat16; the plan computes what they hold in float32
    schedule: Loop | None = None
    places: dict[int, Place] = field(default_factory=dict)
    arena_bytes: int = 0
    instances: list[Instance] = field(default_factory=list)
    parts: list[Any] = field(default_factory=list)  # of lower.Part
    computed: dict[str, Any] = field(default_factory=dict)  # calls whose results recipes name, see graph.py
    shows_input: bool = False  # whether an output may show the input's own memory,
    follows_input: bool = False  # or have its dimensions in the input's order: see strides.py
    rewrites: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of making it: capture, fuse, place, pack

    def root(self, value: int) -> Value:
        """The value whose bytes this one shows."""
        found = self.values[value]
        while found.same_as is not None:
            found = self.values[found.same_as]
        return found

    def channel(self, value: int) -> int:
        """Where in the pixels of its root this value begins."""
        found, channel = self.values[value], 0
        while found.same_as is not None:
            channel += found.channel
            found = self.values[found.same_as]
        return channel

    @property
    def activation_bytes(self) -> int:
        """All feature maps of the batch together: what an arena saves against."""
        maps = [v for v in self.values if v.same_as is None and v.home in ("arena", "output", "planar")]
        return sum(self.batch * v.pixels * v.channels * FLOAT for v in maps)

    def __repr__(self) -> str:
        kernels = sum(step.native for step in self.steps)
        return (
            f"Plan(batch={self.batch}, {len(self.steps)} steps, {kernels} native, arena {self.arena_bytes} B)"
        )
