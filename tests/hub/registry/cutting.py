"""A TCP proxy that cuts connections after so many bytes, as networks do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress


class CuttingProxy:
    """Forwards to `target`; while `cuts` are left, a connection ends after `after` bytes in `direction`.

    With `until`, the connection first stands still until that is true (20 s at most): what had been passed on may still
    be on its way through gRPC, which drops it when the connection ends.
    """

    def __init__(
        self, target: str, direction: str, after: int, cuts: int, until: Callable[[], bool] = lambda: True
    ) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._direction, self._after, self.cuts, self._until = direction, after, cuts, until
        self.done = 0  # cuts made
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes = {"up": 0, "down": 0}
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for source, sink, direction in ((client, server, "up"), (server, client, "down")):
                threading.Thread(target=self._copy, args=(source, sink, direction), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                passed += len(data)
                self.bytes[direction] += len(data)
                sink.sendall(data)
                if direction == self._direction and self.done < self.cuts and passed > self._after:
                    give_up = time.monotonic() + 20
                    while not self._until() and time.monotonic() < give_up:
                        time.sleep(0.01)
                    self.done += 1
                    break
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
