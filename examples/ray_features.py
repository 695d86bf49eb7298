"""Features of all images of a folder as Parquet files, by actors of Ray Data on one machine or on many.

    pip install 'ray[data]'
    python examples/ray_features.py photos features --model resnet50 --weights resnet50.pth
    python examples/ray_features.py photos features --features-only --out-indices -1
    python examples/ray_features.py photos features --address auto --actors 8 --cpus-per-actor 4

Reading and decoding are ordinary tasks; each actor holds one model in eval() and runs it under
inference_mode, as one fused plan. The last batch is as long as it is: an image has the same features in
any batch. The driver loads the weights and sends them along, so only the images and the output folder must be
where every machine sees them.

The output has a row for each file: `path` (below the folder), `error` (null, or why the file could not be
read) and `embedding`, or with --features-only `map_0`, `map_0_shape` and so on. A second run skips what has a
row, unreadable files too; --overwrite starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image, ImageOps
from torch import Tensor

import fast_backbones as fb

SETTINGS = "settings.json"  # what the rows of a folder were made with: two models are never mixed
BATCHES_PER_FILE = 4  # an interrupted run repeats at most so many batches for each actor


class Read:
    """Path -> image as the model wants it; what cannot be read becomes zeros and a sentence."""

    def __init__(self, folder: Path, transform: Any, shape: tuple[int, int, int]):
        self.folder, self.transform, self.shape = folder, transform, shape

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            with Image.open(self.folder / row["path"]) as image:
                pixels = self.transform(ImageOps.exif_transpose(image)).numpy()
            return {"path": row["path"], "error": "", "image": pixels}
        except Exception as problem:  # plugins of Pillow raise what they like; it goes into the table
            sentence = f"{type(problem).__name__}: {problem}"
            return {"path": row["path"], "error": sentence, "image": np.zeros(self.shape, np.float32)}


class Features:
    """The actor: one model, built once."""

    def __init__(self, model: str, options: dict[str, Any], weights: list[Any], threads: int, device: str):
        torch.set_num_threads(threads)
        self.model = fb.create_model(model, **options)
        self.model.load_state_dict(ray.get(weights[0]))
        self.model.eval().to(device)
        self.device = device

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        columns = {name: [None] * len(batch["path"]) for name in self.names()}
        good = np.flatnonzero(batch["error"] == "")
        if len(good):
            with torch.inference_mode():
                found = self.model(torch.from_numpy(np.stack(batch["image"][good])).to(self.device))
            for name, values in self.columns(found).items():
                for i, value in zip(good, values, strict=True):
                    columns[name][i] = value
        columns |= {"path": list(batch["path"]), "error": [e or None for e in batch["error"]]}
        types = {"path": pa.string(), "error": pa.string()}
        for name in self.names():
            types[name] = pa.list_(pa.int32() if name.endswith("_shape") else pa.float32())
        return pa.table(columns, schema=pa.schema(types))

    def names(self) -> list[str]:
        if not self.model.features_only:
            return ["embedding"]
        return [f"map_{i}{end}" for i in range(len(self.model.out_indices)) for end in ("", "_shape")]

    def columns(self, found: Tensor | list[Tensor]) -> dict[str, list[np.ndarray]]:
        if isinstance(found, Tensor):
            return {"embedding": list(found.cpu().numpy())}
        columns = {}
        for i, maps in enumerate(found):
            values = maps.contiguous().cpu().numpy()  # [C, H, W] in this order, whatever the layout
            columns[f"map_{i}"] = [value.ravel() for value in values]
            columns[f"map_{i}_shape"] = [np.array(values.shape[1:], np.int32)] * len(values)
        return columns


def images_in(folder: Path) -> list[str]:
    """Files below the folder that have the ending of an image format, as sorted relative paths."""
    endings = Image.registered_extensions()
    found = (p for p in folder.rglob("*") if p.suffix.lower() in endings and p.is_file())
    return sorted(str(p.relative_to(folder)) for p in found)


def rows_of(output: Path) -> dict[str, str | None]:
    """Path -> error of the rows in the output. What an interrupted write left half done is set aside."""
    rows: dict[str, str | None] = {}
    for file in sorted(output.glob("*.parquet")):
        try:
            table = pq.read_table(file, columns=["path", "error"])
        except pa.ArrowInvalid:
            os.replace(file, f"{file}.unreadable")
            print(f"{file.name} is incomplete: renamed, its images are done again", file=sys.stderr)
            continue
        rows |= zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True)
    return rows


def prepare_output(output: Path, settings: dict[str, Any], overwrite: bool) -> str | None:
    """Make or clear the folder. Returns a sentence when its rows were made with other settings."""
    output.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for file in output.glob("*.parquet"):
            file.unlink()
    elif any(output.glob("*.parquet")):
        path = output / SETTINGS
        before = json.loads(path.read_text()) if path.is_file() else {}
        for key, value in settings.items():
            if before.get(key) != value:
                return f"output {output} has rows of {key} {before.get(key)}, not {value}: use --overwrite"
    (output / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    return None


def resources(options: argparse.Namespace) -> str | None:
    """Fill in actors and CPUs from the cluster. Returns a sentence when they do not fit: Ray would wait."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    largest = max(node["CPU"] for node in nodes)
    if options.actors is None:
        share = options.gpus_per_actor
        options.actors = max(1, int(gpus / share)) if share else len(nodes)
    if options.cpus_per_actor is None:
        options.cpus_per_actor = max(1, int(min(largest, cpus / options.actors)) - 1)
    needed = options.actors * options.cpus_per_actor
    if options.cpus_per_actor > largest:
        return f"--cpus-per-actor {options.cpus_per_actor}: the largest machine has {largest:g}"
    if needed > cpus - 1:
        return (
            f"--actors {options.actors} with --cpus-per-actor {options.cpus_per_actor} take {needed} of "
            f"{cpus:g} CPUs: one must be left to read images"
        )
    if options.actors * options.gpus_per_actor > gpus:
        return f"--gpus-per-actor {options.gpus_per_actor:g}: {options.actors} actors, and {gpus:g} GPUs"
    return None


