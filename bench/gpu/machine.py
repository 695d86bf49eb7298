"""Facts about the GPU machine, as JSON: `python -m bench.gpu.machine FILE`."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import fast_backbones as fb
from fast_backbones.kernels import _ext

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def facts() -> dict:
    """Devices, library versions, and whether the CUDA operators loaded."""
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": device.name,
                "capability": [device.major, device.minor],
                "memory_bytes": device.total_memory,
                "multiprocessors": device.multi_processor_count,
            }
        )
    return {
        "build": fb.build_info(),
        "devices": devices,
        "driver": driver(),
        "triton": version("triton"),
        "cudnn": torch.backends.cudnn.version(),
        "operators": _ext.cuda_why_not() or "registered",
    }


def driver() -> str | None:
    """NVIDIA's, as nvidia-smi calls it."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(facts(), indent=1) + "\n")
