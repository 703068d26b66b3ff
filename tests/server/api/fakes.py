"""Small honest stand-ins: an engine that obeys the contract of server/engine with a thread of its own, a hub in
memory, and a gRPC server around them on a thread with its own event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeVar

from hub.errors import AdapterNotFound, HubUnavailable
from hub.refs import AdapterRef, Alias, Digest
from hub.refs import Version as Numbered
from hub.versions import Target
from server.adapters.directory import AdapterDirectory
from server.api.lifecycle import Server
from server.config import ServerConfig
from server.engine.observer import EngineSnapshot
from server.engine.outbox import Outbox
from server.engine.request import Delta, Finish, FinishReason, Request, Structure, Timing, TokenLogprobs, Usage
from server.errors import Cancelled, Draining, InvalidRequest, StructureInvalid
from server.metrics import Metrics

T = TypeVar("T")
VOCABULARY = 1000
CONTEXT = 400
QUIET = ServerConfig(metrics_port=-1)  # closing a metrics page takes half a second


@dataclass(frozen=True)
class FakeIdentity:
    name: str = "fake-base"
    revision: str | None = None
    fingerprint: str = "sha256:" + "f" * 64


@dataclass(frozen=True)
class FakeBase:
    identity: FakeIdentity = FakeIdentity()
    architecture: str = "FakeForCausalLM"
    quantization: str = "nf4"
    dtype: str = "torch.bfloat16"
    context_tokens: int = CONTEXT
    vocabulary_size: int = VOCABULARY


class FakeStructures:
    """Refuses what says so."""

    def __init__(self) -> None:
        self.threads: set[str] = set()  # who compiled

    def compile(self, structure: Structure) -> None:
        self.threads.add(threading.current_thread().name)
        if "invalid" in structure.text:
            raise StructureInvalid(f"{structure.kind}: it says so")


class FakeText:
    """One token a character."""

    longest_token = 4  # it could say more at a time

    def __init__(self) -> None:
        self.threads: set[str] = set()  # who tokenized

    def encode(self, text: str) -> list[int]:
        self.threads.add(threading.current_thread().name)
        return [ord(char) % VOCABULARY for char in text if char != "\u200b"]

    def render_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise InvalidRequest("the base's chat template refuses these messages: the user speaks first")
        return self.encode("".join(f"<{each['role']}>{each['content']}" for each in messages))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids if token)  # 0 is special

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return [chr(token) for token in token_ids]


class Tier(Enum):
    LOADING = "loading"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True)
class FakeStatus:
    digest: str
    version: str
    tier: Tier = Tier.DEVICE
    rank: int = 8
    host_bytes: int = 1000
    device_bytes: int = 2000
    requests_in_flight: int = 0
    draining: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class FakeTicket:
    digest: str
    version: str
    error: Exception | None = None


class FakeAdapters:
    def __init__(self) -> None:
        self.held: dict[str, FakeStatus] = {}
        self.used: set[str] = set()

    def load(self, digest: str, version: str) -> FakeStatus:
        return self.held.setdefault(digest, FakeStatus(digest, version, warnings=("it is only a fake",)))

    def acquire(self, digests: Sequence[str], versions: Sequence[str]) -> FakeTicket:
        return FakeTicket(digests[0], versions[0])

    def begin(self, ticket: FakeTicket) -> bool:
        return ticket.digest in self.held

    def arrived(self, ticket: FakeTicket) -> FakeStatus:
        return self.load(ticket.digest, ticket.version)

    def release(self, ticket: FakeTicket) -> None:
        pass

    def unload(self, digest: str) -> bool:
        if digest in self.used:
            self.held[digest] = replace(self.held[digest], draining=True)
            return False
        self.held.pop(digest, None)
        return True

    def list(self) -> list[FakeStatus]:
        return list(self.held.values())


@dataclass
class _Running:
    request: Request
    outbox: Outbox
    sent: int = 0


class FakeEngine:
    """Answers "abc…" one letter a step, for `max_new_tokens` steps.

    `gate` cleared: no step is made, so streams stay open until it is set. `failures` maps an adapter's version to the
    error that requests naming it end with; `refuse` is raised by `submit`.
    """

    def __init__(self) -> None:
        self.base = FakeBase()
        self.text = FakeText()
        self.structures = FakeStructures()
        self.adapters = FakeAdapters()
        self.gate = threading.Event()
        self.gate.set()
        self.ended = threading.Event()
        self.failures: dict[str, Exception] = {}
        self.refuse: Exception | None = None
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self._running: dict[str, _Running] = {}
        self._changed = threading.Condition()
        self._draining = self._closed = False
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, outbox: Outbox) -> None:
        with self._changed:
            if self.refuse is not None:
                raise self.refuse
            if self._draining or self._closed:
                raise Draining("the server is shutting down")
            assert request.id not in self._running
            self.submitted.append(request)
            self._running[request.id] = _Running(request, outbox)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self.cancelled.append(request_id)
            running = self._running.pop(request_id, None)
            self._changed.notify_all()
        if running is not None:
            running.outbox.put(Delta(error=Cancelled("the caller went away")))

    def snapshot(self) -> EngineSnapshot:
        with self._changed:
            versions = {use.version for each in self._running.values() for use in each.request.adapters}
            return EngineSnapshot(
                running=len(self._running),
                waiting=2,
                kv_pages_used=3,
                kv_pages_total=4,
                running_adapters=frozenset(versions),
                waiting_adapters=frozenset({"team/b@2", "team/b@1", "solo@1"}),
            )

    def drain(self, seconds: float) -> bool:
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._running, seconds)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            left, self._running = list(self._running.values()), {}
            self._changed.notify_all()
        for each in left:
            each.outbox.put(Delta(error=Draining("the server is shutting down")))

    def wait_idle(self, seconds: float = 5.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, seconds)

    def wait_running(self, count: int, seconds: float = 5.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: len(self._running) == count, seconds)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._closed)
                if self._closed:
                    return
                batch = list(self._running.values())
            if not self.gate.wait(0.01):
                continue
            for each in batch:
                delta = self._step(each)
                with self._changed:
                    if each.request.id not in self._running:
                        continue
                    if delta.last:
                        del self._running[each.request.id]
                        self._changed.notify_all()
                each.outbox.put(delta)

    def _step(self, running: _Running) -> Delta:
        request = running.request
        for use in request.adapters:
            if use.version in self.failures:
                return Delta(error=self.failures[use.version])
        letter = chr(ord("a") + running.sent % 26)
        running.sent += 1
        delta = Delta(text=letter, token_ids=[ord(letter)])
        if request.logprobs is not None:
            delta.logprobs = [TokenLogprobs(ord(letter), -0.5, ((ord(letter), -0.5),) * request.logprobs)]
        if running.sent == 1 and request.adapters:
            delta.warnings = [f"adapter {use.version} is a fake" for use in request.adapters]
        if running.sent == request.stopping.max_new_tokens:
            total = time.monotonic() - request.arrival
            delta.finish = Finish(
                FinishReason.LENGTH, Usage(len(request.prompt), running.sent), Timing(total / 4, total / 2, total)
            )
        return delta


@dataclass(frozen=True)
class FakeAlias:
    targets: Sequence[Target]


@dataclass(frozen=True)
class FakeVersion:
    text: str
    digest: str


@dataclass(frozen=True)
class FakeEvent:
    seq: int
    kind: str
    full_name: str


@dataclass
class FakeHub:
    """Versions and aliases in memory, an event feed, and a switch to be unreachable."""

    versions: dict[str, list[str]] = field(default_factory=dict)  # full name → digests
    held: dict[str, int] = field(default_factory=dict)  # "team/x:prod" → number
    splits: dict[str, dict[int, int]] = field(default_factory=dict)
    unreachable: bool = False
    asked: int = 0

    def __post_init__(self) -> None:
        self._events: list[FakeEvent] = []
        self._changed = threading.Condition()

    def push(self, full_name: str) -> str:
        digests = self.versions.setdefault(full_name, [])
        digest = f"sha256:{len(digests) + 1:x}{full_name.encode().hex():0>63}"[:71]
        digests.append(digest)
        self.held[f"{full_name}:latest"] = len(digests)
        self._note("push", full_name)
        return digest

    def tag(self, full_name: str, alias: str, number: int) -> None:
        self.held[f"{full_name}:{alias}"] = number
        self._note("tag", full_name)

    def untag(self, full_name: str, alias: str) -> None:
        del self.held[f"{full_name}:{alias}"]
        self._note("untag", full_name)

    def remove(self, full_name: str) -> None:
        del self.versions[full_name]
        self._note("remove", full_name)

    def split(self, full_name: str, alias: str, shares: dict[int, int]) -> None:
        """Alias over several versions: number → weight."""
        self.splits[f"{full_name}:{alias}"] = shares
        self.tag(full_name, alias, max(shares, key=lambda number: (shares[number], -number)))

    def aliases(self, full_name: str) -> dict[str, FakeAlias]:
        self.asked += 1
        if self.unreachable:
            raise HubUnavailable("the hub cannot be reached just now")
        digests = self.versions.get(full_name)
        if digests is None:
            raise AdapterNotFound(f"{full_name} is unknown")
        found = {}
        for text, number in self.held.items():
            name, _, alias = text.partition(":")
            if name == full_name:
                shares = self.splits.get(text, {number: 1})
                found[alias] = FakeAlias([Target(n, Digest(digests[n - 1]), weight) for n, weight in shares.items()])
        return found

    def resolve(self, ref: AdapterRef) -> FakeVersion:
        self.asked += 1
        if self.unreachable:
            raise HubUnavailable("the hub cannot be reached just now")
        digests = self.versions.get(ref.full_name, [])
        match ref.selector:
            case Digest():
                number = digests.index(str(ref.selector)) + 1 if str(ref.selector) in digests else 0
            case Numbered(number):
                pass
            case Alias(name):
                number = self.held.get(f"{ref.full_name}:{name}", 0)
        if not 1 <= number <= len(digests):
            raise AdapterNotFound(f"{ref} is not here: the secret {len(digests)} others are")
        return FakeVersion(f"{ref.full_name}@{number}", digests[number - 1])

    def last_seq(self) -> int:
        if self.unreachable:
            raise HubUnavailable("the hub cannot be reached just now")
        return len(self._events)

    def watch(self, since_seq: int, stop: threading.Event, poll_seconds: float) -> Iterator[FakeEvent]:
        while not stop.is_set():
            if self.unreachable:
                raise HubUnavailable("the hub cannot be reached just now")
            with self._changed:
                if len(self._events) == since_seq:
                    self._changed.wait(poll_seconds)
                fresh = self._events[since_seq:]
            for event in fresh:
                since_seq = event.seq
                yield event

    def _note(self, kind: str, full_name: str) -> None:
        with self._changed:
            self._events.append(FakeEvent(len(self._events) + 1, kind, full_name))
            self._changed.notify_all()


class RunningServer:
    """A real gRPC server on free ports, around the engine and the hub given."""

    def __init__(self, engine: Any, hub: Any, config: ServerConfig = QUIET, metrics: Metrics | None = None) -> None:
        self.engine = engine
        self.metrics = metrics or Metrics(max_lora=64)
        self.config = replace(config, listen="127.0.0.1:0")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.directory = AdapterDirectory(hub, poll_seconds=0.02)
        self.server = self.run(self._build())
        self.run(self.server.bind())
        engine.start()

    def serve(self) -> None:
        """Answer calls; before, they are refused as from a server that is loading."""
        self.run(self.server.serve_engine(self.engine, self.directory))

    @property
    def address(self) -> str:
        return self.server.grpc_address

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.spawn(work).result(20)

    def spawn(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        self.engine.close()
        self.run(self.server.stop())
        self.directory.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _build(self) -> Server:
        return Server(self.config, self.metrics)
