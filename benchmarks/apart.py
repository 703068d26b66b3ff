"""The engine in a process of its own, as an experiment: what the server would gain or lose by it.

    python -m benchmarks.apart --base DIRECTORY --max-sequences 64 --threads 2

Prints the same ready line as `hub serve`. This process speaks gRPC with the real front; requests go through a pipe to
a child that runs the engine, and what is new of all answers comes back in one message as often as the pipe is free.
Only what `benchmarks.streams` needs is carried over: no adapters, no structures.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.population import Registered
from server.config import EngineLimits, ModelConfig, ServerConfig
from server.engine.observer import EngineSnapshot, Unobserved
from server.engine.outbox import Outbox
from server.engine.request import Delta, Request

Steps = list[dict[str, Any]]  # keyword arguments of `EngineObserver.step`


class FarEngine:
    """Stands for an engine at the other end of a pipe, as far as the front needs one."""

    def __init__(self, base: Any, pipe: Connection, metrics: Any) -> None:
        from server.engine.structure import Structures
        from server.model.text import Text

        self.base = base
        self.text = Text(base)
        self.structures = Structures(base.tokenizer, base.vocabulary_size, self.text.eos_ids)
        self.adapters = SimpleNamespace(list=list)
        self._pipe = pipe
        self._metrics = metrics
        self._outboxes: dict[str, Outbox] = {}
        self._sending = threading.Lock()
        threading.Thread(target=self._receive, daemon=True).start()

    def submit(self, request: Request, outbox: Outbox) -> None:
        """As `Engine.submit`, but refuses nothing."""
        self._outboxes[request.id] = outbox
        self._send(request)

    def cancel(self, request_id: str) -> None:
        """As `Engine.cancel`."""
        if self._outboxes.pop(request_id, None) is not None:
            self._send(request_id)

    def snapshot(self) -> EngineSnapshot:
        """Nothing."""
        return EngineSnapshot()

    def drain(self, seconds: float) -> bool:
        """At once."""
        return True

    def _send(self, message: Request | str) -> None:
        with self._sending:
            self._pipe.send(message)

    def _receive(self) -> None:
        while True:
            try:
                steps, deltas = self._pipe.recv()
            except (EOFError, OSError):
                return
            for step in steps:
                self._metrics.step(**step)
            for request_id, delta in deltas:
                outbox = self._outboxes.get(request_id)
                if outbox is not None:
                    if delta.last:
                        del self._outboxes[request_id]
                    outbox.put(delta)


class _Sender(Unobserved):
    """In the engine's process: collects deltas and steps, a thread of its own sends them."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._changed = threading.Condition()
        self._deltas: list[tuple[str, Delta]] = []
        self._steps: Steps = []
        threading.Thread(target=self._send, daemon=True).start()

    def step(self, *, seconds: float, sequences: int, adapters: int, tokens: int) -> None:
        with self._changed:
            self._steps.append({"seconds": seconds, "sequences": sequences, "adapters": adapters, "tokens": tokens})
            self._changed.notify()

    def put(self, request_id: str, delta: Delta) -> None:
        """Called on the engine's thread; the step that made it is told after all of its deltas, and sends them."""
        with self._changed:
            self._deltas.append((request_id, delta))
            if delta.error is not None:
                self._changed.notify()

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._steps or any(delta.error for _, delta in self._deltas))
                (deltas, self._deltas), (steps, self._steps) = (self._deltas, []), (self._steps, [])
            self._pipe.send((steps, deltas))


class _Piped(Outbox):
    def __init__(self, request_id: str, sender: _Sender) -> None:
        super().__init__(lambda: None)
        self._id = request_id
        self._sender = sender

    def put(self, delta: Delta) -> None:
        self._sender.put(self._id, delta)


def run_engine(pipe: Connection, config: ServerConfig) -> None:
    """The child: an engine that obeys the pipe until it closes."""
    from server.engine.engine import Engine

    sender = _Sender(pipe)
    engine = Engine.build(config.model, config.engine, Registered(()).fetch, sender)
    engine.start()
    pipe.send(([], []))
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            break
        if message is None:
            break
        if isinstance(message, str):
            engine.cancel(message)
        else:
            engine.submit(message, _Piped(message.id, sender))
    engine.close()


async def run_front(pipe: Connection, config: ServerConfig) -> None:
    """The parent: the real gRPC server, until SIGTERM."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from hub.base import BaseIdentity
    from server.adapters.directory import AdapterDirectory
    from server.api.lifecycle import Server
    from server.api.serving import Signals
    from server.metrics import Metrics

    described: Any = AutoConfig.from_pretrained(config.model.base)
    base = SimpleNamespace(
        identity=BaseIdentity(name="apart", revision=None, fingerprint=None, quantization="none"),
        quantization="none",
        architecture="apart",
        dtype=config.model.dtype,
        model=SimpleNamespace(generation_config=GenerationConfig.from_pretrained(config.model.base)),
        tokenizer=AutoTokenizer.from_pretrained(config.model.base),
        vocabulary_size=described.vocab_size,
        context_tokens=described.max_position_embeddings,
    )
    signals = Signals()
    metrics = Metrics(max_lora=config.engine.max_sequences)
    server = Server(config, metrics)
    await server.bind()
    directory = AdapterDirectory(Registered(()))
    await server.serve_engine(cast(Any, FarEngine(base, pipe, metrics)), directory)
    print(f"ready grpc={server.grpc_address} metrics={server.metrics_url}", flush=True)
    await signals.terminate.wait()
    await server.stop(0)
    directory.close()


def main(arguments: list[str] | None = None) -> None:
    """Front and engine, each in its process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--max-sequences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--engine", type=int, default=None, help=argparse.SUPPRESS)  # the pipe's number: be the child
    options = parser.parse_args(arguments)
    config = settings(options.base, options.max_sequences, options.threads)
    if options.engine is not None:
        run_engine(Connection(options.engine), config)
        return
    near, far = multiprocessing.Pipe()
    command = [sys.executable, "-m", "benchmarks.apart", "--base", str(options.base), "--engine", str(far.fileno())]
    command += ["--max-sequences", str(options.max_sequences), "--threads", str(options.threads)]
    with subprocess.Popen(command, pass_fds=[far.fileno()]) as child:
        far.close()
        try:
            near.recv()
            asyncio.run(run_front(near, config))
        finally:
            near.send(None)  # closing would not do: a thread still reads here
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()


def settings(base: Path, max_sequences: int, threads: int) -> ServerConfig:
    """The same for every arrangement."""
    return ServerConfig(
        model=ModelConfig(base=str(base), quantization="none", threads=threads),
        engine=EngineLimits(max_sequences=max_sequences, kv_memory_bytes=256 << 20, adapter_memory_bytes=64 << 20),
        listen="127.0.0.1:0",
        metrics_port=0,
    )


if __name__ == "__main__":
    main()
