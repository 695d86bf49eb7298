"""Checks an installed fast_backbones, outside of any checkout: `python -I tests/installed_package.py`.

The package must lie in site-packages, with its compiled library, and every instruction set of this machine
must keep the 2x rule on a few networks and do a training step. Exit status 0 and a line of facts, or a
traceback. With `--pure` the library must be absent instead, with a reason, and the numbers those of PyTorch.
"""

import json
import os
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

MODELS = {
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "mobilenetv1_025": 96,
    "legacy_seresnet18": 64,
    "densenet121": 64,
}
ISAS = ("portable", "avx2", "avx512")


def relative_rms(found, truth):
    return float(((found.double() - truth).square().mean() / truth.square().mean()).sqrt())


def check_numbers(native):
    """In this process: every network against itself in float64, with PyTorch's own error as the measure."""
    import torch

    import fast_backbones as fb

    for name, size in MODELS.items():
        torch.manual_seed(0)
        model = fb.create_model(name, num_classes=10).eval()
        image = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            assert fb.engine.why_not(model, image) is None or not native, fb.engine.why_not(model, image)
            ours = model(image)
            with fb.backend("reference"):
                plain = model(image)
                truth = model.double()(image.double())
        error, allowed = relative_rms(ours, truth), 2 * relative_rms(plain, truth)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    torch.manual_seed(0)
    model = fb.resnet18(num_classes=10).train()
    loss = fb.kernels.softmax_cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([1, 2, 3, 4]))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def check_installed(native):
    warnings.simplefilter("error" if native else "ignore")
    import fast_backbones as fb

    site = [Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")]
    where = Path(fb.__file__).resolve()
    assert any(folder in where.parents for folder in site), f"imported from {where}"
    assert list(fb.__path__) == [str(where.parent)], fb.__path__
    info = fb.build_info()
    assert info["native"] is native, info
    if native:
        assert info["isas"] == list(ISAS), info["isas"]
    else:
        assert info["reason"], info
    return info


def main():
    native = "--pure" not in sys.argv
    if "--numbers" in sys.argv:
        return check_numbers(native)
    info = check_installed(native)
    here = ISAS.index(info["isa"]) + 1 if native else 1
    for isa in ISAS[:here]:
        arguments = [sys.executable, "-I", __file__, "--numbers", *(() if native else ("--pure",))]
        subprocess.run(arguments, check=True, env={**os.environ, "FB_MAX_ISA": isa})
    said = {key: info[key] for key in ("version", "native", "reason", "torch", "torch_built_with", "python")}
    print(json.dumps({**said, "checked": list(ISAS[:here]) if native else ["PyTorch"]}))
    return None


if __name__ == "__main__":
    main()
