"""The inputs of decode steps at addresses that never change, so that a captured step can be launched again with other
sequences, adapters, pages and lengths."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.engine.batch import slot
from server.engine.scheduler import Share
from server.engine.sequence import Sequence
from server.kernels.gpu.attention import DecodeScratch
from server.model.attention import AttentionPlan
from server.model.gpu_attention import GpuAttention
from server.model.runner import PackedBatch

_PADDING = (0, -1, 0)  # position, slot, length


class StaticRows:
    """Room for `rows` sequences with one new token each, of up to `longest` tokens.

    A row that no sequence uses is padding: token 0 at position 0, length 0 (it attends to nothing) and slot -1 (it is
    stored nowhere). Its results mean nothing and nobody reads them.
    """

    def __init__(self, rows: int, longest: int, page_tokens: int, heads: int, width: int, device: str) -> None:
        self.rows = rows
        self._page_tokens = page_tokens
        self._shape = (heads, width)
        # Two by turns: a copy that the device has not come to may still read the other.
        self._images = [torch.zeros(4, rows, dtype=torch.int32, pin_memory=device.startswith("cuda")) for _ in range(2)]
        self._device = torch.zeros(4, rows, dtype=torch.int32, device=device)
        self._pages = torch.zeros(rows, -(-longest // page_tokens), dtype=torch.int32, device=device)
        # Of each row: the list of pages that was sent, and how many of it. A sequence's list only ever grows.
        self._sent: list[tuple[list[int] | None, int]] = [(None, 0)] * rows
        self._every = torch.arange(rows, device=device)
        self._scratch: dict[int, DecodeScratch] = {}
        self.clear()

    def clear(self) -> None:
        """Make every row padding."""
        self.fill([], self.rows)

    def fill(self, shares: Seq[Share], rows: int) -> None:
        """Put shares of one token into the first rows and padding into the others, up to `rows`.

        Two copies to the device at most: what every step changes, and the pages that are new to their row.
        """
        sequences = [share.sequence for share in shares]
        image = self._draw([self._place(sequence) for sequence in sequences], rows)
        image.numpy()[0, : len(sequences)] = [sequence.tokens[sequence.computed] for sequence in sequences]
        self._device.copy_(image, non_blocking=True)
        self._send_pages([sequence.pages for sequence in sequences])

    def advance(self, sequences: Seq[Sequence | None], tokens: Tensor, rows: int) -> None:
        """Put the same sequences' next tokens into the same rows, padding where there is None and up to `rows`;
        tokens: [S] on the device, one for every sequence or None.

        What is read of these buffers by launches before this call may still be about to be read.
        """
        image = self._draw([_PADDING if s is None else self._place(s) for s in sequences], rows)
        self._device[1:].copy_(image[1:], non_blocking=True)
        self._device[0, : len(sequences)] = tokens
        self._send_pages([[] if s is None else s.pages for s in sequences])

    def _place(self, sequence: Sequence) -> tuple[int, int, int]:
        """Position, slot and length of a sequence's next token."""
        at = sequence.computed
        return at, slot(sequence.pages, at, self._page_tokens), at + 1

    def _draw(self, places: Seq[tuple[int, int, int]], rows: int) -> Tensor:
        """Positions, slots and lengths of the first rows, and padding up to `rows`; the ids are left to the caller."""
        self._images.reverse()
        lines = self._images[0].numpy()
        if places:
            lines[1:, : len(places)] = list(zip(*places, strict=True))
        lines[:, len(places) : rows] = [[0], *([number] for number in _PADDING)]
        return self._images[0]

    def batch(self, rows: int, longest: int) -> PackedBatch:
        """The first `rows` rows as a batch, whose sequences have up to `longest` tokens; always the same memory."""
        ids, positions, slots, lengths = (line[:rows] for line in self._device)
        none = self._every[:0]
        attention = GpuAttention(
            decodes=rows,
            pages=self._pages[:rows],
            lengths=lengths,
            scratch=self._room(longest),
            prompts=None,
        )
        return PackedBatch(
            token_ids=ids,
            positions=positions,
            attention=AttentionPlan(slots, 0, none, none, 0, {}, (), gpu=attention),
            sample_rows=self._every[:rows],
        )

    def _room(self, longest: int) -> DecodeScratch:
        """Kept for ever: captured steps know its address."""
        if longest not in self._scratch:
            self._scratch[longest] = DecodeScratch(self.rows, *self._shape, longest, self._device.device)
        return self._scratch[longest]

    def _send_pages(self, pages: Seq[list[int]]) -> None:
        places: list[int] = []
        numbers: list[int] = []
        wide = self._pages.shape[1]
        for row, own in enumerate(pages):
            known, count = self._sent[row]
            start = count if known is own else 0
            places += range(row * wide + start, row * wide + len(own))
            numbers += own[start:]
            self._sent[row] = (own, len(own))
        if places:
            host = torch.tensor([places, numbers], dtype=torch.int64)
            if self._pages.is_cuda:
                host = host.pin_memory()
            changed, values = host.to(self._pages.device, non_blocking=True)
            self._pages.view(-1).index_copy_(0, changed, values.int())
