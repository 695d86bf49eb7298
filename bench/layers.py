"""What the kernel microbenchmarks share: inputs of a layer, candidates that accept it, parity, records.

Candidates of a layer:
    reference           plain PyTorch on the same tensors (channels_last; F.conv2d and friends)
    <name>              a native candidate through the public op, as users call it: packs the weight each time
    <name>, packed      the same kernel with its weight packed and its output allocated, as the engine runs it
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast_backbones import kernels
from fast_backbones.kernels import _ext

from .compare import Error, error
from .shapes import Layer, shapes

PACKED = ", packed"
# The C++ kinds behind candidate names; a candidate without an entry has no packed variant.
KINDS = {
    ("pointwise_conv2d", "direct"): "conv2d",
    ("conv2d", "direct"): "conv2d",
    ("conv2d", "winograd"): "winograd_conv2d",
    ("grouped_conv2d", "rows"): "grouped_conv2d",
    ("grouped_conv2d", "direct"): "conv2d",
    ("stem_conv2d", "direct"): "conv2d",
    ("max_pool2d", "native"): "max_pool2d",
    ("global_avg_pool", "native"): "global_avg_pool",
    ("linear", "native"): "linear",
    ("separable_conv2d", "native"): "separable_conv2d",
    ("depthwise_conv2d", "native"): "depthwise_conv2d",
    ("avg_pool2d", "native"): "avg_pool2d",
    ("local_response_norm", "native"): "local_response_norm",
}


WEIGHTLESS = ("max_pool2d", "avg_pool2d", "global_avg_pool", "local_response_norm")


@dataclass(frozen=True)
class Call:
    """The arguments of one call of an op."""

    args: tuple[Any, ...]
    options: dict[str, Any]

    def double(self) -> Call:
        """The same call in float64."""

        def up(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) else value

        return Call(tuple(map(up, self.args)), {k: up(v) for k, v in self.options.items()})


def has_residual(layer: Layer) -> bool:
    """1x1 layers that widen at stride 1 end a bottleneck: they add the shortcut."""
    return layer.op == "pointwise_conv2d" and layer.stride == 1 and layer.k >= layer.c


def arguments(layer: Layer, batch: int, make: Callable[..., Tensor]) -> Call:
    """Inputs of the layer from make(*sizes): maps and filters channels_last, the stem's image NCHW."""

    def image(c: int, h: int, w: int) -> Tensor:
        return make(batch, c, h, w).contiguous(memory_format=torch.channels_last)

    if layer.op == "linear":
        return Call((make(batch, layer.c), make(layer.k, layer.c), make(layer.k)), {})
    if layer.op == "global_avg_pool":
        return Call((image(layer.c, layer.h, layer.w),), {})
    if layer.op in ("max_pool2d", "avg_pool2d"):
        options = {"stride": layer.stride, "padding": layer.padding}
        return Call((image(layer.c, layer.h, layer.w), layer.r), options)
    if layer.op == "local_response_norm":
        return Call((image(layer.c, layer.h, layer.w), layer.r), {})
    if layer.op == "squeeze_excite":
        c, k = layer.c, layer.k
        return Call((image(c, layer.h, layer.w), make(k, c), make(k), make(c, k), make(c)), {})
    if layer.op == "separable_conv2d":
        weights = (make(layer.c, 1, layer.r, layer.r), make(layer.k, layer.c, 1, 1))
        biases = (make(layer.c), make(layer.k))
        options = {"stride": layer.stride, "padding": layer.padding}
        options |= {"depth_activation": "relu", "activation": "relu"}
        return Call((image(layer.c, layer.h, layer.w), *weights, *biases), options)
    stem = layer.op == "stem_conv2d"
    x = make(batch, layer.c, layer.h, layer.w) if stem else image(layer.c, layer.h, layer.w)
    weight = make(layer.k, layer.c // layer.groups, layer.r, layer.r).contiguous(
        memory_format=torch.channels_last
    )
    options: dict[str, Any] = {"stride": layer.stride, "activation": "relu"}
    if layer.op != "pointwise_conv2d":
        options["padding"] = layer.padding
    if layer.op == "grouped_conv2d":
        options["groups"] = layer.groups
    if has_residual(layer):
        options["residual"] = image(layer.k, layer.p, layer.q)
    return Call((x, weight, make(layer.k)), options)


