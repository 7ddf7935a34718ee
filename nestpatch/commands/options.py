"""What commands share: options, progress, and how a result is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nestpatch.events import OnEvent, ignore

if TYPE_CHECKING:
    from nestpatch.formats.interface import Checkpoint

F = TypeVar("F", bound=Callable[..., Any])
PathType = click.Path(path_type=Path)


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


def print_json(value: Any) -> None:
    """One object on one line of stdout."""
    click.echo(json.dumps(value, default=str, ensure_ascii=False))


def progress(quiet: bool) -> AbstractContextManager[OnEvent]:
    """Progress on stderr; without it, without the cost of loading what draws."""
    if quiet:
        from contextlib import nullcontext

        return nullcontext(ignore)
    from nestpatch import views

    return views.progress(quiet=False)


@contextmanager
def opened_base(text: str | None, *, quiet: bool) -> Iterator[Checkpoint | None]:
    """The float model of --base, a path or a Hub id; tells in the end what of it had to be downloaded."""
    if text is None:
        yield None
        return
    from nestpatch.hub.locate import open_base
    from nestpatch.hub.remote import RemoteCheckpoint

    base = open_base(text)
    yield base
    if isinstance(base, RemoteCheckpoint) and not quiet:
        from nestpatch.views import size

        click.echo(f"read {size(base.downloaded)} of the {size(base.size)} of {base.path}", err=True)


def report(result: Any, view: str, as_json: bool) -> None:
    """A result value as JSON, or drawn by the view of that name."""
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    from nestpatch import views

    getattr(views, view)(result)
