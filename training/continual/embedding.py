"""Prompts as a server will read them, for the router: by its own engine, the base held in the same precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch
from torch import Tensor

from server.config import EngineLimits, ModelConfig, Quantization
from server.errors import InvalidRequest
from training.data import Example
from training.errors import GenerationFailed

if TYPE_CHECKING:
    from server.engine.engine import Engine


@dataclass(frozen=True)
class Embedded:
    """Prompts as one base has read them."""

    groups: tuple[Tensor, ...]  # [prompts, d] float32 each
    layer: int  # whose output was averaged over a prompt's tokens; counted as in `server.router`
    base: str | None  # its fingerprint
    quantization: Quantization


class Embed(Protocol):
    """Reads groups of prompts, all by one base; what the examples answer is not looked at."""

    def __call__(self, groups: Sequence[Sequence[Example]]) -> Embedded:
        """One tensor a group, its rows in order. Raises `GenerationFailed` for a prompt that cannot be read."""
        ...


@dataclass(frozen=True)
class EngineEmbed:
    """Reads through `server.engine`, at the middle layer. Raises `RouterUnavailable` where the base cannot be read."""

    base: str
    quantize: Quantization = "none"
    threads: int = 0

    def __call__(self, groups: Sequence[Sequence[Example]]) -> Embedded:
        """See `Embed`."""
        from server.engine.engine import Engine

        config = ModelConfig(base=self.base, quantization=self.quantize, threads=self.threads)
        with closing(Engine.build(config, EngineLimits(), _no_adapter)) as engine:
            layer = engine.base.layers // 2
            engine.reads(layer)
            rows = _read(engine, [one for group in groups for one in group], layer)
            return Embedded(
                torch.split(rows, [len(group) for group in groups]),
                layer,
                engine.base.identity.fingerprint,
                self.quantize,
            )


def _read(engine: Engine, examples: Sequence[Example], layer: int) -> Tensor:
    from server.engine.request import Request, Stopping

    room = engine.base.context_tokens - 1  # a server refuses what is longer, so no router sees it
    try:
        prompts = [engine.text.render_chat([message.as_dict() for message in one.prompt])[:room] for one in examples]
    except InvalidRequest as error:
        raise GenerationFailed(str(error)) from error
    rows = []
    for done in engine.generate(
        Request(f"read-{number}", tuple(prompt), Stopping(max_new_tokens=1), read_layer=layer)
        for number, prompt in enumerate(prompts)
    ):
        embedding = done.deltas[-1].embedding
        if embedding is None:
            raise GenerationFailed(f"a prompt could not be read: {done.error}") from done.error
        rows.append(embedding)
    return torch.stack(rows)


def _no_adapter(digest: str) -> NoReturn:
    raise AssertionError(f"the base alone reads, and {digest} was asked for")
