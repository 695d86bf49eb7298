"""fast-backbones env: what an issue report needs. Names of people, hosts and home folders are taken out."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from .common import AsJson, say

PACKAGES = (
    "numpy", "pillow", "safetensors", "typer", "rich", "triton", "torchvision", "timm", "huggingface_hub",
    "matplotlib", "pyarrow", "onnx", "onnxruntime", "openvino", "ncnn", "MNN",
)  # fmt: skip
# Of these depend kernels, threads and memory: ours, OpenMP's, oneDNN's, PyTorch's, malloc's, CUDA's.
PREFIXES = (
    "FB_", "OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH", "PYTORCH_", "CUDA_",
    "NVIDIA_TF32", "MALLOC_", "GLIBC_TUNABLES", "THP_", "LD_PRELOAD", "TRITON_",
)  # fmt: skip
SYSTEM = {  # fact: file and what to keep of it
    "transparent huge pages": ("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]"),
    "overcommit": ("/proc/sys/vm/overcommit_memory", r"(\d)"),
    "cpu quota (cgroup)": ("/sys/fs/cgroup/cpu.max", r"(.+)"),
    "memory limit (cgroup)": ("/sys/fs/cgroup/memory.max", r"(.+)"),
    "frequency governor": ("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", r"(\w+)"),
}
CACHES = "/sys/devices/system/cpu/cpu0/cache"


def anonymous(text: str) -> str:
    """Without the home folder, the user's name and the host's."""
    text = text.replace(str(Path.home()), "~") if Path.home() != Path("/") else text
    for name, instead in ((platform.node(), "HOST"), (user_name(), "USER")):
        if name and name not in ("localhost", "root"):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text


def user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user need not have a name
        return ""


def cleaned(value: Any) -> Any:
    """`anonymous` in all strings of nested lists and dicts."""
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return anonymous(value) if isinstance(value, str) else value


def system_facts() -> dict[str, str]:
    """What the operating system does to memory and processor time; facts it does not tell are left out."""
    found = {}
    for fact, (file, pattern) in SYSTEM.items():
        try:
            match = re.search(pattern, Path(file).read_text())
        except OSError:
            continue
        if match is not None:
            found[fact] = match.group(1)
    caches = []
    for folder in sorted(Path(CACHES).glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        caches.append(f"L{level} {kind.lower()} {size}")
    return {**found, **({"caches of cpu 0": ", ".join(caches)} if caches else {})}


def kernel_facts() -> dict[str, Any]:
    """What the compiled library sees and uses."""
    from ..kernels import _ext, current_backend

    native = _ext.native()
    facts: dict[str, Any] = {"backend": current_backend(), "cuda operators": _ext.cuda_why_not() or "loaded"}
    if native is not None:
        facts |= {
            "instruction set in use": native.isa(),
            "instruction set of this processor": native.detected_isa(),
            "bfloat16 products": native.has_bf16(),
            "memory of maps": native.map_memory(),
        }
    return facts


def torch_facts() -> dict[str, Any]:
    """Settings of PyTorch that change numbers or speed."""
    import torch

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(i)
        gpus.append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": torch.backends.mkldnn.is_available(),
        "gpus": gpus or "none",
        "cuda": torch.version.cuda or "built without",
        "cudnn": torch.backends.cudnn.version() or "none",
        "config": [line.strip() for line in torch.__config__.show().splitlines()],
        "parallel": [line.strip() for line in torch.__config__.parallel_info().splitlines() if line.strip()],
    }


def environment() -> dict[str, str]:
    """Variables that matter; of preloaded libraries the file names."""
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES)}
    if "LD_PRELOAD" in found:
        found["LD_PRELOAD"] = " ".join(Path(p).name for p in re.split(r"[: ]", found["LD_PRELOAD"]) if p)
    return found


def env(as_json: AsJson = False) -> None:
    """What an issue report needs: versions, processor, build, settings. No names of people or hosts."""
    import torch

    from ..bench import machine
    from ..bench.peer import package_version

    facts = machine.describe(torch.get_num_threads())
    installed = "a checkout" if machine.checkout_root() is not None else "a package"
    report = cleaned(
        {
            "machine": {k: v for k, v in facts.items() if k not in ("fast_backbones", "threads")}
            | {"installed as": installed},
            "system": {"libc": " ".join(platform.libc_ver()), **system_facts()},
            "build": facts["fast_backbones"],
            "kernels": kernel_facts(),
            "torch": torch_facts(),
            "packages": {name: package_version(name) for name in PACKAGES},
            "environment": environment(),
        }
    )
    if as_json:
        say(json.dumps(report))
        return
    for section, content in report.items():
        say(f"[{section}]")
        for key, value in content.items():
            lines = value if isinstance(value, list) and section == "torch" else None
            if lines is not None:
                say(f"  {key}:")
                for line in lines:
                    say(f"    {line}")
                continue
            say(f"  {key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