def inputs(layer: Layer, batch: int) -> Call:
    """Seeded random arguments; filters are scaled so that outputs have a deviation near one."""
    draw = torch.Generator().manual_seed(0)
    call = arguments(layer, batch, lambda *sizes: torch.randn(*sizes, generator=draw))
    if layer.op in ("separable_conv2d", "squeeze_excite"):
        for weight in (call.args[1], call.args[2 if layer.op == "separable_conv2d" else 3]):
            weight.div_(weight[0].numel() ** 0.5)
    elif layer.op not in WEIGHTLESS:
        call.args[1].div_((layer.c // layer.groups * layer.r**2) ** 0.5)
    return call


def candidates(layer: Layer, batch: int = 1) -> list[str]:
    """Names of what can run this layer here, the reference first."""
    call = arguments(layer, batch, torch.empty)  # sizes and layouts are all that a candidate looks at
    accepted = [
        v.name for v in kernels.explain(layer.op, *call.args, **call.options).candidates if v.refusal is None
    ]
    names = ["reference"]
    for name in accepted:
        if name != "reference":
            names += [name, name + PACKED] if (layer.op, name) in KINDS else [name]
    return names


def bind(layer: Layer, call: Call, candidate: str) -> Callable[[], Tensor]:
    """A function without arguments that runs the candidate once and returns its output."""
    if candidate.endswith(PACKED):
        return packed(layer, call, KINDS[layer.op, candidate.removesuffix(PACKED)])
    op = getattr(kernels, layer.op)

    def run() -> Tensor:
        with torch.inference_mode():
            return op(*call.args, backend=candidate, **call.options)

    return run


def packed_weight(kind: str, params: dict[str, int], weight: Tensor) -> Tensor:
    """As the kernel wants it, from a 64-byte line on."""
    native = _ext.require()
    room = torch.empty(native.packed_floats(kind, params) + 16)
    out = room[-(room.data_ptr() // 4) % 16 :]
    plain = weight.contiguous()  # kept alive while it is read
    native.pack_weight(kind, params, plain.data_ptr(), out.data_ptr())
    return out


def packed(layer: Layer, call: Call, kind: str) -> Callable[[], Tensor]:
    """The C++ kernel on raw addresses: weight packed and output allocated here, once."""
    native = _ext.require()
    x, batch = call.args[0], call.args[0].shape[0]
    r = {"r": layer.r, "s": layer.r, "stride_h": layer.stride, "stride_w": layer.stride}
    params = {"n": batch, "h": layer.h, "w": layer.w, "c": layer.c, "k": layer.k}
    if kind == "linear":
        params = {"n": batch, "c": layer.c, "k": layer.k}
    elif kind == "local_response_norm":
        params |= {"size": layer.r, "alpha": 1e-4, "beta": 0.75, "offset": 1.0}
    elif kind != "global_avg_pool":
        params |= {**r, "pad_h": layer.padding, "pad_w": layer.padding, "groups": layer.groups}
    if call.options.get("activation") == "relu":
        params["activation"] = 1
    if layer.op == "stem_conv2d":
        params["nchw_in"] = 1

    flat = layer.op in ("linear", "global_avg_pool")
    y = (
        torch.empty(batch, layer.k)
        if flat
        else torch.empty(batch, layer.k, layer.p, layer.q, memory_format=torch.channels_last)
    )
    tensors = {"x": x, "y": y}
    if kind == "separable_conv2d":
        depth_weight, weight, depth_bias, bias = call.args[1:]
        depth = params | {"k": layer.c, "groups": layer.c}
        tensors |= {"depth_weight": packed_weight("depthwise_conv2d", depth, depth_weight)}
        tensors |= {"weight": packed_weight(kind, params, weight), "depth_bias": depth_bias, "bias": bias}
        params["depth_activation"] = 1
    elif len(call.args) == 3:
        tensors |= {"weight": packed_weight(kind, params, call.args[1]), "bias": call.args[2]}
    if "residual" in call.options:
        tensors["residual"] = call.options["residual"]
    addresses = {name: t.data_ptr() for name, t in tensors.items()}

    def run() -> Tensor:
        native.run_op(kind, params, addresses)
        return tensors["y"]

    return run


@functools.lru_cache(maxsize=4)
def truth(layer: Layer, batch: int) -> tuple[Tensor, Error]:
    """The float64 output, and the error of PyTorch's own float32 run against it."""
    call = inputs(layer, batch)
    reference = getattr(kernels, f"{layer.op}_ref")
    with torch.inference_mode():
        double = call.double()
        exact = reference(*double.args, **double.options)
        return exact, error([reference(*call.args, **call.options)], [exact])


def assert_parity(layer: Layer, batch: int, candidate: str, output: Tensor) -> Error:
    """The 2x rule: a kernel that is less accurate gets no time."""
    exact, own = truth(layer, batch)
    assert output.shape == exact.shape, f"{candidate} gave {list(output.shape)}, expected {list(exact.shape)}"
    ours = error([output], [exact])
    assert ours.within(2, own), f"{candidate} on {layer}: error {ours}, PyTorch's own {own}"
    return ours


@functools.lru_cache(maxsize=1)
def peaks() -> dict[str, float]:
    """Arithmetic and copy rates that this machine reaches now, measured by the native library (0.4 s)."""
    native = _ext.native()
    if native is None:
        return {}
    return {"peak_gflops": round(native.peak_gflops(), 1), "copy_gbps": round(native.copy_gbps(), 1)}


def costs(layer: Layer, batch: int) -> tuple[int, int]:
    """Floating-point operations of the direct algorithm, and bytes of all operands, each once."""
    shortcut = 4 * batch * layer.k * layer.p * layer.q if has_residual(layer) else 0
    return layer.flops(batch), layer.bytes(batch) + shortcut


def time_layer(benchmark, layer: Layer, candidate: str, batch: int) -> None:
    """Parity first, then the time, then rates and provenance into extra_info."""
    call = inputs(layer, batch)
    run = bind(layer, call, candidate)
    found = assert_parity(layer, batch, candidate, run())
    benchmark.group = f"{layer.op} {layer} n{batch}"
    flops, moved = costs(layer, batch)
    benchmark.extra_info.update(
        op=layer.op,
        layer=str(layer),
        candidate=candidate,
        batch=batch,
        why=layer.why,
        count=layer.count,
        flops=flops,
        bytes=moved,
        max_error=found.max,
        rms_error=found.rms,
        threads=torch.get_num_threads(),
    )
    benchmark(run)
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.median
        rates = {"gflops": flops / seconds * 1e-9, "gbps": moved / seconds * 1e-9}
        benchmark.extra_info.update({name: round(rate, 2) for name, rate in rates.items()}, **peaks())


__all__ = ["assert_parity", "time_layer", "bind", "candidates", "inputs", "shapes"]
