"""One GET request: what fetch.py and ranges.py share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nestpatch.hub.client import Reference, Snapshot, explained, first_line, network_error
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
