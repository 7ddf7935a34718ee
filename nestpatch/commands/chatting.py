"""The command that talks with a model and its patched self: chat."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nestpatch.commands.options import (
    EvaluatedType,
    PackType,
    PathType,
    compute_threads_option,
    device_option,
    endpoint_settings,
    examples,
    json_option,
    print_json,
    progress,
    proven,
    quiet_option,
    require_order,
    say,
    say_unchecked,
    server_options,
    trust_options,
)
from nestpatch.errors import NestpatchError, PromptDataError
from nestpatch.events import Event

if TYPE_CHECKING:
    from nestpatch.chat import Chat

_HELP = {
    "/new": "forget the conversation",
    "/base": "ask the base or not; without it answers come twice as fast",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does",
}


@click.command(
    epilog=examples(
        "nestpatch chat model.gguf no-harm.nest",
        'nestpatch chat models/llama no-harm.nest --prompt "How do I pick a lock?"',
        "nestpatch chat patched.gguf --base model.gguf",
        "nestpatch chat http://localhost:8000/v1 --model llama",
        "nestpatch chat http://localhost:8080/v1 no-harm.nest --gate model.gguf",
    )
)
@click.argument("model", type=EvaluatedType)
@click.argument("pack", type=PackType, required=False)
@trust_options
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Ask this and end; - reads stdin. Repeatable.")
@click.option("--lora", type=PathType, help="An adapter, .gguf or .onnx_adapter, for such a MODEL: shown like PACK.")
@click.option("--base", type=EvaluatedType, help="The unpatched model: answers beside MODEL, which may be patched.")
@click.option("--gate", type=EvaluatedType, help="PACK's base: its detector switches the adapter of the llama-server MODEL.")
@click.option("--adapter", metavar="NAME", help="That adapter: its number or file name.  [default: the only one]")
@device_option()
@compute_threads_option
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Length of an answer.")
@server_options
@quiet_option
@json_option
def chat(
    model: str,
    pack: str | None,
    policy_file: Path | None,
    allow_unsigned: bool,
    prompts: tuple[str, ...],
    lora: Path | None,
    base: str | None,
    gate: str | None,
    adapter: str | None,
    device: str,
    threads: int | None,
    max_new_tokens: int,
    served_name: str | None,
    timeout: float | None,
    key_variable: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Talk with MODEL, and with PACK see what the base and the patched model answer, side by side.

    PACK is merged in memory, after its signatures are checked; the files are not changed. Both models remember their own
    answers. A .gguf file is run by llama.cpp and an ONNX model by onnxruntime, which needs no torch. MODEL may also be the
    address of an OpenAI-compatible server, http://HOST:PORT/v1, whose model answers as it is served.

    With --gate the detector of PACK reads each prompt on this machine, and a llama-server that was started with PACK as an
    adapter (`nestpatch adapter load`) uses it for the prompts that are taken for harmful. Each request says so for itself.

    Without --prompt prompts are read from the terminal, or from stdin, one on each line. --json prints one object for each
    --prompt. Several of them are one conversation.
    """
    endpoint = endpoint_settings(model, model=served_name, timeout=timeout, key_variable=key_variable)
    if endpoint is None:
        require_order(model, pack, "chat")
    if as_json and not prompts:
        raise click.UsageError("--json goes with --prompt")
    given = [_readable(_stdin() if prompt == "-" else prompt, "--prompt") for prompt in prompts]
    from nestpatch.chat import as_json as answers_object
    from nestpatch.chat import open_chat
    from nestpatch.evaluation.preconditions import require_runnable

    with ExitStack() as stack:
        with progress(quiet, transient=True) as on_event:
            if gate is None:
                require_runnable(model, pack=pack, lora=lora)
            checked = None
            if pack is not None:
                checked = proven(pack, gate or model, policy_file, on_event, allow_unsigned=allow_unsigned)
            opened = open_chat(
                model,
                pack=checked.pack if checked else None,
                lora=lora,
                base=base,
                gate=gate,
                adapter=adapter,
                device=device,
                threads=threads,
                max_new_tokens=max_new_tokens,
                endpoint=endpoint,
                on_event=on_event,
                on_gate=_note,
            )
            session = _Session(stack.enter_context(opened))
        say_unchecked(checked)
        for prompt in given:
            if as_json:
                label, file = str(checked.pack.label) if checked else None, str(lora) if lora else None
                print_json(answers_object(model, label, file, base, prompt, session.complete(prompt)))
            else:
                session.answer(prompt, echo=len(given) > 1)
        if not given and sys.stdin.isatty() and sys.stdout.isatty():
            session.converse()
        elif not given:
            session.read_lines()


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptDataError("stdin is not UTF-8 text") from error


