"""From a message to a `Request` the engine can run: parsed, its adapters resolved, its prompt tokenized.

A request for `auto` has its adapter chosen on the way (`routing.py`). The slow parts (asking the hub about an unknown
name, tokenizing a long text) run on threads of their own, so that one caller's megabyte never delays another's next
token.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from hub.refs import AdapterRef
from protos.loraplex.v1 import inference_pb2 as wire
from server.adapters.directory import AdapterDirectory
from server.api.parse import MAX_WEIGHT, AskedAdapter, ChatPrompt, Prompt, RequestParser, TextPrompt, TokenPrompt
from server.api.routing import Routed, Routing
from server.engine.request import AdapterUse, Request, Structure
from server.errors import InvalidRequest, PromptEmpty, QueueFull

# Tokenizing this much takes about a millisecond; more is done off the event loop.
INLINE_CHARS = 2048
INLINE_MESSAGES = 32

T = TypeVar("T")


class Tokenizer(Protocol):
    """The part of `server.model.text.Text` that admission uses."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""

    def render_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation."""

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's text."""


class StructureCompiler(Protocol):
    """The part of `server.engine.structure.Structures` that admission uses."""

    def compile(self, structure: Structure) -> None:
        """Check a structure and keep it ready; raises `StructureInvalid`."""


# An odd constant far from small numbers (2^64 / the golden ratio): callers that count their seeds up by one never
# draw one request's second candidate as another's first.
SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Admitted:
    """One call's requests, ready to submit: one a candidate, alike but for the seed."""

    caller_id: str  # what the answer echoes
    prompt: Prompt  # as the caller gave it
    requests: tuple[Request, ...]  # ids are unique in this server, whatever ids callers choose
    routed: Routed | None = None  # how its adapter was chosen, where a router was asked

    @property
    def adapters(self) -> tuple[AdapterUse, ...]:
        """The versions that answer."""
        return self.requests[0].adapters

    @property
    def tenant(self) -> str:
        """Whose call it is."""
        return self.requests[0].tenant


class Admission:
    """Turns messages into requests. Used on the event loop; `close` ends its threads."""

    def __init__(
        self,
        parser: RequestParser,
        directory: AdapterDirectory,
        tokenizer: Tokenizer,
        structures: StructureCompiler,
        routing: Routing,
        *,
        max_pending: int,
    ) -> None:
        """`max_pending`: calls that may wait for the hub or the tokenizer; more are refused with `QueueFull`."""
        self._parser = parser
        self._directory = directory
        self._tokenizer = tokenizer
        self._structures = structures
        self._routing = routing
        self._max_pending = max_pending
        self._pending = 0
        self._serial = itertools.count(1)
        self._tokenizing = ThreadPoolExecutor(2, thread_name_prefix="loraplex-tokenize")
        self._resolving = ThreadPoolExecutor(8, thread_name_prefix="loraplex-resolve")

    async def admit(self, message: wire.GenerateRequest, tenant: str = "") -> Admitted:
        """The request a message asks for, on `tenant`'s share of the server.

        Raises `InvalidRequest`s, the hub's `RefInvalid`, `AdapterNotFound` and `HubUnavailable`, `QueueFull`, and where
        a router is asked `RouterNotFound` and what the engine raises or ends a request with.
        """
        parsed = self._parser.generate(message)
        router = None if parsed.router is None else self._routing.named(parsed.router.name)
        adapters = await self.resolve(parsed.adapters, parsed.routing_key)
        prompt = await self.tokenize(parsed.prompt)
        self._parser.check_fits(len(prompt), parsed.stopping.max_new_tokens)
        if parsed.structure is not None:
            await self._off_loop(self._tokenizing, partial(self._structures.compile, parsed.structure))
        # Two callers may choose one id, and cancelling by id must end only one of them.
        unique = f"{parsed.id}#{next(self._serial)}"
        arrival, routed = time.monotonic(), None
        if parsed.router is not None and router is not None:
            routed = await self._routing.choose(router, prompt, f"{unique}.read", tenant)
            if routed.choice.adapter is not None:
                chosen = AskedAdapter(AdapterRef.parse(routed.choice.adapter), parsed.router.weight)
                adapters = await self.resolve([chosen], parsed.routing_key)
        first = Request(
            id=unique,
            prompt=tuple(prompt),
            stopping=parsed.stopping,
            sampling=parsed.sampling,
            adapters=adapters,
            logprobs=parsed.logprobs,
            structure=parsed.structure,
            arrival=arrival,
            tenant=tenant,
        )
        candidates = tuple(_candidate(first, index) for index in range(parsed.samples))
        return Admitted(parsed.id, parsed.prompt, candidates, routed)

    async def tokenize(self, prompt: Prompt) -> Sequence[int]:
        """The prompt's token ids, at least one."""
        ids: Sequence[int]
        match prompt:
            case TokenPrompt():
                return prompt.ids
            case TextPrompt(text):
                encode: Callable[[], Sequence[int]] = partial(self._tokenizer.encode, text)
                ids = encode() if len(text) <= INLINE_CHARS else await self._off_loop(self._tokenizing, encode)
            case ChatPrompt(messages):
                turns = [{"role": role, "content": content} for role, content in messages]
                render: Callable[[], Sequence[int]] = partial(self._tokenizer.render_chat, turns)
                short = prompt.chars <= INLINE_CHARS and len(messages) <= INLINE_MESSAGES
                ids = render() if short else await self._off_loop(self._tokenizing, render)
        if not ids:
            raise PromptEmpty("the prompt has no tokens")
        return ids

    async def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's text on its own."""
        pieces = partial(self._tokenizer.pieces, ids)
        return pieces() if len(ids) <= INLINE_CHARS // 4 else await self._off_loop(self._tokenizing, pieces)

    async def resolve(self, asked: Sequence[AskedAdapter], key: str | None = None) -> tuple[AdapterUse, ...]:
        """The versions that answer, each digest once: weights of names for the same version are summed.

        Raises `InvalidRequest` where such a sum is beyond what one weight may be.
        """
        uses: dict[str, AdapterUse] = {}
        names: dict[str, list[str]] = {}
        for each in asked:
            found = self._directory.cached(each.ref, key)
            if found is None:
                found = await self._off_loop(self._resolving, partial(self._directory.resolve, each.ref, key))
            known = uses.get(found.digest)
            weight = each.weight if known is None else known.weight + each.weight
            uses[found.digest] = AdapterUse(found.digest, found.version if known is None else known.version, weight)
            names.setdefault(found.digest, []).append(str(each.ref))
        for use in uses.values():
            if not -MAX_WEIGHT <= use.weight <= MAX_WEIGHT:
                raise InvalidRequest(
                    f"{' and '.join(names[use.digest])} name the same version, and the sum of their weights must be "
                    "a finite number"
                )
        return tuple(uses.values())

    def close(self) -> None:
        """End the threads; what they are doing is finished for nobody."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._resolving.shutdown(wait=False, cancel_futures=True)

    async def _off_loop(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        if self._pending >= self._max_pending:
            raise QueueFull(f"{self._pending} calls are already waiting to be admitted")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        finally:
            self._pending -= 1


def _candidate(first: Request, index: int) -> Request:
    """The request that answers as candidate `index`; 0 is the first itself."""
    if not index:
        return first
    seed = (first.sampling.seed + index * SEED_STEP) % 2**64
    return replace(first, id=f"{first.id}.{index}", sampling=replace(first.sampling, seed=seed))
