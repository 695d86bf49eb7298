"""Which way each step of a model is fastest on a GPU: python -m bench.gpu.tune resnet50 --out FILE

fb.tune for each model, batch and type: every tile of Triton's, CUDA C++ and PyTorch's libraries, each step in
its place. The file has all times. What was chosen lies where fb.tune keeps it (FB_CACHE_DIR), is used by the
tools that come after, and becomes the package's own for this GPU as engine/gpu_tables/NAME.json.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

import fast_backbones as fb

from ..subject import input_size, make_model
from . import job
from .machine import DTYPES

# Every kind of layer once, the most valuable first.
DEFAULT = (
    "resnext50_32x4d", "mobilenetv1_100", "densenet121", "legacy_seresnet50", "legacy_xception", "resnet50",
    "resnet18", "inception_v3", "legacy_senet154", "googlenet", "vgg16_bn",
)  # fmt: skip


def tuned(name: str, batch: int, dtype: str, rounds: int) -> dict:
    model = make_model(name).to("cuda", DTYPES[dtype])
    x = torch.randn(batch, *input_size(model)).to("cuda", DTYPES[dtype], memory_format=torch.channels_last)
    found = fb.tune(model, x, rounds=rounds)
    layers = [{**asdict(layer), "steps": len(layer.steps)} for layer in found.layers]
    return {"model": name, "batch": batch, "dtype": dtype, "kept": str(found.path), "layers": layers}


def markdown(results: dict) -> str:
    rows = []
    for part in results["rows"]:
        for layer in part["layers"]:
            times = sorted(layer["seconds"].items(), key=lambda item: item[1])
            shown = ", ".join(f"{way} {1e6 * seconds:.1f}" for way, seconds in times[:4])
            known = shown or "measured with an earlier row"
            rows.append((part["model"], part["batch"], part["dtype"], layer["name"], layer["chosen"], known))
    heads = ("model", "batch", "type", "step", "chosen", "the four fastest, us")
    return job.heading(results) + job.table(heads, rows)


def main() -> None:
    parser = job.parser("bench.gpu.tune", __doc__, DEFAULT)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    work = job.Job(options, markdown)
    for case in work.cases():
        part = tuned(*case, options.rounds)
        work.add(part)
        changed = sum(layer["chosen"] != layer["usual"] for layer in part["layers"])
        print(
            "{} batch {} {}: ".format(*case) + f"{changed} of {len(part['layers'])} layers changed",
            flush=True,
        )


if __name__ == "__main__":
    main()
