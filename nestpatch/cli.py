"""The command line: the groups of commands, and how they end.

Commands parse their arguments, call one function of the library and print its result. Results go to stdout, messages and
progress to stderr. Every error is printed on stderr as its class, its reason and its advice, with --json also as one object on
stdout, and has an exit code (docs/cli.md). Heavy imports are inside the commands, so --help is instant.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import takewhile
from typing import Any

import click

from nestpatch import __version__
from nestpatch.commands.options import Terminated, print_json, say
from nestpatch.errors import FileSystemError, MissingExtraError, NestpatchError, OutOfMemoryError, named
from nestpatch.plain import lines
from nestpatch.runtimes.threads import wait_passively

TAGLINE = "Safety patches for language models: trained once, shipped as a signed megabyte, merged in place, undone bit for bit."
INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and SIGTERM, as shells have them."""
TRACEBACK = "NESTPATCH_TRACEBACK"
"""With this variable set, an unexpected error ends with its traceback."""
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Make packs": {
        "train": ("training.train", "Train a pack that makes a model refuse."),
        "restore": ("restoring.restore", "Bring a pack or aligned rows to a fine-tune."),
        "eval": ("evaluating.evaluate", "Measure attack success and over-refusal of a model."),
        "judge": ("judging.judge", "Compare judges of answers with a person."),
        "detect": ("detecting.detect", "Say which prompts ask for harm, by a pack's detector."),
    },
    "Patch models": {
        "apply": ("patching.apply", "Merge a pack into a model: into a copy, or in place."),
        "revert": ("patching.revert", "Undo what was applied in place, bit for bit."),
        "update": ("fleet.update", "Bring a model to the latest version of its channels."),
        "recover": ("patching.recover", "End an interrupted change of a model."),
    },
    "Inspect": {
        "show": ("inspecting.show", "Explain a pack: what it changes, how it was made."),
        "status": ("inspecting.status", "Show what is applied to a model."),
        "list": ("inspecting.list_models", "List the models that you have patched."),
        "verify": ("inspecting.verify", "Check which state the weights of a model are in."),
        "doctor": ("checking.doctor", "Check the health of a deployed, patched model."),
        "diff": ("inspecting.diff", "Compare two models or two packs."),
        "report": ("reporting.report", "Write an HTML page about a pack, a model or an evaluation."),
    },
    "Ship": {
        "export": ("exporting.export", "Write a patched model or a pack in another format."),
        "guard": ("guarding.guard", "Export what a fine-tune must leave alone."),
        "adapter": ("serving.adapter", "Load a pack into a running server, as an adapter."),
        "push": ("fleet.push", "Publish a pack as the next version of a channel."),
        "pull": ("fleet.pull", "Download a version from a channel and check it."),
        "yank": ("fleet.yank", "Withdraw a version from a channel."),
        "renew": ("fleet.renew", "Sign a channel again before it expires."),
    },
    "Trust": {
        "keygen": ("signing.keygen", "Make a key pair for signing packs."),
        "sign": ("signing.sign", "Sign a pack."),
        "verify-signature": ("signing.verify_signature", "Show who signed a pack."),
        "trust": ("signing.trust", "Add, list and remove trusted keys."),
    },
    "Try": {
        "chat": ("chatting.chat", "Talk with a model and its patched self, side by side."),
        "demo": ("demo.demo", "Train, apply, measure and undo a pack on a chat model."),
        "lab": ("demo.lab", "Build the small model and prompts of demo --lab."),
    },
}
"""The commands in the groups of --help: name -> (module and function in nestpatch.commands, summary)."""
MEANT = {
    "apply": ("install", "patch", "merge"),
    "revert": ("undo", "uninstall", "remove", "rollback"),
    "update": ("upgrade",),
    "eval": ("evaluate", "test", "measure"),
    "show": ("info", "inspect", "describe"),
    "verify": ("check",),
    "doctor": ("health", "diagnose"),
    "diff": ("compare",),
    "export": ("convert",),
    "push": ("publish", "upload"),
    "pull": ("download", "fetch"),
    "yank": ("revoke", "withdraw"),
}
"""Command -> words that other tools have for it."""


class _OnDemand(MutableMapping[str, click.Command]):
    """Commands by name. A module of commands is imported when one of its commands is looked up, which saves each its start."""

    def __init__(self) -> None:
        self._places = {name: place for members in SECTIONS.values() for name, (place, _) in members.items()}
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._loaded:
            module, _, function = self._places[name].partition(".")
            self._loaded[name] = getattr(import_module(f"nestpatch.commands.{module}"), function)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._loaded

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._places, *self._loaded]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        self._places.pop(name, None)
        self._loaded.pop(name, None)


