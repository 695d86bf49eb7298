"""The stacks we compare with, each behind the interface of peer.py and each at its best settings.

All imports of other stacks happen inside the methods: importing this file costs nothing and needs torch
alone.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from .peer import (
    Call,
    Peer,
    Refused,
    as_list,
    export_onnx,
    fastest,
    package_version,
    plain,
    printed,
    run_tool,
)


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
    """torch.compile (Inductor) with freezing: constant weights, folded batch norm, layouts chosen ahead.

    The C++ wrapper replaces the Python code between Inductor's kernels: it matters where a forward takes less
    than a millisecond.
    """

    key, name = "compile", "torch.compile, frozen"
    patience = " (compiles C++, up to a minute or two)"
    mode = "default"
    running: ClassVar[weakref.WeakSet[Call]] = (
        weakref.WeakSet()
    )  # calls of any mode that somebody still holds

    def missing(self) -> str | None:
        if not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++")):
            return "needs a C++ compiler (g++) on PATH"
        return None

    def settings(self) -> dict[str, str]:
        return {
            "mode": self.mode,
            "freezing": "True",
            "cpp_wrapper": "True",
            "grad": "no_grad",
            "layout": "channels_last",
            "threads": str(self.threads),
        }

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        module = plain(model).to(memory_format=torch.channels_last)
        image = x.clone(memory_format=torch.channels_last)
        if not self.running:  # programs of earlier models would count against the recompile limit
            torch._dynamo.reset()
        compiled = torch.compile(module, dynamic=False, options=self.options())

        def call() -> list[Tensor]:
            with torch.no_grad():
                return as_list(compiled(image))

        # As an option of torch.compile, freezing comes too late: the weights are inputs of the graph by then.
        with warnings.catch_warnings(), torch._inductor.config.patch(freezing=True):
            warnings.simplefilter("ignore", UserWarning)  # Inductor's own, about TypedStorage
            call()
        self.running.add(call)
        return call

    def options(self) -> dict[str, object]:
        """Inductor's options: those that torch.compile(mode=...) stands for, and the C++ wrapper."""
        mode = dict(torch._inductor.list_mode_options(self.mode))
        mode.pop("triton.cudagraphs", None)  # for GPUs; on a CPU it only warns
        return {**mode, "cpp_wrapper": True}


class CompileAutotuned(Compile):
    """torch.compile with mode="max-autotune": Inductor also times C++ templates against oneDNN and MKL."""

    key, name = "autotune", "torch.compile, max-autotune"
    mode = "max-autotune"

    def options(self) -> dict[str, object]:
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False
        return {**super().options(), "max_autotune_report_choices_stats": False}


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

        if x.dtype is not torch.float32:
            raise Refused(f"its CPU kernels have no {x.dtype}")
        module, image = plain(model), x.contiguous()
        with torch.no_grad():
            outputs = [
                torch.empty_like(y, memory_format=torch.contiguous_format) for y in as_list(module(image))
            ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            # external data: a model above 2 GB would not fit one protobuf file
            export_onnx(module, image, path, external_data=True)
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
    """OpenVINO's CPU plugin on the traced module, in float32 or, for a model in it, in bfloat16.

    With one request at a time the latency hint (one stream on all threads) is also the right one for a batch:
    the throughput hint splits the cores between streams, and a lone request would then use some of them only.
    The precision hint matters: where the CPU has bfloat16 units the plugin may otherwise compute in bfloat16.
    """

    key, name = "openvino", "OpenVINO"
    packages = (("openvino", "openvino"),)

    narrow = False

    def version(self) -> str:
        return package_version("openvino")

    def settings(self) -> dict[str, str]:
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(self.threads),
            "INFERENCE_PRECISION_HINT": "bf16" if self.narrow else "f32",
        }

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        import openvino as ov

        self.narrow = x.dtype is torch.bfloat16
        module, image = plain(model).float(), x.float().contiguous()
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


