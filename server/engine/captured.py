"""Decode steps launched as one captured graph each, for batches of a few sizes and contexts."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.gpu_active import GpuAdapters
from server.adapters.gpu_decoder import GpuDecoder
from server.engine.batch import extend_segments
from server.engine.rows import StepOfRows
from server.engine.scheduler import Share
from server.engine.sequence import Sequence
from server.engine.static_rows import StaticRows
from server.kernels.gpu.graphs import Graphs
from server.kernels.native.plans import Segment
from server.model.attention import PagedKv

log = logging.getLogger(__name__)

_CONTEXTS = (1024, 4096, 16384)  # tokens; longer ones are launched piece by piece


_Arrangement = tuple[list[Sequence], list[tuple[tuple[int, int, float], ...]], list[int], tuple[Segment, ...]]
"""Sequences, their adapters' rows, their places in the order of these, and the segments."""


@dataclass(frozen=True)
class _Ahead:
    """A step that was launched before the one in front of it was answered."""

    rows: tuple[Sequence, ...]
    at: dict[int, int]  # by id of the sequences that take part: which of their tokens it computes
    logits: Tensor

    def answers(self, shares: Seq[Share]) -> bool:
        """Whether it computes these, perhaps among others."""
        return all(share.tokens == 1 and self.at.get(id(share.sequence)) == share.sequence.computed for share in shares)


def _step(rows: Seq[Sequence], shares: Seq[Share], logits: Tensor) -> tuple[StepOfRows, Tensor]:
    """A step that computed `rows`, for these shares of it, in the rows' order; and the logits of who samples."""
    by = {id(share.sequence): share for share in shares}
    placed = [(row, by[id(sequence)]) for row, sequence in enumerate(rows) if id(sequence) in by]
    sampling = [(row, share) for row, share in placed if share.samples]
    if len(sampling) == len(rows):
        wanted = logits[: len(rows)]
    else:
        index = torch.tensor([row for row, _ in sampling], dtype=torch.int64)
        if logits.is_cuda:
            index = index.pin_memory()  # or the copy waits for the step
        wanted = logits.index_select(0, index.to(logits.device, non_blocking=True))
    return StepOfRows(tuple(share for _, share in placed), tuple(share for _, share in sampling)), wanted