def extract(options: argparse.Namespace, model: Any, build: dict[str, Any], todo: list[str]) -> None:
    """Read, decode and run the model on these files; rows are written as they are ready."""
    device = "cuda" if options.gpus_per_actor else "cpu"
    shape = tuple(model.default_cfg["input_size"])
    weights = ray.put(model.state_dict())
    blocks = max(2 * options.actors, len(todo) // (BATCHES_PER_FILE * options.batch_size))
    blocks = min(blocks, len(todo))
    dataset = ray.data.from_items([{"path": path} for path in todo], override_num_blocks=blocks)
    read = Read(options.folder.resolve(), fb.transforms_for(model), shape)
    # Not 1: Ray joins stages of the same needs, and an actor of one CPU would read its images itself.
    dataset = dataset.map(read, num_cpus=0.99)
    dataset = dataset.map_batches(
        Features,
        fn_constructor_args=(options.model, build, [weights], options.cpus_per_actor, device),
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=options.cpus_per_actor,
        num_gpus=options.gpus_per_actor,
        batch_size=options.batch_size,
    )
    dataset.write_parquet(str(options.output.resolve()), mode=ray.data.SaveMode.APPEND)


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("folder", type=Path, help="images, also in folders below it")
    p.add_argument("output", type=Path, help="folder for Parquet files")
    p.add_argument("--model", default="resnet50", help="a registered model [%(default)s]")
    p.add_argument("--weights", help="a file, a URL or hf-hub:user/repository [seeded random numbers]")
    p.add_argument("--features-only", action="store_true", help="feature maps instead of pooled embeddings")
    p.add_argument("--out-indices", type=int, nargs="+", help="which maps [all]")
    p.add_argument("--batch-size", type=int, default=16, help="images of a call [%(default)s]")
    p.add_argument("--actors", type=int, help="models at work [one for each machine]")
    p.add_argument("--cpus-per-actor", type=int, help="CPUs and threads of a model [a machine's, less one]")
    p.add_argument("--gpus-per-actor", type=float, default=0.0, help="GPUs, or a part of one [none]")
    p.add_argument("--address", help="of a Ray cluster, or auto [RAY_ADDRESS, else this machine alone]")
    p.add_argument("--overwrite", action="store_true", help="remove the rows that are in the output")
    options = p.parse_args(arguments)
    for key in ("batch_size", "actors", "cpus_per_actor"):
        value = getattr(options, key)
        if value is not None and value < 1:
            p.error(f"--{key.replace('_', '-')} {value}: at least 1")
    if options.gpus_per_actor < 0:
        p.error(f"--gpus-per-actor {options.gpus_per_actor:g}: at least 0")
    if not options.folder.is_dir():
        p.error(f"folder {options.folder} is not a folder")
    if options.out_indices is not None and not options.features_only:
        p.error("--out-indices chooses among maps: it needs --features-only")
    return p, options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, also where some files could not be read; 1 when none could; 2 for wrong arguments."""
    parser, options = parse(arguments)
    maps = {"features_only": True, "out_indices": options.out_indices}
    build = maps if options.features_only else {"num_classes": 0}
    torch.manual_seed(0)
    try:
        model = fb.create_model(options.model, weights=options.weights, **build)
    except (ValueError, RuntimeError, OSError) as problem:
        parser.error(f"--model {options.model}, --weights {options.weights}: {problem}")
    settings = {"model": options.model, "weights": options.weights, **build}
    problem = prepare_output(options.output, settings, options.overwrite)
    if problem is not None:
        parser.error(problem)
    files, done = images_in(options.folder), rows_of(options.output)
    todo = [path for path in files if path not in done]
    print(f"{len(files)} images, {len(files) - len(todo)} of them done before", file=sys.stderr)
    seconds = 0.0
    if todo:
        try:
            ray.init(address=options.address, log_to_driver=False)
        except (ConnectionError, ValueError) as problem:
            parser.error(f"--address {options.address}: {problem}")
        problem = resources(options)
        if problem is not None:
            parser.error(problem)
        start = time.perf_counter()
        extract(options, model, build, todo)
        seconds = time.perf_counter() - start
    rows = rows_of(options.output)
    failed = [path for path in todo if rows.get(path, "no row was written") is not None]
    for path in failed[:20]:
        print(f"unreadable: {path}: {rows.get(path, 'no row was written')}", file=sys.stderr)
    rate = f", {len(todo) / seconds:.1f} images/s by {options.actors} actors" if todo else ""
    print(f"{len(todo) - len(failed)} written, {len(failed)} unreadable, in {seconds:.1f} s{rate}")
    return 1 if todo and len(failed) == len(todo) else 0


if __name__ == "__main__":
    sys.exit(main())
