"""A pull that is killed goes on in the next process: only what had not arrived is sent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from hub.hub import Hub
from hub.registry.server import RegistryConfig, RegistryServer
from tests.hub.registry.cutting import CuttingProxy
from tests.hub.registry.test_transfer import MIB, files_of, large_adapter
from tests.waiting import bytes_in

PULL = "import sys; from hub.opening import open_existing; open_existing(sys.argv[1]).pull('x', sys.argv[2])"


class SlowProxy(CuttingProxy):
    """Lets `allowed` bytes down the line, then holds it, so that a process can be killed in the middle."""

    def __init__(self, target: str, allowed: int) -> None:
        self.allowed = allowed
        super().__init__(target, "down", after=0, cuts=0)

    def _copy(self, source, sink, direction):  # type: ignore[no-untyped-def]
        if direction == "up":
            return super()._copy(source, sink, direction)
        try:
            while data := source.recv(65536):
                while self.bytes["down"] >= self.allowed:
                    time.sleep(0.01)
                self.bytes["down"] += len(data)
                sink.sendall(data)
        except OSError:
            return None


def test_a_pull_that_is_killed_goes_on_in_the_next_process(store: Hub, tmp_path: Path) -> None:
    source = large_adapter(tmp_path / "a", 24)
    size = (source / "adapter_model.safetensors").stat().st_size
    store.push(source, "x")
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
    with RegistryServer(store, None, config) as server:
        proxy = SlowProxy(server.address, allowed=9 * MIB)
        # Through one address both times: the cache is kept by it.
        command = [sys.executable, "-c", PULL, f"grpc://{proxy.address}", str(tmp_path / "out")]
        process = subprocess.Popen(command)
        partial = tmp_path / "cache" / "loraplex" / "remote"
        deadline = time.monotonic() + 40
        arrived = 0
        while arrived < 4 * MIB and time.monotonic() < deadline:
            arrived = bytes_in(partial, "*/partial/*")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        kept = bytes_in(partial, "*/partial/*")
        assert 4 * MIB <= kept < size
        before, proxy.allowed = proxy.bytes["down"], 10**12
        subprocess.run(command, check=True, timeout=50)
        sent = proxy.bytes["down"] - before
        proxy.close()
    assert files_of(tmp_path / "out") == files_of(source)
    # What the first connection still had on its way may come down the line beside it.
    assert sent < size - kept + 4 * MIB, "bytes that had arrived came again"
    assert list(partial.glob("*/partial/*")) == []
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert left == []
