"""What commands share: argument types, options, progress, and how a result is printed."""

from __future__ import annotations

import codecs
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nestpatch.errors import MissingInputError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.plain import finite, is_visible, one_line

if TYPE_CHECKING:
    from nestpatch.formats.checkpoint import Checkpoint
    from nestpatch.gate import Proven
    from nestpatch.runtimes.connection import EndpointSettings
    from nestpatch.signing.trust import Policy

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class _Path(click.Path):
    """A path to write; click alone reads an empty text as the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns a Path, or ends with a usage error."""
        if not os.fspath(value):
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class _NewFile(_Path):
    """A file to write: `folder/` and `folder/.` would become a file beside that folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns a Path, or ends with a usage error."""
        if os.path.basename(value) in {"", ".", ".."}:
            self.fail(f"{one_line(value)} names a folder; give a name in it", param, ctx)
        return super().convert(value, param, ctx)


class _InputPath(_Path):
    """A file or folder to read: one that does not exist ends the command with exit code 2, before any work."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns a Path. Raises MissingInputError when there is nothing at the path."""
        path = super().convert(value, param, ctx)
        _require(os.fspath(value), param, ctx)
        return path


class _Source(_Path):
    """A model or a pack: a path, or where it can be fetched from. Stays a text; a path has to exist."""

    def __init__(self, name: str, remote: Callable[[str], bool], advice: str) -> None:
        super().__init__()
        self.name, self.remote, self.advice = name, remote, advice

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the text. Raises MissingInputError when it is a path, and there is nothing at it."""
        # A pack given as MODEL: `require_order` reports that, whether or not the file exists.
        misplaced = self.name == "model" and isinstance(param, click.Argument) and value.lower().endswith(".nest")
        if not misplaced and not self.remote(value):
            _require(super().convert(value, param, ctx), param, ctx, self.advice)
        return value


def require_only(ctx: click.Context, param: click.Parameter, value: Sequence[Path]) -> Sequence[Path]:
    """Callback of an argument MODEL...: a single model has to exist. One of several that is missing does not stop the others.

    Args:
        ctx: The command.
        param: The argument.
        value: What was given.

    Returns:
        The same.

    Raises:
        MissingInputError: One path was given, and there is nothing at it.
    """
    if len(value) == 1:
        _require(os.fspath(value[0]), param, ctx)
    return value


def _require(text: str, param: click.Parameter | None, ctx: click.Context | None, advice: str | None = None) -> None:
    """Raises MissingInputError when nothing exists at a path. Other problems with it are left to the command."""
    path = Path(text)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if param is None or (ctx is not None and ctx.resilient_parsing):
            return
        from difflib import get_close_matches

        label = param.human_readable_name if isinstance(param, click.Argument) else max(param.opts, key=len)
        if close := get_close_matches(path.name, _names(path.parent), 1):
            advice = f"Did you mean {path.with_name(close[0])}?"
        raise MissingInputError(f"{label} {path} does not exist", advice=advice) from None
    except OSError:
        return


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _is_channel(text: str) -> bool:
    from nestpatch.gate import is_channel

    return is_channel(text)


def _on_hub(text: str) -> bool:
    """Whether a text that is not a path here may be a model of the Hub."""
    from nestpatch.hub.client import SCHEME, Reference, looks_local

    return text.startswith(SCHEME) or (not looks_local(text) and Reference.parse(text) is not None)


def _on_hub_or_served(text: str) -> bool:
    from nestpatch.runtimes.connection import is_endpoint

    return is_endpoint(text) or _on_hub(text)


PathType: click.Path = _InputPath(path_type=Path)
OutputPath: click.Path = _Path(path_type=Path)
NewFile: click.Path = _NewFile(path_type=Path)
PackType = _Source("pack", _is_channel, "Check the path. A pack of a channel is written hub://owner/name.")
SourceType = _Source("source", _is_channel, "Check the path. A pack of a channel is written hub://owner/name.")
ModelType = _Source("model", _on_hub, "Check the path. A model of the Hub is written owner/name.")

EvaluatedType = _Source("model", _on_hub_or_served, "Check the path. A model of the Hub is written owner/name.")


def server_options(command: F) -> F:
    """--model, --timeout and --api-key-env, for every command that asks a server."""
    text = "The environment variable that holds the API key of a server.  [default: NESTPATCH_API_KEY]"
    command = click.option("--api-key-env", "key_variable", metavar="NAME", help=text)(command)
    text = "Seconds that a server may take for an answer.  [default: 300]"
    command = click.option("--timeout", type=click.FloatRange(0, 86_400, min_open=True), help=text)(command)
    text = "The name of the model on a server.  [default: the only one there]"
    return click.option("--model", "served_name", metavar="NAME", help=text)(command)


def endpoint_settings(address: str, **options: Any) -> EndpointSettings | None:
    """How a server is asked.

    Args:
        address: What was given as MODEL.
        **options: Members of EndpointSettings; None where nothing was given.

    Returns:
        The settings; None where MODEL is no server.

    Raises:
        click.UsageError: MODEL is no server, and an option goes with a server alone.
    """
    from nestpatch.runtimes.connection import EndpointSettings, is_endpoint

    given = {option: value for option, value in options.items() if value is not None}
    if is_endpoint(address):
        return EndpointSettings(**given)
    if given:
        names = [_SERVER_OPTIONS[name] for name in given]
        raise click.UsageError(f"{', '.join(names)}: only with the address of a server as MODEL")
    return None


_SERVER_OPTIONS = {"model": "--model", "concurrency": "--concurrency", "timeout": "--timeout", "key_variable": "--api-key-env"}
"""Members of EndpointSettings -> their options."""


def require_order(model: str | Path, pack: str | Path | None, command: str) -> None:
    """Recognises MODEL and PACK in the wrong order.

    Args:
        model: What was given as MODEL.
        pack: What was given as PACK; None where nothing was.
        command: The command as it is typed, such as "eval".

    Raises:
        click.UsageError: MODEL is a pack.
    """
    if not _is_pack(model):
        return
    if pack is None:
        raise click.UsageError(
            f"{model} is a pack, and MODEL is expected: nestpatch {command} MODEL. "
            f"To see what is in the pack: nestpatch show {model}"
        )
    if not _is_pack(pack):
        raise click.UsageError(f"{model} is a pack: MODEL comes first. Write: nestpatch {command} {pack} {model}")


def _is_pack(given: str | Path) -> bool:
    """Whether an argument is a pack: by its ending, its scheme, or the header of its file. hub://owner/name may be a model."""
    if Path(given).suffix.lower() == ".nest" or str(given).startswith(("file://", "https://", "http://")):
        return True
    from nestpatch.files.reading import open_regular
    from nestpatch.formats.nest import MAX_HEADER

    try:
        with open_regular(given) as file:
            length = int.from_bytes(file.read(8) or b"", "little")
            header = json.loads(file.read(length) or b"") if 0 < length <= MAX_HEADER else None
    except (OSError, ValueError, RecursionError):
        return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and set(metadata) == {"nest"}


