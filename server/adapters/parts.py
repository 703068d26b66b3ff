"""What an adapter does to a module beside its rank rows in the arena: DoRA, biases, replaced modules, token rows.

For the rows of a request that uses the adapter with weight w, a module's output y0 becomes

    y = y0 + w * (scale * y0 + shift) + w * low_rank(x)        where the parts add to the base
    y = replacement(x), or y0 with some tokens' values set      where they replace it (alone, w = 1)

and the arena's rows are added to that. Rows of other requests are neither computed anew nor touched.

DoRA of magnitude m over W with low rank s·BA:  c = m / |W + s·BA| by output row; its delta is
(c - 1) * (y0 - bias) + c·s·BA x, so scale = c - 1, shift = -(c - 1) * bias, and c is multiplied into the arena's B.
A DoRA adapter with a weight, or among others, counts by that delta against the pristine base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from server.adapters.affine import AffineParts
from server.kernels.native.plans import AffinePlan


@dataclass(frozen=True)
class LowRank:
    """A LoRA outside the arena: (x @ a^T) @ b for a linear layer, a^T[token] @ b for an embedding."""

    a: Tensor  # [r, in], or [r, vocabulary]
    b: Tensor  # [r, out]; scaling (and an embedding's own scale) inside


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding, or outputs of the head, that the adapter replaces."""

    ids: Tensor  # [n] int64, distinct
    rows: Tensor  # [n, hidden]
    index: Tensor  # [vocabulary] int64: token -> place in `ids`, -1 elsewhere
    scale: float  # the embedding's own


_Moved = TypeVar("_Moved", LowRank, TokenRows)


@dataclass(frozen=True)
class ModuleParts:
    """All parts of one adapter at one module."""

    replacement: nn.Module | None = None
    tokens: TokenRows | None = None
    scale: Tensor | None = None  # [out] float32
    shift: Tensor | None = None  # [out] float32
    low_rank: LowRank | None = None

    @property
    def elementwise(self) -> bool:
        """Whether scale and shift are all there is."""
        return self.replacement is None and self.tokens is None and self.low_rank is None

    @property
    def bytes(self) -> int:
        """Memory held beyond the base's own; parameters a replacement shares with the base count as if its own."""
        held = [self.scale, self.shift]
        if self.replacement is not None:
            held += self.replacement.parameters()
        if self.tokens is not None:
            held += [self.tokens.ids, self.tokens.rows, self.tokens.index]
        if self.low_rank is not None:
            held += [self.low_rank.a, self.low_rank.b]
        return sum(tensor.numel() * tensor.itemsize for tensor in held if tensor is not None)

    def on(self, device: str) -> ModuleParts:
        """A copy in the memory of `device`."""
        return ModuleParts(
            replacement=None if self.replacement is None else copy.deepcopy(self.replacement).to(device),
            tokens=None if self.tokens is None else _moved(self.tokens, device),
            scale=None if self.scale is None else self.scale.to(device),
            shift=None if self.shift is None else self.shift.to(device),
            low_rank=None if self.low_rank is None else _moved(self.low_rank, device),
        )


def _moved(parts: _Moved, device: str) -> _Moved:
    moved: dict[str, Any] = {name: value.to(device) for name, value in vars(parts).items() if isinstance(value, Tensor)}
    return replace(parts, **moved)


@dataclass(frozen=True, eq=False)  # an adapter's own, and a key
class AdapterParts:
    """An adapter's parts by module path."""

    modules: Mapping[str, ModuleParts]
    # Features that replace values: no weight but 1 and no second adapter has a meaning with them.
    alone: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(parts.bytes for parts in self.modules.values())

    def on(self, device: str) -> AdapterParts:
        """These parts in the memory of `device`; themselves where they are there already."""
        if device == "cpu":
            return self
        return AdapterParts({path: parts.on(device) for path, parts in self.modules.items()}, self.alone)


NO_PARTS = AdapterParts({})


@dataclass(frozen=True)
class PartSpan:
    """Rows t0…t1 of a module's input belong to a request that uses `parts` with `weight`."""

    t0: int
    t1: int
    weight: float
    parts: AdapterParts


