"""The only file that loads the compiled libraries, and the one that says why they are absent.

    native()        the module fast_backbones.kernels._C, or None; the first None comes with a warning
    why_not()       why native() is None, as a sentence; None when it is there
    require()       the module, or RuntimeError with that sentence
    cuda()          whether the CUDA operators are registered; the first call loads them
    cuda_why_not()  why cuda() is False, as a sentence
    build_info()    what was built with which tools, and what this machine uses of it

Environment: FB_REQUIRE_NATIVE=1 makes an absent library an ImportError; FB_NATIVE=0 leaves it unloaded, and
nothing warns.
"""

import functools
import importlib
import json
import os
import platform
import sysconfig
import threading
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before _C, which needs the libraries that torch loads

__all__ = ["build_info", "cuda", "cuda_why_not", "native", "require", "why_not"]

_HERE = Path(__file__).resolve().parent
_CUDA_LIBRARY = _HERE / "_C_cuda.so"
_INTERFACE = 15  # what this Python code asks of the library: csrc/python/module.cpp has the same number


def _build_facts() -> dict[str, Any]:
    """What setup.py wrote beside the library; empty when it never ran here."""
    path = _HERE / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _why_not_built() -> str:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    others = sorted(path.name for path in _HERE.glob("_C.*.so") if path.name != f"_C{suffix}")
    if others:
        return f"not built for this interpreter: found {', '.join(others)}, need _C{suffix}"
    reason = _build_facts().get("reason")
    if reason:
        return f"not built: {reason}"
    return "not built: run `make build`, or `pip install --no-build-isolation -e .`, with a C++ compiler"


def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module and None, or None and the reason."""
    if os.environ.get("FB_NATIVE") == "0":
        return None, "switched off by FB_NATIVE=0"
    # Looked for here and nowhere else: an editable install's finder would offer the library of its checkout.
    if not any((_HERE / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        return None, _why_not_built()
    try:
        module = importlib.import_module("._C", __package__)
    except ImportError as error:  # it is there and the loader refused it: keep the loader's own words
        built = _build_facts().get("torch", "an unknown version")
        return None, f"failed to load: {error} (built with torch {built}, running torch {torch.__version__})"
    found = getattr(module, "interface", 1)
    if found != _INTERFACE:
        return None, f"built from other sources: interface {found}, need {_INTERFACE}; run `make build`"
    return module, None


_module, _reason = _load()
_warned = False
if _module is None and os.environ.get("FB_REQUIRE_NATIVE") == "1":
    raise ImportError(f"FB_REQUIRE_NATIVE=1, but the compiled library of fast_backbones is absent; {_reason}")


def why_not() -> str | None:
    """Why the compiled library is absent, as a sentence; None when it is loaded."""
    return _reason


def native() -> ModuleType | None:
    """The compiled module, or None. The first None of a process comes with a warning that says why."""
    global _warned
    if _module is None and not _warned:
        _warned = True
        if os.environ.get("FB_NATIVE") != "0":
            warnings.warn(
                f"fast_backbones runs through PyTorch, without its fused kernels; {_reason}",
                RuntimeWarning,
                stacklevel=3,
            )
    return _module


def require() -> ModuleType:
    """The compiled module; RuntimeError with the reason when it is absent."""
    if _module is None:
        raise RuntimeError(f"this needs the compiled library of fast_backbones; {_reason}")
    return _module


_cuda_lock = threading.Lock()


@functools.lru_cache(maxsize=1)
def _load_cuda() -> str | None:
    """Register the CUDA operators; None when that worked, else the reason."""
    if _module is None:  # the schemas are defined there
        return f"the compiled library is absent; {_reason}"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not _CUDA_LIBRARY.is_file():
        return f"the CUDA library is absent: {_build_facts().get('cuda_reason') or 'no record of a build'}"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False on this machine"
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return f"failed to load {_CUDA_LIBRARY.name}: {error}"
    return None


def cuda_why_not() -> str | None:
    """Why there are no CUDA operators, as a sentence; None once they are registered. Loads them."""
    with _cuda_lock:
        return _load_cuda()


def cuda() -> bool:
    """Whether the CUDA operators are registered. Loads them, so ask only when there is a CUDA tensor."""
    return cuda_why_not() is None


def build_info() -> dict[str, Any]:
    """Facts about this build and this machine, for bug reports and benchmark results. Leaves CUDA alone.

    Keys: version, native, reason, isa (in use), isas (compiled in), compiler, build_type, cuda (is its
    library there), cuda_reason, nvcc, torch, torch_built_with, torch_cuda, python, platform, threads.
    """
    from .. import __version__

    facts = _build_facts()
    built_cuda = _CUDA_LIBRARY.is_file()
    return {
        "version": __version__,
        "native": _module is not None,
        "reason": _reason,
        "isa": _module.isa() if _module is not None else None,
        "isas": list(_module.compiled_isas()) if _module is not None else [],
        "compiler": (facts.get("compiler") or _module.compiler()) if _module is not None else None,
        "build_type": facts.get("build_type"),
        "cuda": built_cuda,
        "cuda_reason": None if built_cuda else facts.get("cuda_reason") or "never built here",
        "nvcc": facts.get("nvcc"),
        "torch": torch.__version__,
        "torch_built_with": facts.get("torch"),
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
