"""How an engine's steps are computed: a base with adapters' rows beside its weights, in the way that device, layers and
limits allow. What that is is chosen once, when the engine is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from functools import partial
from itertools import groupby

from torch import Tensor

from server.adapters.arena import Arena, row_bytes
from server.adapters.base_weights import BaseWeights
from server.adapters.first_layers import FirstLayers
from server.adapters.fused import fusable, fuse, pack_weights
from server.adapters.linear import ActiveAdapters, Between, wrap_linears
from server.adapters.parts import PartsHooks
from server.config import EngineLimits
from server.engine.batch import LISTED_TOKENS, StepBatch, lay_out, part_spans
from server.engine.fixed_rows import FixedRows
from server.engine.memory_plan import fit
from server.engine.open_gpu import open_gpu
from server.engine.reading import PackedReader, Reader, RowReader
from server.engine.row_by_row import RowByRow
from server.engine.sampler import Choose, sample
from server.engine.scheduler import Share
from server.engine.step_loop import Forward, RestingForward
from server.errors import BaseUnavailable, RouterUnavailable
from server.kernels import native
from server.model.attention import PagedKv
from server.model.base import BaseModel
from server.model.runner import Runner, RunsPacked


class Computing:
    """One base, wrapped: its linears add the deltas of `arena`'s rows from here on.

    `forward`, `choose`, `resting` and `read` are what `StepLoop` asks for. Raises `BaseUnavailable` where pages, arena
    and workspace do not fit, and `DeterminismUnavailable`.
    """

    def __init__(self, base: BaseModel, limits: EngineLimits) -> None:
        self.base = base
        self._limits = limits
        self.gpu = gpu = open_gpu(base, limits)
        page = PagedKv.page_bytes(base.layers, base.kv_heads, base.head_width, limits.page_tokens, base.dtype)
        pages = limits.kv_memory_bytes // page
        if pages < 1:
            raise BaseUnavailable(f"the KV memory holds no page: {limits.kv_memory_bytes} bytes, one page takes {page}")
        self.shapes = {site: (m.out_features, m.in_features) for site, m in base.linears().items()}
        rows = limits.adapter_memory_bytes // row_bytes(self.shapes, base.dtype)
        self.memory = fit(base, limits, 0 if gpu is None else gpu.standing_bytes)
        self.arena = (Arena if gpu is None else gpu.arena)(self.shapes, rows, base.dtype, base.device)
        self.weights = BaseWeights(base.model)
        self._wrap()
        self.runner = Runner(base, pages, limits.page_tokens)
        self._readers: dict[int, Reader] = {}  # by layer
        self.forward: Forward = self._run_packed
        self.choose: Choose = sample
        if gpu is not None:
            gpu.bind(self.arena, self.runner)
            gpu.warm_up()
            self.forward = partial(gpu.run, launch=self._run)
            self.choose = gpu.sampler
        self._steps_by: Callable[[RunsPacked], RowByRow | FixedRows] | None = None
        if limits.deterministic:
            self._steps_by = self._row_by_row if self._fused else self._fixed_rows
            steps = self._steps_by(self.runner)
            steps.check()
            self.forward = steps.run
        # Another step would change longrope's rotation under the one at rest.
        may_rest = self._fused and self.runner.long_rope is None and not limits.deterministic
        self.resting: RestingForward | None = self._run_packed if may_rest else None

    def _wrap(self) -> None:
        """Have the base's layers add adapters' deltas, natively where they can."""
        base, limits, gpu = self.base, self._limits, self.gpu
        kernels = native.load(base.dtype) if base.device == "cpu" and gpu is None else None
        self._fused = kernels is not None and fusable(base.model)
        if limits.deterministic and not self._fused:
            kernels = None  # the scheme for what is not fused is made of plain torch operations
        self.active = ActiveAdapters(base.dtype, kernels) if gpu is None else gpu.active
        wrap_linears(base.model, self.arena, self.active)
        native_parts = None
        if kernels is not None:
            if self._fused:
                native_parts = fuse(base.model, self.arena, self.active, kernels)
            pack_weights(base.model)
        weights = self.weights
        self.part_hooks = PartsHooks(weights.modules, weights.head, native_parts, singly=limits.deterministic)
        self._listed_tokens = LISTED_TOKENS if kernels is not None else 0
        if gpu is None:
            weights.settle()

    # -- steps ----------------------------------------------------------------------------------------------------

    def _run_packed(self, shares: Seq[Share], between: Between | None = None) -> tuple[StepBatch, Tensor]:
        batch = lay_out(shares, self._limits.page_tokens, self.base.device, self._listed_tokens)
        return batch, self._run(batch, between)

    def _run(self, batch: StepBatch, between: Between | None = None) -> Tensor:
        tokens, sampled = part_spans(batch)
        plain = not self.part_hooks.inside(span.parts for span in tokens)
        affine = self.part_hooks.native_plan(tokens) if plain else None
        self.active.use(batch.segments, batch.decodes, plain, affine)
        if between is not None:
            self.active.between = partial(self._aside, between)
        rope = self.runner.long_rope
        if rope is not None:
            rope.select(((s.tokens, len(s.sequence.tokens)) for s in batch.shares), self.base.device)
        rows = (batch.packed.token_ids.shape[0], len(batch.sampling))
        try:
            with self.part_hooks.applied(tokens, sampled, rows):
                return self.runner.run(batch.packed) if self.gpu is None else self.gpu.forward(batch.packed)
        finally:
            self.active.affine = self.active.between = None

    def _aside(self, run: Between) -> None:
        """Run something while the batch of the moment rests between two layers."""
        with self.active.aside(), self.part_hooks.aside():
            run()

    def _row_by_row(self, runner: RunsPacked) -> RowByRow:
        return RowByRow(self.base, runner, self.active, self.part_hooks, self._limits.page_tokens)

    def _fixed_rows(self, runner: RunsPacked) -> FixedRows:
        limits = self._limits
        return FixedRows(self.base, runner, self.active, self.part_hooks, limits.page_tokens, limits.max_adapter_rank)

    # -- prompts that are only read -------------------------------------------------------------------------------

    def reads(self, layer: int) -> None:
        """Make ready for prompts that are read at `layer`; raises `RouterUnavailable`, see `Engine.reads`."""
        if self.gpu is not None:
            raise RouterUnavailable("routers are not served on a GPU yet: leave --router or --device out")
        if layer in self._readers:
            return
        layers = FirstLayers(self.base, self.runner.kv, layer)
        if self._steps_by is not None:
            self._readers[layer] = RowReader(self._steps_by(layers).forward)
        else:
            rope = self.runner.long_rope
            self._readers[layer] = PackedReader(
                layers, self.active, rope, self._limits.page_tokens, self._listed_tokens
            )

    def read(self, shares: Seq[Share]) -> Iterator[tuple[Share, Tensor]]:
        """Compute prompts that are only read; see `StepLoop`."""

        def layer_of(share: Share) -> int:
            return share.sequence.request.read_layer or 0

        for layer, group in groupby(sorted(shares, key=layer_of), layer_of):
            yield from self._readers[layer].run(list(group))
