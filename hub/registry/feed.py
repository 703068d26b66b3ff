"""One look at the newest event's number for all who watch, however many they are."""

from __future__ import annotations

import logging
import threading

from hub.errors import HubError
from hub.facade import HubFacade

log = logging.getLogger(__name__)


class Feed:
    """Wakes watchers when something was written, by anybody; its thread asks the hub only while somebody waits."""

    def __init__(self, hub: HubFacade, poll_seconds: float = 0.1) -> None:
        self._hub = hub
        self._poll_seconds = poll_seconds
        self._changed = threading.Condition()
        self._waiting = 0
        self._last = 0
        self._closed = False
        self._thread = threading.Thread(target=self._follow, name="loraplex-feed", daemon=True)
        self._thread.start()

    def wait_beyond(self, seq: int, timeout: float) -> bool:
        """Wait for an event after number `seq`, the timeout in seconds or the feed's end; whether there is one."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._last > seq or self._closed, timeout)
            finally:
                self._waiting -= 1
            return self._last > seq

    def close(self) -> None:
        """Let everybody go and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _follow(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
            try:
                last = self._hub.last_seq()
            except HubError as error:
                log.warning("the hub's events cannot be read: %s", error)
                last = 0
            with self._changed:
                if last > self._last:
                    self._last = last
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed, self._poll_seconds)
