"""The tokens this user logged in with: one file, readable by the user alone, a token for each server."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Final

import platformdirs

from hub.errors import CredentialsUnsafe, HubUnavailable, Unauthenticated
from hub.remote.address import Address

ENVIRONMENT: Final = "LORAPLEX_HUB_TOKEN"


def credentials_file() -> Path:
    """Where they are kept."""
    return platformdirs.user_config_path("loraplex") / "credentials.json"


def token_for(address: Address) -> str | None:
    """LORAPLEX_HUB_TOKEN, else the token of the last login there, else None.

    Raises CredentialsUnsafe where it would be sent unencrypted to another machine, or others can read the file, and
    Unauthenticated where no token is written so.
    """
    if said := os.environ.get(ENVIRONMENT, "").strip():
        token = sendable(said, ENVIRONMENT)
    elif (kept := _read().get(str(address))) is not None:
        token = sendable(kept, f"the token kept for {address}")
    else:
        return None
    check_private(address)
    return token


def sendable(text: str, what: str) -> str:
    """`text` without the white space around it; raises Unauthenticated where gRPC could not send it."""
    token = text.strip()
    strange = next((character for character in token if not (character.isascii() and character.isprintable())), None)
    if strange is not None:
        raise Unauthenticated(f"{what} has a character that no token has, {strange!a}: was it copied whole, and alone?")
    return token


def check_private(address: Address) -> None:
    """Raise CredentialsUnsafe where a token sent to this address could be read on the way."""
    if not address.private and not address.plaintext_token:
        raise CredentialsUnsafe(
            f"a token is not sent unencrypted to {address.authority}: use grpcs://{address.authority}, or add "
            "?plaintext-token=yes where the network in between is yours"
        )


def remember(address: Address, token: str | None) -> None:
    """Keep this server's token; None forgets it."""
    known = _read()
    if token is None:
        known.pop(str(address), None)
    else:
        known[str(address)] = token
    path = credentials_file()
    temporary = path.with_name(f".credentials.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(known, file, indent=2)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HubUnavailable(f"{path} cannot be written: {error.strerror}") from error


def _read() -> dict[str, str]:
    path = credentials_file()
    try:
        with path.open(encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise CredentialsUnsafe(f"{path} can be read by others: run `chmod 600 {path}`")
            value = json.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise HubUnavailable(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise HubUnavailable(f"{path} is damaged: remove it and log in again") from error
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise HubUnavailable(f"{path} is damaged: remove it and log in again")
    return value
