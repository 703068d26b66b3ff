"""`hub serve` from the first port to the last stream: the order of things and the signals."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from server.adapters.directory import AdapterDirectory
from server.api.lifecycle import Server, in_daemon_thread
from server.config import ServerConfig
from server.metrics import Metrics

if TYPE_CHECKING:
    from server.engine.engine import Engine

T = TypeVar("T")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# After the engine is empty, the last messages still have to reach slow readers.
FLUSH_SECONDS = 2.0
HURRIED_FLUSH_SECONDS = 0.2


class Outcome(enum.Enum):
    """How a server's life ended."""

    DRAINED = "drained"
    CUT_OFF = "cut off"  # calls were still running when time was up
    FAILED = "failed"  # the engine ended by itself
    ABANDONED = "abandoned"  # stopped while loading; a thread may still be in the model library


@dataclass(frozen=True)
class Parts:
    """What a server needs from outside this package; made one after the other, slow ones off the event loop."""

    open_directory: Callable[[], AdapterDirectory]
    build_engine: Callable[[Metrics], Engine]


class Signals:
    """SIGTERM or SIGINT once: `terminate`; twice: `hurry`; a third one ends the process. Made on a running loop."""

    def __init__(self) -> None:
        self.terminate = asyncio.Event()
        self.hurry = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self.received)

    def received(self) -> None:
        """One more signal."""
        if not self.terminate.is_set():
            self.terminate.set()
            return
        self.hurry.set()
        for number in _SIGNALS:
            self._loop.remove_signal_handler(number)


async def serve(
    config: ServerConfig,
    parts: Parts,
    announce: Callable[[str], None],
    progress: Callable[[str], None],
) -> Outcome:
    """Serve until a signal, or until the engine fails.

    `announce` gets the one line that says the server is ready, `progress` lines for people. Raises
    `AddressUnavailable`, `HubUnavailable`, and what loading the base raises.
    """
    signals = Signals()
    metrics = Metrics(max_lora=config.engine.max_sequences)
    server = Server(config, metrics)
    with contextlib.ExitStack() as stack:
        try:
            await server.bind()
            directory = await in_daemon_thread(parts.open_directory)
            stack.callback(directory.close)
            started = time.monotonic()
            progress(f"loading {config.model.base} ({config.model.quantization}, {config.model.dtype})")
            engine = await _unless(signals.terminate, in_daemon_thread(parts.build_engine, metrics))
            if engine is None:
                progress("stopped while loading")
                return Outcome.ABANDONED
            progress(f"loaded in {time.monotonic() - started:.1f} s")
            stack.callback(engine.close)
            engine.start()
            await server.serve_engine(engine, directory)
            announce(ready_line(server, engine))
            failed = await _unless(signals.terminate, in_daemon_thread(engine.ended.wait)) is True
            if failed:
                progress("the engine has failed: the reason is in the log; stopping")
            else:
                progress(f"draining, at most {config.drain_seconds:g} s; a second signal stops at once")
            drained = await _unless(signals.hurry, server.drain()) is True
            # Whatever is still inside ends with DRAINING, a status its caller can act on.
            await in_daemon_thread(engine.close)
            await server.stop(HURRIED_FLUSH_SECONDS if signals.hurry.is_set() else FLUSH_SECONDS)
            progress("stopped" if drained else "stopped; calls still running were cut off")
            if failed:
                return Outcome.FAILED
            return Outcome.DRAINED if drained else Outcome.CUT_OFF
        finally:
            await server.stop()


def ready_line(server: Server, engine: Engine) -> str:
    """What scripts wait for on stdout."""
    base = engine.base
    return (
        f"ready grpc={server.grpc_address} metrics={server.metrics_url or 'off'} "
        f"base={base.identity.name} quantization={base.quantization}"
    )


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when `event` is set before; then `work` is cancelled."""
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        waiting.cancel()
