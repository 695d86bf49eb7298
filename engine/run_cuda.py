"""Runs a plan on a GPU: the launches of launches.py, captured once as a CUDA graph and replayed from then on.

A graph reads and writes memory of its own. So a call copies x in, replays, and copies the outputs out, all on
the caller's current stream; what it returns stays the caller's. Each stream has a graph with an arena of its
own, since work on two streams may overlap. Inside the caller's own graph capture the model runs its modules:
that graph may outlive this plan and its packed weights.

Memory comes from PyTorch's allocator: the arena, the outputs, and what PyTorch's own calls inside the graph
need.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import gpu_choices
from .gpu_peaks import CAPTURING
from .guard import Guard
from .launches import Arithmetic, DeviceWeights, LaunchList
from .plan import Plan
from .strides import in_strides
from .weights import WeightStore

MAX_GRAPHS = 4  # of one plan: streams that call it in turns


class Graph:
    """A launch list and its CUDA graph, for the stream that is current when it is made."""

    def __init__(self, launches: LaunchList) -> None:
        self.launches = launches
        self.lock = threading.Lock()  # copy in, replay, copy out: one call after the other
        calling = torch.cuda.current_stream()
        for tensor in launches.weights.all():  # shared by graphs: not reused while this stream may read them
            tensor.record_stream(calling)
        launches.compile()
        stream = torch.cuda.Stream()
        stream.wait_stream(calling)
        with torch.cuda.stream(stream):  # outside of the capture: kernels load, libraries set themselves up
            launches.run()
        calling.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            launches.run()
            self.outputs = launches.outputs()

    def __call__(self, x: Tensor) -> Any:
        with self.lock:
            self.launches.x.copy_(x)
            self.graph.replay()
            return pytree.tree_map(_kept, self.outputs)


def _kept(leaf: Any) -> Any:
    return in_strides(leaf, leaf.stride()) if isinstance(leaf, Tensor) else leaf


class CudaRunner:
    """plan(x) on the device of x."""

    shortcut: Any = None  # of CPU plans

    def __init__(
        self,
        plan: Plan,
        guard: Guard,
        store: WeightStore,
        dtype: torch.dtype,
        device: torch.device,
        allowed: Arithmetic,
    ) -> None:
        self.plan, self.guard, self.allowed = plan, guard, allowed
        self.tensors = store.tensors
        if dtype not in store.on_gpu:
            store.on_gpu[dtype] = DeviceWeights.of(store.tensors, dtype, device)
        self.weights: DeviceWeights = store.on_gpu[dtype]
        self.graphs: OrderedDict[int, Graph] = OrderedDict()  # by stream
        self.lock = threading.Lock()

    def __call__(self, x: Tensor) -> Any:
        with torch.cuda.device(x.device), torch.no_grad():
            return self.graph(x)(x)

    def launch_list(self, x: Tensor) -> LaunchList:
        choices = gpu_choices.of_device(x.device)
        return LaunchList(self.plan, self.weights, x, self.tensors, allowed=self.allowed, choices=choices)

    def forget_graphs(self) -> None:
        """The next call makes them anew, by the choices of then."""
        with self.lock:
            self.graphs.clear()

    def graph(self, x: Tensor) -> Graph:
        """The graph of the current stream, made if need be."""
        stream = torch.cuda.current_stream().cuda_stream
        with self.lock:
            if stream not in self.graphs:
                # Outside of inference mode: later calls write to its memory in either mode.
                with CAPTURING, torch.inference_mode(False), torch.no_grad():
                    image = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
                    self.graphs[stream] = Graph(self.launch_list(image))
                while len(self.graphs) > MAX_GRAPHS:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(stream)
            return self.graphs[stream]
