"""A base made trainable in one of three ways: an adapter on it, an adapter on its NF4 copy, or all of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from training.errors import MethodUnsupported
from training.fast_lora import speed_up
from training.loss import plain_head
from training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["lora", "qlora", "full"]
METHODS: tuple[Method, ...] = ("lora", "qlora", "full")


@dataclass(frozen=True)
class Trainable:
    """A model whose trainable parameters are float32 and whose other weights may be anything."""

    model: Any  # a PeftModel, or for "full" the transformers model itself
    trained: int  # parameters with a gradient
    parameters: int  # all
    precision: str  # of the forward: "bfloat16" or "float32"
    autocast: bool  # whether that takes autocast; otherwise the weights have it already


def make_trainable(directory: Path, base: str, method: Method, recipe: Recipe, device: str) -> Trainable:
    """Load the base in `directory` and prepare it for `method`; `base` is the name the adapter will record.

    Raises `MethodUnsupported` when the model's logits or modules do not allow it.
    """
    dtype = dtype_of(recipe.precision, device)
    halved = dtype != torch.float32
    model: Any = load_base(directory, method, recipe.max_length, device, dtype)
    if not plain_head(model):
        raise MethodUnsupported(f"{type(model).__name__} bends its logits, which the label-only loss does not know")
    model.config.use_cache = False
    autocast = halved
    if method != "full":
        model, slow_layers = with_adapter(model, base, recipe, device)
        autocast = halved and slow_layers  # the fast layers bring their own precision
    if method == "full":
        trained = parameters = model.num_parameters()
    else:
        trained, parameters = model.get_nb_trainable_parameters()  # knows that NF4 packs two weights into a byte
    return Trainable(
        model,
        trained=trained,
        parameters=parameters,
        precision=str(dtype).removeprefix("torch."),
        autocast=autocast,
    )


def float32_adapters(model: nn.Module) -> None:
    """Put the trainable parameters (back) to float32.

    TRL casts the adapters of a quantized base to bfloat16, whose eight bits lose most updates of a small learning rate.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def dtype_of(precision: str, device: str) -> torch.dtype:
    """What a recipe's precision means on `device`: "auto" is bfloat16 where its products run in hardware."""
    if precision == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]


def bfloat16_is_fast(device: str) -> bool:
    """Whether bfloat16 matrix products run in hardware; on a CPU without, they take several times float32's time.

    With AVX512-BF16 or AMX a training step of SmolLM2-135M took 0.89 s against 1.46 s in float32.
    """
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def load_base(directory: Path, method: Method, max_length: int, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base as `method` holds it: every weight in float32 to train them all, in `dtype`, or in NF4 for "qlora"."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=torch.float32 if method == "full" else dtype,
        device_map={"": device} if method == "qlora" else None,
        quantization_config=quantization,
        attn_implementation=attention_for(device, max_length),
    )
    if method == "qlora":
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Otherwise the first forward in eval mode repacks the shared weight in place, after which gradients
                # with respect to its input silently come out as None.
                module.support_avx512bf16_for_cpu = False
        model.requires_grad_(False)
    return model


def attention_for(device: str, max_length: int) -> str:
    """transformers' name of the attention to train with.

    On a CPU torch's fused attention is slower than plain products on short rows (forward and backward), but those
    keep every score for the backward pass: length² for each head of each layer.
    """
    return "eager" if device == "cpu" and max_length <= 512 else "sdpa"


def with_adapter(model: PreTrainedModel, base: str, recipe: Recipe, device: str) -> tuple[Any, bool]:
    """(`model` with the recipe's LoRA, whether any of its layers has PEFT's own forward); `base` is recorded.

    Raises `MethodUnsupported` when the targets are not there.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets) or "all-linear",
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        use_rslora=recipe.variant == "rslora",
        use_dora=recipe.variant == "dora",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:  # PEFT's words for target modules that are not there
        raise MethodUnsupported(str(error)) from error
    layers = sum(hasattr(module, "lora_A") for module in adapted.modules())
    return adapted, device != "cpu" or speed_up(adapted) < layers
