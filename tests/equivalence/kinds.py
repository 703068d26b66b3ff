"""One adapter of every kind that is served."""

from pathlib import Path
from typing import Any

from tests.conftest import ALL_LINEARS
from tests.equivalence.reference import write_moved_adapter

TOKENS = [3, 65, 66, 100, 200, 299]
SOME = ["q_proj", "v_proj", "down_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8},
    "plain-24": {"r": 24, "lora_alpha": 12},
    "lora-bias": {"r": 8, "lora_bias": True, "target_modules": SOME},
    "trained-bias": {"r": 4, "bias": "lora_only"},
    "all-biases": {"r": 4, "bias": "all", "target_modules": SOME},
    "dora": {"r": 8, "use_dora": True},
    "dora-rslora": {"r": 12, "lora_alpha": 6, "use_dora": True, "use_rslora": True, "target_modules": SOME},
    "dora-head": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "lm_head"]},
    "dora-bias": {"r": 4, "use_dora": True, "bias": "lora_only", "target_modules": SOME},
    "saved-head": {"r": 4, "modules_to_save": ["lm_head"]},
    "saved-embedding": {"r": 4, "modules_to_save": ["embed_tokens"], "target_modules": SOME},
    "saved-both": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"], "target_modules": SOME},
    "saved-norms": {"r": 4, "modules_to_save": ["norm"], "target_modules": SOME},
    "saved-linear": {"r": 4, "modules_to_save": ["o_proj", "0.mlp"], "target_modules": ["q_proj"]},
    "lora-head": {"r": 6, "target_modules": ["lm_head", *SOME]},
    "lora-embedding": {"r": 6, "target_modules": ["embed_tokens", *SOME]},
    "lora-both": {"r": 6, "target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"r": 4, "trainable_token_indices": TOKENS},
    "tokens-head": {"r": 4, "trainable_token_indices": {"lm_head": TOKENS}, "target_modules": SOME},
    "tokens-both": {
        "r": 4,
        "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS[:3]},
        "target_modules": SOME,
    },
}
# Replace values of the base, so they have no meaning at another weight or beside another adapter.
ALONE = [
    "trained-bias",
    "all-biases",
    "dora-bias",
    *(kind for kind in KINDS if kind.startswith(("saved", "tokens"))),
]


def write_kinds(base: Path, root: Path, biased: bool) -> dict[str, Path]:
    """PEFT directories below `root` by kind; those that train biases only for a base that has some."""
    return {
        kind: write_moved_adapter(base, root / kind, **{"lora_alpha": 16, "target_modules": ALL_LINEARS, **settings})
        for kind, settings in KINDS.items()
        if biased or settings.get("bias", "none") == "none"
    }
