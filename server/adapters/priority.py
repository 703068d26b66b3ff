"""Loading gives way to computing: on few cores a loader in the way of one compute thread holds up the whole step, for
the others wait for it at the next barrier."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

NICENESS = 10


def give_way() -> None:
    """Lower the calling thread's priority where the system has one for each thread (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):  # where it may not, it competes with the others, as on other systems
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
