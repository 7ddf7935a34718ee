"""What commands share: options, progress, and how a result is printed."""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nestpatch.events import OnEvent, ignore
from nestpatch.plain import is_visible, one_line

if TYPE_CHECKING:
    from nestpatch.events import OnEvent
    from nestpatch.formats.checkpoint import Checkpoint
    from nestpatch.gate import Proven
    from nestpatch.signing.trust import Policy


def proven(pack: str, model: str | Path | None, policy_file: Path | None, on_event: OnEvent, *, allow_unsigned: bool) -> Proven:
    """The patch after it passed the gate. Says what passed against the policy; `say_unchecked` says the rest in the end."""
    from nestpatch.gate import prove
    from nestpatch.signing.trust import load_policy

    done = prove(pack, model, policy=load_policy(policy_file), allow_unsigned=allow_unsigned, on_event=on_event)
    if done.warning:
        say(f"WARNING: --allow-unsigned: {done.warning}", err=True)
    return done


def say_unchecked(done: Proven | None) -> None:
    """One line, with the result of a command and also where it is quiet, for what no signature was asked of."""
    if done is not None and done.unchecked:
        say(done.unchecked, err=True)


def say_unsigned(policy: Policy, what: str) -> None:
    """The same for what came from a channel and bears no trusted signature."""
    if policy.keys:
        say(f"WARNING: no trusted key has signed {what}", err=True)
    else:
        where = "on this machine: the signature"
        say(f"no key is trusted {where} of {what} was not checked (nestpatch trust add)", err=True)


F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class _Path(click.Path):
    """A path; click alone takes an empty text for the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A Path. Ends with a usage error."""
        if not os.fspath(value):
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class _NewFile(_Path):
    """A file to write: dir/ and dir/. would be one beside that folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A Path. Ends with a usage error."""
        if os.path.basename(value) in {"", ".", ".."}:
            self.fail(f"{one_line(value)} names a folder; give a name in it", param, ctx)
        return super().convert(value, param, ctx)


PathType, NewFile = _Path(path_type=Path), _NewFile(path_type=Path)


def json_option(command: F) -> F:
    """--json, on every command that answers something."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def trust_options(command: F) -> F:
    """--policy and --allow-unsigned, on every command that applies or fetches a patch."""
    text = "Let a patch pass that too few trusted keys have signed. Wrong signatures never pass."
    command = click.option("--allow-unsigned", is_flag=True, help=text)(command)
    text = "Trust what this file says, instead of your own list."
    return click.option("--policy", "policy_file", type=PathType, help=text)(command)


def quiet_option(command: F) -> F:
    """--quiet, on every command that takes time."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")(command)


def say(text: str, *, err: bool = False) -> None:
    """One line on stdout or stderr, whatever the texts in it hold."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    click.echo(one_line(text).encode(encoding, "backslashreplace").decode(encoding), err=err)


def print_json(value: Any) -> None:
    """One object on one line of stdout, in characters that it can show. NaN and infinity, which JSON has not, become null."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), default=str, ensure_ascii=False)
    ascii_only = not codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name.startswith("utf")
    click.echo("".join(_json_character(c, ascii_only=ascii_only) for c in text))


def _json_character(character: str, *, ascii_only: bool) -> str:
    """As JSON may hold it: what is not visible, or has no place in an encoding, as an escape."""
    if character.isascii() or (is_visible(character) and not ascii_only):
        return character
    # A byte of a file name that is no character: JSON cannot hold it either.
    surrogate = "\ud800" <= character <= "\udfff"
    return json.dumps(one_line(character) if surrogate else character)[1:-1]


def _finite(value: Any) -> Any:
    """The same without NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def progress(quiet: bool) -> AbstractContextManager[OnEvent]:
    """Progress on stderr; without it, without the cost of loading what draws."""
    if quiet:
        from contextlib import nullcontext

        return nullcontext(ignore)
    from nestpatch.views.progress import shown

    return shown()


@contextmanager
def opened_base(text: str | None, *, quiet: bool) -> Iterator[Checkpoint | None]:
    """The float model of --base, a path or a Hub id; tells in the end what of it had to be downloaded."""
    if text is None:
        yield None
        return
    from nestpatch.hub.remote import RemoteCheckpoint, open_base

    base = open_base(text)
    yield base
    if isinstance(base, RemoteCheckpoint) and not quiet:
        from nestpatch.views.console import size

        say(f"read {size(base.downloaded)} of the {size(base.size)} of {base.path}", err=True)


def report(result: T, show: Callable[[T], None], as_json: bool) -> None:
    """Prints a result dataclass: as JSON, or by the view that shows it."""
    if as_json:
        print_json(dataclasses.asdict(result))  # type: ignore[call-overload]
    else:
        show(result)
