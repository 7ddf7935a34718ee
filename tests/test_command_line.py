"""The manners of the command line: help, suggestions, exit codes, errors as JSON, progress, Ctrl-C, completion."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import nestpatch
from nestpatch import errors
from nestpatch.cli import SECTIONS, TAGLINE, main
from nestpatch.errors import NestpatchError
from nestpatch.events import Event
from nestpatch.formats import nest
from nestpatch.signing import keys
from nestpatch.views import console, progress
from tests.helpers import tiny_checkpoint, tiny_pack

ROOT = Path(nestpatch.__file__).parents[1]


def run(*words: object, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, [str(word) for word in words], prog_name="nestpatch")


def commands(group: click.Group, *before: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *before, name)
        else:
            yield (*before, name)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a pack of it and a key, in the current folder, and a home of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(tmp_path / "home"))
    nest.write(tiny_pack(tiny_checkpoint(tmp_path / "model")), tmp_path / "x.nest")
    keys.keygen(tmp_path / "x", None)
    return tmp_path


# Help


@pytest.mark.parametrize("words", commands(main), ids=" ".join)
def test_the_help_of_a_command_has_examples_and_fits(words: tuple[str, ...]) -> None:
    result = run(*words, "--help", COLUMNS="100")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines.count("  Examples:") == 1, result.stdout
    examples = [line.strip() for line in lines[lines.index("  Examples:") :] if line.startswith("    nestpatch ")]
    assert len(examples) >= 2, result.stdout
    assert all(line.split()[1 : 1 + len(words)] == list(words) for line in examples)
    assert max(map(len, lines)) <= 100
    assert not re.search(r"\bPATCH\b", result.stdout), "a .nest file is a PACK"


@pytest.mark.parametrize("words", commands(main), ids=" ".join)
def test_the_examples_name_options_that_exist(words: tuple[str, ...]) -> None:
    command: click.Command = main
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    text = run(*words, "--help").stdout.partition("Examples:")[2]
    assert set(re.findall(r"(?<=\s)--?[a-z][a-z0-9-]*", text)) <= known | {"--help"}


def test_the_help_lists_every_command_once_in_its_section() -> None:
    text = run("--help").stdout
    for title, members in SECTIONS.items():
        section = text.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines()] == list(members)
    assert {name for members in SECTIONS.values() for name in members} == set(main.commands)
    assert max(map(len, text.splitlines())) <= 80


def test_the_package_and_the_command_line_describe_themselves_alike() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\ndescription = "{TAGLINE.rstrip(".")}"\n' in project
    assert TAGLINE in " ".join(run("--help").stdout.split())


@pytest.mark.parametrize(
    ("word", "meant"),
    [("aply", "apply"), ("Show", "show"), ("undo", "revert"), ("install", "apply"), ("verifysignature", "verify-signature")],
)
def test_an_unknown_command_names_the_closest(word: str, meant: str) -> None:
    result = run(word)
    assert (result.exit_code, f"Did you mean '{meant}'?" in result.stderr) == (2, True)


def test_what_resembles_no_command_gets_no_suggestion() -> None:
    result = run("\x1b[2Jqqqq")
    assert (result.exit_code, "Did you mean" in result.stderr, "\x1b" in result.stderr) == (2, False, False)


@pytest.mark.parametrize(
    "words", [("\x1b[2J",), ("apply", "--\x1b[2J"), ("export", "m", "--to", "\x1b[2J"), ("apply", "\x1b.nest", "m")]
)
def test_a_usage_error_drives_no_terminal(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m", "\x1b.nest"):
        (tmp_path / name).mkdir()
    for result in (run(*words), run(*words, "--json")):
        assert result.exit_code == 2
        assert "\x1b" not in result.stdout + result.stderr


def test_an_unknown_option_names_the_closest() -> None:
    result = run("apply", "model", "x.nest", "--in-plac")
    assert (result.exit_code, "--in-place" in result.stderr) == (2, True)


# Exit codes

MISSING = {
    "show": "{x.nest}",
    "status": "{model}",
    "report": "{model} --pack {x.nest} --answers {x.jsonl} --policy {policy.json} -o out.html",
    "verify": "{model} {x.nest} --base {model}",
    "doctor": "{model} --pack {x.nest} --base {model} --policy {policy.json} --suite harmful={x.jsonl}",
    "diff": "{x.nest} {x.nest}",
    "apply": "{model} {x.nest} --policy {policy.json} --base {model}",
    "revert": "{model} --policy {policy.json} --base {model}",
    "recover": "{model}",
    "update": "{model} --policy {policy.json} --base {model}",
    "chat": "{model} {x.nest} --lora {x.gguf} --base {model}",
    "adapter load": "http://127.0.0.1:9/v1 {x.nest} --policy {policy.json}",
    "eval": "{model} {x.nest} --lora {x.gguf} --base {model} --suite harmful={x.jsonl} --judge guard={model}",
    "judge": "{x.csv} --judge classifier={model}",
    "train": "{model} --harmful {x.jsonl} --benign {y.jsonl} --add-harmful {x.jsonl} --recipe {x.toml} -o out.nest",
    "export": "{model} {x.nest} --to safetensors --llama-cpp {model} --for {model}",
    "sign": "{x.nest} --key {x.key}",
    "verify-signature": "{x.nest} --key {x.pub} --policy {policy.json}",
    "trust add": "{x.pub}",
    "detect": "{model} {x.nest} hello",
    "guard": "{model} {x.nest} -o g.safetensors",
    "restore transplant": "{model} --base {model} --reference {model} -o y.nest",
    "restore extrapolate": "{model} --base {model} --rank 2 --alpha 1 -o y.nest",
    "restore carry": "{x.nest} {model} --base {model} -o y.nest",
    "push": "{x.nest} file:///channel --key {x.key}",
    "yank": "file:///channel 1.0.0 --reason r --key {x.key}",
    "renew": "file:///channel --key {x.key} --new-key {x.key}",
    "keygen": "--password-file {password} new",
}
"""Command -> its arguments; each input in braces is missing in turn."""
NO_INPUT = {
    "pull",
    "demo",
    "list",
    "lab build",
    "trust list",
    "trust remove",
    "adapter list",
    "adapter scale",
    "adapter unload",
}
"""Commands that read no file of the user, but for a policy."""


def absent() -> Iterator[tuple[str, int]]:
    for name, template in MISSING.items():
        yield from ((name, position) for position, word in enumerate(template.split()) if "{" in word)


def test_every_command_is_run_without_its_inputs() -> None:
    assert set(MISSING) | NO_INPUT == {" ".join(words) for words in commands(main)}


@pytest.mark.parametrize(("name", "position"), absent())
def test_a_missing_input_ends_with_2(name: str, position: int, scene: Path) -> None:
    """Whatever the input is: a model, a pack, a key, a policy, prompts, settings."""
    (scene / "policy.json").write_text('{"format": "nestpatch-trust/1"}')
    for file in ("x.gguf", "x.toml", "x.csv", "password"):
        (scene / file).touch()
    for file in ("x", "y"):
        (scene / f"{file}.jsonl").write_text("".join(f'{{"prompt": "{file} {number}"}}\n' for number in range(25)))
    words = MISSING[name].split()
    before = sorted(scene.rglob("*"))
    words = [re.sub(r"{(.*)}", r"absent-\1" if number == position else r"\1", word) for number, word in enumerate(words)]
    result = run(*name.split(), *words)
    assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.stderr
    assert f"absent-{MISSING[name].split()[position].partition('{')[2].rstrip('}')}" in result.stderr
    assert sorted(scene.rglob("*")) == before, "nothing is written"


def test_a_missing_path_names_what_is_close_to_it(scene: Path) -> None:
    result = run("apply", "model", "y.nest")
    assert result.stderr == "MissingInputError: PACK y.nest does not exist\nWhat to do: Did you mean x.nest?\n"
    assert "hub://owner/name" in run("show", "acme/no-harm").stderr


@pytest.mark.parametrize("model", ["model.gguf", "model/none", "./none", "/none", "none"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(model: str, scene: Path) -> None:
    result = run("eval", model, "--suite", "harmful=x.jsonl", HF_ENDPOINT="http://127.0.0.1:9")
    assert (result.exit_code, result.stderr.partition(":")[0]) == (2, "MissingInputError")


def test_exit_codes_of_errors() -> None:
    """1 for what went wrong, 2 for what the user passed."""
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, NestpatchError)]
    assert {one.__name__ for one in classes if one.exit_code == 2} == {
        "DataError", "MissingInputError", "PromptDataError", "RecipeError",
    }  # fmt: skip
    assert {one.exit_code for one in classes} == {1, 2}


def test_the_table_of_exit_codes_is_documented() -> None:
    table = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\d+) \|", table, re.MULTILINE) == ["0", "1", "2", "10", "130", "143"]


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    """The drawing at the top of errors.py names every class, under its base."""
    drawn: dict[str, str] = {}
    stack = ["NestpatchError"]
    for line in str(errors.__doc__).splitlines():
        if found := re.match(r"((?:│   |    )*)[├└]── (\w+)  ", line):
            depth = len(found[1]) // 4 + 1
            drawn[found[2]], stack[depth:] = stack[depth - 1], [found[2]]
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, NestpatchError)]
    assert drawn == {one.__name__: one.__base__.__name__ for one in classes if one is not NestpatchError and one.__base__}


# Errors as JSON


@pytest.mark.parametrize(
    ("words", "name", "code"),
    [
        (("show", "none"), "MissingInputError", 2),
        (("apply", "model", "x.nest", "--in-place", "-o", "out"), "UsageError", 2),
        (("apply", "model"), "UsageError", 2),
        (("shw",), "UsageError", 2),
        (("apply", "model", "model"), "PackError", 1),
        (("revert", "model"), "ChainError", 1),
    ],
)
def test_with_json_an_error_is_one_object_on_stdout(words: tuple[str, ...], name: str, code: int, scene: Path) -> None:
    plain, as_json = run(*words), run(*words, "--json")
    assert (plain.exit_code, as_json.exit_code, plain.stdout) == (code, code, "")
    assert as_json.stderr.replace(" --json", "") == plain.stderr, "the words stay on stderr"
    error = json.loads(as_json.stdout)["error"]
    assert (set(error), error["type"], error["exit_code"]) == ({"type", "message", "advice", "exit_code"}, name, code)
    assert error["message"] in plain.stderr
    assert error["advice"]


def test_after_two_dashes_json_is_a_name(scene: Path) -> None:
    assert run("show", "--", "--json").stdout == ""


# Ctrl-C


def stopped(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, before: Callable[[], None] = lambda: None) -> None:
    """Lets a function end as Ctrl-C ends it."""

    def stop(*_: object, **__: object) -> None:
        before()
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, stop)


@pytest.mark.parametrize("words", [("apply", "model", "x.nest"), ("export", "model", "x.nest", "--to", "safetensors")])
def test_ctrl_c_says_that_nothing_was_written(words: tuple[str, ...], scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, nest, "decode")
    before = sorted(scene.rglob("*"))
    result = run(*words, "--json")
    assert (result.exit_code, result.stderr) == (130, "Interrupted. Nothing was written.\n")
    assert json.loads(result.stdout)["error"]["exit_code"] == 130
    assert sorted(scene.rglob("*")) == before


def test_ctrl_c_in_a_change_in_place_says_what_the_rows_hold(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nestpatch.patcher import _transaction

    with monkeypatch.context() as patch:
        stopped(patch, _transaction, "write_ledger")
        result = run("apply", "model", "x.nest", "--in-place", "--quiet")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted. model holds no unfinished change: `nestpatch status model` shows what is applied.\n"
    assert run("verify", "model", "x.nest").stdout.startswith("base ")


def test_ctrl_c_twice_names_the_way_out(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one in the middle of putting the rows back: the journal is left."""
    from nestpatch.patcher import _transaction

    with monkeypatch.context() as patch:
        stopped(patch, _transaction, "write_ledger")
        stopped(patch, _transaction, "roll_back")
        result = run("apply", "model", "x.nest", "--in-place", "--quiet")
    assert (result.exit_code, result.stderr) == (
        130,
        "Interrupted. A change of model is unfinished: `nestpatch recover model` ends it.\n",
    )
    assert "rolled back" in run("recover", "model").stdout
    assert run("verify", "model", "x.nest").stdout.startswith("base ")


