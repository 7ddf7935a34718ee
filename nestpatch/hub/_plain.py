"""One GET request with the standard library.

For channels and packs: importing huggingface_hub and its HTTP library takes longer than the requests of an `update`, and
23 MB of memory. It is for the plain case alone. A proxy, a login in the address, HF_HUB_OFFLINE and certificates that only that
library knows are left to it.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import NamedTuple
from urllib.parse import urlsplit

from nestpatch.hub.retry import AgainError

_FILES = {200, 206}
"""Statuses of answers that are a file, or a part of one."""
_BLOCK = 64 << 10
_MOST_OF_AN_ERROR = 64 << 10
"""Bytes of an answer that is no file: it may say why."""


class Reply(NamedTuple):
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    data: bytes
    """At most a block more than the limit; empty where only the status counts."""


def suits(url: str, headers: Mapping[str, str]) -> bool:
    """Whether `get` can make a request.

    Args:
        url: The full address.
        headers: Headers to send.

    Returns:
        False where the HTTP library of huggingface_hub is needed.
    """
    from urllib.request import getproxies

    from huggingface_hub import constants

    plain = all(re.fullmatch(r"[!-~]+", text) for text in (url, *headers)) and "@" not in urlsplit(url).netloc
    proxied = any(getproxies().get(name) for name in ("http", "https", "all"))
    return (
        plain
        and all(re.fullmatch(r"[ -~]*", value) for value in headers.values())
        and not (proxied or constants.HF_HUB_OFFLINE)
    )


def wanted(status: int, limit: int) -> int:
    """How much of an answer's body is read.

    Args:
        status: Of the answer.
        limit: Bytes that are wanted of a file.

    Returns:
        Bytes; -1 where only the status counts.
    """
    return limit if status in _FILES else _MOST_OF_AN_ERROR if status >= 400 else -1


def collected(blocks: Iterable[bytes], most: int, check: Callable[[], None]) -> bytes:
    """A body, as it was sent.

    Args:
        blocks: Its bytes, in order.
        most: Bytes that are wanted, as `wanted` returns them. What is longer is cut soon after.
        check: Called after each block; raises where the time is over.

    Returns:
        The bytes.
    """
    data = bytearray()
    for block in blocks if most >= 0 else ():
        data += block
        check()
        if len(data) > most:
            break
    return bytes(data)


def get(url: str, headers: Mapping[str, str], limit: int, wait: float, check: Callable[[], None]) -> Reply | None:
    """Makes a request, and follows no redirect.

    Args:
        url: The full address.
        headers: Headers to send.
        limit: Bytes of the body that are wanted at most; what is longer is cut soon after.
        wait: Seconds that connecting, and each read, may take.
        check: Called between reads; raises where the time is over.

    Returns:
        The answer; None where the certificate cannot be checked with what this Python knows.

    Raises:
        AgainError: The connection cannot be made, or broke.
    """
    parts = urlsplit(url)
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        connection: HTTPConnection = HTTPSConnection(parts.hostname or "", parts.port, timeout=wait, context=context)
    else:
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=wait)
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    try:
        connection.request("GET", target, headers={"Accept": "*/*", **headers, "Accept-Encoding": "identity"})
        response = connection.getresponse()
        most = wanted(response.status, limit)
        data = collected(iter(partial(response.read1, _BLOCK), b""), most, check)
        # http.client does not say so itself when a part of the announced bytes is missing.
        if len(data) <= most and response.length:
            raise AgainError(f"the connection broke, with {response.length} bytes missing")
        return Reply(response.status, _joined(response), data)
    except ssl.SSLCertVerificationError:
        return None
    except (OSError, HTTPException) as error:
        raise AgainError((str(error) or type(error).__name__).splitlines()[0][:200]) from error
    finally:
        connection.close()


def _joined(response: HTTPResponse) -> dict[str, str]:
    """The headers. One that is there twice has both values, so that it does not pass for either."""
    found: dict[str, str] = {}
    for name, value in response.getheaders():
        key = name.lower()
        found[key] = f"{found[key]}, {value}" if key in found else value
    return found
