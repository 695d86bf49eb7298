"""At which precision the stacks compute, and how exact ours must be there: the choices of `--precision`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """matmul: what torch.set_float32_matmul_precision is told. dtype: of weights and input.

    A stack whose rms error against float64 is above `wrong` gets no time; ours must also be within `factor`
    times the error of PyTorch eager, run at the highest precision that `dtype` allows.
    """

    matmul: str
    dtype: torch.dtype
    wrong: float
    factor: float

    @property
    def words(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return kind if self.matmul == "highest" else f"{kind} at precision {self.matmul!r}"

    @property
    def rule(self) -> str:
        return f"ours within {self.factor:g}x of PyTorch's own"

    def cast(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
        """Both in the type; the model is a copy where it has another one."""
        if x.dtype is self.dtype:
            return model, x
        return copy.deepcopy(model).to(self.dtype), x.to(self.dtype)


# Float32 stacks agree to 1e-6 .. 1e-4; a bfloat16 or wrongly wired network is at 1e-2 and above. At "high"
# others may multiply TF32 or bfloat16, and ours takes Winograd's real points. In bfloat16 PyTorch's own error
# reaches 2e-1 on deep networks of random weights (inception_v3); a wrongly wired one is at 1 and above.
PRECISIONS = {
    "highest": Precision("highest", torch.float32, 1e-3, 2),
    "high": Precision("high", torch.float32, 5e-2, 16),
    "bfloat16": Precision("highest", torch.bfloat16, 5e-1, 2),
}
