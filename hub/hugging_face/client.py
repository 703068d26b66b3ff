"""huggingface-hub's client, and what went wrong where it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hub.errors import SourceError, SourceInvalid, SourceNotFound, SourceRefused, SourceUnreachable
from hub.hugging_face.address import Address

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def client() -> HfApi:
    """A client of huggingface.co, or of what HF_ENDPOINT names, with this user's token (HF_TOKEN, `hf auth login`)."""
    from huggingface_hub import HfApi  # takes a third of a second, and few verbs need it
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the hub draws its own
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="loraplex")


@contextmanager
def reasons(address: Address) -> Iterator[None]:
    """Turn what the client raises into a SourceError with a reason."""
    from huggingface_hub import errors

    http_error = vars(errors)["HTTPError"]  # of whichever HTTP library this release of it uses
    try:
        yield
    except (http_error, OSError, RuntimeError, ValueError) as error:
        # Uploads are done in threads, and what went wrong there comes wrapped.
        wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
        raise _reason(address, error.__cause__ if wrapped else error, http_error) from error  # type: ignore[arg-type]


def _reason(address: Address, error: Exception, http_error: type[Exception]) -> SourceError:
    """The error to raise; never a token, nor an address with a signature in it."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return SourceRefused(f"{address} is gated: ask for access on its page, and run `hf auth login`")
        case errors.RevisionNotFoundError():
            return SourceNotFound(f"{address.repository} has no revision {address.revision or 'main'}")
        case errors.RepositoryNotFoundError():
            return SourceNotFound(
                f"Hugging Face has no model {address.repository}, or not for you: run `hf auth login`, or set HF_TOKEN"
            )
        case errors.OfflineModeIsEnabled():
            return SourceUnreachable(f"{address} is not asked for: HF_HUB_OFFLINE is set")
        case errors.HfHubHTTPError():
            return _by_status(address, error.response.status_code if error.response is not None else 0)
        case errors.LocalEntryNotFoundError():
            return SourceUnreachable(f"{address} cannot be downloaded: Hugging Face does not answer")
        case errors.HFValidationError():
            return SourceInvalid(f"{address} is no address that Hugging Face knows")
        case ConnectionError() | TimeoutError():
            return SourceUnreachable(f"Hugging Face does not answer: {type(error).__name__}")
        case OSError() if error.errno:
            return SourceError(f"{address} cannot be transferred: {os.strerror(error.errno)}")
        case ValueError() if "metadata" in str(error):
            first = " ".join(str(error).split())[:300]
            return SourceInvalid(f"Hugging Face does not take the card: {first}")
    if isinstance(error, http_error):
        return SourceUnreachable(f"Hugging Face does not answer: {type(error).__name__}")
    return SourceError(f"{address} cannot be transferred: {type(error).__name__}")


def _by_status(address: Address, status: int) -> SourceError:
    if status in (401, 403):
        return SourceRefused(
            f"Hugging Face does not let you do this with {address.repository}: run `hf auth login` with a token that "
            "may write"
        )
    kind = SourceUnreachable if status >= 500 or status == 429 else SourceError
    return kind(f"Hugging Face answered with status {status} for {address}")
