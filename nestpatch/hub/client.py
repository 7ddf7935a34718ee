"""Looking up a repository: which commit and which files. Asked once, so that everything after it reads the same commit.

Every request to a server runs inside `explained`, which turns the exceptions of huggingface_hub into HubError and its kinds.
Tokens come from the usual places: HF_TOKEN, or the file that `hf auth login` writes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

from nestpatch.errors import HubAccessError, HubAnswerError, HubError, HubNotFoundError, HubUnavailableError
from nestpatch.hub.deadline import Deadline, SlowError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

SCHEME = "hub://"
_LOOK_UP_BYTES = 4 << 20
"""Size of the answer to a look-up for which the Hub is given time."""
_WEB_LOGIN = (
    "Write the login for this host into ~/.netrc (machine HOST login NAME password SECRET). "
    "Credentials in an address are used once and stored nowhere: a model that follows the channel has none."
)
_FILE_SUFFIXES = (".nest", ".sig", ".gguf", ".safetensors", ".onnx", ".json", ".jsonl")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REFERENCE = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9._/+-]{{0,254}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Reference:
    """`owner/name[@revision]` as the user wrote it."""

    repo_id: str
    revision: str | None = None
    """A branch, a tag or a commit; None: the main branch."""

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """Reads the form that users write.

        Args:
            text: owner/name[@revision], with or without hub:// before it.

        Returns:
            The reference; None when the text has another form.
        """
        found = _REFERENCE.fullmatch(text.removeprefix(SCHEME))
        if found is None or any(bad in found[0] for bad in ("..", "--", "//")):
            return None
        return cls(found["repo"], found["revision"])

    @property
    def commit(self) -> str | None:
        """The revision if it is a full commit id, which cannot move; else None."""
        return self.revision if self.revision is not None and _COMMIT.fullmatch(self.revision) else None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def looks_local(text: str) -> bool:
    """Whether a text without a scheme is more likely a mistyped path than a repository of the Hub.

    Such a text is never sent to the Hub: "models/llama" beside a folder `models`, "runs/pack.nest", "~/models".

    Args:
        text: What the user wrote, which is not the path of anything on this disk.

    Returns:
        True when it should be treated as a path; False for hub://owner/name, whatever it looks like.
    """
    if text.startswith(SCHEME):
        return False
    first = text.replace("\\", "/").partition("/")[0]
    is_file = text.partition("@")[0].lower().endswith(_FILE_SUFFIXES)
    # os.path.isdir answers no where Path.is_dir raises.
    return is_file or text.startswith((".", "~", "/", "\\")) or "\\" in text or os.path.isdir(first)  # noqa: PTH112


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository. It never changes, whatever happens to branches and tags."""

    repo_id: str
    commit: str
    files: tuple[str, ...]
    """Paths inside the repository."""

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]}"


