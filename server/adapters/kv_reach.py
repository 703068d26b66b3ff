"""Which adapters can change a key or a value of any layer. One that cannot computes the base's own KV pages, and
shares them with the base and with all others of its kind.

A key is computed from what enters its layer. So the output head lies behind all keys and values, and so does, in the
last layer, everything that comes after its keys and values or beside them: queries, the attention's output projection
and the MLP. Everything else, and everything not known here, is taken to reach them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from server.adapters.rank_rows import SiteWeights

# Families whose layers run once each, in their order, attention before the MLP, no layer reading a later one's output.
_IN_ORDER = (
    "Gemma2",
    "Gemma3",
    "Llama",
    "Mistral",
    "Mixtral",
    "Olmo2",
    "Phi3",
    "Qwen2",
    "Qwen2Moe",
    "Qwen3",
    "Qwen3Moe",
)


def behind_kv(model: nn.Module, head: str | None) -> frozenset[str]:
    """Paths of linear layers whose weights no key and no value depends on; `head`: the output head's path."""
    behind = set() if head is None else {head}
    modules = dict(model.named_modules())
    stacks = [path for path, module in modules.items() if path.endswith("layers") and isinstance(module, nn.ModuleList)]
    if type(model).__name__.removesuffix("ForCausalLM") in _IN_ORDER and len(stacks) == 1:
        stack = modules[stacks[0]]
        assert isinstance(stack, nn.ModuleList)
        last = f"{stacks[0]}.{len(stack) - 1}"
        attention = (f"{last}.self_attn.q_proj", f"{last}.self_attn.o_proj")
        behind |= {
            path
            for path, module in modules.items()
            if isinstance(module, nn.Linear) and (path in attention or path.startswith(f"{last}.mlp."))
        }
    return frozenset(behind)


def reaches_kv(
    sites: Mapping[str, SiteWeights], parts: Collection[str], head: str | None, behind: Collection[str]
) -> bool:
    """Whether an adapter might change a key or a value.

    `sites`: its rank rows as served, where a zero delta changes nothing; `parts`: the modules in which it does more.
    Parts count as reaching, whatever they hold, unless they are the head's.
    """
    if any(path != head for path in parts):
        return True
    return any(path not in behind and bool(site.a.any()) and bool(site.b.any()) for path, site in sites.items())
