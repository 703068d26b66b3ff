"""PEFT's adapter_config.json as a value. No torch, and nothing of PEFT is imported.

The keys are an allow-list made from PEFT 0.21's `LoraConfig`. What changes the adapter's function is parsed; what only
mattered while training is accepted and ignored; what runs code, needs another method, or changed the base weights is
refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Self

from hub import config_values, json_text
from hub.config_values import MAX_RANK as MAX_RANK
from hub.config_values import Bias, shown
from hub.errors import BaseChangedInit, ConfigKeyRefused, ConfigMalformed, PeftTypeUnsupported
from hub.tensor_names import TensorSite as TensorSite
from hub.tensor_names import parse_tensor_name as parse_tensor_name

MAX_CONFIG_BYTES: Final = 1024 * 1024
_MAX_MATCH_STEPS: Final = 1_000_000_000  # of a bound far above the steps really taken; a second or so

# Initializations that leave the base weights alone; afterwards the adapter is a plain LoRA.
_SOUND_INITS = {"gaussian", "eva", "orthogonal", "mica"}
# These subtract something from the base weights first, so the file only works on that changed base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Only mattered while training, or only says how the file was made: any JSON value.
_IGNORED_KEYS = {
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "lora_dropout",
    "peft_version",
    "qalora_group_size",
    "task_type",
}
# Accepted only where they say "not used", with these values.
_UNUSED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "arrow_config": (None,),
    "auto_mapping": (None,),
    "corda_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
    "monteclora_config": (None,),
    "use_bdlora": (None,),
    "use_qalora": (None, False),
    "velora_config": (None,),
}

_ADVICE: Mapping[str, str] = {
    "auto_mapping": "it names code to import. PEFT writes it when task_type is not set; make it null, the adapter does "
    "not need it",
}


@dataclass(frozen=True)
class LoraConfig:
    """What of a LoRA's config decides what the adapter computes. Build it with `parse`."""

    r: int  # 1…MAX_RANK
    lora_alpha: float  # finite
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # regex → rank, 1…MAX_RANK
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # regex → alpha
    lora_bias: bool = False
    bias: Bias = "none"
    fan_in_fan_out: bool = False
    target_modules: tuple[str, ...] | str | None = None  # names, or one regex; never evaluated here
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    alora_invocation_tokens: tuple[int, ...] | None = None
    init_lora_weights: str | bool = True
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The config in the bytes of an adapter_config.json.

        Raises ConfigMalformed, PeftTypeUnsupported, ConfigKeyRefused, BaseChangedInit or RankInvalid.
        """
        try:
            keys = json_text.parse_object(data, max_bytes=MAX_CONFIG_BYTES)
        except ValueError as error:
            raise ConfigMalformed(f"adapter_config.json {error}") from error
        if keys.get("peft_type") != "LORA":
            raise PeftTypeUnsupported(f"peft_type is {shown(keys.get('peft_type'))}; the hub takes LORA")
        _refuse_keys(keys)
        _check_init(keys.get("init_lora_weights", True))
        parsed = {name: read(name, keys[name]) for name, read in _READERS.items() if keys.get(name) is not None}
        return cls(**{"r": 8, "lora_alpha": 8.0, **parsed})  # PEFT's defaults

    def rank_of(self, module: str) -> int:
        """The rank PEFT gives the LoRA of `module` ("model.layers.0.self_attn.q_proj")."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha PEFT gives the LoRA of `module`."""
        return self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.lora_alpha)

    def scaling(self, module: str, rank: int) -> float:
        """PEFT's factor on B·A: alpha/rank, or alpha/√rank for rsLoRA. `rank` >= 1 is that of the tensors."""
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def check_match_cost(self, modules: Collection[str]) -> None:
        """Check that matching the patterns against these modules takes seconds at most; raises ConfigMalformed.

        Call it before `rank_of`, `alpha_of` or `scaling` where the config or the module names come from a stranger.
        """
        longest = max(map(len, modules), default=0)
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        steps = len(modules) * sum(config_values.match_steps(pattern, longest) for pattern in patterns)
        if steps > _MAX_MATCH_STEPS:
            raise ConfigMalformed(f"rank_pattern and alpha_pattern take too long to match with {len(modules)} modules")

    @property
    def features(self) -> tuple[str, ...]:
        """Sorted names of what a plain LoRA does not use; "rslora" and the patterns included."""
        used = {
            "rslora": self.use_rslora,
            "dora": self.use_dora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "lora_bias": self.lora_bias,
            "bias": self.bias != "none",
            "target_parameters": self.target_parameters,
            "modules_to_save": self.modules_to_save,
            "trainable_tokens": self.trainable_token_indices is not None,
            "alora": self.alora_invocation_tokens is not None,
        }
        return tuple(sorted(name for name, value in used.items() if value))


def _pattern_key(patterns: Iterable[str], module: str) -> str:
    """The first pattern that ends `module` at a dot, or `module` itself: PEFT's `get_pattern_key`."""
    for pattern in patterns:
        if _compiled(pattern).match(module):
            return pattern
    return module


@lru_cache(maxsize=4 * config_values.MAX_PATTERNS)  # re's own cache is too small for a pattern a module
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _refuse_keys(keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if key in _READERS or key in _IGNORED_KEYS or key in ("peft_type", "init_lora_weights"):
            continue
        if key not in _UNUSED_VALUES:
            raise ConfigKeyRefused(f"adapter_config.json has the key {shown(key)}, which is not on the allow-list")
        # 0 == False in Python, hence the types.
        if not any(value == unused and type(value) is type(unused) for unused in _UNUSED_VALUES[key]):
            advice = _ADVICE.get(key, "the hub takes it only unset")
            raise ConfigKeyRefused(f"adapter_config.json sets {key!r}: {advice}")


def _check_init(value: Any) -> None:
    if isinstance(value, bool) or value is None:
        return
    if not isinstance(value, str):
        raise ConfigMalformed(f"init_lora_weights is {shown(value)}, not true, false or a name")
    name = value.lower()
    if name.startswith(_BASE_CHANGING_INITS):
        raise BaseChangedInit(
            f"init_lora_weights is {shown(value)}: this method changed the base weights, so the adapter does not fit "
            "the base it names. Save it again with path_initial_model_for_weight_conversion=… given to PEFT's "
            "save_pretrained, which turns it into a plain LoRA"
        )
    if name not in _SOUND_INITS:
        raise ConfigMalformed(f"init_lora_weights is {shown(value)}, a method this hub does not know")


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "r": config_values.rank,
    "lora_alpha": config_values.alpha,
    "use_rslora": config_values.flag,
    "use_dora": config_values.flag,
    "rank_pattern": config_values.rank_patterns,
    "alpha_pattern": config_values.alpha_patterns,
    "lora_bias": config_values.flag,
    "bias": config_values.bias,
    "fan_in_fan_out": config_values.flag,
    "target_modules": config_values.names_or_regex,
    "target_parameters": config_values.names,
    "modules_to_save": config_values.names,
    "trainable_token_indices": config_values.indices_by_module,
    "layers_to_transform": config_values.indices,
    "alora_invocation_tokens": config_values.indices,
    "init_lora_weights": config_values.unchecked,
    "base_model_name_or_path": config_values.text,
    "revision": config_values.text,
}
