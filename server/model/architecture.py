"""Whether a loaded model computes what our packed, paged attention can compute, decided before it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.errors import UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Settings that make a decoder something else than one uniform stack of causal key/value attention.
_UNSERVED = {
    "kv_lora_rank": "compressed keys and values (MLA)",
    "num_kv_shared_layers": "layers that share another layer's keys and values",
    "use_bidirectional_attention": "attention to later tokens",
    "is_encoder_decoder": "an encoder",
    "global_head_dim": "heads whose width differs from layer to layer",
}


def refuse_unserved(model: PreTrainedModel) -> None:
    """Raise `UnsupportedArchitecture`, naming the reason, unless the engine computes this model as it is meant."""
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedArchitecture(f"{name} has its own attention, which cannot be replaced by paged attention")
    text: Any = model.config.get_text_config()
    other = sorted(set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYERS)
    if other:
        raise UnsupportedArchitecture(f"{name} has layers of kind {', '.join(other)}, which are not served")
    for setting, meaning in _UNSERVED.items():
        if getattr(text, setting, None):
            raise UnsupportedArchitecture(f"{name} uses {meaning} ({setting}), which is not served")
