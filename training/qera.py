"""An adapter that begins with what NF4 took from its base.

Of each matrix W, held as Q(W), the adapter is set to the low-rank part of W − Q(W) that matters most to the inputs that
come in: with s = √E[x²] of every input,

    b a = the nearest of rank r to (W − Q(W)) diag(s), times diag(s)⁻¹

so training begins near the base in full precision instead of where rounding has put it. The closed form is QERA's
(Zhang et al. 2024, arXiv:2410.06040), its approximate one, which takes inputs for uncorrelated. With s = 1 it would be
LoftQ's first step (arXiv:2310.08659); PEFT has that for a base that stays as it is, but only on GPUs and for a scale of
1. Here too the base stays as it is, for every other adapter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from training.base_weights import matrices
from training.encode import Encoded

_PREFIX: Final = "base_model.model."
_READ: Final = 24  # examples from which the inputs are known
_BATCH: Final = 8
_BEYOND: Final = 16  # columns of the random sketch beyond the rank
_ROUNDS: Final = 4  # power iterations
_LEAST: Final = 1e-3  # of the mean of a matrix's E[x²]: inputs that are hardly ever there are no reason for large rows


def give_back(model: Any, base: Path, examples: Sequence[Encoded], seed: int) -> float:
    """Set the LoRA of `model`, a PeftModel on an NF4 base, to its share of the rounding; what is left of that, 0 to 1.

    The result is ‖(W − Q(W) − b a) diag(s)‖ / ‖(W − Q(W)) diag(s)‖ over all matrices, Frobenius. `base` is the
    directory with the base's own weights, read one matrix at a time; up to 24 of `examples` are read by the model as it
    is. Raises `WeightsMissing` where the files have no matrix of an adapted module's name.
    """
    import bitsandbytes as bnb

    layers = {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    squares = _mean_squares(model, layers, random.Random(seed).sample(list(examples), min(_READ, len(examples))))
    before = after = 0.0
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for name, weight in matrices(base, layers):
            layer = layers[name]
            held = layer.base_layer.weight
            rounded = bnb.functional.dequantize_4bit(held.data, held.quant_state).float()
            s = squares[name].clamp(min=_LEAST * float(squares[name].mean())).sqrt().clamp(min=1e-12)
            error = (weight.to(rounded.device) - rounded) * s
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rows, columns = low_rank(error, len(a))
            before += float(error.square().sum())
            after += float((error - columns @ rows).square().sum())
            a.copy_(rows / s)
            b.copy_(columns / layer.scaling["default"])
    return float((after / before) ** 0.5) if before else 0.0


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(a [r, in], b [out, r]) with b a as near to `matrix` [out, in] as rank r comes, by a randomized SVD.

    Both halves have the square roots of the singular values. Where the rank is more than the matrix has, rows are zero.
    """
    sketch = min(rank + _BEYOND, *matrix.shape)
    u, s, v = torch.svd_lowrank(matrix, q=sketch, niter=_ROUNDS)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a, b = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    a[:kept], b[:, :kept] = root[:, None] * v[:, :kept].T, u[:, :kept] * root
    return a, b


def _mean_squares(model: Any, layers: dict[str, Any], examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """E[x²] [in] of every matrix's inputs, over all tokens."""
    from training.answer_loss import padded

    sums: dict[str, Tensor] = {}
    mask = torch.empty(0, dtype=torch.bool)

    def hook(name: str) -> Any:
        def read(_: Any, given: tuple[Any, ...]) -> None:
            seen = given[0][mask].float().square().sum(0)
            sums[name] = sums[name] + seen if name in sums else seen

        return read

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    tokens = 0
    try:
        with torch.no_grad():
            rows = sorted(examples, key=lambda one: len(one.input_ids))
            for begin in range(0, len(rows), _BATCH):
                ids, given, _ = padded(rows[begin : begin + _BATCH])
                mask = given.to(device).bool()
                tokens += int(mask.sum())
                model(input_ids=ids.to(device), attention_mask=given.to(device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {name: total / tokens for name, total in sums.items()}
