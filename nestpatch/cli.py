"""The command line: puts the commands together and turns errors into messages and exit codes.

Commands parse, call one library function and print. Results go to stdout, everything said to a person on the way to stderr.
Exit codes: 0 ok, 1 a finding or a failure, 2 usage, 130 Ctrl-C. Heavy imports live inside the commands: --help is instant.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from contextlib import suppress
from typing import Any

import click

from nestpatch import __version__
from nestpatch.commands import demo, evaluating, exporting, fleet, inspecting, patching, signing, training
from nestpatch.errors import (
    DataError,
    FileSystemError,
    MissingExtraError,
    NestpatchError,
    OutOfMemoryError,
    UnexpectedError,
)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
TRACEBACK = "NESTPATCH_TRACEBACK"
"""With this variable set, an unexpected error ends with its traceback."""


class Group(click.Group):
    """Turns every error into its class, its reason and its advice on stderr, and an exit code. Nothing ends in a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs the command line, until nothing is left that could fail: also what is written at the very end."""
        # What stdout's encoding cannot hold, such as file names that are no text, is written as an escape.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **extra)
        except OSError as error:  # of --help and --version
            _show(FileSystemError(f"cannot write to stdout: {error.strerror or error}"))
            sys.exit(1)
        finally:
            _let_go()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuses what no system passes on, and what no call of the system takes."""
        if any("\0" in argument for argument in args):
            ctx.fail("an argument holds a NUL character")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, BrokenPipeError):
            raise  # click has an end for each of them
        except (KeyboardInterrupt, click.Abort) as error:
            stopped = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
            click.echo("Interrupted." if stopped else "Aborted.", err=True)
            ctx.exit(INTERRUPTED if stopped else 1)
        except Exception as error:  # noqa: BLE001 - whatever it is, it gets a name
            named = _named(error, ctx)
            _show(named)
            ctx.exit(2 if isinstance(named, DataError) else 1)


def _named(error: Exception, ctx: click.Context) -> NestpatchError:
    """The error as one of ours."""
    if isinstance(error, NestpatchError):
        return error
    if isinstance(error, OSError):
        return FileSystemError(str(error))
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"`nestpatch {ctx.invoked_subcommand}` needs more memory than there is")
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("nestpatch"):
        extra = "llama" if (error.name or "").partition(".")[0] == "llama_cpp" else "train"
        return MissingExtraError(extra, f"`nestpatch {ctx.invoked_subcommand}` (module {error.name})")
    if os.environ.get(TRACEBACK):
        raise error
    return UnexpectedError(f"{type(error).__name__}: {error} ({_place(error)})")


def _place(error: Exception) -> str:
    """Where in nestpatch it happened."""
    places = [f"{entry.filename}:{entry.lineno}" for entry in traceback.extract_tb(error.__traceback__)]
    own = [place for place in places if f"{os.sep}nestpatch{os.sep}" in place]
    return (own or places or ["somewhere"])[-1].rpartition(f"{os.sep}nestpatch{os.sep}")[2]


def _show(error: NestpatchError) -> None:
    from nestpatch.views.console import show_error

    with suppress(OSError):  # stderr may be full as well
        show_error(error, error.advice)


def _let_go() -> None:
    """What could not be written is given up, or the interpreter would try again when it ends, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nestpatch")
def main() -> None:
    """Safety patches for language models: train, ship, apply, prove, undo."""
    # transformers' own bars would mix with ours; a variable that the user set wins.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


for command in (
    training.train,
    evaluating.evaluate,
    demo.demo,
    demo.lab,
    patching.apply,
    patching.revert,
    patching.recover,
    exporting.export,
    inspecting.show,
    inspecting.status,
    inspecting.list_models,
    inspecting.verify,
    inspecting.diff,
    signing.keygen,
    signing.sign,
    signing.verify_signature,
    signing.trust,
    fleet.push,
    fleet.pull,
    fleet.update,
    fleet.yank,
    fleet.renew,
):
    main.add_command(command)
