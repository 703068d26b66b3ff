"""Where an S3 hub's objects are, and what went wrong where they cannot be had.

    s3://bucket/prefix[?endpoint=https://host:port][&region=name]

Credentials are never part of the URL: `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or what the machine was given
(web identity, container and instance roles). `AWS_ENDPOINT_URL` and `AWS_REGION` stand in for the two parameters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from obstore import exceptions
from obstore.store import S3Store

from hub.errors import BucketNotFound, HubUnavailable, StorageRefused, StorageUnreachable

if TYPE_CHECKING:
    from obstore.store import ClientConfig  # a type, not there at run time

_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
_PREFIX_PART: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)
_REGION: Final = re.compile(r"[a-z0-9-]{1,40}", re.ASCII)
_ENDPOINT: Final = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", re.ASCII)
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>")
_STATUS: Final = re.compile(r"status code: (\d{3})")
_CONNECT_SECONDS: Final = 5
_REQUEST_SECONDS: Final = 120  # one request with its body; parts are small enough for slow lines (see `hub.blobs.s3`)
_RETRIES: Final = 3
_RETRY_SECONDS: Final = 10  # after this long no request is begun again


@dataclass(frozen=True)
class Bucket:
    """A bucket, and the prefix that all of the hub's keys have in it."""

    name: str
    prefix: str = ""  # without slashes at either end
    endpoint: str | None = None  # None: AWS_ENDPOINT_URL, else Amazon's
    region: str | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """The place that an s3:// URL names; raises HubUnavailable, which never repeats credentials."""
        try:
            parts = urlsplit(url)
            options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        except ValueError as error:
            raise HubUnavailable("the S3 URL cannot be read; write s3://bucket/prefix") from error
        if "@" in parts.netloc:
            raise HubUnavailable(
                "an S3 URL carries no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
            )
        if parts.scheme != "s3" or parts.fragment or not _BUCKET.fullmatch(parts.netloc):
            raise HubUnavailable("the S3 URL names no bucket; write s3://bucket/prefix")
        prefix = unquote(parts.path).strip("/")
        pieces = prefix.split("/") if prefix else []
        if not all(_PREFIX_PART.fullmatch(piece) and piece.strip(".") for piece in pieces):
            raise HubUnavailable("an S3 prefix is made of letters, digits, '.', '_' and '-', between slashes")
        if unknown := options.keys() - {"endpoint", "region"}:
            raise HubUnavailable(f"an S3 URL has no parameter {min(unknown)[:40]!a}, only endpoint and region")
        endpoint = options.get("endpoint")
        region = options.get("region")
        if region is not None and not _REGION.fullmatch(region):
            raise HubUnavailable("an S3 region is a short name such as eu-central-1")
        return cls(parts.netloc, prefix, None if endpoint is None else _endpoint(endpoint), region)

    @property
    def url(self) -> str:
        """The URL, in one form for one place."""
        options = {"endpoint": self.endpoint, "region": self.region}
        query = urlencode({name: value for name, value in options.items() if value}, safe=":/", quote_via=quote)
        return f"s3://{self.name}" + (f"/{self.prefix}" if self.prefix else "") + (f"?{query}" if query else "")

    def connect(self) -> S3Store:
        """A client; nothing is asked of the service yet. Raises HubUnavailable for settings that cannot be."""
        said = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        endpoint = self.endpoint or (_endpoint(said) if said else None)
        client: ClientConfig = {
            "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
            "timeout": timedelta(seconds=_REQUEST_SECONDS),
        }
        if endpoint is not None and endpoint.startswith("http://"):
            client["allow_http"] = True  # asked for by name; otherwise TLS or nothing
        region = self.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        try:
            return S3Store(
                self.name,
                prefix=self.prefix or None,
                region=region,
                checksum_algorithm="sha256",  # the service checks what arrives
                client_options=client,
                retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)},
                config={} if endpoint is None else {"endpoint": endpoint},
            )
        except (exceptions.BaseError, ValueError) as error:
            raise HubUnavailable("the settings for S3 cannot be used; see AWS_… in the environment") from error


def _endpoint(text: str) -> str:
    """The endpoint without a closing slash; the client would not refuse a broken one but panic."""
    text = text.rstrip("/")
    found = _ENDPOINT.fullmatch(text)
    if found is None or int((found[2] or ":0")[1:]) > 65535:
        raise HubUnavailable("an S3 endpoint is written https://host:port")
    return text


@contextmanager
def reasons(bucket: Bucket) -> Iterator[None]:
    """Turn what obstore raises into a HubUnavailable with a reason; FileNotFoundError means that there is no bucket.

    Nothing inside touches local files. Callers catch AlreadyExistsError, and FileNotFoundError where the object may be
    absent, inside.
    """
    try:
        yield
    except (exceptions.BaseError, OSError) as error:  # its writer raises OSError
        raise reason_of(error, bucket) from error


def no_bucket(error: FileNotFoundError) -> bool:
    """Whether the service said that there is no bucket, not merely no object; it says so only where it has a body."""
    return "NoSuchBucket" in _CODE.findall(str(error))


def reason_of(error: Exception, bucket: Bucket) -> HubUnavailable:
    """The error to raise; never the service's own text, which may show keys and addresses."""
    text = str(error)
    code = next(iter(_CODE.findall(text)), "")
    if isinstance(error, FileNotFoundError):
        return BucketNotFound(f"there is no bucket {bucket.name!r} at the hub's S3 service: make it, or mend the URL")
    refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
    if isinstance(error, refused) or code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return StorageRefused(
                f"the hub's S3 service does not accept the credentials ({code}): see AWS_ACCESS_KEY_ID"
            )
        return StorageRefused(
            f"the hub's S3 service refuses this to the credentials given; they need Get, Put, Delete and List on "
            f"bucket {bucket.name!r}"
        )
    if "InstanceCredentials" in text or "169.254.169.254" in text:
        return StorageRefused("there are no credentials for the hub's S3 service: set AWS_ACCESS_KEY_ID and its secret")
    status = next(iter(_STATUS.findall(text)), "")
    if status and not status.startswith("5"):
        return HubUnavailable(f"the hub's S3 service answered with status {status}{f' ({code})' if code else ''}")
    said = f": it answers with status {status}" if status else ""
    return StorageUnreachable(f"the hub's S3 service cannot be reached just now{said}; try again when it is back")
