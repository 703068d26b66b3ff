"""Which arena rows apply to which rows of a batch, as the C code wants it; built once for many layers and steps."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from torch import Tensor

from server.kernels.native.structs import Affine, AffineSpan, Decode, Prefill, Site, address, floats, int64s, sums

SPAN_ROWS = 16  # SPAN in common.h

Segment = tuple[int, int, int, int, float]
"""(t0, t1, r0, r1, weight) as in `reference.lora_add`."""


class Sites:
    """The arena matrices of up to three linears that share their input; keeps them alive."""

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self._alive = (*a, *b)
        self.count = len(a)
        self.array = (Site * len(a))(*(Site(x.data_ptr(), y.data_ptr(), y.shape[1]) for x, y in zip(a, b, strict=True)))


class AffineTable:
    """One adapter's scales and shifts for all linears of a decoder, by place; keeps the tensors alive.

    The place of a linear layer is 3 * (4 * layer + joint) + its number in the joint, the joints being q/k/v, output,
    gate/up and down.
    """

    def __init__(self, places: int, given: Mapping[int, tuple[Tensor | None, Tensor | None]]) -> None:
        """given: place → (scale, shift), float32 [out] each; without an entry nothing happens there."""
        self._alive = dict(given)
        self.array = (Affine * places)()
        for place, (scale, shift) in given.items():
            self.array[place] = Affine(*(None if t is None else t.data_ptr() for t in (scale, shift)))


class AffinePlan:
    """y + weight * (scale y + shift) on rows t0…t1 of a batch, for any number of (t0, t1, weight, table)."""

    def __init__(self, spans: Sequence[tuple[int, int, float, AffineTable]]) -> None:
        self._alive = [table for *_, table in spans]
        self.count = len(spans)
        self.array = (AffineSpan * len(spans))(
            *(AffineSpan(t0, t1, address(table.array), weight) for t0, t1, weight, table in spans)
        )


class DecodePlan:
    """For single rows: each row's own items, one after the other."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        by_token: dict[int, list[tuple[int, int, float]]] = {}
        for t0, t1, r0, r1, weight in segments:
            for token in range(t0, t1):
                by_token.setdefault(token, []).append((r0, r1, weight))
        tokens = sorted(by_token)
        flat = [item for token in tokens for item in by_token[token]]
        offsets = sums(r1 - r0 for r0, r1, _ in flat)
        self.ranks = offsets[-1]  # over all items
        arrays = (
            int64s(tokens),
            int64s(sums(len(by_token[token]) for token in tokens)),
            int64s([r0 for r0, _, _ in flat]),
            int64s([r1 for _, r1, _ in flat]),
            int64s(offsets),
            floats([weight for _, _, weight in flat]),
        )
        self._alive = arrays
        self.struct = Decode(len(tokens), len(flat), *(address(array) for array in arrays))


class PrefillPlan:
    """For prompts: spans of rows, cut into pieces for the threads."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        # Several adapters on the same rows go one after the other: their threads would write to the same outputs.
        apart: list[list[Segment]] = []
        for segment in segments:
            t0, t1, *_ = segment
            layer = next((known for known in apart if all(t1 <= s[0] or t0 >= s[1] for s in known)), None)
            if layer is None:
                apart.append([segment])
            else:
                layer.append(segment)
        self.widest = max(r1 - r0 for _, _, r0, r1, _ in segments)
        self._alive: list[tuple[object, ...]] = []
        self.layers = len(apart)
        self.structs: ctypes.Array[Prefill] = (Prefill * len(apart))(*map(self._struct, apart))

    def _struct(self, segments: Sequence[Segment]) -> Prefill:
        pieces = [(i, t) for i, (t0, t1, *_) in enumerate(segments) for t in range(t0, t1, SPAN_ROWS)]
        arrays = (
            int64s([i for i, _ in pieces]),
            int64s([t for _, t in pieces]),
            int64s([t1 for _, t1, *_ in segments]),
            int64s([r0 for _, _, r0, _, _ in segments]),
            int64s([r1 for _, _, _, r1, _ in segments]),
            floats([weight for *_, weight in segments]),
        )
        self._alive.append(arrays)
        return Prefill(len(pieces), self.widest, *(address(array) for array in arrays))
