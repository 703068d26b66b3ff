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
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # the hub draws its own
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="loraplex")


@contextmanager
def reasons(address: Address) -> Iterator[None]:
    """Turn what the client raises into a SourceError with a reason."""
    from huggingface_hub import errors

    http_error = vars(errors)["HTTPError"]  # of whichever HTTP library this release of it uses
    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceRefused(f"{address} is gated: ask for access on its page, and run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise SourceNotFound(f"{address.repository} has no revision {address.revision or 'main'}") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceNotFound(
            f"Hugging Face has no model {address.repository}, or not for you: run `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceUnreachable(f"{address} is not asked for: HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise SourceRefused(
                f"Hugging Face does not let you do this with {address.repository}: run `hf auth login` with a token "
                "that may write"
            ) from error
        kind = SourceUnreachable if status >= 500 or status == 429 else SourceError
        raise kind(f"Hugging Face answered with status {status} for {address}") from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceUnreachable(f"{address} cannot be downloaded: Hugging Face does not answer") from error
    except errors.HFValidationError as error:
        raise SourceInvalid(f"{address} is no address that Hugging Face knows") from error
    except (http_error, ConnectionError, TimeoutError) as error:
        raise SourceUnreachable(f"Hugging Face does not answer: {type(error).__name__}") from error
    except OSError as error:
        what = os.strerror(error.errno) if error.errno else type(error).__name__
        raise SourceError(f"{address} cannot be transferred: {what}") from error
