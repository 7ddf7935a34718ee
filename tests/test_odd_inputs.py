"""Every command with every odd thing in the place of every argument: a named error and an exit code, never a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from nestpatch.cli import main
from nestpatch.formats import nest
from nestpatch.signing import keys
from tests.export.families import model_around
from tests.export.tokenizers_made import byte_level
from tests.gguf.files import gguf_of
from tests.helpers import tiny_checkpoint, tiny_pack

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX"),
    pytest.mark.timeout(120),
    # click leaves the password file open when another argument is refused.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
NAMED = re.compile(r"^(?:[A-Z]\w+Error: |Usage: |Aborted)", re.MULTILINE)


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def _empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def _words(path: Path) -> Path:
    path.write_bytes(b"\xff\xfe words \x1b[2J\n" * 50)
    return path


def _huge(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(40 << 30)
    return path


def _unreadable(path: Path) -> Path:
    path.write_bytes(b"{}")
    path.chmod(0)
    return path


def _loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


ODD: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path,
    "nothing at all": lambda path: "",
    "here": lambda path: ".",
    "with a NUL": lambda path: f"{path}\0x",
    "too long": lambda path: path.with_name("x" * 5000 + path.suffix),
    "too deep": lambda path: "a/" * 3000 + path.name,
    "no UTF-8": lambda path: path.with_name("\udcff\udcfe" + path.suffix),
    "a file whose name is no UTF-8": lambda path: _empty(path.with_name("\udcff\udcfe" + path.suffix)),
    "below a file": lambda path: _empty(path) / "x",
    "a directory": _directory,
    "an empty file": _empty,
    "no text": _words,
    "a pipe": _pipe,
    "a device": _device,
    "gigabytes of nothing": _huge,
    "unreadable": _unreadable,
    "a link to itself": _loop,
    "a digit of Thai": lambda path: "\u0e51",
}

# Command -> its arguments; {name} is a good file of that name, and each in turn is replaced by something odd.
COMMANDS = {
    "show": "{x.nest}",
    "status": "{model}",
    "list": "",
    "verify": "{model} {x.nest}",
    "report": "{x.nest} -o {out.html} --policy {policy.json}",
    "report --quiet": "{model} -o {out.html} --pack {x.nest}",
    "report --show-harmful": "{x.json} -o {out.html} --answers {x.jsonl}",
    "verify --full": "{m.gguf} {x.nest}",
    "diff": "{model} {other} -o {out.nest}",
    "diff ": "{x.nest} {x.nest}",
    "apply": "{model} {x.nest} -o {out} --policy {policy.json}",
    "apply --dry-run": "{m.safetensors} {x.nest}",
    "apply --in-place": "{model} {x.nest} --base {other}",
    "revert": "{model} --base {other}",
    "revert --to": "{version} {m.gguf}",
    "recover": "{model}",
    "export --to gguf": "{model} {x.nest} -o {out.gguf}",
    "export --to safetensors": "{model} {x.nest} -o {out}",
    "export --to lora": "{x.nest} -o {out}",
    "export --to gguf-lora": "{x.nest} -o {out.gguf}",
    "export --to onnx-adapter": "{x.nest} --for {m.onnx} -o {out}",
    "export --to gguf --llama-cpp": "{folder} {model} -o {out.gguf}",
    "keygen --no-password": "{name}",
    "keygen --password-file": "{password} {name}",
    "sign": "{x.nest} --key {x.key} -o {out.sig} --overwrite",
    "verify-signature": "{x.nest} --model {model} --policy {policy.json}",
    "verify-signature --key": "{x.pub} {x.nest}",
    "trust add": "{x.pub} --name {text} --model {model}",
    "trust list": "",
    "trust remove": "{text}",
    "push": "{x.nest} {channel} --key {x.key}",
    "pull": "{channel} -o {out.nest} --policy {policy.json}",
    "update": "{model} --channel {channel} --policy {policy.json}",
    "update --check": "{model} {other} --channel {channel}",
    "yank": "{channel} {version} --reason {text} --key {x.key}",
    "renew": "{channel} --key {x.key} --new-key {x.key}",
    "doctor": "{model} --pack {x.nest} --base {other} --policy {policy.json}",
    "adapter load": "{address} {x.nest} --policy {policy.json}",
    "adapter unload": "{address} x",
    "adapter scale": "{address} x 1",
    "adapter list": "{address}",
    "restore transplant": "{model} --base {other} --reference {model} -o {out.nest}",
    "restore extrapolate": "{model} --base {other} --rank 2 --alpha 1 -o {out.nest}",
    "restore carry": "{x.nest} {model} --base {other} -o {out.nest}",
}
RUNNING = {
    # A base without a tokenizer: no training begins.
    "train": "{other} --harmful {x.jsonl} --benign {x.txt} --recipe {x.toml} -o {out.nest}",
    "train --set": "{setting} {other} --harmful {x.csv} --add-benign {x.json} -o {out.nest}",
    "chat": "{m.gguf} {x.nest} --prompt hello",
    "eval": "{m.gguf} {x.nest} --suite harmful={x.jsonl}",
    "eval --fail-over": "{limit} {other} --suite harmful={x.jsonl}",
    "eval --base": "{other} {other} --suite harmful={x.csv} --suite benign={x.txt}",
    "judge": "{x.csv} --judge keywords",
    "detect": "{other} {x.nest} {text}",
    "guard": "{other} {x.nest} --harmful {x.jsonl} -o {out.safetensors}",
    "judge --judge": "guard={other} {x.csv}",
    "lab build": "{x.txt}",
    "demo --keep": "{x.txt}",
    "demo --lab --keep": "{x.txt}",
}
MADE = {"missing", "no UTF-8", "a digit of Thai", "a directory"}
"""Where lab and demo would begin to make what takes minutes."""


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good thing of each kind."""
    folder = tmp_path_factory.mktemp("goods")
    model = model_around(folder / "model")
    byte_level(model, "gpt2")
    tiny_checkpoint(folder / "other")
    shutil.copy(model / "model.safetensors", folder / "m.safetensors")
    gguf_of(folder / "other", folder / "m.gguf", "F16")
    nest.write(tiny_pack(model), folder / "x.nest")
    keys.keygen(folder / "x", None)
    (folder / "policy.json").write_text('{"format": "nestpatch-trust/1"}')
    (folder / "m.onnx").write_bytes(b"\x08\x07")
    (folder / "password").write_text("secret\n")
    (folder / "folder").mkdir()
    words = [f"word {number}" for number in range(25)]
    prompts = {
        "x.jsonl": "".join(json.dumps({"prompt": word}) + "\n" for word in words),
        "x.json": json.dumps([f"harmless {word}" for word in words]),
        "x.csv": "\n".join(["prompt", *words]),
        "x.txt": "\n".join(f"good {word}" for word in words),
    }
    for name, content in {**prompts, "x.toml": "steps = 1\n", "x.parquet": ""}.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def scene(goods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the good things, in the current folder, and a home of its own."""
    shutil.copytree(goods, tmp_path / "goods")
    (tmp_path / "odd").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(tmp_path / "home"))
    return tmp_path


def good(name: str, scene: Path) -> str:
    """The argument that a place in a command line should have."""
    words = {
        "text": "words",
        "setting": "steps=5",
        "limit": "attack_success=0.5",
        "version": "1.0.0",
        "address": "http://127.0.0.1:9/v1",
        "channel": f"file://{scene / 'channel'}",
        "name": str(scene / "made"),
    }
    return words.get(name) or str(scene / "goods" / name if not name.startswith("out") else scene / name)


def filled(command: str, template: str, scene: Path, odd: str | None, value: object) -> list[str]:
    """The command line, with one place taken by something odd."""
    arguments = command.split()
    for word in template.split():
        prefix, _, rest = word.rpartition("{")
        name = rest.rstrip("}")
        arguments.append(word if "{" not in word else prefix + (str(value) if name == odd else good(name, scene)))
    return arguments


def places(template: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"{([^}]*)}", template)))


def assert_named(result: Result, arguments: list[str]) -> None:
    """An end with a name."""
    seen = (arguments, result.stdout, result.stderr, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), seen
    assert result.exit_code in (0, 1, 2, 10), seen
    assert "Traceback" not in result.stderr, seen
    assert "UnexpectedError" not in result.stderr, seen
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", result.stdout + result.stderr), seen
    answer = json.loads(result.stdout) if "--json" in arguments and result.stdout else {}
    if result.exit_code and (not result.stdout or "error" in answer):
        assert NAMED.search(result.stderr), seen
    assert answer.get("error", {}).get("exit_code", result.exit_code) == result.exit_code, seen


def run_odd(command: str, template: str, odd: str, scene: Path) -> None:
    for place in places(template):
        for json_too in ([], ["--json"]):
            if (place, odd) == ("password", "a pipe"):
                continue  # from which a password may come
            for made in [scene / "odd", *scene.glob("out*"), *scene.glob("made*")]:
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            (scene / "odd").mkdir()
            value = ODD[odd](scene / "odd" / place)
            arguments = [*filled(command, template, scene, place, value), *json_too]
            assert_named(CliRunner().invoke(main, arguments), arguments)


def test_the_good_things_are_good(scene: Path) -> None:
    """Else every test below would be refused for another reason than the odd one."""
    for command in ("show", "verify", "apply --dry-run", "export --to gguf", "export --to lora", "diff ", "sign"):
        arguments = filled(command, COMMANDS[command], scene, None, "")
        result = CliRunner().invoke(main, arguments)
        # The pack is not in the rows, which is what verify has to say.
        assert result.exit_code == int(command == "verify"), (arguments, result.stderr)
        assert "Error" not in result.stderr


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("command", COMMANDS)
def test_odd_arguments_end_in_a_named_error(command: str, odd: str, scene: Path) -> None:
    run_odd(command, COMMANDS[command], odd, scene)


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd not in MADE])
@pytest.mark.parametrize("command", RUNNING)
def test_odd_arguments_of_commands_that_run_models(command: str, odd: str, scene: Path) -> None:
    """Refused before torch or llama.cpp see them."""
    pytest.importorskip("torch")
    run_odd(command, RUNNING[command], odd, scene)


def commands(group: click.Group, prefix: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name


def test_every_command_is_attacked() -> None:
    attacked = [*COMMANDS, *RUNNING]
    assert not [name for name in commands(main) if not any(f"{text} ".startswith(f"{name} ") for text in attacked)]