class CapturedSteps:
    """Captures a step when it is first asked for, and launches it again whenever one of its size comes.

    A step is known by its rows (rounded up to a bucket, the rest padding), by the context it has room for and by
    whether it has adapters at all; which adapters, pages and lengths it has lies in buffers that it reads.
    """

    def __init__(
        self,
        graphs: Graphs,
        decoder: GpuDecoder,
        active: GpuAdapters,
        kv: PagedKv,
        max_sequences: int,
        context_tokens: int,
        heads: int,
        width: int,
        vocabulary: int,
        device: str,
    ) -> None:
        self.buckets = buckets(max_sequences)
        self.contexts = contexts(context_tokens)
        self._graphs = graphs
        self._decoder = decoder
        self._active = active
        self._kv = kv
        self._rows = StaticRows(max_sequences, self.contexts[-1], kv.page_tokens, heads, width, device)
        self._logits = torch.empty(max_sequences, vocabulary, dtype=torch.float32, device=device)
        self._captured: dict[tuple[int, int, bool], Callable[[], Tensor]] = {}
        self._last: _Arrangement | None = None
        self._ran: tuple[Sequence, ...] = ()  # the rows of the step that ran last, where it was captured
        self._ahead: _Ahead | None = None

    def run(self, shares: Seq[Share]) -> tuple[StepOfRows, Tensor] | None:
        """The step and the logits [S, vocabulary] of those that sample; None for what is not captured.

        Nobody of these has parts beside rank rows.
        """
        ahead = self.forget()
        if ahead is not None and ahead.answers(shares):
            self._ran = ahead.rows
            return _step(ahead.rows, shares, ahead.logits)
        longest = max(share.sequence.computed for share in shares) + 1
        if any(share.tokens > 1 for share in shares) or longest > self.contexts[-1]:
            return None
        order, segments = self._arranged([share.sequence for share in shares])
        ordered = [shares[place] for place in order]
        self._active.use(segments, len(ordered))
        if not self._active.captured:
            return None
        key = self._size(len(ordered), longest, bool(segments))
        self._rows.fill(ordered, key[0])
        logits = self._captured_for(*key)()
        self._ran = tuple(share.sequence for share in ordered)
        return _step(self._ran, ordered, logits)

    def ahead(self, sequences: Seq[Sequence], tokens: Tensor) -> bool:
        """Launch the next step of these rows of the step that ran last, before anybody knows what that one chose;
        whether it was. `run` answers with it when it is asked for them, or for some of them.

        tokens: [S] int64 on the device, what was chosen for all rows of the step.
        """
        if not self._ran or len(self._ran) != len(tokens) or self._last is None:
            return False
        going_on = set(map(id, sequences))
        rows = [sequence if id(sequence) in going_on else None for sequence in self._ran]
        longest = max((s.computed for s in rows if s is not None), default=0) + 1
        if longest == 1 or longest > self.contexts[-1]:
            return False
        key = self._size(len(rows), longest, bool(self._last[3]))
        if key not in self._captured:
            return False
        self._rows.advance(rows, tokens, key[0])
        self._ahead = _Ahead(self._ran, {id(s): s.computed for s in rows if s is not None}, self._captured[key]())
        return True

    def forget(self) -> _Ahead | None:
        """What was launched ahead, of which `run` knows no more."""
        ahead, self._ahead, self._ran = self._ahead, None, ()
        return ahead

    def _size(self, rows: int, longest: int, adapters: bool) -> tuple[int, int, bool]:
        """The captured step that has room for so many rows of up to so many tokens."""
        rows_for = self.buckets[bisect_left(self.buckets, rows)]
        return rows_for, self.contexts[bisect_left(self.contexts, longest)], adapters

    def _arranged(self, sequences: list[Sequence]) -> tuple[list[int], tuple[Segment, ...]]:
        """Places in the order of their adapters, and the segments of that; the last step's where nobody has changed."""
        rows = [sequence.adapter_rows for sequence in sequences]
        if self._last is None or self._last[:2] != (sequences, rows):
            order = sorted(range(len(rows)), key=rows.__getitem__)
            segments: list[Segment] = []
            for row, place in enumerate(order):
                extend_segments(segments, row, row + 1, rows[place])
            self._last = sequences, rows, order, tuple(segments)
        return self._last[2:]

    def capture_all(self, adapters: bool) -> None:
        """Capture the steps of the shortest context now, before anybody waits for them, and compile what longer ones
        take, which are captured when they come."""
        started = time.monotonic()
        for some in (False, True) if adapters else (False,):
            # Whose rows these are does not matter: nobody reads what comes out.
            self._active.use(((0, 1, 0, 1, 1.0),) if some else (), 1)
            self._rows.clear()
            for rows in reversed(self.buckets):
                self._captured_for(rows, self.contexts[0], some)
        self._active.use((), 1)
        for context in self.contexts[1:]:
            for rows in self.buckets:
                self._decoder.run(self._rows.batch(rows, context), self._kv, self._logits[:rows])
        log.info("%d decode steps captured in %.1f s", len(self._captured), time.monotonic() - started)

    def _captured_for(self, rows: int, context: int, adapters: bool) -> Callable[[], Tensor]:
        """Captured now where it was not before; the inputs lie in the buffers, as they must for what is captured."""
        key = (rows, context, adapters)
        if key not in self._captured:
            batch, out = self._rows.batch(rows, context), self._logits[:rows]
            self._captured[key] = self._graphs.capture(lambda: self._decoder.run(batch, self._kv, out))
        return self._captured[key]


def buckets(most: int) -> list[int]:
    """Batch sizes that steps are captured for: what is padded in vain stays below a third, or below four rows."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(32, sizes[-1] // 4))
    return [*(size for size in sizes if size < most), most]


def contexts(most: int) -> list[int]:
    """Lengths that steps are captured for, up to `most` tokens."""
    return [*(length for length in _CONTEXTS if length < most), *([most] if most <= _CONTEXTS[-1] else [])]
