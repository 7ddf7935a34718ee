"""Requests to the server of a model: JSON in and out, retried by the loop of `nestpatch.hub.retry`.

An answer is read as the text of a stranger. The API key is sent to the address that was given and to no other, since redirects
are not followed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nestpatch.errors import DataError, EndpointAccessError, EndpointAnswerError, EndpointUnavailableError
from nestpatch.hub.client import http_library, network_error, scrubbed
from nestpatch.hub.deadline import Deadline
from nestpatch.hub.retry import TRANSIENT, AgainError, retried, retry_after

KEY_VARIABLE = "NESTPATCH_API_KEY"
"""The environment variable that holds the API key."""
JUDGE_KEY_VARIABLE = "NESTPATCH_JUDGE_API_KEY"
"""The environment variable that holds the API key of a server that judges: that of MODEL's server is not sent to it."""
_WAITS = (0.5, 2.0, 5.0, 10.0)
"""Seconds between attempts to get an answer: a server that counts requests per minute needs longer ones than a file server."""
_CONNECT = 10.0
"""Seconds for a connection."""
_LIMIT = 16 << 20
"""Bytes of an answer at most."""
MAX_TIMEOUT = 86_400.0
"""Seconds that a server may be given for an answer at most: waits of threads end at a finite time."""
_LOCAL = {"localhost", "127.0.0.1", "::1"}
T = TypeVar("T")


@dataclass(frozen=True)
class EndpointSettings:
    """How an endpoint is asked.

    Attributes:
        model: The name of a model on the server; None: the only one that it lists.
        concurrency: Requests at a time.
        timeout: Seconds for one answer, all attempts together; pauses between them do not count.
        key_variable: The environment variable that holds the API key; without a key none is sent.
    """

    model: str | None = None
    concurrency: int = 8
    timeout: float = 300.0
    key_variable: str = KEY_VARIABLE

    def __post_init__(self) -> None:
        """Raises DataError for a timeout that is no time."""
        if not 0 < self.timeout <= MAX_TIMEOUT:  # turned this way so that NaN is refused
            reason = f"{self.timeout:g} seconds are no time limit for an answer"
            raise DataError(reason, advice=f"Give a number over 0 and at most {MAX_TIMEOUT:g}.")


def is_endpoint(model: object) -> bool:
    """Whether a model is named by the address of a server.

    Args:
        model: What a verb takes as a model.

    Returns:
        True for a text that begins with http:// or https://.
    """
    return isinstance(model, str) and model.lower().startswith(("http://", "https://"))


