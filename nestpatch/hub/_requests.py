"""One GET request with the HTTP library of huggingface_hub: what fetch.py and ranges.py share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from nestpatch.errors import HubAnswerError
from nestpatch.hub.client import Reference, Snapshot, explained, first_line, http_library, network_error, shown
from nestpatch.hub.retry import TRANSIENT, AgainError, retry_after


@contextmanager
def streamed(
    url: str, headers: Mapping[str, str], what: Reference | Snapshot | str, endpoint: str, *, follow_redirects: bool
) -> Iterator[Any]:
    """One GET request, whose body is read inside the block.

    Args:
        url: The full address; may contain credentials.
        headers: Headers to send.
        what: What is asked for, for messages.
        endpoint: The server, for messages.
        follow_redirects: Whether the HTTP library follows redirects.

    Yields:
        The response of httpx.

    Raises:
        AgainError: The connection broke, or the status is transient.
        HubError: huggingface_hub raised an error, here or inside the block.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    # Compressed bytes would have another length than the server says.
    asked, wait = {**headers, "Accept-Encoding": "identity"}, constants.HF_HUB_DOWNLOAD_TIMEOUT
    with explained(what, endpoint):
        try:
            with get_session().stream("GET", url, headers=asked, timeout=wait, follow_redirects=follow_redirects) as response:
                if response.status_code in TRANSIENT:
                    raise AgainError(f"the server answered {response.status_code}", retry_after(response.headers))
                yield response
        except HfHubHTTPError:
            raise
        except network_error() as error:
            raise AgainError(first_line(error)) from error


def raise_for(status: int, headers: Mapping[str, str], data: bytes, url: str, what: Reference | Snapshot | str) -> None:
    """Raises the error that huggingface_hub sees in an answer with a status of 400 or more.

    Args:
        status: The status.
        headers: The headers, names in lower case.
        data: The beginning of the body.
        url: The full address; may contain credentials.
        what: What was asked for, for messages.

    Raises:
        HubError: Always.
    """
    from huggingface_hub.utils import hf_raise_for_status

    library = http_library()
    # The body is here as a whole, whatever these said about the way it came.
    kept = {
        name: value
        for name, value in headers.items()
        if name not in {"content-encoding", "content-length", "transfer-encoding"}
    }
    with explained(what, urlsplit(shown(url)).netloc):
        hf_raise_for_status(library.Response(status, headers=kept, content=data, request=library.Request("GET", url)))
    raise HubAnswerError(f"{shown(url)} answered {status}")
