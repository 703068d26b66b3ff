"""push, tag, rm, restore, gc, pull, rollback, pins and rebuilds in any order, beside a model of dictionaries."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hub.errors import (
    AdapterNotFound,
    AliasMoved,
    AliasNotFound,
    HubError,
    NothingToRollBack,
    NotRestorable,
    VersionHeld,
)
from hub.facade import HubFacade
from hub.hub import Hub
from hub.rebuild import rebuild
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote.remote_hub import RemoteHub
from tests.hub.conftest import MakeUrl
from tests.hub.making import lora_tensors, write_adapter

NAMES = st.sampled_from(["a", "team/b"])
SEEDS = st.integers(0, 3)
NUMBERS = st.integers(1, 5)
ALIASES = st.sampled_from(["latest", "prod", "canary"])
WEIGHTS = st.integers(1, 3)
EXAMPLES = 12
Held = dict[int, int]


class Model:
    """One adapter, as the guide describes it."""

    def __init__(self) -> None:
        self.content: dict[int, int] = {}  # number → seed, removed ones too
        self.removed: set[int] = set()
        self.pinned: set[int] = set()
        self.aliases: dict[str, Held] = {}
        self.history: dict[str, list[Held | None]] = {}
        self.last = 0

    def move(self, alias: str, to: Held) -> None:
        if self.aliases.get(alias) != to:
            self.aliases[alias] = to
            self.history.setdefault(alias, []).append(to)

    def there(self, number: int) -> bool:
        return number in self.content and number not in self.removed

    def held(self, number: int) -> bool:
        return number in self.pinned or any(number in held for held in self.aliases.values())


class HubMachine(RuleBasedStateMachine):
    url: str
    directories: list[Path]

    @initialize()
    def open(self) -> None:
        self.hub: HubFacade = self.opened()
        self.models: dict[str, Model] = {}
        self.seq = 0

    def teardown(self) -> None:
        self.hub.close()

    def opened(self) -> HubFacade:
        return Hub.open(self.url)

    def model(self, name: str) -> Model:
        return self.models.setdefault(name, Model())

    def attempt(self, call: Callable[[], Any], allowed: bool, *refusals: type[HubError]) -> bool:
        """Call; it must succeed where the model allows it, and be refused otherwise. Whether it succeeded."""
        try:
            call()
        except refusals:
            assert not allowed
            return False
        assert allowed
        return True

    @rule(name=NAMES, seed=SEEDS)
    def push(self, name: str, seed: int) -> None:
        model = self.model(name)
        known = next((number for number, content in model.content.items() if content == seed), None)
        result = self.hub.push(self.directories[seed], name)
        if known is None:
            model.last += 1
            model.content[model.last] = seed
        number = known or model.last
        assert (result.version.number, result.created) == (number, known is None)
        if known is None or number in model.removed:
            model.removed.discard(number)
            model.move("latest", {number: 1})

    @rule(name=NAMES, number=NUMBERS, alias=ALIASES, expect=st.none() | st.integers(0, 5))
    def tag(self, name: str, number: int, alias: str, expect: int | None) -> None:
        model = self.model(name)
        held = model.aliases.get(alias)
        fits = expect is None or (list(held) == [expect] if held else expect == 0)
        call = lambda: self.hub.tag(f"{name}@{number}", alias, expect)  # noqa: E731
        if self.attempt(call, model.there(number) and fits, AdapterNotFound, AliasMoved):
            model.move(alias, {number: 1})

    @rule(name=NAMES, first=NUMBERS, second=NUMBERS, alias=ALIASES, weights=st.tuples(WEIGHTS, WEIGHTS))
    @precondition(lambda self: any(len(model.content) > 1 for model in self.models.values()))
    def split(self, name: str, first: int, second: int, alias: str, weights: tuple[int, int]) -> None:
        model = self.model(name)
        if first == second:
            return
        wanted = {first: weights[0], second: weights[1]}
        call = lambda: self.hub.split([(f"{name}@{n}", w) for n, w in wanted.items()], alias)  # noqa: E731
        if self.attempt(call, model.there(first) and model.there(second), AdapterNotFound):
            model.move(alias, wanted)

    @rule(name=NAMES, alias=ALIASES)
    def untag(self, name: str, alias: str) -> None:
        model = self.model(name)
        if self.attempt(lambda: self.hub.untag(name, alias), alias in model.aliases, AdapterNotFound, AliasNotFound):
            del model.aliases[alias]
            model.history[alias].append(None)

    @rule(name=NAMES, alias=ALIASES)
    def roll_back(self, name: str, alias: str) -> None:
        model = self.model(name)
        history = model.history.get(alias, [])
        target = history[-2] if len(history) > 1 else None
        allowed = target is not None and all(model.there(number) for number in target)
        refusals = (AdapterNotFound, NothingToRollBack)
        if self.attempt(lambda: self.hub.rollback(name, alias), allowed, *refusals):
            assert target is not None
            moved = model.aliases.get(alias) != target
            model.aliases[alias] = target
            if moved:
                history.pop()

    @rule(name=NAMES, number=NUMBERS)
    def remove(self, name: str, number: int) -> None:
        model = self.model(name)
        allowed = model.there(number) and not model.held(number)
        if self.attempt(lambda: self.hub.remove(f"{name}@{number}"), allowed, AdapterNotFound, VersionHeld):
            model.removed.add(number)

    @rule(name=NAMES, number=NUMBERS)
    def restore(self, name: str, number: int) -> None:
        model = self.model(name)
        refusals = (AdapterNotFound, NotRestorable)
        if self.attempt(lambda: self.hub.restore(f"{name}@{number}"), number in model.removed, *refusals):
            model.removed.discard(number)

    @rule(name=NAMES, number=NUMBERS, pinned=st.booleans())
    def pin(self, name: str, number: int, pinned: bool) -> None:
        model = self.model(name)
        act = self.hub.lease if pinned else self.hub.release
        if self.attempt(lambda: act(f"{name}@{number}", "me"), model.there(number), AdapterNotFound):
            (model.pinned.add if pinned else model.pinned.discard)(number)

    @rule(dry_run=st.booleans(), retention=st.sampled_from([0.0, 3600.0]))
    def sweep(self, dry_run: bool, retention: float) -> None:
        going = {
            f"{name}@{number}" for name, model in self.models.items() for number in model.removed if retention == 0
        }
        swept = self.hub.sweep(retention_seconds=retention, grace_seconds=0, dry_run=dry_run)
        assert set(swept.purged) == going
        if retention == 0 and not dry_run:
            for model in self.models.values():
                for number in model.removed:
                    del model.content[number]
                model.removed.clear()

    @rule(name=NAMES, number=NUMBERS)
    def pull(self, name: str, number: int) -> None:
        model = self.model(name)
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory) / "out"
            call = lambda: self.hub.pull(f"{name}@{number}", target)  # noqa: E731
            if self.attempt(call, model.there(number), AdapterNotFound):
                source = self.directories[model.content[number]]
                assert {p.name: p.read_bytes() for p in target.iterdir()} == {
                    p.name: p.read_bytes() for p in source.iterdir()
                }

    @rule()
    @precondition(lambda self: self.seq > 0)
    def rebuild(self) -> None:
        self.hub.close()
        rebuild(self.url)
        self.hub = self.opened()

    @rule()
    def reopen(self) -> None:
        self.hub.close()
        self.hub = self.opened()

    @invariant()
    def hub_is_as_the_model(self) -> None:
        if not hasattr(self, "hub"):
            return
        assert self.hub.fsck() == []
        assert [version.text for version in self.hub.versions()] == [
            f"{name}@{number}"
            for name in sorted(self.models)
            for number in sorted(self.models[name].content)
            if number not in self.models[name].removed
        ]
        for name, model in self.models.items():
            if not model.last:
                continue
            aliases = self.hub.aliases(name)
            assert {
                alias: {target.version: target.weight for target in state.targets} for alias, state in aliases.items()
            } == model.aliases
            assert {lease.version for lease in self.hub.leases(name)} == model.pinned
        seq = self.hub.last_seq()
        assert seq >= self.seq
        assert [event.seq for event in self.hub.events(self.seq, 10_000)] == list(range(self.seq + 1, seq + 1))
        self.seq = seq


@pytest.mark.timeout(170)
def test_the_hub_does_what_the_model_does(make_url: MakeUrl, tmp_path: Path) -> None:
    directories = [write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)) for seed in range(4)]
    base = make_url()
    runs = iter(range(10**6))

    class Machine(HubMachine):
        def __init__(self) -> None:
            super().__init__()
            self.directories = directories
            number = next(runs)
            address, _, blobs = base.partition("?blobs=")
            blobs, _, endpoint = blobs.partition("?")
            place = f"{blobs}-{number}" + (f"?{endpoint}" if endpoint else "")
            if base.startswith("postgresql"):
                # One database for all runs: a schema each.
                self.url = f"{_with_schema(address, f'run{number}')}&blobs={place}"
            else:
                self.url = f"{address}-{number}" + (f"?blobs={place}" if blobs else "")

    examples = settings(
        # What differs between the engines is below the rules: most of them run on the quickest.
        max_examples=EXAMPLES // 2 if "?blobs=" in base else EXAMPLES,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(Machine, settings=examples)


@pytest.mark.timeout(170)
def test_a_shared_server_does_what_the_model_does(tmp_path: Path) -> None:
    """The same rules through RemoteHub; a client that opens the hub anew meets a server that was started anew."""
    directories = [write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)) for seed in range(4)]
    runs = iter(range(10**6))

    class Served(RemoteHub):
        """A client that takes its server with it."""

        def close(self) -> None:
            super().close()
            for close in self.closers:
                close()

        closers: tuple[Callable[[], None], ...] = ()

    class Machine(HubMachine):
        def __init__(self) -> None:
            super().__init__()
            self.directories = directories
            self.url = str(tmp_path / f"hub-{next(runs)}")

        def opened(self) -> HubFacade:
            store = Hub.open(self.url)
            config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
            server = RegistryServer(store, None, config).start()
            client = Served.open(f"grpc://{server.address}")
            client.closers = (lambda: server.stop(0), store.close)
            return client

    examples = settings(
        max_examples=EXAMPLES // 2,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(Machine, settings=examples)


def _with_schema(address: str, schema: str) -> str:
    """The URL of a new schema in the database at `address`."""
    import sqlalchemy as sa

    engine = sa.create_engine(sa.make_url(address).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    engine.dispose()
    return f"{address}?options=-c%20search_path%3D{schema}"