# Progress


def printed(monkeypatch: pytest.MonkeyPatch, *events: tuple[float, Event]) -> list[str]:
    """The lines for events at these times."""
    text = io.StringIO()
    monkeypatch.setattr(console.err, "_file", text)
    times = iter([0.0, *(time for time, event in events if event.stage != "note")])
    lines = progress._Lines(lambda: next(times))
    for _, event in events:
        lines(event)
    return text.getvalue().splitlines()


def test_without_a_terminal_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(float(second), Event("tune", second * 2, 400, f"loss {second / 100}")) for second in range(1, 31)]
    assert printed(monkeypatch, *steps) == [
        "[    1 s] tuning deltas 2/400, loss 0.01",
        "[   11 s] tuning deltas 22/400, loss 0.11, about 3 min left",
        "[   21 s] tuning deltas 42/400, loss 0.21, about 3 min left",
    ]


def test_what_was_done_before_an_interruption_took_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 200 to 240 took 10 s, so 160 more take 40 s; a look in between begins a new round."""
    found = printed(
        monkeypatch,
        (1, Event("tune", 200, 400)),
        (11, Event("tune", 240, 400)),
        (12, Event("look", 64, 128)),
        (13, Event("tune", 241, 400)),
        (23, Event("tune", 251, 400)),
    )
    assert found == [
        "[    1 s] tuning deltas 200/400",
        "[   11 s] tuning deltas 240/400, about 40 s left",
        "[   12 s] answering held-out prompts 64/128",
        "[   13 s] tuning deltas 241/400",
        "[   23 s] tuning deltas 251/400, about 2 min left",
    ]


def test_stages_and_notes_are_printed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = printed(
        monkeypatch,
        (1, Event("load", note="acme/llama")),
        (2, Event("probe", 1, 10)),
        (3, Event("note", note="layer 3: 12 neurons")),
        (13, Event("probe", 5, 10)),
        (14, Event("evaluate", 1, 4, "a.jsonl")),
        (15, Event("evaluate", 2, 4, "a.jsonl")),
    )
    assert found == [
        "[    1 s] loading, acme/llama",
        "[    2 s] probing neurons 1/10",
        "  layer 3: 12 neurons",
        "[   13 s] probing neurons 5/10, about 14 s left",
        "[   14 s] evaluating 1/4, a.jsonl",
    ]


def test_the_remaining_time_is_that_of_this_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that begins again, such as the next suite, is not as long as both."""
    found = printed(
        monkeypatch, (0, Event("evaluate", 0, 100)), (3000, Event("evaluate", 99, 100)), (3001, Event("evaluate", 0, 100)),
        (3021, Event("evaluate", 10, 100)),
    )  # fmt: skip
    assert found[-1] == "[ 3021 s] evaluating 10/100, about 3 min left"


