"""Loader threads step back, and only they."""

import os
import sys
import threading

import pytest

from server.adapters.fetching import FetchThreads
from server.adapters.priority import NICENESS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have no priority of their own")


def test_only_the_loading_threads_give_way() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    seen: list[int] = []
    done = threading.Event()

    def job() -> None:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        done.set()

    threads = FetchThreads(1, "test")
    threads.run(job)
    assert done.wait(10)
    threads.close()
    assert seen == [max(NICENESS, before)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
