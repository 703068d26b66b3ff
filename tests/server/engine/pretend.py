"""A whole engine without a model: real loop, scheduler, pages, arena and loading, over a runner that checks instead
of computing.

Its KV memory remembers for every slot which adapters, which token and which position were written there; every row of
a step then looks whether all its slots hold what they must, and whether the arena rows of its adapters hold theirs,
so a stale, lost or foreign page fails at the step that reads it. The logits are a function of the adapters and all
tokens before, so what an answer must be is known without the engine: `expected`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from hub.base import BaseIdentity
from server.adapters.weights import AdapterFiles
from server.config import EngineLimits
from server.engine.batch import StepBatch, slot
from server.engine.engine import Engine
from server.engine.foresight import Foresight
from server.engine.observer import Unobserved
from server.engine.outbox import Outbox
from server.engine.request import AdapterUse, Delta, Request, Sampling, Stopping
from server.engine.sampler import Choice, SamplerState, sample
from server.engine.sequence import Sequence
from server.model.base import BaseModel

VOCABULARY = 40
PAGE_TOKENS = 4
RANK = 8
PAGE_BYTES = 2 * 4 * PAGE_TOKENS  # one layer, one head, width 1, float32
ROW_BYTES = (2 + 2) * 4

_ids = iter(range(10**9))


def request(
    *adapters: str | tuple[str, float],
    prompt: Seq[int] = (1, 2, 3),
    new: int = 8,
    tenant: str = "",
    sampling: Sampling | None = None,
    logprobs: int | None = None,
) -> Request:
    uses = [(one, 1.0) if isinstance(one, str) else one for one in adapters]
    return Request(
        id=str(next(_ids)),
        prompt=tuple(prompt),
        stopping=Stopping(max_new_tokens=new, ignore_eos=True),
        sampling=sampling or Sampling(),
        adapters=tuple(AdapterUse(name, f"t/{name}@1", weight) for name, weight in uses),
        logprobs=logprobs,
        tenant=tenant,
    )


def who(asked: Request) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((use.digest, use.weight) for use in asked.adapters if use.weight))


def logits_of(asked: Request, tokens: Seq[int]) -> Tensor:
    text = repr((who(asked), list(tokens))).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def expected(asked: Request) -> list[int]:
    """The answer that `asked` must get, whatever happens around it."""
    state = SamplerState.begin(asked.sampling, asked.logprobs, asked.prompt, frozenset(), 0)
    tokens = list(asked.prompt)
    for _ in range(asked.stopping.max_new_tokens):
        [choice] = sample(logits_of(asked, tokens)[None], [state])
        assert choice.token_id is not None
        tokens.append(choice.token_id)
    return tokens[len(asked.prompt) :]


class PretendHub:
    """Adapters by made-up digests; a fetch of one in `slow` hangs until `answer`, of one in `broken` fails."""

    def __init__(self) -> None:
        self.ranks: dict[str, int] = {}
        self.slow: dict[str, threading.Event] = {}
        self.broken: dict[str, Exception] = {}
        self.fetched: list[str] = []
        self._made: dict[str, AdapterFiles] = {}

    def fetch(self, digest: str) -> AdapterFiles:
        self.fetched.append(digest)
        if digest in self.slow:
            assert self.slow[digest].wait(30)
        if digest in self.broken:
            raise self.broken[digest]
        if digest not in self._made:
            rank = self.ranks.get(digest, RANK)
            tensors = {
                "base_model.model.site.lora_A.weight": torch.full((rank, 2), mark(digest)),
                "base_model.model.site.lora_B.weight": torch.ones(2, rank),
            }
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["site"]}
            self._made[digest] = AdapterFiles(digest, json.dumps(config).encode(), save(tensors), None, None)
        return self._made[digest]


def mark(digest: str) -> float:
    """What the adapter's rows hold."""
    return float(int.from_bytes(hashlib.blake2b(digest.encode(), digest_size=2).digest(), "little") + 1)


class Counts(Unobserved):
    def __init__(self) -> None:
        self.preemptions = 0
        self.hit_tokens = 0
        self.computed = 0
        self.steps = 0
        self.interludes = 0
        self.step_of_first_token: dict[str, int] = {}

    def step(self, *, seconds: float, sequences: int, adapters: int, tokens: int) -> None:
        self.steps += 1
        self.computed += tokens

    def interlude(self, seconds: float) -> None:
        assert seconds > 0
        self.interludes += 1

    def preempted(self, asked: Request) -> None:
        self.preemptions += 1

    def prefix_hit(self, asked: Request, tokens: int) -> None:
        self.hit_tokens += tokens

    def first_token(self, asked: Request, seconds: float) -> None:
        self.step_of_first_token[asked.id] = self.steps + 1  # this step is counted at its end


