"""Who may do what: roles within namespaces, parsed once and asked before every action of the shared server.

    grant     = namespace ":" role ["," role …]        "team:push,promote", "*:read", ".:admin"
    namespace = a namespace, "." (adapters without one) or "*" (all)

    read     resolve, pull, list, search, log, watch, verify one version, lease for at most an hour
    push     push new versions (":latest" follows), add evaluations, pin and unpin
    promote  move every other alias: tag, untag, promote, rollback, push with an alias
    admin    everything in the namespace, also rm and restore; for "*" gc, fsck and tokens too

Every role includes read; push and promote do not include each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from hub.errors import Forbidden, GrantInvalid, RefInvalid
from hub.refs import AdapterRef

ROLES: Final = ("read", "push", "promote", "admin")
ALL: Final = "*"
NO_NAMESPACE: Final = "."


@dataclass(frozen=True)
class Grant:
    """Roles within one namespace."""

    namespace: str
    roles: tuple[str, ...]  # in the order of ROLES

    @classmethod
    def parse(cls, text: str) -> Self:
        """`text` by the grammar above; raises GrantInvalid."""
        namespace, colon, roles = text.partition(":")
        if not colon:
            raise GrantInvalid(f"{text[:80]!a} is no grant: write NAMESPACE:ROLE[,ROLE], such as team:push,promote")
        return cls.of(namespace, (role.strip() for role in roles.split(",")))

    @classmethod
    def of(cls, namespace: str, roles: Iterable[str]) -> Self:
        """A checked grant; raises GrantInvalid."""
        wanted = set(roles)
        if strange := sorted(wanted - set(ROLES)):
            raise GrantInvalid(f"{strange[0][:40]!a} is no role; known: {', '.join(ROLES)}")
        if not wanted:
            raise GrantInvalid("a grant needs at least one role")
        if namespace not in (ALL, NO_NAMESPACE):
            try:
                AdapterRef.parse(f"{namespace}/x")
            except RefInvalid as error:
                raise GrantInvalid(f"{namespace[:80]!a} is no namespace, '.' or '*'") from error
        return cls(namespace, tuple(role for role in ROLES if role in wanted))

    def __str__(self) -> str:
        return f"{self.namespace}:{','.join(self.roles)}"

    def gives(self, role: str, namespace: str) -> bool:
        """Whether this grant alone allows it; the namespace "*" is asked for what concerns all of them."""
        return self.namespace in (ALL, namespace) and (role == "read" or role in self.roles or "admin" in self.roles)


@dataclass(frozen=True)
class Caller:
    """Who calls, and with what grants."""

    subject: str
    grants: tuple[Grant, ...]
    token_id: str = ""  # empty: the server runs without tokens
    expires: float | None = None  # Unix time

    def may(self, role: str, full_name: str) -> bool:
        """Whether the caller has `role` for this adapter."""
        namespace = full_name.rpartition("/")[0] or NO_NAMESPACE
        return any(grant.gives(role, namespace) for grant in self.grants)

    def may_everywhere(self, role: str) -> bool:
        """Whether the caller has `role` in all namespaces."""
        return any(grant.gives(role, ALL) for grant in self.grants)

    def require(self, role: str, full_name: str) -> None:
        """Raise Forbidden where the caller lacks the role; says nothing of whether the adapter exists."""
        if not self.may(role, full_name):
            namespace = full_name.rpartition("/")[0]
            where = f"the namespace {namespace}" if namespace else "adapters without a namespace"
            raise Forbidden(f"{self.subject} lacks the role {role!r} for {where}")

    def require_everywhere(self, role: str) -> None:
        """Raise Forbidden where the caller lacks the role for all namespaces."""
        if not self.may_everywhere(role):
            raise Forbidden(f"{self.subject} lacks the role {role!r} for all namespaces ('*')")


def anyone() -> Caller:
    """The caller of a server that runs without tokens."""
    return Caller("anonymous", (Grant(ALL, ROLES),))
