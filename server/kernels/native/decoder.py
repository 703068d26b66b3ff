"""All layers of a decoder in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.kernels.native import Native, lora_scratch
from server.kernels.native.packing import TILE_ROWS, PackedProduct
from server.kernels.native.plans import AffinePlan, DecodePlan, PrefillPlan, Sites
from server.kernels.native.structs import Batch, Joint, Layer, Product, Site, pointer
from server.kernels.native.structs import Decoder as DecoderStruct

RESTS = 10  # parts that a call with something to do between layers is divided into


@dataclass(frozen=True)
class JointLinears:
    """Linear layers that share their input: packed weights and the arena's matrices, in the same order."""

    product: PackedProduct
    sites: Sites

    def struct(self) -> Joint:
        """As the C code wants it."""
        count = self.sites.count
        return Joint(count, (Product * 3)(*self.product.products), (Site * 3)(*self.sites.array))


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer; norms are float32 [width] or None where the family has none there."""

    qkv: JointLinears
    out: JointLinears
    gate_up: JointLinears
    down: JointLinears
    before_attention: Tensor | None
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None


@dataclass(frozen=True)
class Shape:
    """What all layers have in common."""

    hidden: int
    heads: int
    kv_heads: int
    width: int  # of a head
    inner: int  # of the MLP
    late_norm: bool  # the norm's weight is multiplied in before rounding
    flat_norm: bool  # q_norm and k_norm run over all heads together
    eps: float
    scale: float  # of attention scores


@dataclass(frozen=True)
class ListedRows:
    """Rows that look at the first tokens of their own sequence each, all int64.

    Row rows[i] belongs to sequence sequences[i], whose pages are pages[sequences[i]], and looks at lengths[i] tokens,
    the row's own included.
    """

    rows: Tensor  # [n]
    sequences: Tensor  # [n]
    lengths: Tensor  # [n]
    pages: Tensor  # [sequences, P]
    longest: int  # the largest of lengths, 0 without rows


@dataclass
class _Room:
    """Work space for a number of rows, a multiple of 16."""

    rows: int
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Decoder:
    """The layers, bound to their cache; one call at a time, and one more between two layers of it."""

    def __init__(
        self, kernels: Native, shape: Shape, layers: Sequence[LayerParts], caches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """caches: (k, v) of every layer, each [kv_heads, pages * page_tokens, width]."""
        self._kernels = kernels
        self._shape = shape
        self._alive = (tuple(layers), tuple(caches))
        self._layers = (Layer * len(layers))(*map(_layer, layers, caches))
        self._slots = caches[0][0].shape[1]
        wide = max(j.product.wide for layer in layers for j in (layer.qkv, layer.out, layer.gate_up, layer.down))
        self._wide = torch.empty(torch.get_num_threads() * wide, dtype=kernels.dtype)
        self._rooms: list[_Room] = []  # not in use

    def run(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        write_slots: Tensor,
        listed: ListedRows,
        page_tokens: int,
        lora: tuple[DecodePlan | None, PrefillPlan | None],
        others: Callable[[int, Tensor, Tensor], None] | None,
        affine: AffinePlan | None = None,
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        """x: [rows, hidden] → [rows, hidden] after all layers; rope: cos and sin [rows, rotary].

        Rows that are not listed must be attended by `others`, called for every layer with (layer, q, out), both
        [rows, heads, width], after the layer's keys and values are stored; None where all rows are listed.
        `between` is called now and then between two layers, and may run other rows here.
        """
        shape, rows = self._shape, x.shape[0]
        with self._workspace(rows) as room:
            hidden = room["x"]
            hidden[:rows] = x
            cos, sin = (t.contiguous() for t in rope)
            decode, prefill = lora
            h, pieces = lora_scratch(3, decode, prefill)
            scores = torch.empty(torch.get_num_threads() * 4 * listed.longest, dtype=torch.float32)
            batch = Batch(
                rows,
                *map(pointer, (hidden, cos, sin, write_slots)),
                *(listed.rows.numel(), listed.pages.shape[1], listed.longest),
                *map(pointer, (listed.rows, listed.sequences, listed.lengths, listed.pages)),
                None if decode is None else ctypes.addressof(decode.struct),
                None if prefill is None else ctypes.addressof(prefill.structs),
                0 if prefill is None else prefill.layers,
                *((None, 0) if affine is None else (ctypes.addressof(affine.array), affine.count)),
                *(pointer(room[name]) for name in ("normed", "qkv", "q", "attended", "y", "gate_up", "inner")),
                *map(pointer, (self._wide, h, scores, pieces)),
            )
            decoder = DecoderStruct(
                ctypes.addressof(self._layers),
                *(shape.hidden, shape.heads, shape.kv_heads, shape.width, cos.shape[-1], shape.inner),
                *(self._slots, page_tokens, shape.late_norm, shape.flat_norm, shape.eps, shape.scale),
            )
            stages = 2 * len(self._layers)
            run, given = self._kernels.decode, (ctypes.byref(decoder), ctypes.byref(batch))
            rest = stages if between is None else 2 * max(1, len(self._layers) // RESTS)  # stages from rest to rest
            if others is None:
                for stage in range(0, stages, rest):
                    if stage and between is not None:
                        between()
                    run(*given, ctypes.c_int64(stage), ctypes.c_int64(min(stage + rest, stages)))
            else:
                q = room["q"].view(-1, shape.heads, shape.width)[:rows]
                out = room["attended"].view(-1, shape.heads, shape.width)[:rows]
                run(*given, ctypes.c_int64(0), ctypes.c_int64(1))
                for stage in range(1, stages, 2):
                    others(stage // 2, q, out)
                    if between is not None and (stage - 1) % rest == 0:
                        between()
                    run(*given, ctypes.c_int64(stage), ctypes.c_int64(min(stage + 2, stages)))
            return hidden[:rows].clone()

    @contextmanager
    def _workspace(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """Lend room for so many rows; what rests between two layers keeps its own."""
        room = self._rooms.pop() if self._rooms else _Room(0)
        if room.rows < rows:
            whole = -(-rows // TILE_ROWS) * TILE_ROWS
            s, dtype = self._shape, self._kernels.dtype
            widths = {
                "x": s.hidden,
                "normed": s.hidden,
                "qkv": (s.heads + 2 * s.kv_heads) * s.width,
                "q": s.heads * s.width,
                "attended": s.heads * s.width,
                "y": s.hidden,
                "gate_up": 2 * s.inner,
                "inner": s.inner,
            }
            # Zeros: a tile's rows beyond the last are multiplied too, and must not slow that down as denormals.
            room = _Room(whole, {name: torch.zeros(whole, w, dtype=dtype) for name, w in widths.items()})
        try:
            yield room.tensors
        finally:
            self._rooms.append(room)


def _layer(parts: LayerParts, cache: tuple[Tensor, Tensor]) -> Layer:
    norms = (
        parts.before_attention,
        parts.q_norm,
        parts.k_norm,
        parts.after_attention,
        parts.before_mlp,
        parts.after_mlp,
    )
    return Layer(
        *(joint.struct() for joint in (parts.qkv, parts.out, parts.gate_up, parts.down)),
        *map(pointer, (*norms, *cache)),
        parts.window or 0,
    )
