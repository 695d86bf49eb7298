"""What each of the ranks of test_training_scale.py does; started by torchrun with the folder for results."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fast_backbones as fb
from fast_backbones import engine

STEPS, BATCH = 3, 8


def make_model(dtype=torch.float32):
    """MobileNet at a quarter of the width, whose norms are frozen with statistics that are not 0 and 1.

    Its weights are contiguous: PyTorch's FSDP2 refuses those that are channels last.
    """
    torch.manual_seed(0)
    model = fb.mobilenetv1_025(num_classes=5)
    for norm in norms(model):
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        norm.requires_grad_(False)
    return model.to(dtype)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def train_mode(model):
    model.train()
    for norm in norms(model):
        norm.eval()


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 5, (BATCH,), generator=generator)
    return images.to(dtype, memory_format=torch.channels_last), labels


def train(model, network, rows=slice(None), dtype=torch.float32):
    """Three steps on rows of the batches: of all of them in one process, of its own on each rank."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for step in range(STEPS):
        train_mode(model)
        images, labels = batch(step, dtype)
        loss = fb.training.label_smoothing_cross_entropy(network(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


def plan_follows_steps(model, network, rows):
    """The eval-mode outputs between the steps, as planned and as the modules give them."""
    images, _ = batch(100)
    for _ in train(model, network, rows):
        model.eval()
        with torch.inference_mode():
            yield {
                "why_not": engine.why_not(model, images[:2]),
                "plan": model(images[:2]).clone(),
                "modules": model.forward_modules(images[:2]).clone(),
            }


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks.modules():
        if type(block).__name__ == "DepthwiseBlock":
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def forward_with_synchronised_norms(network):
    """The sentence with which PyTorch refuses, or None."""
    try:
        network.train()(batch(0)[0])
    except ValueError as refusal:
        return str(refusal)
    return None


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * BATCH // count, (rank + 1) * BATCH // count)
    result = {}

    model = make_model()
    result["evaluations"] = list(plan_follows_steps(model, DistributedDataParallel(model), rows))
    result["ddp"] = model.state_dict()

    model = sharded(make_model())
    for _ in train(model, model, rows):
        pass
    result["fsdp"] = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    model.eval()
    with torch.inference_mode():
        result["fsdp_why_not"] = engine.why_not(model, batch(100)[0])
    with torch.no_grad():
        result["fsdp_logits"] = model(batch(100)[0])

    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model())
    result["synchronised"] = sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    result["refusal"] = forward_with_synchronised_norms(model)
    model.eval()
    with torch.inference_mode():
        images = batch(100)[0]
        result["synchronised_why_not"] = engine.why_not(model, images)
        result["synchronised_plan"], result["plain_plan"] = model(images), make_model().eval()(images)

    torch.save(result, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
