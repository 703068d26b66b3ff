"""Rank rows of ordinary linear layers: shapes checked, values looked at, scaled and laid out as the arena has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hub.lora_config import LoraConfig
from server.errors import AdapterUnservable, RankTooLarge, TensorUnbound
from server.kernels.native.loading import Arrival, Arrivals, convertible


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rank, in, out)."""
        return self.a.shape[0], self.a.shape[1], self.b.shape[0]


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
    shapes = {module: pair.shape for module, pair in pairs.items()}
    sites = room_for(shapes, dtype)
    moves = arrivals({module: Pair(_readable(p.a), _readable(p.b)) for module, p in pairs.items()}, sites, config)
    if all(convertible(each.source, dtype) for each in moves):
        odd = Arrivals(moves).convert()
    else:
        odd = _convert_with_torch(moves)
    refuse_odd(odd, list(sites))
    return sites


def room_for(shapes: Mapping[str, tuple[int, int, int]], dtype: torch.dtype) -> dict[str, SiteWeights]:
    """Uninitialized rows for modules of (rank, in, out), one behind the other in one stretch of memory."""
    room = torch.empty(sum(rank * (width + out) for rank, width, out in shapes.values()), dtype=dtype)
    sites, at = {}, 0
    for module, (rank, width, out) in shapes.items():
        middle = at + rank * width
        sites[module] = SiteWeights(
            room.as_strided((rank, width), (width, 1), at), room.as_strided((rank, out), (out, 1), middle)
        )
        at = middle + rank * out
    return sites


def arrivals(pairs: Mapping[str, Pair], sites: Mapping[str, SiteWeights], config: LoraConfig) -> list[Arrival]:
    """What brings `pairs` into `sites`: A and then B of each module."""
    return [
        arrival
        for module, pair in pairs.items()
        for arrival in (
            Arrival(pair.a, sites[module].a),
            Arrival(pair.b, sites[module].b, config.scaling(module, pair.a.shape[0]), turned=True),
        )
    ]


def refuse_odd(odd: int | None, modules: Sequence[str]) -> None:
    """Raise `AdapterUnservable` where the conversion ended at number `odd` of `arrivals`."""
    if odd is not None:
        raise AdapterUnservable(f"tensor {modules[odd // 2]}.lora_{'AB'[odd % 2]} holds NaN or infinite values")


def _readable(tensor: Tensor) -> Tensor:
    exact = tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()
    return exact.contiguous()


def _convert_with_torch(moves: Sequence[Arrival]) -> int | None:
    """See `server.kernels.native.loading.Arrivals.convert`."""
    for i, each in enumerate(moves):
        if not torch.isfinite(each.source).all():
            return i
        scaled = each.source if each.scale == 1 else each.source.float() * each.scale
        each.to.copy_(scaled.T if each.turned else scaled)
    return None
