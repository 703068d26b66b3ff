"""An engine's steps on a GPU: what is different there, chosen once when the engine is made."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, cast

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
from server.engine.rows import StepOfRows
from server.engine.scheduler import Share
from server.engine.sequence import Sequence
from server.kernels.gpu.attention import scratch_bytes
from server.kernels.gpu.door import GpuKernels
from server.kernels.gpu.nf4 import PARTS
from server.kernels.gpu.pages import PageCheck
from server.model.base import BaseModel
from server.model.gpu_linear import convert
from server.model.runner import PackedBatch, Runner

log = logging.getLogger(__name__)

_FIRST_PROMPTS = (24, 200)  # tokens: of few rows products read NF4 as it is, for more it is made dense


@dataclass
class _Nobody:
    """What a step needs of a sequence."""

    tokens: list[int]
    computed: int
    pages: list[int]
    adapter_rows: tuple[tuple[int, int, float], ...]

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


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
        self.meanwhile: Callable[[], None] = lambda: None  # called in every step while the device computes
        self.sampler = DeviceSampler(base.device, lambda: self.meanwhile())

    @property
    def standing_bytes(self) -> int:
        """Device memory that `bind` will take beside the pages."""
        limits, base = self._limits, self._base
        held = standing_bytes(limits.max_sequences, limits.max_batch_tokens)
        held += 4 * PARTS + min(STAGED_BYTES, limits.adapter_memory_bytes)
        if self._decodable and self._gpu.graphs is not None:
            held += limits.max_sequences * base.vocabulary_size * 4  # logits
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
        if self._captured is not None:
            with self._here(), torch.inference_mode():
                self._captured.capture_all(bool(self._arena.rows))
        self.first_prompts()

    @torch.inference_mode()
    def first_prompts(self) -> None:
        """Steps with prompts, a short and a longer one, alone and beside an answer, with adapters and without: nobody
        reads what comes of them. They write to pages that nobody has yet, and take rows that hold zeros."""
        started = time.monotonic()
        kv, limits = self._runner.kv, self._limits
        most = min(limits.max_batch_tokens - 1, (kv.pages - 1) * kv.page_tokens, self._base.context_tokens)
        uses: list[tuple[tuple[int, int, float], ...]] = [()]
        if self._arena.rows:
            uses.append(((0, min(8, self._arena.rows), 1.0),))
        steps = 0
        for length in {min(length, most) for length in _FIRST_PROMPTS if most > 1}:
            for rows in uses:
                pages = list(range(1, 1 + -(-length // kv.page_tokens)))
                prompt = Share(cast(Sequence, _Nobody([0] * length, 0, pages, rows)), length)
                answer = Share(cast(Sequence, _Nobody([0, 0], 1, [0], rows)), 1)
                for shares in ([prompt], [prompt, answer]):
                    batch = lay_out(shares, kv.page_tokens, self._base.device, self._heads, self._base.head_width)
                    with self._here():
                        self.active.use(batch.segments, batch.decodes)
                        self.forward(batch.packed)
                    steps += 1
        if self._base.device.startswith("cuda"):
            torch.cuda.synchronize(self._base.device)
        log.info("%d steps with prompts tried in %.1f s", steps, time.monotonic() - started)

    @torch.inference_mode()
    def run(self, shares: Seq[Share], launch: Callable[[StepBatch], Tensor]) -> tuple[StepOfRows | StepBatch, Tensor]:
        """The step and its logits [S, vocabulary]; `launch` sets a batch's adapters up and calls `forward`."""
        with self._here():
            plain = self.capturing and not any(share.sequence.parts for share in shares)
            if plain and self._captured is not None:
                done = self._captured.run(shares)
                if done is not None:
                    return done
            kv = self._runner.kv
            batch = lay_out(shares, kv.page_tokens, self._base.device, self._heads, self._base.head_width)
            return batch, launch(batch)

    def forward(self, batch: PackedBatch) -> Tensor:
        """One pass: by our own layers where no adapter has parts within them, else by transformers'."""
        if self._decoder is not None and self.active.plain:
            return self._decoder.run(batch, self._runner.kv)
        return self._runner.run(batch)

    def _here(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the thread's current device."""
        return (
            torch.cuda.device(self._base.device) if self._base.device.startswith("cuda") else contextlib.nullcontext()
        )
