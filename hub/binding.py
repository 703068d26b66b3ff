"""Whether an adapter's tensors fit together, fit its config, and fit the base they are for.

Notation: a base weight W is [out, in] ([in, out] where `fan_in_fan_out`), an embedding is [vocabulary, hidden].
"""

from __future__ import annotations

from collections.abc import Mapping

from hub.errors import RankInvalid, ShapeMismatch, TensorMissing, TensorUnknown
from hub.lora_config import MAX_RANK, LoraConfig
from hub.tensor_names import Kind, TensorSite

Shape = tuple[int, ...]
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output")


def check_consistent(config: LoraConfig, sites: Mapping[TensorSite, Shape]) -> dict[str, int]:
    """The rank of every module with a LoRA, after checking the tensors against each other and the config.

    Raises RankInvalid, ShapeMismatch, TensorMissing or TensorUnknown, naming the module, or ConfigMalformed where the
    config's patterns would take too long to match.
    """
    modules: dict[str, dict[Kind, Shape]] = {}
    for site, shape in sites.items():
        if site.kind == "saved":
            _check_listed(config, site)
        elif site.kind != "base":
            modules.setdefault(site.module, {})[site.kind] = shape
    config.check_match_cost(modules)
    ranks: dict[str, int] = {}
    for name, kinds in modules.items():
        if "trainable_tokens" in kinds:
            _check_trainable_tokens(config, name, kinds["trainable_tokens"])
        if kinds.keys() - {"trainable_tokens"}:
            ranks[name] = _checked_rank(config, name, kinds)
    if not ranks and not any(site.kind == "trainable_tokens" for site in sites):
        raise TensorMissing("adapter_model.safetensors has no LoRA tensor")
    return ranks


def check_binds(config: LoraConfig, sites: Mapping[TensorSite, Shape], base: Mapping[str, Shape]) -> None:
    """Check that every tensor has its place in the base with these parameter shapes.

    Raises TensorUnknown where a tensor binds to nothing, ShapeMismatch where it does not fit.
    """
    index = _BaseIndex(base)
    for site, shape in sites.items():
        weight = index.find(site)
        if weight is None:
            if config.target_parameters and index.has_module(_unwrapped(site.module)):
                continue  # experts kept as one parameter: no weight of their own to compare with
            raise TensorUnknown(f"{site.module}: the base has no such module, so its {site.kind} binds to nothing")
        if not _fits(config, site.kind, shape, weight):
            raise ShapeMismatch(
                f"{site.module}: {site.kind} is {list(shape)}, which does not fit the base's {list(weight)}"
            )