class PartsHooks:
    """Applies parts inside the base's modules.

    A module's `forward` is taken over when the first adapter with a part there runs, so a server whose adapters are
    plain LoRA runs the base's own code. Used by the engine's thread only.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        head: str | None,
        native: AffineParts | None = None,
        singly: bool = False,
    ) -> None:
        """native: what the layers can do without calling their single modules; singly: take one row at a time through
        everything whose rounding could depend on the number of rows, so that a row's bits are its own."""
        self._modules = modules
        self._head = head
        self._native = native
        self._singly = singly
        self._hooked: set[str] = set()
        self._active: dict[str, list[tuple[int, int, float, ModuleParts]]] = {}
        self._rows = (0, 0)

    @contextmanager
    def applied(self, tokens: Sequence[PartSpan], sampled: Sequence[PartSpan], rows: tuple[int, int]) -> Iterator[None]:
        """What applies to the batch that runs within; both empty: nothing does.

        `sampled` counts the rows whose logits are wanted: the output head sees only these. `rows`: how many rows
        there are in all, and how many of them are sampled.
        """
        self._rows = rows
        try:
            for spans, wanted in ((tokens, False), (sampled, True)):
                for span in spans:
                    for path, parts in span.parts.modules.items():
                        if (path == self._head) is wanted:
                            self._hook(path)
                            self._active.setdefault(path, []).extend(self._pieces(span, parts))
            yield
        finally:
            self._active.clear()  # an unloaded adapter's tensors shall not live on here

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Another batch may be run within; afterwards what applied applies again."""
        rows, active = self._rows, dict(self._active)
        self._active.clear()
        try:
            yield
        finally:
            self._rows = rows
            self._active.update(active)

    def _pieces(self, span: PartSpan, parts: ModuleParts) -> list[tuple[int, int, float, ModuleParts]]:
        rows = 1 if self._singly and not parts.elementwise else span.t1 - span.t0
        return [(t, t + rows, span.weight, parts) for t in range(span.t0, span.t1, rows)]

    def inside(self, used: Iterable[AdapterParts]) -> bool:
        """Whether any of the parts needs the decoder's layers to call their single modules.

        Those of embedding and head do not: these are called the same way always. Nor does what native layers do.
        """
        return any(self._calls_modules(path, parts) for each in used for path, parts in each.modules.items())

    def _calls_modules(self, path: str, parts: ModuleParts) -> bool:
        if path == self._head or isinstance(self._modules[path], nn.Embedding):
            return False
        return self._native is None or not self._native.takes(path, parts)

    def native_plan(self, tokens: Sequence[PartSpan]) -> AffinePlan | None:
        """What native layers do of a batch's parts."""
        return None if self._native is None else self._native.plan(tokens)

    def _hook(self, path: str) -> None:
        if path not in self._hooked:
            module: Any = self._modules[path]
            module.forward = partial(self._forward, path, module.forward)
            self._hooked.add(path)

    def _forward(self, path: str, forward: Any, x: Tensor) -> Tensor:
        y: Tensor = forward(x)
        active = self._active.get(path)
        if active is None:
            return y
        embedding = isinstance(self._modules[path], nn.Embedding)
        rows = self._rows[path == self._head]
        inputs, out = _by_row(x, rows, 1 if embedding else 2), _by_row(y, rows, 2)
        if inputs is None or out is None:
            raise AssertionError(f"{path} is not called once with every row, so its parts cannot be applied")
        # All from the base's own output, before any is added.
        deltas = [(t0, t1, w * _affine(parts, out[t0:t1])) for t0, t1, w, parts in active if _has_affine(parts)]
        for t0, t1, w, parts in active:
            # A copy begins where every copy does: how its memory is aligned must not depend on its place either.
            own = inputs[t0:t1].clone() if self._singly else inputs[t0:t1]
            _replace(parts, own, out[t0:t1])
            if parts.low_rank is not None:
                out[t0:t1] += w * _low_rank(parts.low_rank, own, embedding)
        for t0, t1, delta in deltas:
            out[t0:t1] += delta
        return y


def _by_row(x: Tensor, rows: int, depth: int) -> Tensor | None:
    """A view of x with the batch's rows first, or None; `depth`: x's dimensions without a batch dimension.

    Most callers give [1, T, width], a mixture's shared expert [T, width], norms over heads [1, T, H, D] or
    [1, H, T, D]. These are told apart by size, and where T = H by stride: a token's heads lie together.
    """
    if x.dim() > depth:
        if x.shape[0] != 1:
            return None
        x = x[0]
    if x.dim() == 3:
        fitting = [axis for axis in (0, 1) if x.shape[axis] == rows]
        return x.movedim(max(fitting, key=x.stride), 0) if fitting else None
    return x if x.shape[0] == rows else None


def _has_affine(parts: ModuleParts) -> bool:
    return parts.scale is not None or parts.shift is not None


def _affine(parts: ModuleParts, y: Tensor) -> Tensor:
    """scale * y + shift, computed in float32; y: [rows, out]."""
    delta = y.float() * parts.scale if parts.scale is not None else torch.zeros_like(y, dtype=torch.float32)
    return delta if parts.shift is None else delta + parts.shift


def _replace(parts: ModuleParts, x: Tensor, y: Tensor) -> None:
    """Overwrite y [rows, out] by what the replaced module, or the replaced token rows, give for x."""
    if parts.replacement is not None:
        y.copy_(parts.replacement(x))
    tokens = parts.tokens
    if tokens is None:
        return
    if x.is_floating_point():
        y[:, tokens.ids] = x @ tokens.rows.T
    else:
        places = tokens.index[x]
        mine = places >= 0
        y[mine] = tokens.rows[places[mine]] * tokens.scale


def _low_rank(low_rank: LowRank, x: Tensor, embedding: bool) -> Tensor:
    hidden = low_rank.a.T[x] if embedding else x @ low_rank.a.T
    return hidden @ low_rank.b