class Reader(Outbox):
    """All of one answer."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.deltas: list[Delta] = []

    def put(self, delta: Delta) -> None:
        assert not self.ended, "something followed the last delta"
        self.deltas.append(delta)

    @property
    def ended(self) -> bool:
        return bool(self.deltas) and self.deltas[-1].last

    @property
    def error(self) -> Exception | None:
        return self.deltas[-1].error if self.deltas else None

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


class PretendEngine:
    """An engine whose steps the test makes, one by one. `rests`: they rest once each, when `at_rest` is called.
    `ahead`: they are launched ahead, as on a GPU, by a device that does what it is told in the order of launches."""

    POISON = "poison"  # an adapter of this name computes NaN

    def __init__(
        self, *, pages: int = 64, adapters: int = 4, rests: bool = False, ahead: bool = False, **limits: Any
    ) -> None:
        self.hub = PretendHub()
        self.counts = Counts()
        self.engine = Engine(
            _base(),
            EngineLimits(
                **{
                    "kv_memory_bytes": pages * PAGE_BYTES,
                    "page_tokens": PAGE_TOKENS,
                    "adapter_memory_bytes": adapters * RANK * ROW_BYTES,
                    "max_sequences": 8,
                    "max_batch_tokens": 32,
                    **limits,
                }
            ),
            self.hub.fetch,
            self.counts,
        )
        self.memory: dict[int, Any] = {}
        self.at_rest: Callable[[], None] = lambda: None
        if rests:
            self.engine._loop._resting = self.engine._computing._run_packed
        self.launched: list[list[tuple[Sequence, int]]] = []  # steps launched ahead: who, and the slot it wrote
        self._ahead: list[tuple[Sequence, int]] = []  # of those, what the next step finds
        if ahead:
            loop = self.engine._loop
            choose, loop._foresight = loop._choose, Foresight(loop._door, loop._scheduler, self._launch_ahead)

            def chosen(logits: Tensor, states: Seq[SamplerState]) -> list[Choice]:
                choices = choose(logits, states)
                loop.meanwhile(torch.tensor([choice.token_id or 0 for choice in choices]))
                return choices

            loop._choose = chosen
        self.engine._computing._run = self._run  # type: ignore[method-assign]
        self.engine._computing.runner.kv.finite = self._finite  # type: ignore[method-assign]
        self.engine._computing.runner.kv.scrub = self._scrub  # type: ignore[method-assign]

    @property
    def scheduler(self) -> Any:
        return self.engine._scheduler

    @property
    def residency(self) -> Any:
        return self.engine.adapters

    def submit(self, asked: Request) -> Reader:
        reader = Reader()
        self.engine.submit(asked, reader)
        return reader

    def step(self) -> None:
        self.engine._loop.advance()

    def finish(self, *readers: Reader, seconds: float = 20.0) -> None:
        """Do as the engine's own thread does until all of `readers` ended: where that would sleep, so does this."""
        door, loop = self.engine._door, self.engine._loop
        until = time.monotonic() + seconds
        while not all(reader.ended for reader in readers):
            if door._called(self.scheduler.has_work):
                self.step()
                if not self.scheduler.running:
                    loop.deliver()
            else:
                time.sleep(0.0005)  # everybody waits for an adapter
            assert time.monotonic() < until, "the engine is stuck"

    def run(self, *asked: Request) -> list[Reader]:
        readers = [self.submit(one) for one in asked]
        self.finish(*readers)
        return readers

    def wait(self, condition: Any, seconds: float = 10.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.0005)

    def close(self) -> None:
        self.engine.close()

    def check_empty(self) -> None:
        """Nothing runs or waits, so nothing may be held."""
        self.engine.check_integrity()
        pages = self.engine._pages
        assert (pages.used, pages.free) == (0, pages.pages)
        assert self.residency.leases() == 0
        claims = self.residency._claims
        assert not (claims.queue or claims.ready or claims.running)
        assert not self.scheduler.running
        assert len(self.scheduler.waiting) == 0
        assert not self.engine._door.inside()

    def _run(self, batch: StepBatch, between: Callable[[], None] | None = None) -> Tensor:
        arena = self.residency._arena
        ahead = {id(sequence): at for sequence, at in self._ahead}
        self._ahead = []
        found = [id(share.sequence) in ahead for share in batch.shares]
        assert all(found) or not any(found), "somebody joined a step that was launched ahead"
        for share in batch.shares:
            sequence = share.sequence
            if id(sequence) in ahead:
                assert share.tokens == 1
                assert slot(sequence.pages, sequence.computed, PAGE_TOKENS) == ahead[id(sequence)]
                continue  # what was written is looked at below
            for position in range(sequence.computed, sequence.computed + share.tokens):
                self._write(sequence, position, sequence.tokens[position])
        if between is not None:
            self.at_rest()
            between()
        assert sum(share.tokens for share in batch.shares) <= self.engine.limits.max_batch_tokens
        for share in batch.shares:
            sequence, asked = share.sequence, share.sequence.request
            for (digest, wanted), (start, stop, weight) in zip(who(asked), sequence.adapter_rows, strict=True):
                assert weight == wanted
                assert stop - start == RANK * -(-self.hub.ranks.get(digest, RANK) // RANK)
                assert arena.a["site"][start, 0] == mark(digest), "foreign rows"
            if self._poisoned(asked):
                continue
            for position in range(sequence.computed + share.tokens):
                found = self.memory[slot(sequence.pages, position, PAGE_TOKENS)]
                assert found == (who(asked), sequence.tokens[position], position), "a stale or foreign page"
            stale = [self.memory.get(page * PAGE_TOKENS + i) for page in sequence.pages for i in range(PAGE_TOKENS)]
            assert all(content == content for content in stale), "a NaN left by somebody else"
        nan = torch.full((VOCABULARY,), float("nan"))
        rows = [
            nan if self._poisoned(s.sequence.request) else logits_of(s.sequence.request, s.sequence.tokens)
            for s in batch.sampling
        ]
        return torch.stack(rows) if rows else torch.zeros(0, VOCABULARY)

    def _launch_ahead(self, sequences: Seq[Sequence], tokens: Tensor) -> bool:
        assert self.engine._loop._foresight is not None
        chosen_for = [share.sequence for share in self.engine._loop._foresight.choosing]
        self._ahead = [
            (sequence, self._write(sequence, sequence.computed, token))
            for sequence, token in zip(chosen_for, tokens.tolist(), strict=True)
            if any(sequence is other for other in sequences)
        ]
        self.launched.append(self._ahead)
        return True

    def _write(self, sequence: Sequence, position: int, token: int) -> int:
        at = slot(sequence.pages, position, PAGE_TOKENS)
        content = (who(sequence.request), token, position)
        self.memory[at] = float("nan") if self._poisoned(sequence.request) else content
        return at

    def _poisoned(self, asked: Request) -> bool:
        return any(use.digest == self.POISON for use in asked.adapters)

    def _finite(self, pages: Seq[int]) -> list[bool]:
        slots = [[self.memory.get(page * PAGE_TOKENS + i) for i in range(PAGE_TOKENS)] for page in pages]
        return [all(content == content for content in page) for page in slots]

    def _scrub(self, pages: Seq[int]) -> None:
        for page in pages:
            for i in range(PAGE_TOKENS):
                self.memory.pop(page * PAGE_TOKENS + i, None)


def _base() -> BaseModel:
    from tokenizers import Tokenizer, decoders, models

    model = nn.Module()
    model.site = nn.Linear(2, 2, bias=False)
    config = SimpleNamespace(
        num_hidden_layers=1,
        hidden_size=2,
        intermediate_size=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        rope_parameters=None,
    )
    config.get_text_config = lambda: config
    model.config = config  # type: ignore[assignment]
    model.generation_config = None  # type: ignore[assignment]
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    model.get_input_embeddings = lambda: None  # type: ignore[assignment]
    backend = Tokenizer(models.WordLevel({f"w{i} ": i for i in range(VOCABULARY)}, unk_token="w0 "))
    backend.decoder = decoders.Fuse()
    return BaseModel(
        identity=BaseIdentity("pretend", None, None),
        model=model,  # type: ignore[arg-type]
        tokenizer=SimpleNamespace(  # type: ignore[arg-type]
            backend_tokenizer=backend,
            eos_token_id=None,
            decode=lambda ids, skip_special_tokens=True: "".join(f"w{i} " for i in ids),
        ),
        architecture="Pretend",
        quantization="none",
        dtype=torch.float32,
        device="cpu",
        context_tokens=1 << 20,
        vocabulary_size=VOCABULARY,
    )