class _BaseIndex:
    """Finds a base's parameter by the module's name, however many leading components the checkpoint drops."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = shapes
        self._shortened = {name.partition(".")[2]: shape for name, shape in shapes.items() if "." in name}

    def find(self, site: TensorSite) -> Shape | None:
        name = f"{_unwrapped(site.module)}.{site.parameter if site.kind in ('saved', 'base') else 'weight'}"
        # Checkpoints saved from an inner model lack the outer name ("transformer."), others have one more.
        for candidate in (name, name.partition(".")[2]):
            if candidate in self._shapes:
                return self._shapes[candidate]
        if name in self._shortened:
            return self._shortened[name]
        if name.removesuffix(".weight").rpartition(".")[2] in _HEADS:  # tied: the checkpoint has only the embedding
            tied = [shape for key, shape in self._shapes.items() if key.split(".")[-2:-1] in [[e] for e in _EMBEDDINGS]]
            return tied[0] if len(tied) == 1 else None
        return None

    def has_module(self, module: str) -> bool:
        return any(f".{name}".find(f".{module}.") >= 0 for name in self._shapes)


def _unwrapped(module: str) -> str:
    return module.replace(".base_layer", "")


def _fits(config: LoraConfig, kind: Kind, shape: Shape, weight: Shape) -> bool:
    if kind in ("saved", "base"):
        return shape == weight
    if len(weight) != 2:
        return False
    rows, columns = weight
    transposed = (columns, rows) if config.fan_in_fan_out else weight
    if kind == "lora_A":
        return shape[1] == transposed[1] or _packed(weight, shape[1])
    if kind == "lora_B":
        return shape[0] == transposed[0] or _packed(weight, shape[0])
    if kind == "lora_bias":
        return shape[0] == transposed[0] or _packed(weight, shape[0])
    if kind == "magnitude":
        return shape[-1] in (rows, columns) or _packed(weight, shape[-1])
    if kind == "embedding_A":
        return shape[1] == rows
    return shape[0] == columns if kind == "embedding_B" else shape[1] == columns


def _packed(weight: Shape, length: int) -> bool:
    """Whether `weight` is a 4-bit matrix packed into one column, of which only the product of its sides is known."""
    return weight[1] == 1 and weight[0] * 2 % length == 0


def _check_listed(config: LoraConfig, site: TensorSite) -> None:
    parts = site.module.split(".")
    # PEFT's rule: a module is saved whole, all inside it included, when its name ends with the listed text.
    above = (".".join(parts[: count + 1]) for count in range(len(parts)))
    if any(module.endswith(config.modules_to_save) for module in above) or (
        config.bias == "all" and site.parameter == "bias"
    ):
        return
    # PEFT saves resized embeddings without listing them.
    if site.module.rpartition(".")[2] in (*_EMBEDDINGS, *_HEADS):
        return
    name = f"{site.module}.{site.parameter}"
    raise TensorUnknown(f"{name} is a full weight, but modules_to_save does not list its module")


def _check_trainable_tokens(config: LoraConfig, name: str, shape: Shape) -> None:
    indices = config.trainable_token_indices
    if indices is None:
        raise TensorUnknown(f"{name} has trained token rows, but trainable_token_indices is not set")
    counts = {len(rows) for rows in indices.values()} if isinstance(indices, Mapping) else {len(indices)}
    if len(shape) != 2 or shape[0] not in counts:
        raise ShapeMismatch(f"{name}: the trained token rows are {list(shape)}, trainable_token_indices says {counts}")


def _checked_rank(config: LoraConfig, name: str, shapes: Mapping[Kind, Shape]) -> int:
    pairs: tuple[tuple[Kind, Kind], ...] = (("embedding_A", "embedding_B"), ("lora_A", "lora_B"))
    down, up = next((pair for pair in pairs if shapes.keys() & set(pair)), pairs[1])
    for kind in (down, up):
        if kind not in shapes:
            raise TensorMissing(f"{name} has no {kind}")
        if len(shapes[kind]) != 2 or 0 in shapes[kind]:
            raise ShapeMismatch(f"{name}: {kind} is {list(shapes[kind])}, not a matrix")
    rank, width = shapes[down][0], shapes[up][1]
    if rank != width:
        raise ShapeMismatch(f"{name}: {down} has rank {rank}, {up} has rank {width}")
    expected = config.rank_of(_unwrapped(name))
    if rank != expected and not (config.target_parameters and rank % expected == 0):  # experts share one tensor
        raise RankInvalid(f"{name} has rank {rank}, the config says {expected}")
    if rank > MAX_RANK and not config.target_parameters:
        raise RankInvalid(f"{name} has rank {rank}; ranks are 1 to {MAX_RANK}")
    _check_extras(config, name, shapes, out=shapes[up][0])
    return expected


def _check_extras(config: LoraConfig, name: str, shapes: Mapping[Kind, Shape], *, out: int) -> None:
    extras: tuple[tuple[Kind, bool, str], ...] = (
        ("lora_bias", config.lora_bias, "lora_bias"),
        ("magnitude", config.use_dora, "use_dora"),
    )
    for kind, wanted, key in extras:
        shape = shapes.get(kind)
        if shape is None and wanted:
            raise TensorMissing(f"{name} has no {kind}, though {key} is set")
        if shape is not None and not wanted:
            raise TensorUnknown(f"{name} has a {kind}, but {key} is not set")
        if shape is not None and shape != (out,):
            raise ShapeMismatch(f"{name}: {kind} is {list(shape)}, expected {[out]}")
