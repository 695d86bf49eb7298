"""CNN backbones for PyTorch with fused CPU kernels.

    import fast_backbones as fb
    model = fb.resnext50(weights="resnext50_32x4d.pth").eval()
    with torch.inference_mode():
        logits = model(image)                 # one fused call on the CPU
    print(fb.explain(model, image))           # each step: fused, kernel, time, share of its bound

This package is a facade. The code lives in five rooms, each importable on its own:

    fast_backbones.kernels     fused operations on tensors
    fast_backbones.engine      a whole eval-mode network becomes one plan
    fast_backbones.backbones   the models, as plain PyTorch
    fast_backbones.training    losses, optimiser, schedules and recipes of the papers
    fast_backbones.bench       measurements
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a wheel the rooms sit inside this folder; in a checkout they sit beside it.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))
del _here, _Path


from . import backbones, engine, kernels, training  # noqa: E402
from .backbones import *  # noqa: E402, F403
from .backbones import __all__ as _models  # noqa: E402
from .engine import explain, load_plan, optimize_, revert_, save_plan, tune  # noqa: E402
from .kernels import backend, build_info  # noqa: E402

__all__ = [
    "__version__",
    "backbones",
    "backend",
    "build_info",
    "engine",
    "explain",
    "kernels",
    "load_plan",
    "optimize_",
    "revert_",
    "save_plan",
    "training",
    "tune",
    *_models,
]
