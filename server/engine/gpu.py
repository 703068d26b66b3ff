"""An engine's steps on a GPU: what is different there, chosen once when the engine is made."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from server.adapters.arena import Arena
from server.adapters.gpu_active import GpuAdapters, standing_bytes
from server.adapters.gpu_arena import STAGED_BYTES, GpuArena
from server.adapters.gpu_decoder import GpuDecoder, decodable
from server.adapters.linear import SiteGroup
from server.adapters.pinned import pin
from server.adapters.weights import AdapterFiles, LoraWeights
from server.config import EngineLimits
from server.engine.batch import StepBatch
from server.engine.captured import CapturedSteps, contexts
from server.engine.device_sampler import DeviceSampler
from server.engine.gpu_batch import lay_out
from server.engine.gpu_trials import trials
from server.engine.rows import StepOfRows
from server.engine.scheduler import Share
from server.engine.sequence import Sequence
from server.kernels.gpu import nf4_cuda
from server.kernels.gpu.attention import scratch_bytes
from server.kernels.gpu.door import GpuKernels
from server.kernels.gpu.graphs import KEPT_BYTES
from server.kernels.gpu.nf4 import PARTS
from server.kernels.gpu.pages import PageCheck
from server.model.base import BaseModel
from server.model.gpu_linear import convert
from server.model.runner import PackedBatch, Runner

log = logging.getLogger(__name__)


class GpuSteps:
    """Runs an engine's steps by the GPU's kernels: captured ones where every row has one token, others as they come.

    Made before the model's linears are wrapped, whose NF4 weights it takes over; `bind` and `start` follow.
    """

    def __init__(self, base: BaseModel, limits: EngineLimits, gpu: GpuKernels) -> None:
        self._base = base
        self._limits = limits
        self._gpu = gpu
        self.active = GpuAdapters(gpu, limits.max_sequences, limits.max_batch_tokens)
        config: Any = base.model.config.get_text_config()
        self._heads = int(config.num_attention_heads)
        convert(base.model, gpu.workspace, base.dtype)
        self._decodable = decodable(base.model)
        self._decoder: GpuDecoder | None = None
        self._captured: CapturedSteps | None = None
        self.capturing = True  # False: every step is launched piece by piece
        self.early = True  # False: no step is launched before the one in front of it is answered
        self.meanwhile: Callable[[Tensor], None] = lambda tokens: None  # called in every step while the device computes
        self.sampler = DeviceSampler(base.device, lambda tokens: self.meanwhile(tokens))

    @property
    def standing_bytes(self) -> int:
        """Device memory that `bind` will take beside the pages."""
        limits, base = self._limits, self._base
        held = standing_bytes(limits.max_sequences, limits.max_batch_tokens)
        held += 4 * PARTS + min(STAGED_BYTES, limits.adapter_memory_bytes)
        if self._decodable and self._gpu.graphs is not None:
            held += limits.max_sequences * base.vocabulary_size * 4 + KEPT_BYTES  # logits, and what libraries keep
            held += sum(
                scratch_bytes(limits.max_sequences, longest, self._heads, base.head_width)
                for longest in contexts(base.context_tokens)
            )
        return held

    def arena(self, shapes: Mapping[str, tuple[int, int]], rows: int, dtype: torch.dtype, device: str) -> GpuArena:
        """The arena that takes what `parsing` makes."""
        return GpuArena(shapes, rows, dtype, device, self._gpu.aside)

    def parsing(self, parse: Callable[[AdapterFiles], LoraWeights]) -> Callable[[AdapterFiles], LoraWeights]:
        """As `parse`, with the weights where a GPU copies them from."""
        page_locked = self._base.device.startswith("cuda")
        return lambda files: pin(parse(files), page_locked=page_locked)

    def bind(self, arena: Arena, runner: Runner) -> None:
        """The linears are wrapped, the pages are there."""
        self._arena = arena
        self._runner = runner
        if self._decodable:
            self._decoder = GpuDecoder(self._base.model, arena, self.active, self._gpu)
            groups = self._decoder.groups
        else:
            groups = [SiteGroup(arena, [site]) for site in arena.a]
        if arena.rows:
            self.active.reserve(groups)
        runner.kv.check = PageCheck([*runner.kv.k, *runner.kv.v], runner.kv.page_tokens)
        if self._decoder is not None and self._gpu.graphs is not None:
            base = self._base
            self._captured = CapturedSteps(
                self._gpu.graphs,
                self._decoder,
                self.active,
                runner.kv,
                self._limits.max_sequences,
                min(base.context_tokens, runner.kv.pages * runner.kv.page_tokens),
                self._heads,
                base.head_width,
                base.vocabulary_size,
                base.device,
            )

    def warm_up(self) -> None:
        """Capture the commonest steps, and compile what prompts take, before requests come."""
        if self._decoder is not None:
            nf4_cuda.prepare(((weight.codes, weight.scales) for weight in self._decoder.packed), self._base.dtype)
        if self._captured is not None:
            with torch.inference_mode():
                self._captured.capture_all(bool(self._arena.rows))
        self.first_prompts()

    @torch.inference_mode()
    def first_prompts(self) -> None:
        """Steps with prompts, and the look at a page after them; nobody reads what comes of these."""
        started = time.monotonic()
        kv, context = self._runner.kv, self._base.context_tokens
        steps = 0
        for shares in trials(self._limits, kv.pages, kv.page_tokens, context, self._arena.rows):
            batch = self._lay_out(shares)
            self.active.use(batch.segments, batch.decodes)
            self.forward(batch.packed)
            steps += 1
        kv.finite([0])
        if self._base.device.startswith("cuda"):
            torch.cuda.synchronize(self._base.device)
        log.info("%d steps with prompts tried in %.1f s", steps, time.monotonic() - started)

    @torch.inference_mode()
    def run(self, shares: Seq[Share], launch: Callable[[StepBatch], Tensor]) -> tuple[StepOfRows | StepBatch, Tensor]:
        """The step and its logits [S, vocabulary]; `launch` sets a batch's adapters up and calls `forward`."""
        if self._captured is not None:
            if self.capturing and not any(share.sequence.parts for share in shares):
                done = self._captured.run(shares)
                if done is not None:
                    return done
            else:
                self._captured.forget()
        batch = self._lay_out(shares)
        return batch, launch(batch)

    @torch.inference_mode()
    def ahead(self, sequences: Seq[Sequence], tokens: Tensor) -> bool:
        """Launch the next step of these, which took part in the one that ran last; see `CapturedSteps.ahead`.

        What is freed before that step ends is free all the same: pages are written again by launches behind it, and
        the rows of an adapter that nobody holds are read for answers that nobody reads.
        """
        return self.early and self._captured is not None and self._captured.ahead(sequences, tokens)

    def _lay_out(self, shares: Seq[Share]) -> StepBatch:
        base = self._base
        return lay_out(shares, self._runner.kv.page_tokens, base.device, self._heads, base.head_width)

    def forward(self, batch: PackedBatch) -> Tensor:
        """One pass: by our own layers where no adapter has parts within them, else by transformers'."""
        if self._decoder is not None and self.active.plain:
            return self._decoder.run(batch, self._runner.kv)
        return self._runner.run(batch)
