"""One row of the whole-model benchmark: one model at one batch size, in this process or in one of its own.

A process of its own gives all memory back when it ends, whatever a stack keeps, and survives a stack that
crashes: the row is then measured again without that stack, whose line says how the process ended.

    python -m bench.rows resnet50 --batch 16      progress to stderr, a JSON object to stdout
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import machine
from .child import ChildFailed, run_child
from .compare import Comparison, Entry, compare
from .peers import PEERS, make_peers
from .precision import PRECISIONS
from .subject import make_input, make_model
from .timing import NoiseGuard

PROGRESS = "progress: "
PATIENCE = 2 * 3600  # seconds for one row; the slowest models at batch 16 take some minutes

Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class How:
    """How rows are measured.

    Peers by key (None: all), threads, seconds of timing, least number of rounds, a key of PRECISIONS.
    """

    peers: list[str] | None
    threads: int
    budget: float
    rounds: int
    precision: str = "highest"


def measure_here(model_name: str, batch: int, how: How, tell: Tell) -> dict:
    """The row, as plain data."""
    tell(0.0, "building the model")
    model = make_model(model_name)
    before = machine.core_round_trip_ns()
    comparison = compare(
        model,
        make_input(model, batch),
        make_peers(how.peers, how.threads),
        budget=how.budget,
        min_rounds=how.rounds,
        guard=NoiseGuard(),
        tell=tell,
        precision=how.precision,
    )
    round_trip = [before, machine.core_round_trip_ns()]
    return {"model": model_name, **comparison.as_dict(), "core_round_trip_ns": round_trip}


def isolated(model_name: str, batch: int, how: How, tell: Tell, patience: float = PATIENCE) -> dict:
    """The row, from a process of its own. ChildFailed when that fails and no stack can be named for it."""
    keys = [key for key in PEERS if how.peers is None or key in how.peers]
    crashed: dict[str, str] = {}
    while True:
        doing = ""

        def listen(line: str) -> bool:
            nonlocal doing
            if not line.startswith(PROGRESS):
                return False
            share, doing = json.loads(line.removeprefix(PROGRESS))
            tell(share, doing)
            return True

        arguments = ["-m", "{bench}.rows", model_name, "--batch", str(batch), "--threads", str(how.threads)]
        arguments += ["--budget", str(how.budget), "--rounds", str(how.rounds)]
        arguments += ["--precision", how.precision, "--peers", *keys]
        try:
            row = run_child(arguments, timeout=patience, listen=listen)
        except ChildFailed as failure:
            key = named_in(doing, keys)
            if failure.code is None or failure.code >= 0 or key in (None, "ours"):
                raise
            crashed[key] = f"the process {failure.how} while {doing}"
            keys.remove(key)
            continue
        if not crashed:
            return row
        comparison = Comparison.from_dict(row)
        for key, sentence in crashed.items():
            peer = PEERS[key](how.threads)
            comparison.entries.append(
                Entry(key, peer.name, peer.version(), peer.settings(), "failed", sentence)
            )
        comparison.entries.sort(key=lambda entry: list(PEERS).index(entry.key))
        return row | comparison.as_dict()


def named_in(doing: str, keys: Sequence[str]) -> str | None:
    """The peer that a progress line is about ("preparing MNN", "timing ncnn"), or None."""
    verb, _, rest = doing.partition(" ")
    if verb not in ("preparing", "timing"):
        return None
    for key in keys:
        name, patience = PEERS[key].name, PEERS[key].patience
        if rest in (name, name + patience, f"warm-up: {key}"):
            return key
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="highest", choices=PRECISIONS)
    parser.add_argument("--peers", nargs="+", default=None)
    options = parser.parse_args(argv)

    def tell(share: float, what: str) -> None:
        print(PROGRESS + json.dumps([share, what]), file=sys.stderr, flush=True)

    how = How(options.peers, options.threads, options.budget, options.rounds, options.precision)
    print(json.dumps(measure_here(options.model, options.batch, how, tell)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
