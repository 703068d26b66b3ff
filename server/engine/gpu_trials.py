"""Steps that an engine on a GPU tries before requests come, so that nobody waits while their kernels are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import cast

from server.config import EngineLimits
from server.engine.scheduler import Share
from server.engine.sequence import Sequence
from server.kernels.gpu.attention import MOST, ROWS, STEP

# Tokens: up to 16, 32 and 64 rows products read NF4 as it is, each by a kernel of its own; for more it is made dense.
_PROMPTS = (12, 24, 40, 200)
_LONG = STEP * MOST  # stored positions from which answers' attention is another kernel

AdapterRows = tuple[tuple[int, int, float], ...]


@dataclass
class _Nobody:
    """What a step needs of a sequence."""

    tokens: list[int]
    computed: int
    pages: list[int]
    adapter_rows: AdapterRows

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


def trials(
    limits: EngineLimits, pages: int, page_tokens: int, context_tokens: int, adapter_rows: int
) -> Iterator[list[Share]]:
    """Prompts of several lengths, alone and beside answers; answers alone, which are not captured where they are too
    long or have too many adapters; all of it with adapters and without.

    They write to pages that nobody has yet, of which answers share the first, and take adapters' rows that hold zeros.
    """
    if pages < 2:
        return  # no room for a prompt beside an answer
    # By how many answers there are: their attention is compiled for one, for up to ROWS, for up to twice as many …
    most = min(limits.max_sequences, limits.max_batch_tokens)
    counts = [1, 2, *((ROWS << power) + 1 for power in range(most.bit_length()))]
    counts = [count for count in counts if count <= most]
    beside = [count for count in counts if count < limits.max_sequences]
    room = min((pages - 1) * page_tokens, context_tokens, limits.max_batch_tokens)
    lengths = sorted({min(length, room) for length in _PROMPTS if room > 1})
    for rows in [(), ((0, min(8, adapter_rows), 1.0),)] if adapter_rows else [()]:
        for length in lengths:
            prompt = _share(length, 0, range(1, 1 + -(-length // page_tokens)), rows)
            yield [prompt]
            for count in beside:
                if count + length <= limits.max_batch_tokens:
                    yield [*_answers(count, 1, page_tokens, rows), prompt]
        yield from (_answers(count, 1, page_tokens, rows) for count in counts)
        if min(context_tokens, pages * page_tokens) <= _LONG:
            continue
        prompt = _share(2, 0, [1, 1], rows)
        for count in counts:
            long = _answers(count, _LONG, page_tokens, rows)
            yield long
            if count in beside and count + 2 <= limits.max_batch_tokens:
                yield [*long, prompt]


def _answers(count: int, computed: int, page_tokens: int, rows: AdapterRows) -> list[Share]:
    return [_share(1, computed, [0] * (computed // page_tokens + 1), rows) for _ in range(count)]


def _share(tokens: int, computed: int, pages: Seq[int], rows: AdapterRows) -> Share:
    """The next `tokens` tokens of somebody who wants one more after them."""
    return Share(cast(Sequence, _Nobody([0] * (computed + tokens), computed, list(pages), rows)), tokens)
