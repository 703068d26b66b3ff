"""The engine put together: a base, adapters, KV pages and the loop that steps; and its doors for other threads.

Requests come in by the front door (front_door.py) or a list at a time (offline.py); the step loop (step_loop.py) runs
them in a thread of its own; the answers leave through each request's outbox.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from functools import partial
from itertools import groupby

from torch import Tensor

from server.adapters.arena import Arena, row_bytes
from server.adapters.base_weights import BaseWeights
from server.adapters.first_layers import FirstLayers
from server.adapters.fused import fusable, fuse, pack_weights
from server.adapters.layouts import Layouts
from server.adapters.linear import ActiveAdapters, Between, wrap_linears
from server.adapters.load_pace import LoadPace, every_core_computes
from server.adapters.parts import PartsHooks
from server.adapters.residency import Residency
from server.adapters.weights import AdapterFetch, parse_adapter
from server.config import EngineLimits, ModelConfig
from server.engine.batch import LISTED_TOKENS, StepBatch, lay_out, part_spans
from server.engine.fixed_rows import FixedRows
from server.engine.front_door import FrontDoor
from server.engine.kv_cache import PageTable
from server.engine.memory_plan import fit
from server.engine.observer import EngineObserver, EngineSnapshot, SchedulerReports, Unobserved
from server.engine.offline import Completion, run_all
from server.engine.open_gpu import make_current, open_gpu
from server.engine.outbox import Outbox
from server.engine.pace import Pace
from server.engine.reading import PackedReader, Reader, RowReader
from server.engine.request import Request
from server.engine.row_by_row import RowByRow
from server.engine.sampler import Choose, SamplerState, sample
from server.engine.scheduler import Scheduler, Share
from server.engine.sequence import Sequence
from server.engine.step_loop import Forward, StepLoop
from server.engine.structure import Structures
from server.errors import BaseUnavailable, RequestTooLarge, RouterUnavailable
from server.kernels import native
from server.model.attention import PagedKv
from server.model.base import BaseModel, load_base
from server.model.runner import Runner, RunsPacked
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
        page = PagedKv.page_bytes(base.layers, base.kv_heads, base.head_width, limits.page_tokens, base.dtype)
        gpu = self._gpu = open_gpu(base, limits)
        pages = limits.kv_memory_bytes // page
        if pages < 1:
            raise BaseUnavailable(f"the KV memory holds no page: {limits.kv_memory_bytes} bytes, one page takes {page}")
        shapes = {site: (m.out_features, m.in_features) for site, m in base.linears().items()}
        rows = limits.adapter_memory_bytes // row_bytes(shapes, base.dtype)
        self.memory = fit(base, limits, 0 if gpu is None else gpu.standing_bytes)
        make_arena = Arena if gpu is None else gpu.arena
        arena = make_arena(shapes, rows, base.dtype, base.device)
        kernels = native.load(base.dtype) if base.device == "cpu" and gpu is None else None
        fused = kernels is not None and fusable(base.model)
        if limits.deterministic and not fused:
            kernels = None  # the scheme for what is not fused is made of plain torch operations
        self._active = ActiveAdapters(base.dtype, kernels) if gpu is None else gpu.active
        modules = BaseWeights(base.model)
        wrap_linears(base.model, arena, self._active)
        native_parts = None
        if kernels is not None:
            if fused:
                native_parts = fuse(base.model, arena, self._active, kernels)
            pack_weights(base.model)
        self._part_hooks = PartsHooks(modules.modules, modules.head, native_parts, singly=limits.deterministic)
        self._listed_tokens = LISTED_TOKENS if kernels is not None else 0
        if gpu is None:
            modules.settle()
        self._runner = Runner(base, pages, limits.page_tokens)
        self._make_reader: Callable[[FirstLayers], Reader] = partial(
            PackedReader,
            active=self._active,
            rope=self._runner.long_rope,
            page_tokens=limits.page_tokens,
            listed_tokens=self._listed_tokens,
        )
        self._readers: dict[int, Reader] = {}  # by layer
        forward: Forward = self._run_packed
        choose: Choose = sample
        if gpu is not None:
            gpu.bind(arena, self._runner)
            gpu.warm_up()
            forward = partial(gpu.run, launch=self._run)
            choose = gpu.sampler
        if limits.deterministic:
            rest = (self._active, self._part_hooks, limits.page_tokens)

            def steps_by(runner: RunsPacked) -> RowByRow | FixedRows:
                if fused:
                    return RowByRow(base, runner, *rest)
                return FixedRows(base, runner, *rest, limits.max_adapter_rank)

            steps = steps_by(self._runner)
            steps.check()
            forward = steps.run
            self._make_reader = lambda layers: RowReader(steps_by(layers).forward)
        self._pages = PageTable(pages, limits.page_tokens)
        self._door = FrontDoor(limits.max_waiting, limits.max_waiting_per_tenant)
        parse = partial(
            parse_adapter,
            shapes=shapes,
            base=base.identity,
            dtype=base.dtype,
            max_rank=limits.max_adapter_rank,
            modules=modules,
            layouts=Layouts(),
        )
        self.adapters = Residency(
            arena,
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
            self._runner.kv,
            self.adapters,
            limits.max_sequences,
            limits.max_batch_tokens,
            watcher=reports,
            # longrope turns a sequence's keys anew when it grows past a length: pages are not the prefix's alone.
            prefix_cache=limits.prefix_cache and self._runner.long_rope is None,
            pace=pace,
        )
        rope = self._runner.long_rope
        self._loop = StepLoop(
            self._door,
            self._scheduler,
            self._pages,
            forward,
            told,
            reports,
            long_from=None if rope is None else rope.switch + 1,
            pace=pace,
            choose=choose,
            # Another step would change longrope's rotation under the one at rest.
            resting=self._run_packed if fused and rope is None and not limits.deterministic else None,
            read=self._read,
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
        if self._gpu is not None:
            raise RouterUnavailable("routers are not served on a GPU yet: leave --router or --device out")
        if layer not in self._readers:
            self._readers[layer] = self._make_reader(FirstLayers(self.base, self._runner.kv, layer))

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

    def _run_packed(self, shares: Seq[Share], between: Between | None = None) -> tuple[StepBatch, Tensor]:
        batch = lay_out(shares, self.limits.page_tokens, self.base.device, self._listed_tokens)
        return batch, self._run(batch, between)

    def _run(self, batch: StepBatch, between: Between | None = None) -> Tensor:
        tokens, sampled = part_spans(batch)
        plain = not self._part_hooks.inside(span.parts for span in tokens)
        affine = self._part_hooks.native_plan(tokens) if plain else None
        self._active.use(batch.segments, batch.decodes, plain, affine)
        if between is not None:
            self._active.between = partial(self._aside, between)
        rope = self._runner.long_rope
        if rope is not None:
            rope.select(((s.tokens, len(s.sequence.tokens)) for s in batch.shares), self.base.device)
        rows = (batch.packed.token_ids.shape[0], len(batch.sampling))
        try:
            with self._part_hooks.applied(tokens, sampled, rows):
                return self._runner.run(batch.packed) if self._gpu is None else self._gpu.forward(batch.packed)
        finally:
            self._active.affine = self._active.between = None

    def _read(self, shares: Seq[Share]) -> Iterator[tuple[Share, Tensor]]:
        def layer_of(share: Share) -> int:
            return share.sequence.request.read_layer or 0

        for layer, group in groupby(sorted(shares, key=layer_of), layer_of):
            yield from self._readers[layer].run(list(group))

    def _aside(self, run: Between) -> None:
        """Run something while the batch of the moment rests between two layers."""
        with self._active.aside(), self._part_hooks.aside():
            run()

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
