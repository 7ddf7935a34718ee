"""A web server that knows nothing of channels."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from tests.hubserver.messages import Answer, Request
from tests.hubserver.server import Listener


class Web:
    """A plain web server over a folder. Knows ETags, and no ranges."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: list[tuple[str, int]] = []
        self.tokens: set[str | None] = set()
        self.logins: list[str | None] = []
        """The Authorization headers."""
        self.targets: list[str] = []
        """Paths with queries."""
        self.replaced: dict[str, Answer] = {}
        self.wants = ""
        """The only Authorization that is let in; empty: everybody is."""
        self.listener = Listener(self.answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.port}"

    def answer(self, request: Request) -> Answer:
        self.tokens.add(request.token)
        self.logins.append(request.headers.get("authorization"))
        self.targets.append(request.target)
        if self.wants and self.logins[-1] != self.wants:
            return Answer(401)
        found = self.replaced.get(request.path) or self.serve(request)
        self.log.append((request.path, found.status))
        return found

    def serve(self, request: Request) -> Answer:
        file = self.folder / request.path.lstrip("/")
        if not file.is_file():
            return Answer(404)
        data = file.read_bytes()
        etag = f'"{sha256(data).hexdigest()[:16]}"'
        if request.headers.get("if-none-match") == etag:
            return Answer(304, {"ETag": etag})
        return Answer(200, {"ETag": etag}, data)
