"""Ends of the command line in a process of its own: full and closed outputs, odd encodings, no home, Ctrl-C, many at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nestpatch
from nestpatch.errors import TrustError
from nestpatch.formats import nest
from nestpatch.signing import keys
from nestpatch.signing.store import _changing as changing
from nestpatch.signing.store import trust_file
from tests.helpers import tiny_checkpoint, tiny_pack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full, and locales of Linux")
ROOT = Path(nestpatch.__file__).parents[1]


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("goods")
    nest.write(tiny_pack(tiny_checkpoint(folder / "model")), folder / "x.nest")
    keys.keygen(folder / "x", None)
    return folder


def environment(tmp: Path, **more: str) -> dict[str, str]:
    (tmp / "home").mkdir(exist_ok=True)
    return {**os.environ, "PYTHONPATH": str(ROOT), "NESTPATCH_HOME": str(tmp / "home"), "PYTHONUNBUFFERED": "", **more}


def command(*arguments: object) -> list[str | bytes]:
    odd = (argument if isinstance(argument, bytes) else str(argument) for argument in arguments)
    return [sys.executable, "-m", "nestpatch", *odd]


WRITERS: dict[str, list[str]] = {
    "show": ["show", "{x.nest}"],
    "show --json": ["show", "{x.nest}", "--json"],
    "status": ["status", "{model}"],
    "verify": ["verify", "{model}", "{x.nest}"],
    "diff": ["diff", "{x.nest}", "{x.nest}"],
    "apply": ["apply", "{model}", "{x.nest}", "--dry-run"],
    "export": ["export", "{model}", "{x.nest}", "--to", "safetensors", "--dry-run", "--json"],
    "keygen": ["keygen", "--no-password", "{new}"],
    "trust list": ["trust", "list", "--json"],
    "verify-signature": ["verify-signature", "{x.nest}"],
    "help": ["--help"],
    "help of a command": ["apply", "--help"],
    "version": ["--version"],
    "recover": ["recover", "{model}"],
    "settings": ["train", "--help-recipe"],
}


def filled(name: str, goods: Path, tmp: Path) -> list[str | bytes]:
    words = [str((tmp if word == "{new}" else goods) / word[1:-1]) if word.startswith("{") else word for word in WRITERS[name]]
    return command(*words)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_stdout_is_one_named_error(name: str, goods: Path, tmp_path: Path) -> None:
    """Also when the interpreter ends and flushes once more."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            filled(name, goods, tmp_path),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(tmp_path),
            check=False,
        )
    assert done.returncode == 1, done.stderr
    assert errors_of(done.stderr).startswith("FileSystemError: "), done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("name", WRITERS)
def test_a_closed_pipe_is_silent(name: str, goods: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            filled(name, goods, tmp_path),
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(tmp_path),
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, errors_of(done.stderr)) == (1, "")