class Connection:
    """Connections to one server. Several threads may use it at once; close it at the end.

    Attributes:
        url: The address of the API, such as http://localhost:8000/v1.
        root: The address of the server, without /v1.
        settings: How it is asked.
        notes: What a reader of the results must know.
    """

    def __init__(self, url: str, settings: EndpointSettings) -> None:
        """Checks the address and reads the API key; nothing is sent yet.

        Args:
            url: The address; without a path /v1 is added.
            settings: How the server is asked.

        Raises:
            DataError: The address or the key cannot be used.
        """
        self.settings = settings
        self.url = checked_url(url, settings.key_variable)
        self.root = self.url.removesuffix("/v1")
        self.notes: list[str] = []
        # A read may take as long as the whole answer: most servers send nothing before it is complete.
        http = http_library()
        self._key = self._read_key()
        timeout = http.Timeout(self.settings.timeout, connect=min(_CONNECT, self.settings.timeout))
        self._client = http.Client(headers=self._headers(), timeout=timeout, limits=http.Limits(max_connections=None))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def quoted(self, text: str, most: int = 200) -> str:
        """What a server wrote, for a message: without the API key, which a server may repeat, and without secrets in addresses.

        Args:
            text: The text.
            most: Characters that are quoted.

        Returns:
            The beginning of the text, with *** for the key.
        """
        return scrubbed(text.replace(self._key, "***") if self._key else text)[:most]

    def _line(self, error: Exception) -> str:
        """The first line of an error's text, which may contain what the server wrote."""
        return self.quoted((str(error) or type(error).__name__).splitlines()[0])

    def _read_key(self) -> str:
        """The API key; empty without one. Raises DataError."""
        name = self.settings.key_variable
        key = os.environ.get(name, "").strip()
        if not key and name not in (KEY_VARIABLE, JUDGE_KEY_VARIABLE):
            raise DataError(f"the environment variable {name} holds no API key", advice=f"export {name}=...")
        if not (key.isascii() and key.isprintable()):
            raise DataError(f"the environment variable {name} holds characters that no API key has")
        parts = urlsplit(self.url)
        if key and parts.scheme == "http" and parts.hostname not in _LOCAL:
            self.notes.append(f"the API key is sent to {parts.hostname} without encryption: use https")
        return key

    def _headers(self) -> dict[str, str]:
        from nestpatch import __version__

        headers = {"User-Agent": f"nestpatch/{__version__}", "Accept-Encoding": "identity"}
        return headers | ({"Authorization": f"Bearer {self._key}"} if self._key else {})

    def json(self, method: str, url: str, body: Any = None, waits: Sequence[float] | None = _WAITS) -> Any:
        """Sends a request, and parses the answer.

        Args:
            method: "GET" or "POST".
            url: The full address.
            body: A JSON value to send; None sends nothing.
            waits: Seconds between the attempts; None: those of the Hub.

        Returns:
            The JSON value of the answer.

        Raises:
            EndpointError: The server does not answer with JSON.
        """
        data = self.text(method, url, body, waits)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise self.strange(url, data) from None

    def text(self, method: str, url: str, body: Any = None, waits: Sequence[float] | None = _WAITS) -> str:
        """Sends a request.

        Args:
            method: "GET" or "POST".
            url: The full address.
            body: A JSON value to send; None sends nothing.
            waits: Seconds between the attempts; None: those of the Hub.

        Returns:
            The text of the answer.

        Raises:
            EndpointUnavailableError: The server cannot be reached, fails, or is too slow.
            EndpointAccessError: It wants another API key.
            EndpointAnswerError: It refuses the request, or answers too much.
        """

        def attempt() -> bytes:
            with closing(self._open(method, url, body)) as response:
                return self._read(response, url)

        return self._retried(attempt, url, waits).decode("utf-8", "replace")

    def lines(self, url: str, body: Any) -> Iterator[str]:
        """Sends a POST request, and yields the lines of the answer as they come. Retried until the answer begins.

        Args:
            url: The full address.
            body: A JSON value to send.

        Yields:
            The lines, without their ends.

        Raises:
            EndpointError: The server does not answer, or breaks off.
        """
        response = self._retried(lambda: self._open("POST", url, body), url, _WAITS)
        with closing(response):
            try:
                yield from response.iter_lines()
            except network_error() as error:
                raise EndpointUnavailableError(f"{url} broke off its answer: {self._line(error)}") from error

    def _retried(self, work: Callable[[], T], url: str, waits: Sequence[float] | None) -> T:
        return retried(work, Deadline.of(self.settings.timeout), url, waits=waits, error=EndpointUnavailableError)

    def _open(self, method: str, url: str, body: Any) -> Any:
        """One attempt: a response with status 200 whose body is not read yet. Raises AgainError or EndpointError."""
        try:
            request = self._client.build_request(method, url, json=body)
            response = self._client.send(request, stream=True, follow_redirects=False)
        except network_error() as error:
            raise AgainError(self._line(error)) from error
        if response.status_code == 200:
            return response
        with closing(response):
            raise self._refusal(response, url)

    def _refusal(self, response: Any, url: str) -> Exception:
        """What a status other than 200 means, to be raised."""
        status, said = response.status_code, self._said(self._read(response, url))
        if status in TRANSIENT:
            return AgainError(f"the server answered {status}{said}", retry_after(response.headers))
        reason = f"{url} answered {status}{said}"
        if status in {401, 403}:
            return EndpointAccessError(reason)
        advice = "Check the address: most servers have their API below /v1." if status in {404, 405} else None
        return EndpointAnswerError(reason, advice=advice)

    def _read(self, response: Any, url: str) -> bytes:
        data = bytearray()
        try:
            for block in response.iter_raw():
                data += block
                if len(data) > _LIMIT:
                    raise EndpointAnswerError(f"{url} answers with more than {_LIMIT >> 20} MiB")
        except network_error() as error:
            raise AgainError(self._line(error)) from error
        return bytes(data)

    def strange(self, url: str, answer: object) -> EndpointAnswerError:
        """The error for an answer of another form than the API has.

        Args:
            url: What was asked.
            answer: Its text, or its JSON value.

        Returns:
            The error, to be raised.
        """
        text = self.quoted(answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False), 120)
        advice = "Give the address of an OpenAI-compatible API, such as http://localhost:8000/v1."
        return EndpointAnswerError(f"{url} does not answer like an OpenAI-compatible server: {text!r}", advice=advice)

    def _said(self, body: bytes) -> str:
        """What the server gives as the reason, for a message; empty where it gives none."""
        text: Any = body.decode("utf-8", "replace")
        try:
            value: Any = json.loads(text)
            for name in ("error", "message", "detail"):
                value = value.get(name, value) if isinstance(value, Mapping) else value
            text = value if isinstance(value, str) else text
        except (ValueError, RecursionError):
            pass
        line = next(iter(text.strip().splitlines()), "")
        return f": {self.quoted(line)}" if line else ""


def checked_url(url: str, key_variable: str = KEY_VARIABLE) -> str:
    """The address of an API in its plain form.

    Args:
        url: As the user wrote it.
        key_variable: Where the API key goes, for the error.

    Returns:
        The address without a slash at its end, with /v1 where it had no path.

    Raises:
        DataError: It is no http or https address, or contains a password, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError as error:
        raise DataError(f"an address of a server cannot be read: {scrubbed(str(error))}") from error
    if not is_endpoint(url) or not parts.hostname or not url.isprintable() or " " in url:
        raise DataError(f"{scrubbed(url)!r} is not the address of a server", advice="Write http://HOST:PORT/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        advice = f"Put an API key into the environment variable {key_variable}: addresses are in messages and reports."
        raise DataError("the address of a server contains a password, a query or a fragment", advice=advice)
    _require_host_name(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def _require_host_name(url: str) -> None:
    """Raises DataError for a host name that the HTTP library or the resolver cannot encode, such as one with an empty label."""
    http = http_library()
    try:
        http.URL(url).raw_host.decode("ascii").encode("idna")
    except (http.InvalidURL, UnicodeError) as error:
        raise DataError(f"{scrubbed(url)!r} has a host name that cannot be: {scrubbed(str(error))}") from error