def test_on_a_terminal_bars_show_step_note_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    for name, value in {"_file": text, "_force_terminal": True, "_width": 120}.items():
        monkeypatch.setattr(console.err, name, value)
    with progress.shown() as on_event:
        on_event(Event("tune", 21, 100, "loss 0.6"))
        on_event(Event("tune", 42, 100, "loss 0.5"))
        on_event(Event("note", note="layer [3]"))
    drawn = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert "layer [3]" in drawn
    bar = [line for line in drawn.splitlines() if "tuning deltas" in line][-1]
    assert re.search(r"42/100 0:00:\d\d left [-:0-9]+ loss 0\.5", bar), bar


# Widths


def wide(*words: object, columns: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": columns}
    command = [sys.executable, "-m", "nestpatch", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()


def test_columns_is_the_width_also_of_a_pipe(scene: Path) -> None:
    shown = wide("show", "x.nest", columns="50")
    assert max(map(len, shown)) <= 50
    assert nest.pack_id(nest.read("x.nest")) in re.sub(r"\s", "", "".join(shown)), "a digest is never cut"
    assert max(map(len, wide("status", "--help", columns="60"))) <= 60


def test_show_sums_layers_and_rows_lists_them_in_numeric_order(tmp_path: Path) -> None:
    pack = tiny_pack(tiny_checkpoint(tmp_path / "model", layers=12))
    nest.write(pack, tmp_path / "x.nest")
    short, long = (run("show", tmp_path / "x.nest", *more).stdout for more in ((), ("--rows",)))
    assert len(short.splitlines()) <= 25
    assert "model.layers.*.mlp.gate_proj.weight" in short
    layers = [int(number) for number in re.findall(r"layers\.(\d+)\.mlp\.gate_proj", long)]
    assert layers == sorted(layers)
    assert len(layers) > 1


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_options(shell: str) -> None:
    def complete(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "_NESTPATCH_COMPLETE": f"{shell}_complete"}
        environment |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1) if shell != "fish" else words[-1]}
        code = "from nestpatch.cli import main; main(prog_name='nestpatch')"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False).stdout

    assert "verify-signature" in complete("nestpatch", "veri")
    assert "--in-place" in complete("nestpatch", "apply", "--in")
    assert "file" in complete("nestpatch", "apply", "mod")
