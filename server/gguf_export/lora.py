"""A PEFT LoRA as llama.cpp's pairs: what the format can hold, and under which numbers.

PEFT adds s_m · B A to module m with a scaling s_m of its own (rank and alpha patterns, rsLoRA). llama.cpp knows one
alpha for the file and adds alpha / r_m · B A, r_m the rank of the pair. Where they differ, B is multiplied by
s_m · r_m / alpha, in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hub.lora_config import LoraConfig, parse_tensor_name
from hub.tensor_names import Kind
from server.errors import ExportUnsupported, TensorUnbound
from server.gguf_export.architecture import Architecture
from server.merge import CONFIG_FILE, WEIGHTS_FILE

_CANNOT: dict[Kind, str] = {
    "lora_bias": "lora_bias",
    "magnitude": "DoRA (use_dora)",
    "embedding_A": "LoRA on the embedding",
    "embedding_B": "LoRA on the embedding",
    "trainable_tokens": "trainable_token_indices",
    "base": "copies of the base's own parameters (trained biases, a tied weight)",
    "saved": "modules_to_save",
}


def lora_pairs(
    directory: Path, name: str, architecture: Architecture
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(llama.cpp tensor → (A [r, in], B [out, r]) in float32, alpha) of the adapter in `directory`, called `name`.

    Raises `ExportUnsupported`, naming every feature that GGUF has no place for.
    """
    config = LoraConfig.parse((directory / CONFIG_FILE).read_bytes())
    found: dict[str, dict[Kind, Tensor]] = {}
    refused = set()
    for key, tensor in load_file(directory / WEIGHTS_FILE).items():
        site = parse_tensor_name(key)
        if site.kind in _CANNOT:
            refused.add(_CANNOT[site.kind])
        found.setdefault(site.module, {})[site.kind] = tensor.float()
    if config.use_dora:
        refused.add(_CANNOT["magnitude"])
    if config.alora_invocation_tokens is not None:
        refused.add("alora_invocation_tokens")
    if config.target_parameters:
        refused.add("target_parameters")
    if refused:
        raise ExportUnsupported(
            f"{name} uses {', '.join(sorted(refused))}, which a GGUF LoRA cannot hold; `hub merge --gguf` writes a "
            "whole model instead"
        )
    alpha = float(config.lora_alpha)
    if alpha == 0:
        raise ExportUnsupported(f"{name} has lora_alpha 0, which llama.cpp reads as a scale of 1")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module, tensors in found.items():
        if tensors.keys() != {"lora_A", "lora_B"}:
            raise TensorUnbound(f"{name}: {module} has only one half of its low-rank pair")
        a, b = tensors["lora_A"], tensors["lora_B"]
        target = architecture.tensor_name(f"{module}.weight")
        if target is None or (module == "lm_head" and architecture.tied):
            why = "its head is the embedding" if module == "lm_head" else "not there in llama.cpp"
            raise ExportUnsupported(f"{name} changes {module}, which has no tensor of its own ({why})")
        rank = a.shape[0]
        factor = config.scaling(module, rank) * rank / alpha
        rows = architecture.reordered(f"{module}.weight", b)
        pairs[target] = (a, rows if factor == 1 else (rows.double() * factor).to(torch.float32))
    return pairs, alpha