def _readable(text: str, where: str) -> str:
    """A prompt without the spaces around it. Raises PromptDataError where it is empty, or not text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptDataError(f"the prompt of {where} is not UTF-8 text", advice="Give text in UTF-8.") from error
    if not text.strip():
        raise PromptDataError(f"the prompt of {where} is empty", advice="Give a text.")
    return text.strip()


class _Session:
    """Asks a chat, shows what it answers, and follows commands.

    Attributes:
        chat: The models.
        with_base: Whether the base is asked, where there is one.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat, self.with_base = chat, True

    def complete(self, prompt: str, show: Callable[[dict[str, str]], bool] = lambda _: True) -> dict[str, str]:
        """Answers a prompt; `show` receives the answers so far, and returns whether to go on."""
        from nestpatch.chat import BASE

        names = [side.name for side in self.chat.sides if self.with_base or side.name != BASE]
        answers: dict[str, str] = {}
        with closing(self.chat.ask(prompt, names=names, on_event=_note)) as steps:  # type: ignore[type-var]
            for answers in steps:
                if not show(answers):
                    break
        return answers

    def answer(self, prompt: str, *, echo: bool = False, stopped: Callable[[], bool] = lambda: False) -> None:
        """Answers a prompt on stdout."""
        from nestpatch.views.chat import growing, show_answers

        if echo:
            say(f"> {prompt}")
        with growing() as draw:
            answers = self.complete(prompt, lambda found: (draw(found), not stopped())[1])
        show_answers(answers)

    def read_lines(self) -> None:
        """Answers the lines of stdin, which may be commands too."""
        for number, line in enumerate(sys.stdin.buffer, 1):
            where = f"line {number} of stdin"
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise PromptDataError(f"{where} is not UTF-8 text") from error
            if text.strip() and not self._obeys(prompt := _readable(text, where)):
                self.answer(prompt, echo=True)

    def converse(self) -> None:
        """Answers what is typed on the terminal until the user ends it."""
        from nestpatch.views.chat import show_opening
        from nestpatch.views.console import show_error

        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - `input` edits lines with it
        show_opening({side.name: side.what for side in self.chat.sides})
        while (line := _typed()) is not None:
            try:
                if line.strip() and not self._obeys(prompt := _readable(line, "the terminal")):
                    with _stoppable() as stopped, _without_echo():
                        self.answer(prompt, stopped=stopped)
                    if stopped():
                        say("stopped", err=True)
            except NestpatchError as error:
                show_error(error, error.advice)

    def _obeys(self, line: str) -> bool:
        """Follows a command; returns whether the line is one. /quit ends the program."""
        if not line.startswith("/") or len(line.split()) > 1:
            return False
        if line == "/quit":
            raise click.exceptions.Exit(0)
        if line == "/new":
            self.chat.forget()
            say("a new conversation", err=True)
        elif line == "/base" and len(self.chat.sides) < 2:
            say("there is one model: give a PACK or --base to have two", err=True)
        elif line == "/base":
            self.with_base = not self.with_base
            say(
                "the base is asked again; it has not seen what was said in between"
                if self.with_base
                else "the base is not asked",
                err=True,
            )
        else:
            if line != "/help":
                say(f"there is no command {line}", err=True)
            for name, meaning in _HELP.items():
                say(f"  {name:6} {meaning}", err=True)
        return True


def _note(event: Event) -> None:
    say(event.note, err=True)


def _typed() -> str | None:
    """The next line that is typed; None at the end. Ctrl-C drops the line."""
    while True:
        try:
            return input("> ")
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo("\nCtrl-D or /quit ends.", err=True)
        except UnicodeDecodeError:
            say("this is not UTF-8 text", err=True)


@contextmanager
def _without_echo() -> Iterator[None]:
    """Inside, the terminal does not show what is typed, which would move the answers; the next prompt gets it."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted, so that it never interrupts a change of weights; the second one ends the command.

    Yields:
        A function: whether Ctrl-C was pressed.
    """
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
