"""The stacks we compare with, each behind the same small interface and each at its best settings.

    peer = OnnxRuntime(threads=2)
    if peer.missing() is None:
        call = peer.prepare(model, x)      # capture, compile, pack: everything that is done once
        outputs = call()                   # one forward of exactly x; a list of tensors

Every peer runs the same plain PyTorch modules (`plain`), float32, one request at a time, with `threads`
threads. Input and weights are laid out beforehand as the peer likes them best, and nobody is charged for a
conversion of the input. The returned tensors may be views of buffers that the next call overwrites.

All imports of other stacks happen inside the methods: importing this file costs nothing and needs torch
alone.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

Call = Callable[[], list[Tensor]]


class Refused(RuntimeError):
    """This peer cannot run this model; the message is the sentence for the table."""


class Plain(nn.Module):
    """A model's ordinary modules, without the engine: what other stacks capture and PyTorch eager runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor):
        return getattr(self.model, "forward_modules", self.model)(x)


def plain(model: nn.Module) -> nn.Module:
    """A private copy of the model that never enters the engine, in eval mode."""
    return Plain(copy.deepcopy(model)).eval()


def as_list(outputs: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """A model returns one tensor (logits) or several (feature levels); the benchmarks always see a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def package_version(name: str) -> str:
    """The installed version of a distribution, or a sentence that says it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


class Peer:
    """One way to run a model. `key` names it on command lines, `name` in tables."""

    key = ""
    name = ""
    patience = ""  # what to tell people who wait for `prepare`
    packages: tuple[tuple[str, str], ...] = ()  # (module to look for, distribution that brings it)

    def __init__(self, threads: int = 2):
        self.threads = threads

    def missing(self) -> str | None:
        """None when the peer can run here, otherwise the sentence for the table."""
        absent = [dist for module, dist in self.packages if importlib.util.find_spec(module) is None]
        return f"not installed: pip install {' '.join(absent)}" if absent else None

    def version(self) -> str:
        return torch.__version__

    def settings(self) -> dict[str, str]:
        """What was set, as it goes into the results."""
        return {}

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        """Do all one-off work for inputs like x, and return the call to time."""
        raise NotImplementedError(f"{type(self).__name__}.prepare")


class Eager(Peer):
    """PyTorch as it comes: NCHW tensors, inference mode."""

    key, name = "eager", "eager NCHW"
    memory_format = torch.contiguous_format

    def settings(self) -> dict[str, str]:
        return {"mode": "inference_mode", "layout": "NCHW", "threads": str(self.threads)}

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        module = plain(model).to(memory_format=self.memory_format)
        image = x.clone(memory_format=self.memory_format)

        def call() -> list[Tensor]:
            with torch.inference_mode():
                return as_list(module(image))

        return call


class EagerChannelsLast(Eager):
    """PyTorch with weights and image in channels_last, which oneDNN usually prefers on CPUs."""

    key, name = "channels_last", "eager channels_last"
    memory_format = torch.channels_last

    def settings(self) -> dict[str, str]:
        return {**super().settings(), "layout": "channels_last"}


class Compile(Peer):
    """torch.compile (Inductor) with freezing: constant weights, folded batch norm, layouts chosen ahead."""

    key, name = "compile", "torch.compile, frozen"
    patience = " (compiles C++, up to a minute or two)"

    def missing(self) -> str | None:
        if not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++")):
            return "needs a C++ compiler (g++) on PATH"
        return None

    def settings(self) -> dict[str, str]:
        return {
            "freezing": "True",
            "mode": "no_grad",
            "layout": "channels_last",
            "threads": str(self.threads),
        }

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        import torch._inductor.config as inductor

        module = plain(model).to(memory_format=torch.channels_last)
        image = x.clone(memory_format=torch.channels_last)
        torch._dynamo.reset()  # programs of earlier models would count against the recompile limit
        compiled = torch.compile(module)

        def call() -> list[Tensor]:
            with torch.no_grad():
                return as_list(compiled(image))

        with inductor.patch(freezing=True):
            call()
        return call


class OnnxRuntime(Peer):
    """ONNX Runtime on the graph that torch.onnx exports: all graph optimisations, buffers bound once."""

    key, name = "onnxruntime", "ONNX Runtime"
    packages = (("onnxruntime", "onnxruntime"), ("onnx", "onnx"), ("onnxscript", "onnxscript"))

    def version(self) -> str:
        return package_version("onnxruntime")

    def settings(self) -> dict[str, str]:
        return {
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "execution_mode": "ORT_SEQUENTIAL",
            "intra_op_num_threads": str(self.threads),
            "inter_op_num_threads": "1",
            "io": "binding, outputs preallocated",
        }

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        import numpy
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3

        module, image = plain(model), x.contiguous()
        with torch.no_grad():
            outputs = [
                torch.empty_like(y, memory_format=torch.contiguous_format) for y in as_list(module(image))
            ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            # external data: a model above 2 GB would not fit one protobuf file
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the exporter's own about itself
                torch.onnx.export(module, (image,), path, dynamo=True, external_data=True, verbose=False)
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        bind = {"device_type": "cpu", "device_id": 0, "element_type": numpy.float32}
        for info, t in zip([*session.get_inputs(), *session.get_outputs()], [image, *outputs], strict=True):
            place = binding.bind_input if t is image else binding.bind_output
            place(name=info.name, shape=tuple(t.shape), buffer_ptr=t.data_ptr(), **bind)

        def call() -> list[Tensor]:
            session.run_with_iobinding(binding)
            return outputs

        call.keep = (image, outputs)  # the session only borrows these buffers
        return call


class OpenVino(Peer):
    """OpenVINO's CPU plugin on the traced module, in float32.

    With one request at a time the latency hint (one stream on all threads) is also the right one for a batch:
    the throughput hint splits the cores between streams, and a lone request would then use some of them only.
    The precision hint matters: where the CPU has bfloat16 units the plugin may otherwise compute in bfloat16.
    """

    key, name = "openvino", "OpenVINO"
    packages = (("openvino", "openvino"),)

    def version(self) -> str:
        return package_version("openvino")

    def settings(self) -> dict[str, str]:
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(self.threads),
            "INFERENCE_PRECISION_HINT": "f32",
        }

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        import openvino as ov

        module, image = plain(model), x.contiguous()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.trace, which OpenVINO calls
            graph = ov.convert_model(module, example_input=image, input=list(image.shape))
        request = ov.Core().compile_model(graph, "CPU", self.settings()).create_infer_request()
        request.set_input_tensor(ov.Tensor(image.numpy(), shared_memory=True))
        request.infer()
        outputs = [torch.from_numpy(request.get_output_tensor(i).data) for i in range(len(graph.outputs))]

        def call() -> list[Tensor]:
            request.infer()
            return outputs

        call.keep = image
        return call


class Ours(Peer):
    """fast_backbones: the model as it is, called under inference_mode; its engine makes the plan at the first
    call."""

    key, name = "ours", "fast_backbones"

    def missing(self) -> str | None:
        from fast_backbones.kernels import _ext

        if _ext.native() is None:
            return f"no native library: {_ext.why_not()}"
        return None

    def version(self) -> str:
        import fast_backbones

        return fast_backbones.__version__

    def settings(self) -> dict[str, str]:
        return {"mode": "inference_mode", "layout": "NCHW image", "threads": str(self.threads)}

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        """Call once, which captures, fuses and packs. Raises Refused with the engine's sentence when the
        engine would only run the modules: that time would be PyTorch's, not ours."""
        from fast_backbones import engine

        module, image = copy.deepcopy(model).eval(), x.contiguous()
        with torch.inference_mode():
            reason = engine.why_not(module, image)  # makes the plan
            if reason is not None:
                raise Refused(f"no plan for this model: {reason}")

        if hasattr(module, "forward_modules"):  # one of our backbones: it enters the engine by itself
            forward = module
        else:

            def forward(image: Tensor):
                return engine.forward(module, image, module.forward)

        def call() -> list[Tensor]:
            with torch.inference_mode():
                return as_list(forward(image))

        call()
        return call


PEERS: dict[str, type[Peer]] = {
    peer.key: peer for peer in (Eager, EagerChannelsLast, Compile, OnnxRuntime, OpenVino, Ours)
}


def make_peers(keys: list[str] | None = None, threads: int = 2) -> list[Peer]:
    """Peers by key, in table order; None means all of them. An unknown key raises ValueError with the known
    ones."""
    unknown = [key for key in keys or () if key not in PEERS]
    if unknown:
        raise ValueError(f"unknown peer {', '.join(unknown)}; known: {', '.join(PEERS)}")
    return [peer(threads) for key, peer in PEERS.items() if keys is None or key in keys]