def examples(*commands: str) -> str:
    """Writes the end of a command's help.

    Args:
        commands: Command lines that a user can copy.

    Returns:
        The text, in click's markup.
    """
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def json_option(command: F) -> F:
    """--json, for every command that prints a result."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def trust_options(command: F) -> F:
    """--policy and --allow-unsigned, for every command that applies or downloads a pack."""
    text = "Accept a pack that too few trusted keys have signed. Wrong signatures are always rejected."
    command = click.option("--allow-unsigned", is_flag=True, help=text)(command)
    text = "Use the trusted keys and rules of this file instead of your own."
    return click.option("--policy", "policy_file", type=PathType, help=text)(command)


def _limit(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """The number of --limit; for `all` more than any set has."""
    if value is None or value == "all":
        return None if value is None else sys.maxsize
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise click.BadParameter(f"{one_line(value)} is not a number of prompts: give 1 or more, or all")
    return number


def suite_options(command: F) -> F:
    """--suite and --limit, for every command that measures a model. `choose_suites` reads them."""
    text = "Prompts of each suite at most, a fixed sample.  [default: 100 of a built-in suite, all of yours]"
    command = click.option("--limit", metavar="N|all", callback=_limit, help=text)(command)
    text = "[KIND=]SOURCE; kinds: harmful, benign, lookalike. Repeatable.  [default: the built-in suites]"
    return click.option("--suite", multiple=True, help=text)(command)


def note_sample(suites: Sequence[str], limit: int | None, on_event: OnEvent) -> None:
    """Reports that a part of the built-in suites is measured, where nobody asked for a part.

    Args:
        suites: What --suite named.
        limit: What --limit said; None where it was not given.
        on_event: Receives the note.
    """
    from nestpatch.evaluation.suites import BUILTIN_LIMIT

    if not suites and limit is None:
        note = f"measuring {BUILTIN_LIMIT} prompts of each built-in suite; --limit all measures every one"
        on_event(Event("note", note=note))


def quiet_option(command: F) -> F:
    """--quiet, for every command that takes time."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")(command)


def threads_option(command: F) -> F:
    """--threads, for every command that reads and writes the rows of a model. It holds while the command runs."""
    text = "Threads that hash and quantize rows; results are the same.  [default: every core]"
    option = click.option("--threads", type=click.IntRange(1), expose_value=False, callback=_limit_threads, help=text)
    return option(command)


