"""Parity on this machine, in under a minute on two cores: `fast-backbones selftest`.

Every instruction set that the library has and the processor runs is a process of its own, since the choice is
made once (FB_MAX_ISA); it writes a line of JSON for each check of selftest_checks.py. AVX2 and AVX-512 must
give the same bits.

    python -m fast_backbones.selftest avx2        what such a process runs
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ORDER = ("portable", "avx2", "avx512")
SAME_BITS = ("avx2", "avx512")
LIMIT = 900  # seconds that one instruction set may take; a machine that is used otherwise takes long


@dataclass
class Result:
    """A check that has been made. `words`: what was found, or what is wrong."""

    isa: str
    name: str
    ok: bool
    words: str
    seconds: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)


def isas() -> list[str]:
    """What is built in and runs here within FB_MAX_ISA, the one in use first.

    RuntimeError without a library.
    """
    from .kernels import _ext

    native = _ext.require()
    within = ORDER[: ORDER.index(native.isa()) + 1]
    return [isa for isa in reversed(within) if isa in native.compiled_isas()]


def run(tell: Callable[[int, int, Result], None]) -> list[Result]:
    """All checks. tell(number, how many there are, result) is called after each."""
    found: list[Result] = []
    try:
        sets = isas()
    except RuntimeError as absent:
        result = Result("", "compiled library", False, str(absent))
        tell(1, 1, result)
        return [result]
    totals: dict[str, int] = {}
    compared = [isa for isa in SAME_BITS if isa in sets]
    for isa in sets:
        for line in results_of(isa, best=isa == sets[0], totals=totals):
            found.append(line)
            done = sum(totals.values()) + (len(sets) - len(totals)) * totals.get(sets[0], 0)
            tell(len(found), max(done, len(found)), line)
    if len(compared) == 2:
        result = same_bits(found)
        found.append(result)
        tell(len(found), len(found), result)
    return found


def same_bits(found: list[Result]) -> Result:
    """Whether AVX2 and AVX-512 agree."""
    digests: dict[str, dict[str, str]] = {isa: {} for isa in SAME_BITS}
    for result in found:
        if result.isa in digests:
            digests[result.isa] |= result.digests
    first, second = digests.values()
    different = [name for name in first if first[name] != second.get(name)]
    words = f"differ on {', '.join(different)}" if different else f"the same bits on {len(first)} models"
    return Result("all", "avx2 against avx512", bool(first) and not different, words)


def results_of(isa: str, best: bool, totals: dict[str, int]) -> Iterator[Result]:
    """Of a process of this instruction set; what ends it early is a failed check."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    keep = {key: value for key, value in os.environ.items() if key not in ("FB_BACKEND", "FB_NATIVE")}
    environment = {**keep, "FB_MAX_ISA": isa, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "fast_backbones.selftest", isa, *(["best"] if best else [])]
    running = "start"
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        watch = threading.Timer(LIMIT, process.kill)
        watch.start()
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "total" in message:
                    totals[isa] = message["total"]
                elif "running" in message:
                    running = message["running"]
                else:
                    yield Result(isa, **message)
                    running = "end"
            code = process.wait()
            timed_out = not watch.is_alive()
        finally:
            watch.cancel()
            if process.poll() is None:
                process.kill()
            process.wait()
        if code != 0:
            errors.seek(0)
            last = " | ".join(errors.read().strip().splitlines()[-3:])
            yield Result(isa, running, False, f"{ending(code, timed_out)}: {last}".rstrip(": "))


def ending(code: int, timed_out: bool) -> str:
    if timed_out:
        return f"stopped after {LIMIT} s"
    return (
        f"the process ended by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
    )


def summary(found: list[Result]) -> dict[str, Any]:
    """Counts, and the names of what failed."""
    failed = [f"{r.isa} {r.name}".strip() for r in found if not r.ok]
    sets = list(dict.fromkeys(r.isa for r in found if r.isa in ORDER))
    return {"checks": len(found), "failed": failed, "instruction_sets": sets}


def child(isa: str, best: bool) -> int:
    """One instruction set; lines of JSON on stdout."""
    import torch

    from .kernels import _ext
    from .selftest_checks import Failed, checks

    if _ext.require().isa() != isa:
        print(f"runs {_ext.require().isa()}, asked for {isa}", file=sys.stderr)
        return 1
    torch.set_num_threads(2)
    every = checks(best)
    print(json.dumps({"total": len(every)}), flush=True)
    for check in every:
        print(json.dumps({"running": check.name}), flush=True)
        start = time.perf_counter()
        try:
            ok, words = True, check.run()
        except Failed as wrong:
            ok, words = False, str(wrong)
        except Exception:  # whatever else a broken build raises is a failed check, too
            ok, words = False, traceback.format_exc(limit=-3).strip()
        seconds = time.perf_counter() - start
        result = {"name": check.name, "ok": ok, "words": words, "seconds": seconds}
        print(json.dumps({**result, "digests": check.digests}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(child(sys.argv[1], "best" in sys.argv[2:]))
