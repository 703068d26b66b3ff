"""The answers to one call, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from server.engine.outbox import Outbox
from server.engine.request import Delta


class Candidates:
    """Outboxes that share one reader on an asyncio loop, one a candidate; build it on that loop."""

    def __init__(self, count: int) -> None:
        self._ready = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            # The loop may be gone when a request outlives its server; then nobody reads.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._ready.set)

        self.outboxes = [Outbox(wake) for _ in range(count)]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """(candidate, delta) until every candidate has had its last one."""
        unfinished = list(range(len(self.outboxes)))
        while unfinished:
            await self._ready.wait()
            self._ready.clear()
            for index in list(unfinished):
                delta = self.outboxes[index].take()
                if delta is None:
                    continue
                if delta.last:
                    unfinished.remove(index)
                yield index, delta
