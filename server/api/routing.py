"""Requests for the adapter `auto`: the base reads the prompt, and a router chooses by what it made of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hub.refs import AdapterRef
from server.api.candidates import Candidates
from server.engine.request import Request, Stopping
from server.errors import RouterMismatch, RouterNotFound, RouterUnnamed

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.engine import Engine
    from server.router import Choice, Router


@dataclass(frozen=True)
class Routed:
    """How an adapter was chosen."""

    router: str  # its name on this server
    choice: Choice


class Routing:
    """A server's routers, and the engine that reads for them. Used on the event loop.

    `count` is told of each choice: the router, and the chosen adapter's name without its version, or None.
    """

    def __init__(self, routers: Mapping[str, Router], engine: Engine, count: Callable[[str, str | None], None]) -> None:
        self._routers = routers
        self._engine = engine
        self._count = count

    @classmethod
    def open(
        cls, places: Sequence[tuple[str, Path]], engine: Engine, count: Callable[[str, str | None], None]
    ) -> Routing:
        """The routers in directories, by name.

        Raises `RouterInvalid` for a directory that holds none, `RouterMismatch` for another base's or another
        precision's, and `RouterUnavailable` where this base cannot be read.
        """
        routers = {}
        if places:
            from server.router import Router  # brings torch, which the engine has brought already

            for name, directory in places:
                router = routers[name] = Router.read(directory)
                _check(name, router, engine)
                engine.reads(router.layer)
        return cls(routers, engine, count)

    def named(self, asked: str) -> str:
        """The name of the router that a request asks for, "" being the only one.

        Raises `RouterNotFound` and `RouterUnnamed`.
        """
        known = ", ".join(f"auto:{name}" for name in sorted(self._routers))
        if not self._routers:
            raise RouterNotFound("this server has no router; the hub's own adapter of this name is written auto@3")
        if asked in self._routers:
            return asked
        if asked:
            raise RouterNotFound(f"there is no router auto:{asked} here, but {known}")
        if len(self._routers) > 1:
            raise RouterUnnamed(f"there are several routers here: write {known.replace(', ', ' or ')}")
        return next(iter(self._routers))

    async def choose(self, name: str, prompt: Sequence[int], request_id: str, tenant: str) -> Routed:
        """Have the prompt read on `tenant`'s share and the router `name` choose. Raises what `Engine.submit` raises and
        what ends a request."""
        router = self._routers[name]
        embedding = await self._read(
            Request(
                id=request_id,
                prompt=tuple(prompt),
                stopping=Stopping(max_new_tokens=1),
                tenant=tenant,
                read_layer=router.layer,
                arrival=time.monotonic(),
            )
        )
        choice = router.choose(embedding)
        self._count(name, None if choice.adapter is None else AdapterRef.parse(choice.adapter).full_name)
        return Routed(name, choice)

    async def _read(self, request: Request) -> Tensor:
        answers = Candidates(1)
        self._engine.submit(request, answers.outboxes[0])
        try:
            async for _, delta in answers:
                if delta.error is not None:
                    raise delta.error
                if delta.embedding is not None:
                    return delta.embedding
        finally:
            self._engine.cancel(request.id)
        raise AssertionError("a prompt was read, and nothing came of it")


def _check(name: str, router: Router, engine: Engine) -> None:
    base = engine.base
    if router.base and base.identity.fingerprint and router.base != base.identity.fingerprint:
        raise RouterMismatch(
            f"the router {name} was fitted for another base ({router.base}) than {base.identity.name} "
            f"({base.identity.fingerprint})"
        )
    if router.quantization != base.quantization:
        # Measured: of SmolLM2's prompts two thirds go to the base where its precision is another.
        raise RouterMismatch(
            f"the router {name} was fitted on the base in the precision {router.quantization}; in {base.quantization} "
            f"prompts lie elsewhere: serve with --quantize {router.quantization}, or fit it anew with "
            f"`hub continual router PLAN RUN --quantize {base.quantization} --out DIR`"
        )
    width = int(base.model.config.get_text_config().hidden_size)
    if router.mean.numel() != width:
        raise RouterMismatch(
            f"the router {name} was fitted for hidden states of {router.mean.numel()} numbers; "
            f"those of {base.identity.name} have {width}"
        )
    if not 0 <= router.layer <= base.layers:
        raise RouterMismatch(
            f"the router {name} looks at hidden states after {router.layer} layers, of which {base.identity.name} has "
            f"{base.layers}"
        )
