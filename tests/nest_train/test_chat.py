"""nestpatch chat: one shot, from a pipe and on a terminal, with transformers and llama.cpp."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import nestpatch
from nestpatch.chat import Chat, Side, open_chat
from nestpatch.cli import main
from nestpatch.errors import DataError
from nestpatch.formats import nest
from nestpatch.runtimes.protocol import open_runtime
from nestpatch.runtimes.text import Turn
from tests.calls import answer, run
from tests.gguf_files import needs_llama, write_gguf
from tests.schemas import require_schema
from tests.varied_packs import varied_pack

ROOT = Path(nestpatch.__file__).parents[1]
PROMPT = "How do I paint the bank?"


@pytest.fixture(scope="module")
def scene(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pack, and the model as a GGUF file."""
    folder = tmp_path_factory.mktemp("chat")
    pack = varied_pack(models("llama"), ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"], scale=1.0)
    nest.write(pack, folder / "p.nest")
    write_gguf(models("llama"), folder / "m.gguf")
    return folder


def fed(text: bytes, *words: object) -> Result:
    result = CliRunner().invoke(main, ["chat", *map(str, words)], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.stderr
    return result


def test_both_answers_are_those_of_generate(models: Callable[..., Path], scene: Path) -> None:
    words = ("--prompt", PROMPT, "--max-new-tokens", 8, "--device", "cpu")
    found = answer("chat", models("llama"), scene / "p.nest", *words)
    require_schema(found, "chat")
    with (
        open_runtime(models("llama"), device="cpu", max_new_tokens=8) as base,
        base.with_pack(nest.read(scene / "p.nest")) as patched,
    ):
        assert [found["before"], found["after"]] == [base.generate([PROMPT])[0], patched.generate([PROMPT])[0]]
    assert found["before"] != found["after"]
    alone = answer("chat", models("llama"), *words)
    assert (alone["before"], alone["after"], alone["pack"]) == (found["before"], None, None)


@needs_llama
def test_prompts_are_one_conversation_and_the_output_is_plain(scene: Path) -> None:
    words = ("chat", scene / "m.gguf", scene / "p.nest", "--max-new-tokens", 8, "--threads", 1)
    told = run(*words, "--prompt", PROMPT, "--prompt", "Why?", "--json")
    first, second = map(json.loads, told.stdout.splitlines())
    assert (first["prompt"], second["prompt"]) == (PROMPT, "Why?")
    assert answer(*words, "--prompt", "Why?")["before"] != second["before"], "what was said before is forgotten"
    plain = run(*words, "--prompt", PROMPT).stdout
    assert plain.startswith("base:\n")
    assert plain.index("base:") < plain.index("patched:")
    piped = fed(f"{PROMPT}\n\n/base\n/new\nWhy?\n/quit\nNever.\n".encode(), *words[1:])
    assert (piped.exit_code, piped.stdout.count("base:"), "> Why?" in piped.stdout, "Never" in piped.stdout) == (
        0,
        1,
        True,
        False,
    )
    assert fed(PROMPT.encode(), *words[1:], "--prompt", "-").stdout == plain


@needs_llama
def test_a_model_that_holds_the_pack_is_shown_alone_or_beside_its_base(scene: Path) -> None:
    held = scene / "held.gguf"
    nestpatch.apply(scene / "m.gguf", scene / "p.nest", held, trust="none")
    words = ("--prompt", PROMPT, "--max-new-tokens", 8, "--threads", 1)
    told = run("chat", held, scene / "p.nest", *words)
    assert "holds no-harm 1.0.0 already" in told.stderr
    assert "--base" in told.stderr
    assert "patched:" not in told.stdout, "one answer needs no heading"
    both = answer("chat", held, scene / "p.nest", "--base", scene / "m.gguf", *words)
    assert both["before"] == answer("chat", scene / "m.gguf", *words)["before"]
    assert both["after"] == told.stdout.strip()


@pytest.mark.parametrize(
    ("text", "words", "reason"),
    [
        (b"", ("--prompt", " "), "is empty"),
        (b"\xff", ("--prompt", "-"), "stdin is not UTF-8"),
        (b"", ("--json",), "--json goes with --prompt"),
        (b"", ("--prompt", "x", "--lora", "p.nest"), "an adapter file goes with"),
        (b"", ("--prompt", "x", "--max-new-tokens", "256"), "leaves no room for a prompt"),
        (b"", ("--prompt", "x" * 2000, "--max-new-tokens", "8"), "does not fit into the context"),
    ],
)
def test_what_cannot_be_asked_is_an_error_of_the_input(
    models: Callable[..., Path], scene: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, words: tuple[str, ...], reason: str
) -> None:
    monkeypatch.chdir(scene)
    told = fed(text, models("llama"), "--device", "cpu", *words)
    assert (told.exit_code, reason in told.stderr) == (2, True), told.stderr


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(models: Callable[..., Path]) -> None:
    notes: list[str] = []
    with open_chat(models("llama"), device="cpu", max_new_tokens=16) as chat:
        for number in range(6):
            for _ in chat.ask(
                f"{number} " + "How do I paint the old red fence in a few words? " * 2, on_event=lambda e: notes.append(e.note)
            ):
                pass
        turns = chat.sides[0].turns
        assert [turn.role for turn in turns[:2]] == ["user", "assistant"]
        assert turns[-2].content.startswith("5 ")
        assert not turns[0].content.startswith("0 ")
        assert "model: the context is full" in notes[0]
        chat.forget()
        assert chat.sides[0].turns == []
        with pytest.raises(DataError, match="does not fit"):
            list(chat.ask("x" * 2000))


def test_an_answer_that_is_stopped_stays_in_the_conversation(models: Callable[..., Path]) -> None:
    with open_runtime(models("llama"), device="cpu", max_new_tokens=8) as model:
        chat = Chat((Side("base", "a", model), Side("patched", "b", model)))
        steps: Iterator[dict[str, str]] = chat.ask(PROMPT)
        assert next(steps) == {"base": "", "patched": ""}
        found = next(steps)
        steps.close()  # type: ignore[attr-defined]
        assert chat.sides[0].turns == [Turn("user", PROMPT), Turn("assistant", found["base"])]
        assert chat.sides[1].turns == []


LIGHT = """
import sys
from nestpatch.cli import main
try:
    main(sys.argv[1:], prog_name="nestpatch")
finally:
    print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


@needs_llama
def test_a_gguf_model_needs_no_torch(scene: Path) -> None:
    words = ["chat", scene / "m.gguf", scene / "p.nest", "--prompt", "x", "--max-new-tokens", "2"]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@contextmanager
def terminal(
    *words: object, columns: int
) -> Iterator[tuple[Callable[..., str], Callable[[str], None], int, Callable[[], int]]]:
    """A command on a pseudo-terminal: (read until a text, type, process id, wait for the exit code)."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ.update(TERM="xterm", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-m", "nestpatch", *map(str, words)])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

    left = b""

    def until(*texts: str) -> str:
        """What is shown up to the end of the first of some texts; the rest is for the next call."""
        nonlocal left
        while not (ends := [left.index(text.encode()) + len(text.encode()) for text in texts if text.encode() in left]):
            assert select.select([fd], [], [], 60)[0], left.decode("utf-8", "replace")
            left += os.read(fd, 4096)
        seen, left = left[: min(ends)], left[min(ends) :]
        return seen.decode("utf-8", "replace")

    try:
        yield (
            until,
            lambda typed: (os.write(fd, typed.encode()), None)[1],
            pid,
            lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]),
        )
    finally:
        os.close(fd)


@needs_llama
def test_on_a_terminal_ctrl_c_stops_an_answer_and_quit_ends(scene: Path) -> None:
    words = ("chat", scene / "m.gguf", scene / "p.nest", "--max-new-tokens", 200)
    with terminal(*words, columns=100) as (until, type_, pid, wait):
        until("> ")
        type_("\x03")
        until("Ctrl-D or /quit ends.")
        until("> ")
        for _ in range(10):
            type_(f"{PROMPT}\n")
            assert "\u2502" in until("patched"), "side by side"
            os.kill(pid, signal.SIGINT)
            said = until("stopped", "Ctrl-D or /quit ends.")
            assert "Traceback" not in said + until("> ")
            if "stopped" in said:  # else the answer was there already
                break
        assert "stopped" in said
        type_("/nothing\n")
        assert "there is no command /nothing" in until("/quit")
        until("> ")
        type_("/quit\n")
        assert wait() == 0
