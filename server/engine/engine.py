"""The step loop: sole owner of everything mutable about running requests.

Other threads hand requests in and cancel them; the answers leave through each request's outbox.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from server.adapters.arena import Arena, row_bytes
from server.adapters.base_weights import BaseWeights
from server.adapters.fused import fusable, fuse, pack_weights
from server.adapters.linear import ActiveAdapters, wrap_linears
from server.adapters.parts import PartsHooks
from server.adapters.residency import Residency
from server.adapters.weights import AdapterFetch, parse_adapter
from server.config import EngineLimits, ModelConfig
from server.engine.batch import LISTED_TOKENS, StepBatch, lay_out, part_spans
from server.engine.fixed_rows import FixedRows, FixedStep
from server.engine.kv_cache import PageTable
from server.engine.observer import EngineObserver, EngineSnapshot, Unobserved
from server.engine.outbox import BlockingOutbox, Outbox
from server.engine.request import Delta, FinishReason, Request
from server.engine.row_by_row import RowByRow
from server.engine.sampler import SamplerState, sample
from server.engine.scheduler import Scheduler, Share
from server.engine.sequence import Sequence
from server.engine.structure import Structures
from server.errors import (
    BaseUnavailable,
    Cancelled,
    Draining,
    EngineFailed,
    QueueFull,
    RequestTooLarge,
)
from server.kernels import native
from server.model.attention import PagedKv
from server.model.base import BaseModel, load_base
from server.model.runner import Runner
from server.model.text import StopScanner, Text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """A whole answer, as the offline door gives it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: Exception | None
    deltas: tuple[Delta, ...]


