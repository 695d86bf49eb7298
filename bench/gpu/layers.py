"""Each launch of a model on a GPU as a share of what the card can do: python -m bench.gpu.layers resnet50
--batch 256

The rows are those of fb.explain(): a launch timed alone, by CUDA events, and the larger of its shares of the
measured copy bandwidth and of the measured rate of a large matrix product in the same type.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from fast_backbones import engine

from ..files import write_results
from ..subject import input_size, make_model
from .machine import DTYPES, facts
from .models import commit


def layers(name: str, batch: int, dtype: str) -> dict:
    model = make_model(name).to("cuda", DTYPES[dtype])
    x = torch.randn(batch, *input_size(model)).to("cuda", DTYPES[dtype], memory_format=torch.channels_last)
    with torch.no_grad():
        found = engine.explain(model, x)
    if found.reason is not None:
        raise RuntimeError(f"{name}: {found.reason}")
    limits = {"tflops": 1e-3 * found.peak_gflops, "copy_tbps": 1e-3 * found.copy_gbps}
    return {
        "model": name,
        "batch": batch,
        "dtype": dtype,
        **limits,
        "rows": [asdict(row) for row in found.rows],
    }


def markdown(results: dict) -> str:
    lines = ["| model | batch | type | step | kernel | us | share of the bound | tiles |", "|---" * 8 + "|"]
    for part in results["models"]:
        for row in part["rows"]:
            cells = (
                part["model"],
                part["batch"],
                part["dtype"],
                row["name"],
                row["kernel"],
                f"{1e3 * row['ms']:.1f}",
                f"{row['peak']:.0%}",
                row["detail"],
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", help="names from fast_backbones.list_models()")
    parser.add_argument("--batch", nargs="+", type=int, default=[256])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; a table lies beside it")
    options = parser.parse_args()
    results: dict = {"machine": facts(), "commit": commit(), "models": []}
    for dtype in options.dtype:
        for batch in options.batch:
            for name in options.models:
                part = layers(name, batch, dtype)
                results["models"].append(part)
                write_results(results, markdown(results), options.out.parent, options.out.stem)
                total = sum(row["ms"] for row in part["rows"])
                bound = sum(row["ms"] * row["peak"] for row in part["rows"])
                share = f"{total:.3f} ms in {len(part['rows'])} launches, {bound / total:.0%} of their bounds"
                print(f"{name} batch {batch} {dtype}: {share}", flush=True)
                for row in sorted(part["rows"], key=lambda row: row["ms"] * (row["peak"] - 1))[:8]:
                    share = f"{1e3 * row['ms']:8.1f} us, {row['peak']:.0%}"
                    print(f"  {row['name']:<40} {row['kernel']:<18} {share}  {row['detail']}")


if __name__ == "__main__":
    main()
