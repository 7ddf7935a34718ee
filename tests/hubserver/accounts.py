"""Who may do what, answered with the codes of the real Hub."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.hubserver.messages import RefusedError, Request


@dataclass(frozen=True)
class User:
    """Somebody with a token."""

    name: str
    writes: bool


@dataclass
class Doors:
    """Who may enter one repository."""

    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    """Users who passed the gate."""


WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class Accounts:
    """Tokens and doors. With no token one is anonymous."""

    tokens: dict[str, User] = field(default_factory=lambda: {WRITER: User("acme", True), READER: User("fleet", False)})
    doors: dict[tuple[str, str], Doors] = field(default_factory=dict)
    """(repository type, id) -> its doors."""

    def user(self, request: Request) -> User | None:
        """Who asks. An unknown token is refused even for public things."""
        if request.token is None:
            return None
        if request.token not in self.tokens:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return self.tokens[request.token]

    def of(self, kind: str, repo_id: str) -> Doors:
        """The doors of a repository; they stand open at first."""
        return self.doors.setdefault((kind, repo_id), Doors())

    def check_writer(self, request: Request, repo_id: str) -> None:
        """Only the owner of the name writes."""
        user = self.user(request)
        if user is None:
            raise RefusedError(401, message="Invalid username or password.")
        if not user.writes or user.name != repo_id.partition("/")[0]:
            raise RefusedError(403, message=f"Forbidden: {user.name} has no write access to {repo_id}")

    def check_reader(self, request: Request, kind: str, repo_id: str, *, content: bool = False) -> None:
        """Private repositories look missing to strangers; of gated ones only the content is closed."""
        user, doors = self.user(request), self.of(kind, repo_id)
        inside = user is not None and (user.name == repo_id.partition("/")[0] or user.name in doors.granted)
        if doors.private and not inside:
            raise not_found(user)
        if content and doors.gated and not inside:
            text = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise RefusedError(401 if user is None else 403, "GatedRepo", text)


def not_found(user: User | None) -> RefusedError:
    """Anonymous users are told 401 where others are told 404."""
    if user is None:
        return RefusedError(401, "RepoNotFound", "Invalid username or password.")
    return RefusedError(404, "RepoNotFound", "Repository not found")
