"""Each launch of a model on a GPU as a share of what the card can do: python -m bench.gpu.layers resnet50
--batch 256 --out FILE

The rows are those of fb.explain(): a launch timed alone, by CUDA events around a graph of it, and the larger
of its shares of the measured copy bandwidth and of the measured rate of a large matrix product in that type.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from fast_backbones import engine

from ..subject import input_size, make_model
from . import job
from .machine import DTYPES


def layers(name: str, batch: int, dtype: str) -> dict:
    model = make_model(name).to("cuda", DTYPES[dtype])
    x = torch.randn(batch, *input_size(model)).to("cuda", DTYPES[dtype], memory_format=torch.channels_last)
    with torch.no_grad():
        found = engine.explain(model, x)
    if found.reason is not None:
        raise RuntimeError(f"{name}: {found.reason}")
    limits = {"tflops": 1e-3 * found.peak_gflops, "copy_tbps": 1e-3 * found.copy_gbps}
    launches = [asdict(row) for row in found.rows]
    return {"model": name, "batch": batch, "dtype": dtype, **limits, "launches": launches}


def markdown(results: dict) -> str:
    rows = [
        (
            part["model"], part["batch"], part["dtype"], row["name"], row["kernel"], f"{1e3 * row['ms']:.1f}",
            f"{row['of_bound']:.0%}", row["detail"],
        )
        for part in results["rows"]
        for row in part["launches"]
    ]  # fmt: skip
    heads = ("model", "batch", "type", "step", "kernel", "us", "share of the bound", "how")
    return job.heading(results) + job.table(heads, rows)


def main() -> None:
    parser = job.parser("bench.gpu.layers", __doc__)
    parser.set_defaults(batch=[256])
    work = job.Job(parser.parse_args(), markdown)
    for case in work.cases():
        part = layers(*case)
        work.add(part)
        launches = part["launches"]
        total = sum(row["ms"] for row in launches)
        bound = sum(row["ms"] * row["of_bound"] for row in launches)
        share = f"{total:.3f} ms in {len(launches)} launches, {bound / total:.0%} of their bounds"
        print("{} batch {} {}: ".format(*case) + share, flush=True)
        for row in sorted(launches, key=lambda row: row["ms"] * (row["of_bound"] - 1))[:8]:
            share = f"{1e3 * row['ms']:8.1f} us, {row['of_bound']:.0%}"
            print(f"  {row['name']:<40} {row['kernel']:<18} {share}  {row['detail']}")


if __name__ == "__main__":
    main()
