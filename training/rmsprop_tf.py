"""RMSProp as TensorFlow computes it: the optimiser of Inception v3, v4 and MobileNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RMSPropTF(Optimizer):
    """RMSProp with eps inside the root, mean squares that start at 1, and the rate inside the momentum.

    g   = gradient + weight_decay * p
    ms  = alpha * ms + (1 - alpha) * g^2            ms starts at 1
    mom = momentum * mom + lr * g / sqrt(ms + eps)  mom starts at 0
    p   = p - mom

    `torch.optim.RMSprop` starts ms at 0, adds eps outside the root and multiplies the whole buffer by the
    current lr. With the eps of 1 that the Inception papers use (arXiv 1512.00567, section 8; 1602.07261,
    section 4) it is another optimiser, and its schedules mean something else.

    Args:
        params: parameters, or groups with their own lr, alpha, eps, momentum and weight_decay.
        lr: the paper's 0.045 belongs to its batch of 32 on 50 replicas.
        alpha: decay of the mean square. eps: as in the formula. momentum: 0 keeps no buffer.
        weight_decay: the L2 penalty weight_decay / 2 * p^2 in the loss.
    Raises: ValueError for options out of range and complex parameters, RuntimeError for sparse gradients,
        before anything is changed.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.045,
        *,
        alpha: float = 0.9,
        eps: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError("RMSPropTF takes real parameters only, got a complex one")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; with a closure, which must compute the loss and its gradients, returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.layout is not torch.strided for p, _ in moving):
            raise RuntimeError("RMSPropTF does not take sparse gradients: use a dense embedding or SGD")
        for p, group in moving:
            self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        grad = p.grad if group["weight_decay"] == 0 else p.grad.add(p, alpha=group["weight_decay"])
        state = self.state[p]
        if "square_avg" not in state:
            state["square_avg"] = torch.ones_like(p, memory_format=torch.preserve_format)
        square = state["square_avg"]
        square.mul_(group["alpha"]).addcmul_(grad, grad, value=1 - group["alpha"])
        move = (grad * group["lr"]).div_((square + group["eps"]).sqrt_())
        if group["momentum"] > 0:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            move = state["momentum_buffer"].mul_(group["momentum"]).add_(move)
        p.sub_(move)


def _check_options(group: dict[str, Any]) -> None:
    for name, legal in (
        ("lr", lambda v: v >= 0),
        ("alpha", lambda v: 0 <= v <= 1),
        ("eps", lambda v: v >= 0),
        ("momentum", lambda v: 0 <= v < 1),
        ("weight_decay", lambda v: v >= 0),
    ):
        if not legal(group[name]):
            raise ValueError(f"RMSPropTF: {name} is out of range: {group[name]}")
