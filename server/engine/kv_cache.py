"""Which KV page belongs to whom. Only numbers; the memory itself is `model.attention.PagedKv`.

A page is in one of three states: free (nobody's, content meaningless), owned (by one sequence, or by several that
share its content) or cached (nobody's, but its content has a key and may be asked for again). Cached pages are given
away, least recently used first, when there are no free ones left.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from server.engine.prefix import PageKey


class PageTable:
    """Owners, keys and free pages of a fixed pool."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))
        self._owners: dict[int, int] = {}  # page -> how many sequences own it, >= 1
        self._cached: OrderedDict[int, None] = OrderedDict()  # keyed pages without owners, least recently used first
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    @property
    def free(self) -> int:
        """Pages that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages that somebody owns."""
        return len(self._owners)

    @property
    def cached(self) -> int:
        """Pages that nobody owns and whose content may be asked for again."""
        return len(self._cached)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_tokens)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one owner and no key, or None when fewer can be had."""
        if count > self.free:
            return None
        while len(self._free) < count:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self._free.append(page)
        taken = [self._free.pop() for _ in range(count)]
        self._owners.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, keys: Sequence[PageKey]) -> list[int]:
        """The pages of the longest known beginning of `keys`; the caller becomes one more owner of each."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._cached.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1
            found.append(page)
        return found

    def publish(self, page: int, key: PageKey) -> None:
        """Let others share an owned, full page from now on; nothing happens when the key or the page is known."""
        if page not in self._owners:
            raise AssertionError(f"page {page} is nobody's")
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """End one ownership of each page, given in the order of the tokens in them."""
        # The end first: of one sequence's pages, the later ones are the first to be given away, since they are
        # worth nothing without those before them.
        for page in reversed(pages):
            owners = self._owners[page] - 1
            if owners:
                self._owners[page] = owners
                continue
            del self._owners[page]
            if page in self._key_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def keyed(self, page: int) -> bool:
        """Whether the page's content was published."""
        return page in self._key_of

    def alone(self, pages: Iterable[int]) -> int:
        """How many of `pages` have a single owner, so that its release makes them available."""
        return sum(self._owners[page] == 1 for page in pages)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Raise AssertionError unless `owned` (a page once for each owner), free and cached pages are all there is."""
        if dict(Counter(owned)) != self._owners:
            raise AssertionError("KV pages are owned by nobody, or by more or fewer than they count")
        if sorted([*self._free, *self._cached, *self._owners]) != list(range(self.pages)):
            raise AssertionError("KV pages are lost or in two states at once")
        if {key: page for page, key in self._key_of.items()} != self._page_of:
            raise AssertionError("keys and pages disagree")
        if any(page not in self._key_of for page in self._cached) or any(page in self._key_of for page in self._free):
            raise AssertionError("a cached page has no key, or a free one has")
