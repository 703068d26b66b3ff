"""What makes a KV page's content: the adapters that computed it, its tokens and everything before them.

Keys are chained: a page's key covers its parent's. Adapters enter by digest and weight, never by name, so a moved
alias or another weight leads to other keys and cannot meet pages that were computed differently. Adapters that cannot
change a key or value are left out by the caller, and so share the base's pages.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from server.engine.request import AdapterUse

PageKey = bytes
"""32 bytes; equal keys mean equal content, up to the rounding of the batch that computed it."""


def root_key(adapters: Sequence[AdapterUse]) -> PageKey:
    """The parent of a sequence's first page. The order of adapters does not count, nor one of weight zero."""
    digest = hashlib.sha256(b"loraplex kv page 1")
    for use in sorted((use for use in adapters if use.weight), key=lambda use: use.digest):
        name = use.digest.encode()
        digest.update(struct.pack("<Qd", len(name), use.weight) + name)
    return digest.digest()


def page_key(parent: PageKey, tokens: Sequence[int]) -> PageKey:
    """The key of a full page of `tokens` that follows the page of key `parent`."""
    return hashlib.sha256(parent + struct.pack(f"<{len(tokens)}q", *tokens)).digest()


def extend_keys(keys: list[PageKey], root: PageKey, tokens: Sequence[int], page_tokens: int, pages: int) -> None:
    """Append to `keys`, in place, until it holds the keys of the first `pages` full pages of `tokens`."""
    while len(keys) < pages:
        start = len(keys) * page_tokens
        keys.append(page_key(keys[-1] if keys else root, tokens[start : start + page_tokens]))
