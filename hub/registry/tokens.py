"""The shared server's tokens, in a table of their own beside the catalog's.

A token is "lpt_<id>_<secret>", 256 random bits of secret. The table keeps a random salt and SHA-256(salt + secret):
for a secret of this kind a slow hash adds nothing. Rows are never deleted, so who had what, and who gave and took it,
can be told later. Every call asks the table: a token that is revoked is refused at once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from hub.errors import GrantInvalid, HubReadOnly, HubUnavailable, TokenNotFound, Unauthenticated
from hub.registry.grants import Caller, Grant
from hub.sqlite import cause
from hub.transactions import asked, read, writing

MAX_LIFETIME_SECONDS: Final = 10 * 365 * 24 * 3600.0
_TOKEN = re.compile(r"lpt_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)
_SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}", re.ASCII)
_UNKNOWN: Final = "the token is not known to this hub: log in with `hub login URL`, or set LORAPLEX_HUB_TOKEN"

_metadata = sa.MetaData()
_tokens = sa.Table(
    "registry_tokens",
    _metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("grants", sa.Text, nullable=False),  # JSON [[namespace, [role, …]], …]
    sa.Column("salt", sa.Text, nullable=False),  # hex
    sa.Column("hash", sa.Text, nullable=False),  # hex
    sa.Column("created", sa.Double, nullable=False),  # Unix times
    sa.Column("created_by", sa.Text),
    sa.Column("expires", sa.Double),  # null: never
    sa.Column("revoked", sa.Double),
    sa.Column("revoked_by", sa.Text),
)


@dataclass(frozen=True)
class Token:
    """What is known of a token; not its secret."""

    id: str
    subject: str
    grants: tuple[Grant, ...]
    created: float  # Unix times
    created_by: str | None = None
    expires: float | None = None  # None: never
    revoked: float | None = None
    revoked_by: str | None = None


class TokenStore:
    """The tokens in one database; methods are safe to call from several threads and raise HubUnavailable."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._ready = False

    def create(
        self, subject: str, grants: Sequence[Grant], lifetime_seconds: float | None = None, by: str | None = None
    ) -> tuple[Token, str]:
        """A new token and its text, which is not kept. Raises GrantInvalid."""
        if not _SUBJECT.fullmatch(subject):
            raise GrantInvalid("a subject has 1 to 100 of the characters A-Z a-z 0-9 . _ @ -, a letter or digit first")
        if not grants or len(grants) > 100:
            raise GrantInvalid("a token has 1 to 100 grants")
        if lifetime_seconds is not None and not 0 < lifetime_seconds <= MAX_LIFETIME_SECONDS:
            raise GrantInvalid("a lifetime is more than 0 seconds and at most ten years")
        identifier, secret, salt = secrets.token_hex(8), secrets.token_urlsafe(32), secrets.token_bytes(16)
        created = time.time()
        expires = None if lifetime_seconds is None else created + lifetime_seconds
        row = {
            "id": identifier, "subject": subject, "created": created, "created_by": by, "expires": expires,
            "grants": json.dumps([[grant.namespace, grant.roles] for grant in grants]),
            "salt": salt.hex(), "hash": _hash(salt, secret),
        }  # fmt: skip
        with self._writing() as connection:
            connection.execute(sa.insert(_tokens).values(row))
        return Token(identifier, subject, tuple(grants), created, by, expires), f"lpt_{identifier}_{secret}"

    def list(self) -> list[Token]:
        """All tokens, revoked and expired ones too, oldest first."""
        return [_token(row) for row in self._rows(sa.select(_tokens).order_by(_tokens.c.created, _tokens.c.id))]

    def revoke(self, identifier: str, by: str | None = None) -> Token:
        """Refuse this token from now on; again changes nothing. Raises TokenNotFound."""
        with self._writing() as connection:
            connection.execute(
                sa.update(_tokens)
                .where(_tokens.c.id == identifier, _tokens.c.revoked.is_(None))
                .values(revoked=time.time(), revoked_by=by)
            )
            row = connection.execute(sa.select(_tokens).where(_tokens.c.id == identifier)).first()
        if row is None:
            raise TokenNotFound(f"there is no token {identifier[:40]!a}; `hub token list` shows them")
        return _token(row)

    def authenticate(self, text: str) -> Caller:
        """Whose token this is; raises Unauthenticated, which tells more only to who knows the secret."""
        parts = _TOKEN.fullmatch(text)
        if parts is None:
            raise Unauthenticated(_UNKNOWN)
        row = next(iter(self._rows(sa.select(_tokens).where(_tokens.c.id == parts[1]))), None)
        salt, expected = (bytes.fromhex(row.salt), row.hash) if row is not None else (b"", "")
        if not hmac.compare_digest(_hash(salt, parts[2]), expected) or row is None:
            raise Unauthenticated(_UNKNOWN)
        token = _token(row)
        if token.revoked is not None:
            raise Unauthenticated(f"the token {token.id} of {token.subject} was revoked")
        if token.expires is not None and token.expires <= time.time():
            raise Unauthenticated(f"the token {token.id} of {token.subject} has expired")
        return Caller(token.subject, token.grants, token.id, token.expires)

    def _rows(self, query: sa.Select[Any]) -> Sequence[Any]:
        with _translated():
            if not self._has_table():
                return []
            return asked(self._engine, lambda connection: connection.execute(query).all())

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        self._make_table()
        with _translated(), writing(self._engine) as connection:
            yield connection

    def _make_table(self) -> None:
        with _translated():
            if not self._has_table():
                with writing(self._engine) as connection:
                    _metadata.create_all(connection)
        self._ready = True

    def _has_table(self) -> bool:
        """Whether there ever was a token; a hub that cannot be written may have none."""
        if not self._ready:
            self._ready = read(self._engine, lambda connection: sa.inspect(connection).has_table(_tokens.name))
        return self._ready


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError, UnicodeDecodeError) as error:
        if getattr(getattr(error, "orig", None), "sqlite_errorname", "").startswith("SQLITE_READONLY"):
            raise HubReadOnly("the hub's tokens cannot be written from here: its directory is read-only") from error
        raise HubUnavailable("the hub's tokens cannot be read or written", cause(error)) from error


def _hash(salt: bytes, secret: str) -> str:
    return hashlib.sha256(salt + secret.encode()).hexdigest()


def _token(row: Any) -> Token:
    grants = tuple(Grant.of(namespace, roles) for namespace, roles in json.loads(row.grants))
    return Token(
        row.id, row.subject, grants, row.created, row.created_by, row.expires, row.revoked, row.revoked_by
    )  # fmt: skip
