"""Without a GPU the kernels run in Triton's interpreter, which keeps its place in globals: threads must take turns."""

from __future__ import annotations

import functools
import threading

_turn = threading.RLock()


@functools.cache
def take_turns() -> None:
    """From here on one thread interprets a kernel at a time."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def in_turn(self, *args, **kwargs):
        with _turn:
            return run(self, *args, **kwargs)

    InterpretedFunction.run = in_turn