class Ncnn(Peer):
    """ncnn on the traced module, converted by its own pnnx, in float32 or, for a model in it, in bfloat16.

    ncnn's options are those of its documentation for float32: packed layout, Winograd and SGEMM convolutions,
    light mode, 16-bit and 8-bit storage off (bfloat16: its storage on); its own pools serve feature maps and
    workspaces. The image is in ncnn's own aligned memory.

    A batch can be run in three ways, and the fastest here is taken: one image after another, which is what
    most of its users do; one Mat that holds all images (new in 2026); or the images spread over as many
    extractors as there are threads, each with one thread. A way that returns something else than the first
    one is left out, and the settings say so.
    """

    key, name = "ncnn", "ncnn"
    packages = (("ncnn", "ncnn"), ("pnnx", "pnnx"))
    options: ClassVar[dict[str, bool]] = {
        "use_packing_layout": True,
        "use_winograd_convolution": True,
        "use_sgemm_convolution": True,
        "lightmode": True,
        "use_vulkan_compute": False,
        "use_fp16_packed": False,
        "use_fp16_storage": False,
        "use_fp16_arithmetic": False,
        "use_bf16_packed": False,
        "use_bf16_storage": False,
        "use_int8_inference": False,
    }
    ONE_BY_ONE, TOGETHER, SPREAD = (
        "one image after another",
        "one Mat of all images",
        "spread over extractors",
    )

    def __init__(self, threads: int = 2):
        super().__init__(threads)
        self.way = ""
        self.left_out: dict[str, str] = {}
        self.narrow = False

    def version(self) -> str:
        return package_version("ncnn")

    def all_options(self) -> dict[str, bool]:
        return self.options | {"use_bf16_storage": self.narrow}

    def settings(self) -> dict[str, str]:
        found = {"num_threads": str(self.threads)} | {k: str(v) for k, v in self.all_options().items()}
        if self.way:
            found["batch"] = self.way
        if self.left_out:
            found["left out"] = "; ".join(f"{way}: {why}" for way, why in self.left_out.items())
        return found

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        import ncnn
        import numpy
        import pnnx

        self.way, self.left_out, self.narrow = "", {}, x.dtype is torch.bfloat16
        module, x = plain(model).float(), x.float().contiguous()
        images = x.numpy()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.trace
                warnings.simplefilter(
                    "ignore", torch.jit.TracerWarning
                )  # checks of shapes, which are fixed here
                trace = torch.jit.trace(module, x[:1], check_trace=False)
            trace.save(str(folder / "model.pt"))
            shape = ",".join(map(str, (1, *x.shape[1:])))
            command = [pnnx.EXEC_PATH, "model.pt", f"inputshape=[{shape}]f32", "fp16=0"]
            run_tool(command, folder, folder / "model.ncnn.param")

            def load(threads: int):
                """A network on so many threads."""
                net = ncnn.Net()
                for key, value in self.all_options().items():
                    setattr(net.opt, key, value)
                net.opt.num_threads = threads
                with printed() as said:
                    codes = [
                        net.load_param(str(folder / "model.ncnn.param")),
                        net.load_model(str(folder / "model.ncnn.bin")),
                    ]
                if any(codes):
                    raise Refused(f"ncnn cannot load what pnnx wrote: {said()}")
                return net

            net = load(self.threads)
            single = load(1) if len(images) > 1 and self.threads > 1 else None
        (entry,), exits = net.input_names(), sorted(net.output_names(), key=lambda n: int(n.lstrip("out")))

        def forward(net, mat) -> list:
            with net.create_extractor() as extractor:
                extractor.input(entry, mat)
                found = [extractor.extract(name) for name in exits]
            if any(code for code, _ in found):
                raise RuntimeError(f"ncnn: extract returned {[code for code, _ in found]} for {exits}")
            return [mat for _, mat in found]

        mats = [ncnn.Mat(image).clone() for image in images]
        shapes = [numpy.asarray(mat).shape for mat in forward(net, mats[0])]
        outputs = [torch.empty(len(mats), *shape) for shape in shapes]
        places = [y.numpy() for y in outputs]

        def one_by_one() -> list[Tensor]:
            for i, mat in enumerate(mats):
                for place, y in zip(places, forward(net, mat), strict=True):
                    place[i] = y
            return outputs

        if len(mats) == 1:
            return one_by_one

        together = ncnn.Mat(images, 0).clone()

        def all_together() -> list[Tensor]:
            for place, y in zip(places, forward(net, together), strict=True):
                if y.n != len(mats):
                    raise Refused(f"the output holds {y.n} images")
                for i in range(len(mats)):
                    place[i] = y.batch(i)
            return outputs

        ways = {self.ONE_BY_ONE: one_by_one, self.TOGETHER: all_together}
        if single is not None:
            pool = ThreadPoolExecutor(self.threads - 1)

            def some(first: int) -> None:
                for i in range(first, len(mats), self.threads):
                    for place, y in zip(places, forward(single, mats[i]), strict=True):
                        place[i] = y

            def spread() -> list[Tensor]:
                others = [pool.submit(some, first) for first in range(1, self.threads)]
                some(0)
                for other in others:
                    other.result()
                return outputs

            ways[self.SPREAD] = spread
        right = [y.clone() for y in one_by_one()]
        for way, call in list(ways.items()):
            try:
                call()
                close = 0.1 if self.narrow else 1e-3
                if not all(
                    torch.allclose(a, b, rtol=close, atol=close * b.std()) for a, b in zip(call(), right)
                ):
                    raise Refused("other numbers than one image after another")
            except (Refused, RuntimeError, ValueError) as problem:
                self.left_out[way] = str(problem)
                del ways[way]
        self.way = fastest(ways)
        return ways[self.way]