def compute_threads_option(command: F) -> F:
    """--threads, for every command that runs a model: the number is handed to the library that computes."""
    text = "Threads that compute.  [default: OMP_NUM_THREADS, or every core]"
    return click.option("--threads", type=click.IntRange(1), help=text)(command)


def device_option(of: str = "", name: str = "--device") -> Callable[[F], F]:
    """--device, for every command that may run a model in transformers.

    Args:
        of: What the device is for, such as "Of MODEL"; empty where there is one model.
        name: The option, where a command has two.
    """
    return click.option(name, default="auto", show_default=True, help=f"{of}{': ' if of else ''}cpu, cuda or mps.")


def _limit_threads(context: click.Context, _: click.Parameter, threads: int | None) -> None:
    if threads is not None and not context.resilient_parsing:
        from nestpatch.files.threads import limited

        context.with_resource(limited(threads))


def proven(pack: str, model: str | Path | None, policy_file: Path | None, on_event: OnEvent, *, allow_unsigned: bool) -> Proven:
    """Passes a pack through the gate, and warns on stderr when only --allow-unsigned let it pass.

    Args:
        pack: A file or a channel.
        model: The model that the pack is for: decides which rules and keys of the policy count.
        policy_file: The policy to use; None means that of this user and this machine.
        on_event: Called with the progress of a download.
        allow_unsigned: Whether a pack with too few trusted signatures passes.

    Returns:
        The pack that was checked. Call `say_unchecked` with it after the result of the command.

    Raises:
        NestpatchError: As `nestpatch.gate.prove`.
    """
    from nestpatch.gate import prove
    from nestpatch.signing.store import load_policy

    done = prove(pack, model, policy=load_policy(policy_file), allow_unsigned=allow_unsigned, on_event=on_event)
    if done.warning:
        say(f"WARNING: --allow-unsigned: {done.warning}", err=True)
    return done


def say_unchecked(done: Proven | None) -> None:
    """Reports on stderr, also with --quiet, that no signature of a pack was checked.

    Args:
        done: From `proven`; None reports nothing.
    """
    if done is not None and done.unchecked:
        say(done.unchecked, err=True)


def say_unsigned(policy: Policy, what: str) -> None:
    """Reports on stderr that something from a channel has no trusted signature.

    Args:
        policy: Decides the message: without any trusted key nothing was checked.
        what: What was downloaded.
    """
    if policy.keys:
        say(f"WARNING: no trusted key has signed {what}", err=True)
    else:
        say(f"no key is trusted on this machine: the signature of {what} was not checked (nestpatch trust add)", err=True)


def say(text: str, *, err: bool = False) -> None:
    """Prints one line. Line breaks, control characters and what the encoding lacks are escaped.

    Args:
        text: The line.
        err: Whether to print on stderr instead of stdout.
    """
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    click.echo(one_line(text).encode(encoding, "backslashreplace").decode(encoding), err=err)


def print_json(value: Mapping[str, Any]) -> None:
    """Prints one JSON object on one line of stdout. NaN and infinity, which JSON does not have, become null.

    Args:
        value: The object, of JSON's own types: docs/json-schema.json has one entry for each command.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(value), ensure_ascii=False)
    ascii_only = not codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name.startswith("utf")
    click.echo("".join(_json_character(c, ascii_only=ascii_only) for c in text))


def _json_character(character: str, *, ascii_only: bool) -> str:
    """A character of JSON; one that is not visible, or that the encoding lacks, as an escape."""
    if character.isascii() or (is_visible(character) and not ascii_only):
        return character
    # A byte of a file name that is not UTF-8: JSON cannot hold it either.
    surrogate = "\ud800" <= character <= "\udfff"
    return json.dumps(one_line(character) if surrogate else character)[1:-1]


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated, so that a command can leave things in order and say how to go on."""

    def stop(*_: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def progress(quiet: bool, *, transient: bool = False) -> AbstractContextManager[OnEvent]:
    """Shows progress on stderr.

    Args:
        quiet: Whether to show nothing, and to import nothing that draws.
        transient: Whether bars are taken away at the end.

    Returns:
        A context manager that yields the listener for events.
    """
    if quiet:
        return nullcontext(ignore)
    from nestpatch.views.progress import shown

    return shown(transient=transient)


@contextmanager
def opened_base(text: str | None, *, quiet: bool) -> Iterator[Checkpoint | None]:
    """Opens the float model of --base, and reports in the end how much of it was downloaded.

    Args:
        text: A path or a Hub id; None yields None.
        quiet: Whether to report nothing.
    """
    if text is None:
        yield None
        return
    from nestpatch.hub.remote import RemoteCheckpoint, open_base

    base = open_base(text)
    yield base
    if isinstance(base, RemoteCheckpoint) and not quiet:
        from nestpatch.views.console import size

        say(f"read {size(base.meter.bytes)} of the {size(base.size)} of {base.path}", err=True)
