"""The base model: found by name, loaded in the wanted precision, checked to be one we can serve."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from hub.base import BaseIdentity, locate_base
from hub.fingerprint import fingerprint_directory
from server.config import ModelConfig
from server.errors import BaseUnavailable
from server.model import attention
from server.model.architecture import refuse_unserved

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class BaseModel:
    """A loaded base and what others need to know of it."""

    identity: BaseIdentity
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: str  # "LlamaForCausalLM"
    quantization: str  # "nf4", "int8" or "none"
    dtype: torch.dtype
    device: str
    context_tokens: int
    vocabulary_size: int

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def kv_heads(self) -> int:
        """Key/value heads of a layer."""
        config: Any = self.model.config.get_text_config()
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    @property
    def head_width(self) -> int:
        """Dimension of one head."""
        config: Any = self.model.config.get_text_config()
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear layer that an adapter may target, by its module path; the output head is not among them.

        Nor are linears of a mixture's experts: each sees only the tokens routed to it.
        """
        head = self.model.get_output_embeddings()
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not head and ".experts." not in name
        }


def load_base(config: ModelConfig) -> BaseModel:
    """Load the base that `config` names.

    Raises `hub.errors.BaseNotFound` for an unknown name, `BaseUnavailable` when its files cannot be loaded and
    `UnsupportedArchitecture` when the model cannot run on our attention.
    """
    bound_threads(config.threads)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    located = locate_base(config.base)
    directory = str(located.directory)
    fingerprint = fingerprint_directory(located.directory)
    dtype = _DTYPES[config.dtype]
    attention.register()
    _quieten()
    try:
        described = AutoConfig.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map=config.device,
            quantization_config=_quantization(config.quantization, dtype),
        )
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise BaseUnavailable(f"the base {config.base!r} cannot be loaded: {_first_line(error)}") from error
    refuse_unserved(model)
    model.set_attn_implementation(attention.ATTENTION_NAME)
    model.requires_grad_(False).eval()
    if config.quantization == "nf4" and config.device == "cpu":
        _keep_odd_shapes_unpacked(model)
    text = described.get_text_config()
    return BaseModel(
        identity=BaseIdentity(
            name=located.name,
            revision=located.revision,
            fingerprint=fingerprint.fingerprint,
            quantization=config.quantization,
        ),
        model=model,
        tokenizer=tokenizer,
        architecture=type(model).__name__,
        quantization=config.quantization,
        dtype=dtype,
        device=config.device,
        context_tokens=int(text.max_position_embeddings),
        vocabulary_size=int(text.vocab_size),
    )


def bound_threads(threads: int) -> None:
    """Bound torch's CPU threads (0 = all cores): a spinning pool larger than the machine costs 10-50x."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def _quieten() -> None:
    """The front tells the user what is loading; the libraries' own bars and hints would only cut through it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # It warns of a package with optional kernels that no index we may use offers.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if kind == "int8":
        # Threshold 0: outlier columns are found over the whole batch, so one request would change another's answer.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return None


def _keep_odd_shapes_unpacked(model: nn.Module) -> None:
    """Take layers that bitsandbytes' packed CPU kernel cannot hold off that path.

    With AVX512-BF16 it repacks the weight on the first forward, which fails where out % 32 != 0 and computes
    wrongly for in = 96 (in must be whole blocks of 64).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            linear = cast(nn.Linear, module)
            if linear.out_features % 32 or linear.in_features % 64:
                linear.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