class Engine:
    """Runs requests over one base, each with its own adapters, all in one batch."""

    def __init__(
        self,
        base: BaseModel,
        limits: EngineLimits,
        fetch: AdapterFetch,
        observer: EngineObserver | None = None,
    ) -> None:
        self.base = base
        self.limits = limits
        self.text = Text(base)
        self.structures = Structures(base.tokenizer, base.vocabulary_size, self.text.eos_ids)
        self._observer: EngineObserver = observer or Unobserved()
        page = PagedKv.page_bytes(base.layers, base.kv_heads, base.head_width, limits.page_tokens, base.dtype)
        pages = limits.kv_memory_bytes // page
        if pages < 1:
            raise BaseUnavailable(f"the KV memory holds no page: {limits.kv_memory_bytes} bytes, one page takes {page}")
        shapes = {site: (m.out_features, m.in_features) for site, m in base.linears().items()}
        arena = Arena(shapes, limits.adapter_memory_bytes // row_bytes(shapes, base.dtype), base.dtype, base.device)
        kernels = native.load(base.dtype) if base.device == "cpu" else None
        fused = kernels is not None and fusable(base.model)
        if limits.deterministic and not fused:
            kernels = None  # the scheme for what is not fused is made of plain torch operations
        self._active = ActiveAdapters(base.dtype, kernels)
        modules = BaseWeights(base.model)
        self._part_hooks = PartsHooks(modules.modules, modules.head)
        wrap_linears(base.model, arena, self._active)
        if kernels is not None:
            if fused:
                fuse(base.model, arena, self._active, kernels)
            pack_weights(base.model)
        self._listed_tokens = LISTED_TOKENS if kernels is not None else 0
        modules.settle()
        self._runner = Runner(base, pages, limits.page_tokens)
        self._forward: Callable[[Seq[Share]], tuple[StepBatch | FixedStep, Tensor]] = self._run_packed
        if limits.deterministic:
            steps: RowByRow | FixedRows
            if fused:
                steps = RowByRow(base, self._runner, self._active, limits.page_tokens)
            else:
                steps = FixedRows(base, self._runner, self._active, limits.page_tokens, limits.max_adapter_rank)
            steps.check()
            self._forward = steps.run
        self._pages = PageTable(pages, limits.page_tokens)
        self._changed = threading.Condition()
        self.adapters = Residency(
            arena,
            fetch,
            partial(
                parse_adapter,
                shapes=shapes,
                base=base.identity,
                dtype=base.dtype,
                max_rank=limits.max_adapter_rank,
                modules=modules,
                parts=not limits.deterministic,
            ),
            limits.host_adapter_memory_bytes,
            wake=self._wake,
            loaded=self._observer.adapter_loaded,
            parts_bytes=limits.adapter_parts_memory_bytes,
            fetches=limits.adapter_fetches,
        )
        self._scheduler = Scheduler(
            self._pages,
            self._runner.kv,
            self.adapters,
            limits.max_sequences,
            limits.max_batch_tokens,
            watcher=self,
            # longrope turns a sequence's keys anew when it grows past a length: pages are not the prefix's alone.
            prefix_cache=limits.prefix_cache and self._runner.long_rope is None,
        )
        self._prefix_hit_tokens = 0
        # Shared with other threads, under _changed:
        self._arrivals: list[Sequence] = []
        self._cancelled: set[str] = set()
        self._unfinished: dict[str, Sequence] = {}
        self._waiting: Counter[str] = Counter()  # by tenant
        self._draining = False
        self._closed = False
        self._awake = False
        self._snapshot = EngineSnapshot(kv_pages_total=pages)
        self._thread = threading.Thread(target=self._loop, name="loraplex-engine", daemon=True)

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

        Raises `QueueFull`, `RequestTooLarge` (it could never run here), `Draining`, or `StructureInvalid`. A
        structure is compiled here unless `structures.compile` has done so before.
        """
        if request.structure is not None:
            self.structures.compile(request.structure)
        needed = self._pages.pages_for(len(request.prompt) + request.stopping.max_new_tokens)
        if needed > self._pages.pages:
            raise RequestTooLarge(
                f"prompt and answer need {needed} KV pages of {self._pages.page_tokens} tokens, "
                f"the server has {self._pages.pages}"
            )
        with self._changed:
            if self._draining or self._closed:
                raise Draining("the server is shutting down")
            if self._waiting.total() >= self.limits.max_waiting:
                raise QueueFull(f"{self._waiting.total()} requests wait already")
            if self._waiting[request.tenant] >= self.limits.max_waiting_per_tenant:
                raise QueueFull(f"{self._waiting[request.tenant]} requests of yours wait already")
            if request.id in self._unfinished:
                raise AssertionError(f"request id {request.id} is in use")
            sequence = self._sequence(request, outbox)
            self._unfinished[request.id] = sequence
            self._waiting[request.tenant] += 1
            self._arrivals.append(sequence)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request early; its outbox gets a last delta with `Cancelled`. Unknown or ended ids are ignored."""
        with self._changed:
            if request_id in self._unfinished:
                self._cancelled.add(request_id)
                self._changed.notify_all()

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """The offline door: run requests, all sharing the batch, and return their answers in order.

        Starts the step loop when needed. A request that fails has `error` set; the others are not affected.
        """
        if not self._thread.ident:
            self.start()
        answers: list[Completion] = []
        queued: list[tuple[Request, BlockingOutbox]] = []

        def collect() -> None:
            answers.append(_completion(queued.pop(0)[1]))

        for request in requests:
            while True:
                outbox = BlockingOutbox()
                try:
                    self.submit(request, outbox)
                    break
                except QueueFull:
                    collect()
            queued.append((request, outbox))
        while queued:
            collect()
        return answers

    def snapshot(self) -> EngineSnapshot:
        """The state after the last step."""
        return self._snapshot

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those inside; False when some are still running after `seconds`."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._unfinished, seconds)

    def close(self) -> None:
        """Stop at the next step boundary; requests still inside end with `Draining`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident:
            self._thread.join()
        self.adapters.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, rows and leases add up; only while no step runs."""
        self._scheduler.check_integrity()

    # -- the scheduler's watcher ----------------------------------------------------------------------------------

    def admitted(self, request: Request, queue_seconds: float) -> None:
        """See `EngineObserver`."""
        self._observer.admitted(request, queue_seconds)

    def prefix_hit(self, request: Request, tokens: int) -> None:
        """See `EngineObserver`."""
        self._prefix_hit_tokens += tokens
        self._observer.prefix_hit(request, tokens)

    def preempted(self, request: Request) -> None:
        """See `EngineObserver`."""
        self._observer.preempted(request)

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._wait():
            self._advance()
        for sequence in list(self._unfinished.values()):
            self._end(sequence, Draining("the server is shutting down"))

    def _advance(self) -> None:
        """Take in what came, run one step if there is something to run, note the state; never waits."""
        self._take_in()
        shares = self._scheduler.schedule()
        if shares:
            try:
                self._step(shares)
            except Exception:
                log.exception("an engine step failed")
                for share in shares:
                    self._end(share.sequence, EngineFailed("the step failed; the request may be sent again"))
        self._note()

    def _step(self, shares: Seq[Share]) -> None:
        started = time.monotonic()
        batch, logits = self._forward(shares)
        self._postprocess(batch, logits)
        self._observer.step(
            seconds=time.monotonic() - started,
            sequences=len(shares),
            adapters=len({use.digest for share in shares for use in share.sequence.request.adapters}),
            tokens=sum(share.tokens for share in shares),
        )

    def _run_packed(self, shares: Seq[Share]) -> tuple[StepBatch, Tensor]:
        batch = lay_out(shares, self.limits.page_tokens, self.base.device, self._listed_tokens)
        return batch, self._run(batch)

    def _run(self, batch: StepBatch) -> Tensor:
        tokens, sampled = part_spans(batch)
        self._active.use(batch.segments, batch.decodes, plain=not (tokens or sampled))
        self._part_hooks.activate(tokens, sampled, (batch.packed.token_ids.shape[0], len(batch.sampling)))
        rope = self._runner.long_rope
        if rope is not None:
            rope.select(((s.tokens, len(s.sequence.tokens)) for s in batch.shares), self.base.device)
        try:
            return self._runner.run(batch.packed)
        finally:
            self._part_hooks.clear()  # an unloaded adapter's tensors shall not live on here

    def _postprocess(self, batch: StepBatch | FixedStep, logits: Tensor) -> None:
        for share in batch.shares:
            share.sequence.computed += share.tokens
        choices = sample(logits, [share.sequence.sampler for share in batch.sampling])
        for share, choice in zip(batch.sampling, choices, strict=True):
            sequence, request = share.sequence, share.sequence.request
            if choice.token_id is None:
                sequence.tainted = True  # its pages are scrubbed before anybody else gets them
                self._end(sequence, choice.error or EngineFailed("no token was chosen"))
                continue
            before = sequence.last_token
            delta = sequence.advance(choice)
            rope = self._runner.long_rope
            if rope is not None and len(sequence.tokens) == rope.switch + 1:
                sequence.computed = 0  # all of its tokens rotate differently from here on
            if before is None:
                self._observer.first_token(request, (sequence.first_token or 0.0) - request.arrival)
            else:
                self._observer.tokens(request, 1, (sequence.last_token or 0.0) - before)
            if before is None or delta.finish is not None:
                self._scheduler.keep(sequence)
            if delta.finish is not None:
                self._leave(sequence)
                self._observer.finished(request, delta.finish, None)
            sequence.outbox.put(delta)

    def _wait(self) -> bool:
        """Wait for something to do; False when it is time to stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._awake or self._arrivals or self._cancelled or self._scheduler.has_work()
            )
            return not self._closed

    def _take_in(self) -> None:
        """Take arrivals and cancellations in, and end what failed to load."""
        with self._changed:
            self._awake = False
            arrivals, self._arrivals = self._arrivals, []
            cancelled = [self._unfinished[i] for i in self._cancelled if i in self._unfinished]
            self._cancelled.clear()
        for sequence in arrivals:
            self._scheduler.waiting.add(sequence)
        for sequence in cancelled:
            self._end(sequence, Cancelled("the caller went away"))
        for sequence in self._scheduler.failed():
            self._end(sequence, sequence.ticket.error or sequence.refused or EngineFailed("no reason was recorded"))

    def _end(self, sequence: Sequence, error: Exception) -> None:
        self._leave(sequence)
        self._observer.finished(sequence.request, None, error)
        sequence.outbox.put(Delta(error=error))

    def _leave(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        with self._changed:
            self._unfinished.pop(sequence.request.id, None)
            self._changed.notify_all()

    def _note(self) -> None:
        scheduler = self._scheduler
        self._snapshot = EngineSnapshot(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_pages_used=self._pages.used,
            kv_pages_total=self._pages.pages,
            kv_pages_cached=self._pages.cached,
            prefix_hit_tokens=self._prefix_hit_tokens,
            running_adapters=frozenset(u.version for s in scheduler.running for u in s.request.adapters),
            waiting_adapters=frozenset(u.version for s in scheduler.waiting for u in s.request.adapters),
        )
        with self._changed:
            self._waiting = Counter(scheduler.waiting.waiting_of())
            self._waiting.update(sequence.request.tenant for sequence in self._arrivals)

    def _wake(self) -> None:
        with self._changed:
            self._awake = True
            self._changed.notify_all()

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


def _completion(outbox: BlockingOutbox) -> Completion:
    deltas = tuple(outbox)
    last = deltas[-1]
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=last.finish.reason if last.finish else None,
        error=last.error,
        deltas=deltas,
    )