def look_up(repo_id: str, revision: str | None = None, *, endpoint: str | None = None) -> Snapshot:
    """Asks the Hub for a commit and the list of its files, in one request.

    Never uses a cache: when the Hub is unreachable, an old commit must not pass for the current one.

    Args:
        repo_id: owner/name.
        revision: A branch, a tag or a commit; None: the main branch.
        endpoint: Address of the Hub; None: that of HF_ENDPOINT.

    Returns:
        The snapshot that the revision names now.

    Raises:
        HubNotFoundError: There is no such repository or revision, or it is hidden from this user.
        HubAccessError: The repository is gated, or the token is refused.
        HubUnavailableError: The Hub cannot be reached, fails, or is too slow.
        HubAnswerError: The answer is not that of a Hub, or names another commit.
    """
    from huggingface_hub import constants

    api, wanted = client(endpoint), Reference(repo_id, revision)
    with explained(wanted, api.endpoint):
        try:
            wait = constants.HF_HUB_ETAG_TIMEOUT
            facts = Deadline(_LOOK_UP_BYTES).run(
                lambda: api.model_info(repo_id, revision=revision, expand=["sha", "siblings"], timeout=wait)
            )
            files = tuple(sorted(file.rfilename for file in facts.siblings or ()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # Not JSON, or without what every answer of a Hub has: a login page, a proxy's greeting.
            raise HubAnswerError(
                f"{shown(api.endpoint)} does not answer like a Hub, asked for {wanted}: {first_line(error)}"
            ) from error
        except SlowError as error:
            raise HubUnavailableError(f"cannot reach {shown(api.endpoint)} for {wanted}: {error}") from error
    if facts.sha is None or not _COMMIT.fullmatch(facts.sha) or facts.sha != (wanted.commit or facts.sha):
        raise HubAnswerError(f"{shown(api.endpoint)} names no commit, or another one, for {wanted}: {facts.sha!r}")
    return Snapshot(repo_id, facts.sha, files)


def client(endpoint: str | None = None) -> HfApi:
    """The client of huggingface_hub.

    Args:
        endpoint: Address of the Hub; None: that of HF_ENDPOINT.

    Returns:
        A client that names nestpatch to the Hub.
    """
    from huggingface_hub import HfApi

    from nestpatch import __version__

    return HfApi(endpoint=endpoint, library_name="nestpatch", library_version=__version__)


def token() -> str | None:
    """This user's token for the Hub: HF_TOKEN, or what huggingface_hub finds elsewhere.

    Returns:
        The token; None for a user who has none, or forbids to send it unasked (HF_HUB_DISABLE_IMPLICIT_TOKEN).
    """
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    given = (os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or "").strip()
    # Its import takes longer than a request: only where it would find something else.
    elsewhere = not given and ("google.colab" in sys.modules or os.path.lexists(constants.HF_TOKEN_PATH))
    if elsewhere or os.environ.get("HF_OIDC_RESOURCE"):
        from huggingface_hub import get_token

        return get_token()
    return given or None


def default_endpoint() -> str:
    """The address of the Hub: that of HF_ENDPOINT where it is set."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def request_headers() -> dict[str, str]:
    """Who asks, and this user's token. The headers of huggingface_hub can cost a request of their own.

    Returns:
        Headers for the Hub, and for no other server.
    """
    from nestpatch import __version__

    secret = token()
    return {"User-Agent": f"nestpatch/{__version__}"} | ({"Authorization": f"Bearer {secret}"} if secret else {})


def resolve_url(endpoint: str, repo_id: str, revision: str, path: str) -> str:
    """The address of a file in a model repository of the Hub.

    Args:
        endpoint: Address of the Hub.
        repo_id: owner/name.
        revision: A branch or a commit.
        path: The file's path in the repository.

    Returns:
        The full address, which may lead to another server.
    """
    return f"{endpoint}/{quote(repo_id)}/resolve/{quote(revision, safe='')}/{quote(path)}"


@contextmanager
def explained(what: Reference | Snapshot | str, endpoint: str) -> Iterator[None]:
    """Turns what a request may raise into a HubError that names the repository and what to do.

    Args:
        what: What is asked for; a text for a web server that is not a Hub.
        endpoint: The server.

    Yields:
        Nothing; the request runs inside the block.

    Raises:
        HubError: In place of the exceptions of huggingface_hub and of its HTTP library.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    endpoint = shown(endpoint)
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubUnavailableError(
            f"{what} must be read from {endpoint}, but HF_HUB_OFFLINE is set", advice="Unset HF_HUB_OFFLINE."
        ) from error
    except HfHubHTTPError as error:
        raise _hub_error(error, what, endpoint) from error
    except network_error() as error:
        raise HubUnavailableError(f"cannot reach {endpoint} for {what}: {first_line(error)}") from error


def http_library() -> ModuleType:
    """The HTTP library that huggingface_hub is installed with: httpx, or httpx2 since its version 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


def network_error() -> type[Exception]:
    """The base of what the HTTP library raises for broken connections."""
    return cast("type[Exception]", http_library().HTTPError)


def _hub_error(error: HfHubHTTPError, what: Reference | Snapshot | str, endpoint: str) -> HubError:
    from huggingface_hub import errors

    status = error.response.status_code
    kind: type[HubError] = HubAnswerError
    if status in {401, 403}:
        kind = HubAccessError
    elif status in {408, 429} or status >= 500:
        kind = HubUnavailableError
    if isinstance(what, str):  # a web server that is not a Hub
        reason = f"{what} answered {status}"
        if status == 404:
            return HubNotFoundError(reason, advice="Check the address. Logins for a web server come from ~/.netrc.")
        return kind(reason, advice=_WEB_LOGIN) if kind is HubAccessError else kind(reason)
    page, words = f"{endpoint}/{what.repo_id}", (error.server_message or "no reason given").splitlines()[0]
    words = scrubbed(words)[:200]
    if isinstance(error, errors.GatedRepoError):
        advice = f"Ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN."
        return HubAccessError(f"{what.repo_id} is gated, and this user has no access to it", advice=advice)
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubNotFoundError(f"{endpoint} has no model repository {what.repo_id}, or hides it from this user")
    if isinstance(error, (errors.RevisionNotFoundError, errors.EntryNotFoundError)):
        return HubNotFoundError(f"{page} does not have {what}: {words}", advice=f"See {page}.")
    return kind(f"{endpoint} answered {status} when asked for {what}: {words}")


def first_line(error: Exception) -> str:
    """The first line of an error's text, without secrets, for a message."""
    return scrubbed((str(error) or type(error).__name__).splitlines()[0])[:200]


def shown(url: str) -> str:
    """An address for messages.

    Args:
        url: The address, which may contain secrets.

    Returns:
        The address without user name, password, query and fragment, in printable characters.
    """
    # The password first: it may contain the characters that begin a query.
    bare = re.split(r"[?#]", re.sub(r"//[^/]*@", "//", url, count=1), maxsplit=1)[0]
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in bare)


def scrubbed(text: str) -> str:
    """A foreign text for messages.

    Args:
        text: The text, which may contain addresses with secrets.

    Returns:
        The text with every address as `shown` returns it.
    """
    return re.sub(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+", lambda found: shown(found[0]), text, flags=re.IGNORECASE)
