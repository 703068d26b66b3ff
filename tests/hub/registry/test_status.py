"""An error that a server raises is the same error at the client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from hub import errors
from hub.registry.answers import Draining
from hub.remote.connection import ServerAway, _raised
from hub.remote.status import MAX_MESSAGE_CHARS, answer_for, error_of, is_away, trailing


class Answer(grpc.RpcError, grpc.Call):
    """What a client's call raises."""

    def __init__(self, error: Exception) -> None:
        self.status, self.message, self.reason = answer_for(error)
        if isinstance(error, Draining):
            self.status = grpc.StatusCode.UNAVAILABLE

    def code(self) -> Any:
        return self.status

    def details(self) -> Any:
        return self.message

    def trailing_metadata(self) -> Any:
        return trailing(self.status, self.message, self.reason)

    def _unused(self, *arguments: Any) -> Any:
        raise NotImplementedError

    initial_metadata = is_active = time_remaining = cancel = add_callback = _unused


def leaves(root: type[errors.HubError]) -> Iterator[type[errors.HubError]]:
    if root.__module__ == "hub.errors":
        yield root
        for child in root.__subclasses__():
            yield from leaves(child)


@pytest.mark.parametrize("kind", list(leaves(errors.HubError)), ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_itself(kind: type[errors.HubError]) -> None:
    found = error_of(Answer(kind("what is wrong")))
    assert (type(found), str(found)) == (kind, "what is wrong")


def test_what_is_not_the_hubs_own_tells_nothing() -> None:
    found = error_of(Answer(ValueError("/srv/secret/path")))
    assert (found.reason, "secret" in str(found)) == ("INTERNAL", False)


def test_where_a_server_was_looked_for_is_told_to_its_own_user_alone() -> None:
    class Away(Answer):
        def trailing_metadata(self) -> Any:
            return ()

    away = Away(errors.HubUnavailable("failed to connect to ipv4:10.0.0.7:50052"))
    assert isinstance(raised := _raised(away), ServerAway)
    assert raised.public == "the hub's server cannot be reached"
    assert str(raised) == "the hub's server cannot be reached: failed to connect to ipv4:10.0.0.7:50052"


def test_long_messages_are_cut() -> None:
    assert len(str(error_of(Answer(errors.RefInvalid("x" * 10_000))))) == MAX_MESSAGE_CHARS


def test_a_server_that_drains_or_lacks_its_database_is_away_and_others_are_not() -> None:
    assert is_away(Answer(Draining("bye"))) and is_away(Answer(errors.HubUnavailable("the database is down")))
    assert isinstance(error_of(Answer(Draining("bye"))), errors.HubUnavailable)
    for other in (errors.Unauthenticated("no"), errors.Forbidden("no"), errors.AdapterNotFound("no")):
        assert not is_away(Answer(other))
