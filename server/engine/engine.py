"""The engine put together: a base, adapters, KV pages and the loop that steps; and its doors for other threads.

Requests come in by the front door (front_door.py) or a list at a time (offline.py); the step loop (step_loop.py) runs
them in a thread of its own; the answers leave through each request's outbox.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial

from server.adapters.layouts import Layouts
from server.adapters.load_pace import LoadPace, every_core_computes
from server.adapters.residency import Residency
from server.adapters.weights import AdapterFetch, parse_adapter
from server.config import EngineLimits, ModelConfig
from server.engine.computing import Computing
from server.engine.front_door import FrontDoor
from server.engine.kv_cache import PageTable
from server.engine.observer import EngineObserver, EngineSnapshot, SchedulerReports, Unobserved
from server.engine.offline import Completion, run_all
from server.engine.open_gpu import make_current
from server.engine.outbox import Outbox
from server.engine.pace import Pace
from server.engine.request import Request
from server.engine.sampler import SamplerState
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.step_loop import StepLoop
from server.engine.structure import Structures
from server.errors import RequestTooLarge
from server.model.base import BaseModel, load_base
from server.model.text import StopScanner, Text

__all__ = ["Completion", "Engine"]


class Engine:
    """Runs requests over one base, each with its own adapters, all in one batch."""

    def __init__(
        self,
        base: BaseModel,
        limits: EngineLimits,
        fetch: AdapterFetch,
        observer: EngineObserver | None = None,
    ) -> None:
        make_current(base.device)
        self.base = base
        self.limits = limits
        self.text = Text(base)
        self.structures = Structures(base.tokenizer, base.vocabulary_size, self.text.eos_ids)
        told: EngineObserver = observer or Unobserved()
        self._computing = computing = Computing(base, limits)
        self.memory = computing.memory
        gpu, rope = computing.gpu, computing.runner.long_rope
        self._pages = PageTable(computing.runner.kv.pages, limits.page_tokens)
        self._door = FrontDoor(limits.max_waiting, limits.max_waiting_per_tenant)
        parse = partial(
            parse_adapter,
            shapes=computing.shapes,
            base=base.identity,
            dtype=base.dtype,
            max_rank=limits.max_adapter_rank,
            modules=computing.weights,
            layouts=Layouts(),
        )
        self.adapters = Residency(
            computing.arena,
            fetch,
            parse if gpu is None else gpu.parsing(parse),
            limits.host_adapter_memory_bytes,
            wake=self._door.wake,
            loaded=told.adapter_loaded,
            parts_bytes=limits.adapter_parts_memory_bytes,
            fetches=limits.adapter_fetches,
            pace=LoadPace(self._answering if base.device == "cpu" and every_core_computes() else None),
        )
        reports = SchedulerReports(told)
        pace = Pace()
        self._scheduler = Scheduler(
            self._pages,
            computing.runner.kv,
            self.adapters,
            limits.max_sequences,
            limits.max_batch_tokens,
            watcher=reports,
            # longrope turns a sequence's keys anew when it grows past a length: pages are not the prefix's alone.
            prefix_cache=limits.prefix_cache and rope is None,
            pace=pace,
        )
        self._loop = StepLoop(
            self._door,
            self._scheduler,
            self._pages,
            computing.forward,
            told,
            reports,
            long_from=None if rope is None else rope.switch + 1,
            pace=pace,
            choose=computing.choose,
            resting=computing.resting,
            read=computing.read,
            ahead=None if gpu is None else gpu.ahead,
        )
        if gpu is not None:
            gpu.meanwhile = self._loop.meanwhile
        self._thread = threading.Thread(target=self._steps, name="loraplex-engine", daemon=True)

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        limits: EngineLimits,
        fetch: AdapterFetch,
        observer: EngineObserver | None = None,
    ) -> Engine:
        """Load the base that `model` names and put an engine around it; raises what `load_base` raises."""
        return cls(load_base(model), limits, fetch, observer)

    # -- for other threads ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the step loop."""
        self._thread.start()

    def submit(self, request: Request, outbox: Outbox) -> None:
        """Queue a request; its answer arrives in `outbox`, ending with a delta whose `last` is true.

        Raises `QueueFull`, `RequestTooLarge` (it could never run here), `Draining`, `EngineFailed`, or
        `StructureInvalid`. A structure is compiled here unless `structures.compile` has done so before.
        """
        if request.structure is not None:
            self.structures.compile(request.structure)
        needed = self._pages.pages_for(len(request.prompt) + request.stopping.max_new_tokens)
        if needed > self._pages.pages:
            raise RequestTooLarge(
                f"prompt and answer need {needed} KV pages of {self._pages.page_tokens} tokens, "
                f"the server has {self._pages.pages}"
            )
        self._door.admit(request, lambda: self._sequence(request, outbox))

    def reads(self, layer: int) -> None:
        """Make ready for requests whose prompts are only read, at `layer`; at any time.

        Raises `RouterUnavailable` on a GPU, and where the base has no such layer or keeps its layers elsewhere.
        """
        self._computing.reads(layer)

    def cancel(self, request_id: str) -> None:
        """End a request early; its outbox gets a last delta with `Cancelled`. Unknown or ended ids are ignored."""
        self._door.cancel(request_id)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """The offline door: run requests, all sharing the batch, and return their answers in order.

        Starts the step loop when needed. A request that fails has `error` set; the others are not affected.
        """
        if not self._thread.ident:
            self.start()
        return run_all(requests, self.submit)

    def snapshot(self) -> EngineSnapshot:
        """The state after the last step."""
        return self._loop.snapshot

    def _answering(self) -> bool:
        return self.snapshot().running > 0

    @property
    def ended(self) -> threading.Event:
        """Set when the engine's thread has ended: by `close`, or because it failed, and everybody inside with it."""
        return self._loop.ended

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those inside; False when some are still running after `seconds`."""
        return self._door.drain(seconds)

    def close(self) -> None:
        """Stop at the next step boundary; requests still inside end with `Draining`."""
        self._door.close()
        if self._thread.ident:
            self._thread.join()
        self.adapters.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, rows and leases add up; only while no step runs."""
        self._scheduler.check_integrity()

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _steps(self) -> None:
        make_current(self.base.device)
        self._loop.run()

    # -- a request on its way in ----------------------------------------------------------------------------------

    def _sequence(self, request: Request, outbox: Outbox) -> Sequence:
        stopping, structure = request.stopping, request.structure
        stop_ids = frozenset(stopping.stop_token_ids)
        if not stopping.ignore_eos:
            stop_ids |= self.text.eos_ids
        return Sequence(
            request=request,
            outbox=outbox,
            ticket=self.adapters.acquire(
                [use.digest for use in request.adapters], [use.version for use in request.adapters]
            ),
            stop_ids=stop_ids,
            sampler=SamplerState.begin(
                request.sampling,
                request.logprobs,
                request.prompt,
                stop_ids,
                stopping.min_new_tokens,
                None if structure is None else self.structures.begin(structure, may_end=not stopping.ignore_eos),
            ),
            detokenizer=self.text.stream(),
            scanner=StopScanner(stopping.stop_strings),
            tokens=list(request.prompt),
        )
