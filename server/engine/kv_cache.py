"""Which KV page belongs to whom. Only numbers; the memory itself is `model.attention.PagedKv`."""

from __future__ import annotations

from collections.abc import Iterable


class PageTable:
    """Free and used pages of a fixed pool."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages somebody owns."""
        return self.pages - len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_tokens)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None when fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back."""
        self._free += pages

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Raise AssertionError unless `owned` and the free list are each page exactly once."""
        if sorted([*self._free, *owned]) != list(range(self.pages)):
            raise AssertionError("KV pages are lost or owned twice")
