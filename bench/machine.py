"""What a result must say about where it came from: processor, instruction sets, versions, commit, date.

Nothing here names a person or a host.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path

from fast_backbones.kernels import _ext

ISA_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "hypervisor",
)


def cpu_facts(cpuinfo: str) -> tuple[str, list[str]]:
    """Model name and the instruction sets that matter here, from the text of /proc/cpuinfo."""
    name = re.search(r"^(?:model name|Model|CPU part)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    return (name.group(1).strip() if name else platform.machine()), [f for f in ISA_FLAGS if f in have]


def cpu_model(cpuinfo: str) -> str | None:
    """What tells processors of one name apart: family 25, model 17 is Zen 4, an EPYC of 26 is Zen 5."""
    parts = [re.search(rf"^{key}\s*:\s*(\d+)$", cpuinfo, re.MULTILINE) for key in ("cpu family", "model")]
    if None in parts:
        return None
    family, model = (part.group(1) for part in parts)
    return f"family {family}, model {model}"


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checkout_root() -> Path | None:
    """The folder that holds both bench/ and fast_backbones/, or None when the package is installed."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "fast_backbones" / "__init__.py").is_file() else None


SAME = ("cpu", "cpus", "torch", "code", "fast_backbones")  # facts that must not change within one table

CAPS = ("FB_MAX_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # on the instructions of stacks

# What a measurement depends on; results that are committed, documents and tests do not count.
MEASURED = (
    "backbones", "bench", ":!bench/results", ":!bench/report.py", "csrc", "engine", "fast_backbones",
    "kernels", "CMakeLists.txt", "setup.py",
)  # fmt: skip


def git(root: Path | None, *arguments: str) -> str | None:
    """What git says about the checkout; None outside one, where there is no git, and where it fails."""
    root = root if root is not None else checkout_root()
    if root is None or not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(root: Path | None = None) -> str | None:
    """The commit of the checkout, "+changes" behind it when tracked files differ; None outside a checkout."""
    head = git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if git(root, "status", "--porcelain", "--untracked-files=no") else "")


def code(root: Path | None = None) -> str | None:
    """A hash of the tracked files that a measurement depends on, as they are now; "+changes" behind it where
    they are not as committed."""
    files = git(root, "ls-files", "--stage", "--", *MEASURED)
    changes = git(root, "diff", "HEAD", "--", *MEASURED)
    if files is None or changes is None:
        return None
    return hashlib.sha256((files + changes).encode()).hexdigest()[:12] + ("+changes" if changes else "")


def describe(threads: int) -> dict[str, object]:
    """The machine and the software, as plain data for a result file."""
    import torch

    import fast_backbones

    path = Path("/proc/cpuinfo")
    cpuinfo = path.read_text() if path.is_file() else ""
    name, isa = cpu_facts(cpuinfo)
    preload = [Path(p).name for p in re.split(r"[: ]", os.environ.get("LD_PRELOAD", "")) if p]
    return {
        "cpu": name,
        "cpu_model": cpu_model(cpuinfo),
        "cpus": cpu_count(),
        "isa": isa,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
        "preload": preload,
        "caps": {name: os.environ[name] for name in CAPS if os.environ.get(name)},
        "load_average": [round(v, 2) for v in os.getloadavg()],
        "fast_backbones": fast_backbones.build_info(),
        "commit": commit(),
        "code": code(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def core_round_trip_ns() -> float | None:
    """Nanoseconds for a cache line to go from one thread to another and back, now; None without two threads.

    About 100 between cores that share a cache. A virtual machine's CPUs may be moved to cores that do not,
    where it is several times that: everything that threads hand to each other is slower then.
    """
    native = _ext.native()
    found = native.round_trip_ns() if native is not None else 0.0
    return round(found) if found else None


def short_cpu(facts: dict) -> str:
    """The processor's name for file names: amd-epyc-9b45."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|processor|@.*", "", facts["cpu"].lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def headline(machine: dict) -> str:
    """One line for tables: "AMD EPYC, 2 CPUs, 2 threads, avx512, torch 2.13.0, commit abc, 2026-01-01"."""
    isa = machine["fast_backbones"].get("isa") or "no native library"
    parts = [
        machine["cpu"] + (f" ({machine['cpu_model']})" if machine.get("cpu_model") else ""),
        f"{machine['cpus']} CPUs",
        f"{machine['threads']} threads",
        isa,
        f"torch {machine['torch']}",
        *(f"{name}={value}" for name, value in machine.get("caps", {}).items()),
        f"commit {machine['commit']}" if machine.get("commit") else None,
        str(machine["date"])[:10],
    ]
    return ", ".join(p for p in parts if p)