def errors_of(text: str) -> str:
    """What a command prints on stderr, without the line for a user who trusts no key."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("no key is trusted on this machine"))


@pytest.mark.parametrize("name", ["show", "show --json", "version"])
def test_everything_full_or_closed_ends_quietly(name: str, goods: Path, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(filled(name, goods, tmp_path), stdout=full, stderr=full, env=environment(tmp_path), check=False)
    assert done.returncode == 1
    closed = f"exec {' '.join(map(str, filled(name, goods, tmp_path)))} >&- 2>&-"
    assert subprocess.run(["sh", "-c", closed], env=environment(tmp_path), check=False).returncode in (0, 1)


ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "utf-8": {"PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"},
}


@pytest.mark.parametrize("json_too", [[], ["--json"]])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_names_that_are_no_text_are_shown_in_every_encoding(
    encoding: str, json_too: list[str], goods: Path, tmp_path: Path
) -> None:
    """A model and a pack whose names are bytes, found and not found, with results and with errors."""
    folder = os.fsencode(tmp_path) + b"/\xff\xe9 K\xc3\xa4se"
    os.mkdir(folder)  # noqa: PTH102 - bytes
    for name in ("x.nest", "model"):
        subprocess.run(["cp", "-r", goods / name, folder + b"/" + name.encode()], check=True)
    model, patch = folder + b"/model", folder + b"/x.nest"
    cases = [
        (0, ("show", patch)), (1, ("show", folder)), (1, ("show", patch + b"\xfe")), (0, ("status", model)),
        (1, ("verify", model, patch)), (0, ("apply", model, patch, "--dry-run")), (0, ("diff", patch, patch)),
        (1, ("diff", model, patch + b"\xfe")), (0, ("recover", model)), (1, ("verify-signature", patch)),
        (0, ("keygen", "--no-password", folder + b"/key")), (1, ("update", model)), (1, ("eval", folder, "--suite", patch)),
        (0, ("apply", model, patch, "-o", folder + b"/out")), (0, ("apply", model, patch, "--in-place")),
        (0, ("revert", model)),
    ]  # fmt: skip
    for code, arguments in cases:
        done = subprocess.run(
            command(*arguments, *json_too), capture_output=True, env=environment(tmp_path, **ENCODINGS[encoding]), check=False
        )
        seen = arguments, done.stdout, done.stderr
        assert done.returncode in ((1, 2) if code else (0,)), seen
        assert b"Traceback" not in done.stderr, seen
        assert b"UnexpectedError" not in done.stderr, seen
        text = done.stdout.decode("utf-8" if encoding == "utf-8" else "latin-1" if encoding == "latin-1" else "ascii")
        if json_too and text:
            json.loads(text)
        if arguments[0] in ("status", "recover") and not json_too:
            assert r"\xff" in text, seen


@pytest.mark.parametrize("arguments", [("trust", "list"), ("trust", "add", "{x.pub}"), ("update", "{model}")])
def test_a_user_without_a_home_is_told_what_to_set(arguments: tuple[str, ...], goods: Path, tmp_path: Path) -> None:
    """As in a container with a user id of its own; what needs no home works."""
    done = homeless(goods, tmp_path, *arguments)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("TrustError: this user has no home folder"), done.stderr
    assert "NESTPATCH_HOME" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("show", "{x.nest}"), ("status", "{model}"), ("verify", "{model}", "{x.nest}"), ("diff", "{x.nest}", "{x.nest}")],
)
def test_commands_without_keys_need_no_home(arguments: tuple[str, ...], goods: Path, tmp_path: Path) -> None:
    done = homeless(goods, tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (int(arguments[0] == "verify"), ""), "the pack is not in the rows, says verify"


def homeless(goods: Path, tmp: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user whom the system does not know."""
    kept = {
        name: value for name, value in environment(tmp).items() if name not in ("HOME", "NESTPATCH_HOME", "XDG_CONFIG_HOME")
    }
    # The list of users is asked for this process only.
    code = """import pwd, runpy, sys
def unknown(*_):
    raise KeyError("unknown")
pwd.getpwuid = unknown
runpy.run_module("nestpatch", run_name="__main__", alter_sys=True)"""
    words = [str(goods / word[1:-1]) if word.startswith("{") else word for word in arguments]
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=kept, check=False)


def test_the_folder_is_that_of_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NESTPATCH_HOME", "XDG_CONFIG_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert trust_file().parent == tmp_path / "NESTPATCH_HOME"
    monkeypatch.delenv("NESTPATCH_HOME")
    assert trust_file().parent == tmp_path / "XDG_CONFIG_HOME" / "nestpatch"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert trust_file().parent == tmp_path / "HOME" / ".config" / "nestpatch"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_home_without_locks_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(TrustError, match=r"cannot lock .*trust\.lock") as caught,
        changing(tmp_path / "home" / "trust.json", create=True),
    ):
        pass
    assert "NESTPATCH_HOME" in caught.value.advice


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(TrustError, match="cannot make"), changing(tmp_path / "home" / "x" / "trust.json", create=True):
        pass


def test_eight_at_once_lose_no_key(tmp_path: Path) -> None:
    for number in range(8):
        keys.keygen(tmp_path / f"k{number}", None)
    names = [f"k{number}" for number in range(8)]
    together([command("trust", "add", tmp_path / f"{name}.pub", "--name", name) for name in names], tmp_path)
    assert trusted(tmp_path) == set(names)
    together([command("trust", "remove", name) for name in names[:7]], tmp_path)
    assert trusted(tmp_path) == {"k7"}


