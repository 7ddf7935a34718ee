"""What repository and which commit: asked of the Hub once, so that everything after it reads one and the same commit.

Every question to the Hub runs inside `explained`, which turns what huggingface_hub raises into the errors of nestpatch.
Tokens come from its standard places: HF_TOKEN, or the file that `hf auth login` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from nestpatch.errors import HubAccessError, HubAnswerError, HubError, HubNotFoundError, HubUnavailableError
from nestpatch.hub.deadline import Deadline, SlowError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

SCHEME = "hub://"
MOST_FACTS = 4 << 20
"""Bytes for which a Hub that lists the files of a repository is given time."""
WEB_LOGIN = (
    "Write the login for this host into ~/.netrc (machine HOST login NAME password SECRET). "
    "Credentials in an address are used once and kept nowhere: a model that follows the channel has none."
)
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REFERENCE = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9._/+-]{{0,254}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Reference:
    """`owner/name[@revision]` as somebody typed it."""

    repo_id: str
    revision: str | None = None
    """A branch, a tag or a commit; None: the main branch."""

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def parse_reference(text: str) -> Reference | None:
    """Reads `owner/name[@revision]`, with or without hub:// before it; None when the text is nothing like that."""
    found = _REFERENCE.fullmatch(text.removeprefix(SCHEME))
    if found is None or any(bad in found[0] for bad in ("..", "--", "//")):
        return None
    return Reference(found["repo"], found["revision"])


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository. It never changes, whatever happens to branches and tags."""

    repo_id: str
    commit: str
    files: tuple[str, ...]
    """Paths inside the repository."""

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]}"


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit id, which cannot move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def resolve(repo_id: str, revision: str | None = None, *, endpoint: str | None = None) -> str:
    """The commit that a branch or tag names now. A full commit id is returned as it is, without a request.

    Never answers from a cache: a dead endpoint is an error, not yesterday's commit.
    Raises HubNotFoundError, HubAccessError, HubUnavailableError, HubAnswerError.
    """
    return cast("str", revision) if is_commit(revision) else look_up(repo_id, revision, endpoint=endpoint).commit


def look_up(repo_id: str, revision: str | None = None, *, endpoint: str | None = None) -> Snapshot:
    """The commit and the list of its files, in one request. Raises as `resolve` does."""
    from huggingface_hub import constants

    api, wanted = client(endpoint), Reference(repo_id, revision)
    with explained(wanted, api.endpoint):
        try:
            wait = constants.HF_HUB_ETAG_TIMEOUT
            facts = Deadline(MOST_FACTS).run(
                lambda: api.model_info(repo_id, revision=revision, expand=["sha", "siblings"], timeout=wait)
            )
            files = tuple(sorted(file.rfilename for file in facts.siblings or ()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # JSON that is none, or that lacks what every answer of a Hub has: a login page, a proxy's greeting.
            raise HubAnswerError(
                f"{shown(api.endpoint)} does not answer like a Hub, asked for {wanted}: {first_line(error)}"
            ) from error
        except SlowError as error:
            raise HubUnavailableError(f"cannot reach {shown(api.endpoint)} for {wanted}: {error}") from error
    if facts.sha is None or not is_commit(facts.sha) or (is_commit(revision) and facts.sha != revision):
        raise HubAnswerError(f"{shown(api.endpoint)} names no commit, or another one, for {wanted}: {facts.sha!r}")
    return Snapshot(repo_id, facts.sha, files)


def client(endpoint: str | None = None) -> HfApi:
    """huggingface_hub's client; None: the endpoint of HF_ENDPOINT."""
    from huggingface_hub import HfApi

    from nestpatch import __version__

    return HfApi(endpoint=endpoint, library_name="nestpatch", library_version=__version__)


@contextmanager
def explained(what: Reference | Snapshot | str, endpoint: str) -> Iterator[None]:
    """Turns whatever a question to the Hub may raise into a HubError that names the repository and the way out."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    endpoint = shown(endpoint)
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubUnavailableError(
            f"{what} must be asked for at {endpoint}, and HF_HUB_OFFLINE is set", advice="Unset HF_HUB_OFFLINE."
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(error, what, endpoint) from error
    except network_error() as error:
        raise HubUnavailableError(f"cannot reach {endpoint} for {what}: {first_line(error)}") from error


def network_error() -> type[Exception]:
    """What the HTTP library under huggingface_hub raises for anything between here and there, whichever library that is."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast("type[Exception]", HfHubHTTPError.__bases__[0])


def _refusal(error: HfHubHTTPError, what: Reference | Snapshot | str, endpoint: str) -> HubError:
    from huggingface_hub import errors

    if isinstance(what, str):  # a web server that is no Hub
        told = f"{what} answered {error.response.status_code}"
        if error.response.status_code == 404:
            return HubNotFoundError(told, advice="Check the address. Logins for a web server come from ~/.netrc.")
        kind = _kind(error.response.status_code)
        return kind(told, advice=WEB_LOGIN) if kind is HubAccessError else kind(told)
    page = f"{endpoint}/{what.repo_id}"
    if isinstance(error, errors.GatedRepoError):
        advice = f"Ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN."
        return HubAccessError(f"{what.repo_id} is gated, and this user has no access to it", advice=advice)
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubNotFoundError(f"{endpoint} has no model repository {what.repo_id}, or hides it from this user")
    if isinstance(error, (errors.RevisionNotFoundError, errors.EntryNotFoundError)):
        return HubNotFoundError(f"{page} does not hold {what}: {_server_words(error)}", advice=f"See {page}.")
    told = f"{endpoint} answered {error.response.status_code} when asked for {what}: {_server_words(error)}"
    return _kind(error.response.status_code)(told)


def _kind(status: int) -> type[HubError]:
    if status in {401, 403}:
        return HubAccessError
    return HubUnavailableError if status in {408, 429} or status >= 500 else HubAnswerError


def _server_words(error: HfHubHTTPError) -> str:
    return scrubbed((error.server_message or "no reason given").splitlines()[0])[:200]


def first_line(error: Exception) -> str:
    """What an error says, for a message."""
    return scrubbed((str(error) or type(error).__name__).splitlines()[0])[:200]


def shown(url: str) -> str:
    """An address without what may be secret, that is user name, password, query and fragment, and in printable characters."""
    # The password first: it may hold what else begins a query.
    bare = re.split(r"[?#]", re.sub(r"//[^/]*@", "//", url, count=1), maxsplit=1)[0]
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in bare)


def scrubbed(text: str) -> str:
    """A text of somebody else, whose addresses are shown without what may be secret."""
    return re.sub(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+", lambda found: shown(found[0]), text, flags=re.IGNORECASE)