class Group(click.Group):
    """The command `nestpatch`: no command ends in a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs the command line and exits. The arguments are those of `click.Command.main`."""
        # A text that the encoding of stdout cannot hold, such as the name of a file, is written with escapes.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        given = args[0] if args else extra.get("args")
        words = tuple(sys.argv[1:] if given is None else given)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False, "obj": words})
        except click.ClickException as error:
            code = _end_usage(error, words)
        except (KeyboardInterrupt, click.Abort) as error:
            code = _end_stopped(error, words)
        except OSError as error:  # of --help and --version
            code = _end(FileSystemError(f"cannot write to stdout: {error.strerror or error}"), words)
        finally:
            _abandon_output()
        sys.exit(code)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rejects NUL characters, which no call of the operating system accepts."""
        if any("\0" in argument for argument in args):
            ctx.fail("an argument contains a NUL character")
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command; the error for an unknown one names the closest."""
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            meant = [command for command, others in MEANT.items() if name.lower() in others]
            close = meant or get_close_matches(name.lower(), self.commands, 1)
            ctx.fail(f"No such command '{name}'.{f' Did you mean {close[0]!r}?' if close else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as click has it
        """Lists the commands in their sections, in columns of one width."""
        width = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{width}}", summary) for name, (_, summary) in commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise  # ended by `main`, or by click
        except KeyboardInterrupt as error:
            raise click.Abort from error
        except Exception as error:  # noqa: BLE001 - every error gets a class and an exit code
            ctx.exit(_end(_named(error, ctx.invoked_subcommand), ctx.obj))


def _named(error: Exception, command: str | None) -> NestpatchError:
    """An error as one of nestpatch's own classes."""
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"`nestpatch {command}` needs more memory than there is")
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("nestpatch"):
        extra = "llama" if (error.name or "").partition(".")[0] == "llama_cpp" else "train"
        return MissingExtraError(extra, f"`nestpatch {command}` (module {error.name})")
    if os.environ.get(TRACEBACK) and not isinstance(error, (NestpatchError, OSError)):
        raise error
    return named(error)


def _end(error: NestpatchError, words: Sequence[str]) -> int:
    """Reports an error; returns the exit code."""
    from nestpatch.views.console import show_error

    with suppress(OSError):  # stderr may be full as well
        show_error(error, error.advice)
    return _as_object(type(error).__name__, str(error), error.advice, error.exit_code, words)


def _end_usage(error: click.ClickException, words: Sequence[str]) -> int:
    """Reports arguments that click rejected, with the usage of the command; returns the exit code."""
    message = lines(error.format_message())
    context = error.ctx if isinstance(error, click.UsageError) else None
    help_of = f"{context.command_path if context else 'nestpatch'} --help"
    with suppress(OSError):  # stderr may be full
        if context is not None:
            click.echo(f"{context.get_usage()}\nTry '{help_of}' for help.\n", err=True)
        click.echo(f"Error: {message}", err=True)
    return _as_object("UsageError", message, f"Run `{help_of}`.", error.exit_code, words)


def _end_stopped(error: BaseException, words: Sequence[str]) -> int:
    """Reports Ctrl-C, SIGTERM or a question that was not answered, and what is left of the command; returns the exit code."""
    signal = error if isinstance(error, KeyboardInterrupt) else error.__cause__ or error.__context__
    if not isinstance(signal, KeyboardInterrupt):
        say("Aborted.", err=True)
        return _as_object("Aborted", "no answer was given", "Run the command again.", 1, words)
    left = _leftover(words)
    say(f"Interrupted. {left}".rstrip(), err=True)
    code = TERMINATED if isinstance(signal, Terminated) else INTERRUPTED
    return _as_object("Interrupted", "the command was interrupted", left, code, words)


def _as_object(name: str, message: str, advice: str, code: int, words: Sequence[str]) -> int:
    """With --json, prints an error as the one object on stdout. Returns the exit code."""
    if "--json" in takewhile(lambda word: word != "--", words):
        with suppress(OSError):
            print_json({"error": {"type": name, "message": message, "advice": advice, "exit_code": code}})
    return code


def _leftover(words: Sequence[str]) -> str:
    """What an interrupted command leaves behind, as the files have it: it may have been past its last write."""
    command = main.commands.get(words[0]) if words else None
    if command is None:
        return ""
    options = command.make_context(words[0], list(words[1:]), resilient_parsing=True).params
    if options.get("in_place") or words[0] in ("revert", "update", "recover"):
        return _unfinished(options["models"] if "models" in options else [options["model"]])
    if options.get("run_dir") and os.path.lexists(options["run_dir"]):
        return f"The same command goes on from what is in {options['run_dir']}."
    if "keep" in options:
        return f"{options['keep']} is incomplete: remove it." if options["keep"] else "Nothing is left."
    return "Nothing was written." if {"output", "directory"} & set(options) else ""


def _unfinished(models: Sequence[str]) -> str:
    """What the journals beside models say."""
    from nestpatch.patcher.state_dir import state_dir_of

    for model in models:
        with suppress(NestpatchError, OSError):
            if os.path.lexists(state_dir_of(model).journal):
                return f"A change of {model} is unfinished: `nestpatch recover {model}` ends it."
    if len(models) > 1:
        return "No model holds an unfinished change: the same command goes on with those that are not up to date."
    return f"{models[0]} holds no unfinished change: `nestpatch status {models[0]}` shows what is applied."


def _abandon_output() -> None:
    """Drops what could not be written; otherwise the interpreter would try again at exit and print a warning."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@click.group(cls=Group, commands=_OnDemand(), help=TAGLINE, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nestpatch")
def main() -> None:
    """Sets the environment variables that every command needs."""
    # The progress bars of transformers would mix with ours; a variable that the user set wins.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wait_passively()  # before a command imports numpy or torch