class Mnn(Peer):
    """MNN on the ONNX file, in float32 (precision high), with memory and power set to high.

    A model in bfloat16 gets precision "low", for which MNN takes that type where it can.

    Two interfaces are tried and the faster one is taken: a Module whose weights are rearranged when it is
    loaded, and a Session. A Session's input is copied on each call, as it must be: MNN puts other activations
    in the same memory. Winograd units are kept small for the Session (WINOGRAD_MEMORY_LEVEL 1, as the Module
    does by itself): large ones were slower and a hundred times less exact.

    The converter is called through its library. The wheel's own command, mnnconvert, installs a logging
    package with pip and reports to its vendor.
    """

    key, name = "mnn", "MNN"
    packages = (("MNN", "MNN"),)
    MODULE, SESSION = "Module, weights rearranged", "Session, WINOGRAD_MEMORY_LEVEL=1, input copied"
    WINOGRAD_MEMORY_LEVEL = 3  # of Interpreter::HintMode

    def __init__(self, threads: int = 2):
        super().__init__(threads)
        self.way = ""
        self.narrow = False

    def version(self) -> str:
        return package_version("MNN")

    def settings(self) -> dict[str, str]:
        precision = "low" if self.narrow else "high"
        found = {"backend": "CPU", "precision": precision, "memory": "high", "power": "high"}
        found |= {"numThread": str(self.threads), "optimizePrefer": "2"}
        return found | ({"interface": self.way} if self.way else {})

    def prepare(self, model: nn.Module, x: Tensor) -> Call:
        self.way, self.narrow = "", x.dtype is torch.bfloat16
        module, image = plain(model).float(), x.float().contiguous()
        with torch.no_grad():
            shapes = [tuple(y.shape) for y in as_list(module(image))]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (entry,), exits = export_onnx(module, image, folder / "model.onnx", external_data=False)
            command = [sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)"]
            command += ["-f", "ONNX", "--modelFile", "model.onnx", "--MNNModel", "model.mnn"]
            command += ["--bizCode", "bench", "--optimizePrefer", "2"]
            run_tool(command, folder, folder / "model.mnn")
            path = str(folder / "model.mnn")
            with printed() as said:
                try:
                    ways = {
                        self.MODULE: self.module(path, image, entry, exits),
                        self.SESSION: self.session(path, image, exits, shapes),
                    }
                    for call in ways.values():
                        call()
                except Exception as problem:  # its own words are on standard output
                    raise Refused(f"MNN does not run it: {problem} ({said()})") from problem
        self.way = fastest(ways)
        return ways[self.way]

    def module(self, path: str, image: Tensor, entry: str, exits: list[str]) -> Call:
        import MNN.expr
        import MNN.nn

        net = MNN.nn.load_module_from_file(
            path,
            [entry],
            exits,
            backend=MNN.expr.Backend.CPU,
            precision_mode=MNN.expr.PrecisionMode.Low if self.narrow else MNN.expr.PrecisionMode.High,
            memory_mode=MNN.expr.MemoryMode.High,
            power_mode=MNN.expr.PowerMode.High,
            thread_num=self.threads,
            rearrange=True,
            shape_mutable=False,
        )
        feed = MNN.expr.const(image.numpy(), list(image.shape), MNN.expr.NCHW)

        def call() -> list[Tensor]:
            found = net.onForward([feed])
            return [torch.from_numpy(MNN.expr.convert(y, MNN.expr.NCHW).read()) for y in found]

        return call

    def session(self, path: str, image: Tensor, exits: list[str], shapes: list[tuple[int, ...]]) -> Call:
        import MNN

        net = MNN.Interpreter(path)
        net.setSessionHint(self.WINOGRAD_MEMORY_LEVEL, 1)
        config = {"backend": "CPU", "numThread": self.threads}
        session = net.createSession(
            config | {key: self.settings()[key] for key in ("precision", "memory", "power")}
        )
        kind, layout = MNN.Halide_Type_Float, MNN.Tensor_DimensionType_Caffe
        feed = MNN.Tensor(tuple(image.shape), kind, image.numpy(), layout)
        entry = net.getSessionInput(session)
        inner = [net.getSessionOutput(session, name) for name in exits]
        outer = [MNN.Tensor(shape, kind, torch.zeros(shape).numpy(), layout) for shape in shapes]

        def call() -> list[Tensor]:
            entry.copyFrom(feed)
            net.runSession(session)
            for y, host in zip(inner, outer, strict=True):
                y.copyToHostTensor(host)
            return [torch.from_numpy(host.getNumpyData()) for host in outer]

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
    peer.key: peer
    for peer in (
        Eager,
        EagerChannelsLast,
        Compile,
        CompileAutotuned,
        OnnxRuntime,
        OpenVino,
        Ncnn,
        Mnn,
        Ours,
    )
}


def make_peers(keys: list[str] | None = None, threads: int = 2) -> list[Peer]:
    """Peers by key, in table order; None means all of them. An unknown key raises ValueError with the known
    ones."""
    unknown = [key for key in keys or () if key not in PEERS]
    if unknown:
        raise ValueError(f"unknown peer {', '.join(unknown)}; known: {', '.join(PEERS)}")
    return [peer(threads) for key, peer in PEERS.items() if keys is None or key in keys]
