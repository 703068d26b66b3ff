"""PEFT's adapter_config.json as a value. No torch, and nothing of PEFT is imported.

The keys are an allow-list made from PEFT 0.21's `LoraConfig`. What changes the adapter's function is parsed; what only
mattered while training is accepted and ignored; what runs code, needs another method, or changed the base weights is
refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self

from hub import json_text
from hub.errors import BaseChangedInit, ConfigKeyRefused, ConfigMalformed, PeftTypeUnsupported, RankInvalid
from hub.tensor_names import TensorSite as TensorSite
from hub.tensor_names import parse_tensor_name as parse_tensor_name

MAX_CONFIG_BYTES: Final = 1024 * 1024
MAX_RANK: Final = 4096
MAX_PATTERNS: Final = 16384
MAX_NAME_CHARS: Final = 256  # of a module name or a pattern
Bias = Literal["none", "all", "lora_only"]

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
            raise PeftTypeUnsupported(f"peft_type is {_shown(keys.get('peft_type'))}; the hub takes LORA")
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
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


def _refuse_keys(keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if key in _READERS or key in _IGNORED_KEYS or key in ("peft_type", "init_lora_weights"):
            continue
        if key not in _UNUSED_VALUES:
            raise ConfigKeyRefused(f"adapter_config.json has the key {_shown(key)}, which is not on the allow-list")
        # 0 == False in Python, hence the types.
        if not any(value == unused and type(value) is type(unused) for unused in _UNUSED_VALUES[key]):
            advice = _ADVICE.get(key, "the hub takes it only unset")
            raise ConfigKeyRefused(f"adapter_config.json sets {key!r}: {advice}")


def _check_init(value: Any) -> None:
    if isinstance(value, bool) or value is None:
        return
    if not isinstance(value, str):
        raise ConfigMalformed(f"init_lora_weights is {_shown(value)}, not true, false or a name")
    name = value.lower()
    if name.startswith(_BASE_CHANGING_INITS):
        raise BaseChangedInit(
            f"init_lora_weights is {_shown(value)}: this method changed the base weights, so the adapter does not fit "
            "the base it names. Save it again with path_initial_model_for_weight_conversion=… given to PEFT's "
            "save_pretrained, which turns it into a plain LoRA"
        )
    if name not in _SOUND_INITS:
        raise ConfigMalformed(f"init_lora_weights is {_shown(value)}, a method this hub does not know")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigMalformed(f"{name} is {_shown(value)}, not true or false")
    return value


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigMalformed(f"{name} is {_shown(value)}, not an integer")
    if not 1 <= value <= MAX_RANK:
        raise RankInvalid(f"{name} is {value}; ranks are 1 to {MAX_RANK}")
    return value


def _alpha(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e9:
        raise ConfigMalformed(f"{name} is {_shown(value)}, not a number of at most 1e9")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise ConfigMalformed(f"{name} is {_shown(value)}, not a line of text")
    return value


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS or not value.isprintable():
        raise ConfigMalformed(f"{name} holds {_shown(value)}, not a name of at most {MAX_NAME_CHARS} characters")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ConfigMalformed(f"{name} is {_shown(value)}, not a list of names")
    return tuple(_name(name, item) for item in value)


def _names_or_regex(name: str, value: Any) -> tuple[str, ...] | str:
    return _text(name, value) if isinstance(value, str) else _names(name, value)


def _indices(name: str, value: Any) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**31:
            raise ConfigMalformed(f"{name} holds {_shown(item)}, not an index")
    return tuple(items)


def _indices_by_module(name: str, value: Any) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    if isinstance(value, dict):
        return {_name(name, key): _indices(name, item) for key, item in value.items()}
    return _indices(name, value)


def _bias(name: str, value: Any) -> Bias:
    if value not in ("none", "all", "lora_only"):
        raise ConfigMalformed(f"{name} is {_shown(value)}, not none, all or lora_only")
    return value  # type: ignore[no-any-return]


def _init(name: str, value: Any) -> str | bool:
    return value  # type: ignore[no-any-return]  # _check_init has seen it


def _rank_patterns(name: str, value: Any) -> Mapping[str, int]:
    return {key: _rank(f"{name}[{_shown(key)}]", item) for key, item in _patterns(name, value).items()}


def _alpha_patterns(name: str, value: Any) -> Mapping[str, float]:
    return {key: _alpha(f"{name}[{_shown(key)}]", item) for key, item in _patterns(name, value).items()}


def _patterns(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigMalformed(f"{name} is {_shown(value)}, not an object")
    if len(value) > MAX_PATTERNS:
        raise ConfigMalformed(f"{name} has {len(value)} entries; at most {MAX_PATTERNS} are taken")
    for pattern in value:
        _name(name, pattern)
        _check_pattern(name, pattern)
    return value


def _check_pattern(name: str, pattern: str) -> None:
    """Refuse what could take Python's backtracking matcher more than a moment on a module name.

    Exponential time needs a repeated group, a back-reference or many repetitions in a row; patterns that name modules
    need none of these.
    """
    bare = re.sub(r"\\.|\[\]?[^]]*\]", "c", pattern)  # an escape or a class is one character
    repetitions = len(re.findall(r"(?<!\()[*+?{]", bare))
    if repetitions > 3 or re.search(r"\)[*+{]", bare) or re.search(r"\\[1-9]|\(\?P[=>]|\(\?\(", pattern):
        raise ConfigMalformed(f"{name} has the pattern {_shown(pattern)}, which repeats too much to be matched safely")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigMalformed(f"{name} has the pattern {_shown(pattern)}, which is no regular expression") from error


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "r": _rank,
    "lora_alpha": _alpha,
    "use_rslora": _flag,
    "use_dora": _flag,
    "rank_pattern": _rank_patterns,
    "alpha_pattern": _alpha_patterns,
    "lora_bias": _flag,
    "bias": _bias,
    "fan_in_fan_out": _flag,
    "target_modules": _names_or_regex,
    "target_parameters": _names,
    "modules_to_save": _names,
    "trainable_token_indices": _indices_by_module,
    "layers_to_transform": _indices,
    "alora_invocation_tokens": _indices,
    "init_lora_weights": _init,
    "base_model_name_or_path": _text,
    "revision": _text,
}
