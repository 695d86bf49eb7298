"""One process, or many under torchrun: who this one is, and the few things that all of them do together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import Refused


@dataclass(frozen=True)
class Processes:
    """This process among all. Without torchrun it is the only one, and nothing below communicates."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.count > 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        if self.many:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in one of them. It travels over gloo, so that no GPU is waited for."""
        if not self.many:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in order of rank, on each of them."""
        values = [value] * self.count
        if self.many:
            dist.all_gather_object(values, value)
        return values

    def from_first(self, model: nn.Module) -> None:
        """The buffers of rank 0 to all: each batch norm has seen other images since the last step."""
        if self.many:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def start(device: str) -> Processes:
    """Join the others, if torchrun started this process; gloo for the CPU, NCCL for GPUs."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise Refused(f"--device cuda: process {local} of this node has no GPU of its own")
        torch.cuda.set_device(local)
    chosen = torch.device(device, local) if device == "cuda" else torch.device(device)
    if "RANK" not in os.environ:
        return Processes(0, 1, chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), chosen)


def finish(processes: Processes) -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