def together(commands: list[list[str | bytes]], tmp: Path) -> None:
    running = [subprocess.Popen(one, stdout=subprocess.DEVNULL, env=environment(tmp)) for one in commands]
    assert [process.wait() for process in running] == [0] * len(running)


def trusted(tmp: Path) -> set[str]:
    done = subprocess.run(command("trust", "list", "--json"), capture_output=True, env=environment(tmp), check=True)
    return {key["name"] for key in json.loads(done.stdout)["keys"]}


def test_ctrl_c_ends_a_command_with_one_line(goods: Path, tmp_path: Path) -> None:
    """While it waits: for the lock that this process holds."""
    (tmp_path / "home").mkdir()
    with changing(tmp_path / "home" / "trust.json", create=True):
        waiting = subprocess.Popen(
            command("trust", "add", goods / "x.pub"), stderr=subprocess.PIPE, text=True, env=environment(tmp_path)
        )
        until_it_waits(waiting.pid)
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate(timeout=60)
    assert (waiting.returncode, said) == (130, "Interrupted.\n")


def until_it_waits(pid: int) -> None:
    """Until a process sleeps in flock."""
    inode = None
    for _ in range(600):
        locks = Path("/proc/locks").read_text()
        inode = any("->" in line and f" {pid} " in line for line in locks.splitlines())
        if inode:
            return
        time.sleep(0.1)
    pytest.fail("it never waited")


@pytest.mark.parametrize(
    ("error", "says", "code"),
    [
        (KeyboardInterrupt(), "Interrupted.", 130),
        (MemoryError(), "OutOfMemoryError: `nestpatch show` needs more memory", 1),
        (RecursionError("deep"), "UnexpectedError: RecursionError: deep", 1),
        (ZeroDivisionError("x\x1b[2J"), r"UnexpectedError: ZeroDivisionError: x\x1b[2J (", 1),
        (OSError(errno.EIO, "Input/output error"), "FileSystemError: ", 1),
    ],
)
def test_whatever_goes_wrong_has_a_name(
    error: BaseException, says: str, code: int, goods: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from nestpatch.cli import main

    def fail(path: object) -> None:
        raise error

    monkeypatch.delenv("NESTPATCH_TRACEBACK", raising=False)
    monkeypatch.setattr(nest, "decode", fail)
    result = CliRunner().invoke(main, ["show", str(goods / "x.nest")])
    assert (result.exit_code, type(result.exception)) == (code, SystemExit)
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert "\x1b" not in result.stderr


def test_who_looks_for_an_error_of_nestpatch_gets_its_traceback(goods: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from nestpatch.cli import main

    def fail(path: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setenv("NESTPATCH_TRACEBACK", "1")
    monkeypatch.setattr(nest, "decode", fail)
    assert isinstance(CliRunner().invoke(main, ["show", str(goods / "x.nest")]).exception, ZeroDivisionError)


@pytest.mark.parametrize("name", ["", ".", "..", "sub/", "sub/.", "sub/..", "missing/key", "x" * 300, "\udcff/"])
def test_odd_names_for_keys_make_no_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from nestpatch.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    result = CliRunner().invoke(main, ["keygen", "--no-password", name])
    assert (result.exit_code in (1, 2), type(result.exception)) == (True, SystemExit), result.stderr
    assert "UnexpectedError" not in result.stderr
    assert [file.name for file in tmp_path.rglob("*")] == ["sub"]


@pytest.mark.parametrize("place", ["/dev/null", "/dev/full", ".", "/", "sub", "missing/x.sig", "x" * 300, "pipe"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_signatures_go_into_files_alone(
    place: str, overwrite: list[str], goods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--overwrite replaces files, and neither devices nor folders."""
    from click.testing import CliRunner

    from nestpatch.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    arguments = ["sign", str(goods / "x.nest"), "--key", str(goods / "x.key"), "-o", place, *overwrite]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert result.stderr.startswith("OutputError: "), result.stderr
    assert Path("/dev/null").is_char_device()
    assert {file.name for file in tmp_path.rglob("*")} == {"sub", "pipe"}
