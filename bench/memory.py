"""Peak memory of one forward, measured from outside: how far resident memory rises.

    python -m bench.memory resnet50 --batch 16 --peer ours       one candidate, in this process; JSON

Method. A fresh process builds model and image and notes its resident memory. The kernel's high-water mark
(VmHWM) is set back by writing 5 to /proc/self/clear_refs, one forward runs, and VmHWM is read again. malloc
is told to take every block of 64 KiB or more from the system and to give it back when freed
(MALLOC_MMAP_THRESHOLD_), so that pages which an earlier forward left behind cannot hide what this one needs.

    first    peak of the first forward above the state before it, with capture, packing and libraries
    kept     what is still resident after it (packed weights, code, caches), without `held`
    forward  peak of a later forward above the state just before it, the largest of three; plus `held`
    held     activation memory that a candidate keeps between calls and that would not show (our arena)

`forward` is the number to compare.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
from pathlib import Path

from .child import run_child

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
KEYS = ("eager", "channels_last", "ours")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def status_kib(field: str) -> int:
    """A memory field of /proc/self/status, in KiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}: this measurement needs Linux")
    return int(found.group(1))


def settle(trim: bool = True) -> None:
    """Collect garbage and, with `trim`, give free pages back, so that resident memory is what is in use."""
    gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim and give_back is not None:
        give_back(0)


def peak_of(call) -> int:
    """KiB that the call's peak lies above resident memory before it."""
    settle()
    before = status_kib("VmRSS")
    CLEAR_REFS.write_text("5")
    result = call()
    peak = status_kib("VmHWM") - before
    del result
    return max(peak, 0)


def held_bytes(model, threads: int) -> int:
    """Activation memory that the engine keeps for its next call: spare arenas and kernel scratch."""
    state = model.__dict__.get("_fb_engine")
    if state is None:
        return 0
    arenas = sum(arena.numel() * arena.element_size() for arena in state.arenas.spare)
    natives = [n for runner in state.runners.values() for part, n in runner.parts if part.native]
    return arenas + sum(n.shared_bytes + threads * n.scratch_bytes for n in natives)


def measure_here(name: str, batch: int, key: str, threads: int) -> dict[str, float]:
    """Measure one candidate in this process, which should be fresh. Megabytes are MiB."""
    import torch

    from .peer import Plain
    from .subject import make_input, make_model

    torch.set_num_threads(threads)
    model = make_model(name, trained_like=False)
    x = make_input(model, batch)
    held = lambda: 0  # noqa: E731
    if key == "ours":
        module = model
        held = lambda: held_bytes(model, threads) // 1024  # noqa: E731
    else:
        layout = torch.channels_last if key == "channels_last" else torch.contiguous_format
        module = Plain(model).to(memory_format=layout)
        x = x.contiguous(memory_format=layout)

    def forward():
        with torch.inference_mode():
            return module(x)

    settle()
    before = status_kib("VmRSS")
    first = peak_of(forward)
    if key == "ours":
        from fast_backbones import engine

        with torch.inference_mode():
            reason = engine.why_not(model, x)
        if reason is not None:
            raise SystemExit(f"no plan for {name}: {reason}")
    forward()
    settle()
    kept = status_kib("VmRSS") - before
    steady = max(peak_of(forward) for _ in range(3))
    mib = {"first": first, "kept": kept - held(), "forward": steady + held(), "held": held()}
    return {"model": name, "batch": batch, "peer": key} | {
        f"{k}_mib": round(v / 1024, 1) for k, v in mib.items()
    }


def measure_memory(name: str, batch: int, threads: int = 2, keys=KEYS, tell=lambda share, what: None) -> dict:
    """Each candidate in its own process, and ours against eager's better layout."""
    rows = {}
    for i, key in enumerate(keys):
        tell(i / len(keys), f"memory: {name}, batch {batch}, {key}")
        arguments = [name, "--batch", str(batch), "--peer", key, "--threads", str(threads)]
        rows[key] = run_child(["-m", "{bench}.memory", *arguments], environment=ENVIRONMENT)
    result = {
        "model": name,
        "batch": batch,
        "peers": rows,
        "method": __doc__.split("\n\n")[2].replace("\n", " "),
    }
    eager = [rows[k]["forward_mib"] for k in ("eager", "channels_last") if k in rows]
    if eager and "ours" in rows:
        result["ours_share_of_eager"] = round(rows["ours"]["forward_mib"] / min(eager), 3)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=KEYS, default="ours")
    options = parser.parse_args(argv)
    print(json.dumps(measure_here(options.model, options.batch, options.peer, options.threads)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
