"""Hundreds of registered adapters out of a few files: loading one is real work, keeping them needs little disk.

Digest n stands for the files of directory n modulo their number. To the engine every digest is another adapter: it
fetches, parses, places and evicts each by itself.
"""

from __future__ import annotations

import itertools
import random
import uuid
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from benchmarks.workload import prompt
from hub.refs import AdapterRef
from server.adapters.directory import HubAlias, HubEvent, ResolvedAdapter
from server.adapters.weights import AdapterFiles
from server.engine.engine import Engine
from server.engine.request import AdapterUse, Request, Stopping


@dataclass(frozen=True)
class Population:
    """`count` registered adapters; `first` sets apart populations that one engine serves."""

    directories: Sequence[Path]  # PEFT
    count: int
    first: int = 0

    def digest(self, number: int) -> str:
        """Adapter `number`'s, as a manifest's would look."""
        if not 0 <= number < self.count:
            raise IndexError(f"adapter {number} of {self.count}")
        return f"sha256:{self.first + number:064x}"

    def use(self, number: int) -> AdapterUse:
        """Adapter `number` in a request."""
        return AdapterUse(self.digest(number), f"bench/adapter-{self.first + number}@1")

    def holds(self, digest: str) -> bool:
        """Whether the digest is one of these."""
        return self.first <= int(digest.removeprefix("sha256:"), 16) < self.first + self.count

    def fetch(self, digest: str) -> AdapterFiles:
        """The files, read from disk each time."""
        number = int(digest.removeprefix("sha256:"), 16) - self.first
        directory = self.directories[number % len(self.directories)]
        return AdapterFiles(
            digest=digest,
            config=(directory / "adapter_config.json").read_bytes(),
            weights=(directory / "adapter_model.safetensors").read_bytes(),
            base_name=None,
            base_fingerprint=None,
        )


@dataclass(frozen=True)
class Registered:
    """Several populations as one hub: what an engine fetches from and a directory resolves against."""

    populations: Sequence[Population]

    def fetch(self, digest: str) -> AdapterFiles:
        """See `Population.fetch`."""
        return next(population for population in self.populations if population.holds(digest)).fetch(digest)

    def resolve(self, ref: AdapterRef) -> HubVersion:
        """bench/adapter-N → its version."""
        digest = f"sha256:{int(ref.name.rpartition('-')[2]):064x}"
        return HubVersion(digest, f"bench/{ref.name}@1")

    def aliases(self, full_name: str) -> dict[str, HubAlias]:
        """None: these adapters are named by number."""
        return {}

    def last_seq(self) -> int:
        """No events."""
        return 0

    def watch(self, since_seq: int, stop: Event, poll_seconds: float) -> Iterator[HubEvent]:
        """None, until told to stop."""
        stop.wait()
        return iter(())


@dataclass(frozen=True)
class HubVersion:
    """What `Registered.resolve` gives."""

    digest: str
    text: str


def zipf(count: int, exponent: float, draws: int, seed: int) -> list[int]:
    """`draws` numbers below `count`, number k drawn with probability ~ 1 / (k + 1)^exponent."""
    weights = list(itertools.accumulate((k + 1) ** -exponent for k in range(count)))
    random_ = random.Random(seed)
    return [bisect(weights, random_.random() * weights[-1], 0, count - 1) for _ in range(draws)]


def ask(engine: Engine, number: int, uses: Sequence[AdapterUse], new_tokens: int, prompt_tokens: int = 0) -> Request:
    """Request `number`: the workload's sentence, or `prompt_tokens` random tokens that no other request has."""
    if prompt_tokens:
        random_ = random.Random(uuid.uuid4().int)
        ids = tuple(
            random_.randrange(engine.base.vocabulary_size // 2, engine.base.vocabulary_size)
            for _ in range(prompt_tokens)
        )
    else:
        ids = tuple(engine.text.encode(prompt(number)))
    return Request(
        id=uuid.uuid4().hex,
        prompt=ids,
        stopping=Stopping(max_new_tokens=new_tokens, ignore_eos=True),
        adapters=tuple(uses),
    )


def resolved(found: ResolvedAdapter) -> AdapterUse:
    """A directory's answer as a request names it."""
    return AdapterUse(found.digest, found.version)
