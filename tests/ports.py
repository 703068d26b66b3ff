"""Ports for services that must be told one before they start."""

from __future__ import annotations

import random
import socket

_LOWEST = 10_000
_HIGHEST = 32_000  # above, the kernel gives ports to whoever asks for any: to other tests, at any moment
_DICE = random.SystemRandom()


def free_port(*beside: int) -> int:
    """A port of this machine that is free now, and so are those this far `beside` it."""
    for _ in range(1000):
        port = _DICE.randrange(_LOWEST, _HIGHEST - max(beside, default=0))
        if all(_is_free(port + step) for step in (0, *beside)):
            return port
    raise OSError("found no free port")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that closed a moment ago is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
