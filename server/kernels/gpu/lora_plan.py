"""Which arena rows apply to which tokens, laid out for the LoRA kernels in one int32 buffer that never moves.

A *group* is a run of tokens that all use the same adapters; a *piece* is up to RANKS rows of one of these adapters.
Tokens on the base alone are in no group, so no kernel reads or writes anything for them. What a program needs for its
first loads lies in one row of words, so that nothing it reads waits for another address.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import torch

RANKS = 16  # arena rows a piece holds at most: the smallest tile a tensor core takes, so that rank 8 wastes little
DECODE_TOKENS = 8  # of a group of rows with one token each: the other side of that tile
HEADER = 8  # words before the groups: groups, pieces, six unused
GROUP = 8  # words of a group: first token, tokens, first piece, one past the last; rows and weight of the first piece
PIECE = 8  # words of a piece: first token, tokens, first arena row, rows, weight (float32 bits), three unused

Segment = tuple[int, int, int, int, float]


class LoraPlan:
    """Room for up to `groups` groups and `pieces` pieces of up to `tokens` tokens a group (8 or 16, more for prompts).

    `buffer`: int32 on `device`, HEADER words, then the groups, then the pieces. `fill` overwrites it in place, in
    stream order, so kernels and captured graphs that hold its address see the new step.
    """

    def __init__(self, device: torch.device | str, *, tokens: int, groups: int, pieces: int) -> None:
        if tokens not in (8, 16, 32, 64, 128):
            raise ValueError(f"a group of {tokens} tokens is no tile; 8, 16, 32, 64 and 128 are")
        self.tokens = tokens
        self.groups = groups
        self.pieces = pieces
        self.piece_at = HEADER + GROUP * groups
        self.buffer = torch.zeros(self.piece_at + PIECE * pieces, dtype=torch.int32, device=device)
        self.empty = True  # as last filled: nothing to launch

    def fill(self, segments: Sequence[Segment]) -> None:
        """Take over segments (t0, t1, r0, r1, weight) as in `reference.lora_add`.

        Raises ValueError, and changes nothing, where they need more groups or pieces than there is room for.
        """
        groups: list[bytes] = []
        pieces: list[bytes] = []
        for first, last, active in _runs(segments):
            rows = [(row, min(RANKS, r1 - row), weight) for r0, r1, weight in active for row in range(r0, r1, RANKS)]
            for t0 in range(first, last, self.tokens):
                span = (t0, min(self.tokens, last - t0))
                groups.append(struct.pack("=iiiiiifi", *span, len(pieces), len(pieces) + len(rows), *rows[0], 0))
                pieces += [struct.pack("=iiiifiii", *span, *row, 0, 0, 0) for row in rows]
        counts = (len(groups), len(pieces))
        if counts[0] > self.groups or counts[1] > self.pieces:
            raise ValueError(
                f"the plan has room for {self.groups} groups and {self.pieces} pieces, the batch has "
                f"{counts[0]} and {counts[1]}"
            )
        self.empty = not pieces
        host = torch.zeros_like(self.buffer, device="cpu", pin_memory=self.buffer.is_cuda)
        host[:2] = torch.tensor(counts, dtype=torch.int32)
        for at, words in ((HEADER, groups), (self.piece_at, pieces)):
            if words:
                packed = torch.frombuffer(bytearray(b"".join(words)), dtype=torch.int32)
                host[at : at + packed.numel()] = packed
        # Stale words past the counts are never read, so all of the buffer is one copy.
        self.buffer.copy_(host, non_blocking=True)


def _runs(segments: Sequence[Segment]) -> Iterator[tuple[int, int, list[tuple[int, int, float]]]]:
    """Runs of tokens (first, one past the last) with the adapters that all of them use, in the order given."""
    waiting = sorted(
        ((t0, order, t1, (r0, r1, weight)) for order, (t0, t1, r0, r1, weight) in enumerate(segments) if t1 > t0),
        reverse=True,
    )
    waiting = [segment for segment in waiting if segment[3][1] > segment[3][0]]
    active: list[tuple[int, int, tuple[int, int, float]]] = []  # order, t1, rows
    at = 0
    while waiting or active:
        if not active:
            at = waiting[-1][0]
        while waiting and waiting[-1][0] == at:
            _, order, t1, rows = waiting.pop()
            active.append((order, t1, rows))
        active.sort()
        until = min(t1 for _, t1, _ in active)
        if waiting:
            until = min(until, waiting[-1][0])
        yield at, until, [rows for _, _, rows in active]
        at = until
        active = [segment for segment in active if segment[1] > at]
