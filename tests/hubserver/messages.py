"""What travels: a request, an answer, a refusal. Handlers are functions from one to the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """One request. Header names are in lower case."""

    method: str
    target: str
    """Path and query, as sent."""
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    @property
    def token(self) -> str | None:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme == "Bearer" and token else None

    def flag(self, name: str) -> bool:
        """A boolean of the query."""
        return self.query.get(name, ["false"])[0].lower() in {"true", "1"}

    def json(self) -> Any:
        """The body, read as JSON; nothing at all counts as {}."""
        try:
            return json.loads(self.body or b"{}")
        except ValueError:
            raise RefusedError(400, message="the body is no JSON") from None

    def without(self, header: str) -> Request:
        """The same request without a header."""
        return replace(self, headers={name: value for name, value in self.headers.items() if name != header})


@dataclass(frozen=True)
class Answer:
    """One answer."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    """The connection is closed after that many bytes of the body; -1: before anything is said."""
    pace: float = 0.0
    """Seconds before each byte of the body."""
    slow_head: bool = False
    """The head has the same pace."""


class RefusedError(Exception):
    """An answer that says no, the way the real Hub does: a status, X-Error-Code and X-Error-Message."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(f"{status} {code} {message}")
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def answer(self) -> Answer:
        """As it is sent."""
        headers = {"Content-Type": "application/json"}
        headers |= {name.replace("_", "-"): value for name, value in self.headers.items()}
        if self.code:
            headers["X-Error-Code"] = self.code
        if self.message:
            headers["X-Error-Message"] = self.message.replace("\n", " ")
        return Answer(self.status, headers, json.dumps({"error": self.message}).encode())


def as_json(value: Any, status: int = 200) -> Answer:
    """A JSON answer."""
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


def part_of(size: int, request: Request) -> tuple[int, int] | None:
    """(first byte, end) that the Range header asks for, or None for all of it."""
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if wanted is None or wanted.group(0) == "bytes=-":
        return None
    first, last = wanted.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise RefusedError(416, message="Range Not Satisfiable", Content_Range=f"bytes */{size}")
    return start, stop


def content(size: int, read: Callable[[int, int], bytes], request: Request, headers: Mapping[str, str]) -> Answer:
    """The bytes that the request asks for; `read(start, stop)` fetches them."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    part = part_of(size, request)
    if part is None:
        return Answer(200, headers, read(0, size))
    start, stop = part
    return Answer(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, read(start, stop))


def unquoted(groups: Mapping[str, str | None]) -> dict[str, str]:
    """The parts of a path, decoded."""
    return {name: unquote(value) for name, value in groups.items() if value is not None}
