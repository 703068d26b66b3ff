"""Rank rows of ordinary linear layers: shapes checked, values looked at, scaled and laid out as the arena has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hub.lora_config import LoraConfig
from server.errors import AdapterUnservable, RankTooLarge, TensorUnbound
from server.kernels.native.loading import Arrival, convert, convertible


@dataclass(frozen=True)
class SiteWeights:
    """One module's update: x -> (x @ a^T) @ b with the adapter's scaling inside b. On the CPU, contiguous."""

    a: Tensor  # [r, in]
    b: Tensor  # [r, out]


@dataclass(frozen=True)
class Pair:
    """lora_A [r, in] and lora_B [out, r] of one module as the file has them."""

    a: Tensor
    b: Tensor


def check_shapes(module: str, pair: Pair, shape: tuple[int, int], max_rank: int) -> None:
    """`shape`: (out, in) of the module. Raises `TensorUnbound` or `RankTooLarge`."""
    out_features, in_features = shape
    rank = pair.a.shape[0]
    if pair.a.shape != (rank, in_features) or pair.b.shape != (out_features, rank):
        raise TensorUnbound(
            f"module {module} is {out_features}x{in_features}, but lora_A is {list(pair.a.shape)} and lora_B "
            f"{list(pair.b.shape)}"
        )
    if rank > max_rank:
        raise RankTooLarge(f"module {module} has rank {rank}, this server serves up to {max_rank}")


def rank_rows(pairs: Mapping[str, Pair], config: LoraConfig, dtype: torch.dtype) -> dict[str, SiteWeights]:
    """Pairs by module, of checked shapes → what is served, in one stretch of memory.

    Raises `AdapterUnservable` for what is not finite. Each value is scaled in float32 and rounded to `dtype` once.
    """
    sizes = [tensor.numel() for pair in pairs.values() for tensor in (pair.a, pair.b)]
    room = iter(torch.split(torch.empty(sum(sizes), dtype=dtype), sizes))
    sites, arrivals, names = {}, [], []
    for module, pair in pairs.items():
        rank = pair.a.shape[0]
        site = SiteWeights(next(room).view(pair.a.shape), next(room).view(pair.b.shape[::-1]))
        arrivals.append(Arrival(_readable(pair.a), site.a))
        arrivals.append(Arrival(_readable(pair.b), site.b, config.scaling(module, rank), turned=True))
        names += [f"{module}.lora_A", f"{module}.lora_B"]
        sites[module] = site
    if all(convertible(each.source, dtype) for each in arrivals):
        odd = convert(arrivals)
    else:
        odd = _convert_with_torch(arrivals)
    if odd is not None:
        raise AdapterUnservable(f"tensor {names[odd]} holds NaN or infinite values")
    return sites


def _readable(tensor: Tensor) -> Tensor:
    exact = tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()
    return exact.contiguous()


def _convert_with_torch(arrivals: list[Arrival]) -> int | None:
    """See `server.kernels.native.loading.convert`."""
    for i, each in enumerate(arrivals):
        if not torch.isfinite(each.source).all():
            return i
        scaled = each.source if each.scale == 1 else each.source.float() * each.scale
        each.to.copy_(scaled.T if each.turned else scaled)
    return None
