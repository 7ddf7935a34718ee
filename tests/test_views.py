"""Hostile text in every field of everything that is shown: no control character reaches the terminal, no markup works."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import io
import json
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from nestpatch import views
from nestpatch.channels._release import MARK, model_card
from nestpatch.channels.listing import Channel, ListedFile, ListedPack, ListedStatus
from nestpatch.commands.options import print_json, say
from nestpatch.evaluation.agreement import Agreement
from nestpatch.evaluation.dose import Dose, DosePoint
from nestpatch.evaluation.shares import Share
from nestpatch.events import Event
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.plain import count, lines, markdown, number, one_line
from nestpatch.signing import keys
from nestpatch.views import (
    chat,
    comparing,
    console,
    demo,
    detecting,
    evaluation,
    exporting,
    fleet,
    health,
    models,
    packs,
    parts,
    progress,
    publishing,
    restoring,
)
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.report_pages import evaluation as measured_evaluation

HOSTILE = (
    "\x1b[2J", "\x9b31m", "\x1b]8;;http://evil\x1b\\", "[red]x[/red]", "[/]", "[/bold]", "\u202eevil",
    "a\nWhat to do: run evil", "\r",
    "\u200b", "\u2028", "\x00", "\x07", "[link=http://evil", "x]", "\\", "\\\\\\", ":boom:", "\udcff", "\u3164", "[bold",
)  # fmt: skip
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\u3164]")
MODULES = (
    chat, comparing, console, demo, detecting, evaluation, exporting, fleet, health, models, packs, parts, progress, publishing,
    restoring,
)  # fmt: skip


def value_of(kind: Any, text: str, depth: int = 0) -> Any:
    """Some value of a type, with the text wherever there is a text."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return value_of(next(one for one in inner if one is not type(None)), text, depth)
    if origin is tuple:
        return tuple(value_of(one, text, depth) for one in inner if one is not Ellipsis)
    if origin in (list, Sequence):
        return [value_of(inner[0], text, depth)]
    if origin in (dict, Mapping):
        return {value_of(inner[0], text, depth): value_of(inner[1], text, depth)}
    if kind in SIMPLE:
        return SIMPLE[kind](text)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind))
    assert dataclasses.is_dataclass(kind), kind
    return filled(kind, text, depth + 1)  # type: ignore[arg-type]


SIMPLE: dict[Any, Callable[[str], Any]] = {
    str: lambda text: text,
    Path: Path,
    bool: lambda _: False,
    int: lambda _: 3,
    float: lambda _: 0.5,
    Any: lambda text: text,
    object: lambda text: text,
    bytes: lambda text: text.encode("utf-8", "surrogatepass"),
    keys.PublicKey: lambda _: keys.PrivateKey.generate().public,
}


def filled(cls: type, text: str, depth: int = 0) -> Any:
    """A value of a dataclass whose checks are passed over: what is shown may come from anywhere."""
    assert depth < 8
    made = object.__new__(cls)
    for name, kind in typing.get_type_hints(cls, localns=names_of(cls)).items():
        if name in {field.name for field in dataclasses.fields(cls)}:
            object.__setattr__(made, name, value_of(kind, text, depth))
    return made


def names_of(cls: type) -> dict[str, Any]:
    """What annotations of a module may name though only type checkers import it."""
    from nestpatch.export.results import Parity

    return {"Share": Share, "Parity": Parity, **vars(importlib.import_module(cls.__module__))}


def dataclasses_shown() -> Iterator[tuple[Callable[..., Any], str]]:
    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and re.match(r"show_|.*_table$", name):
                yield function, name


def changed(text: str) -> None:
    from nestpatch.patcher.inplace import Changed

    for done in (filled(Changed, text), dataclasses.replace(filled(Changed, text), steps=())):
        models.show_changed(done)


def guards(text: str) -> None:
    from nestpatch.guarding.export import ExportedGuard

    guard: Any = SimpleNamespace(pack=text, matrices=(text,), directions=0.1, prompts=7)
    exporting.show_guard(ExportedGuard(Path(text), guard, 1, 0.1))


def restored(text: str) -> None:
    from nestpatch.restore.result import Restored

    restoring.show_restored(filled(Restored, text))


def detected(text: str) -> None:
    from nestpatch.evaluation.detecting import Detected

    detecting.show_detected(filled(Detected, text))


def shown_packs(text: str) -> None:
    for rows in (False, True):
        packs.show_pack(filled_pack(text), text, 5, rows=rows)


def updated_models(text: str) -> list[Any]:
    """One that failed itself, and one whose channels are in every state."""
    from nestpatch.patcher.fleet import UpdatedModel
    from nestpatch.patcher.update import Updated

    channels = tuple(
        dataclasses.replace(filled(Updated, text), state=state) for state in ("current", "available", "failed", text)
    )
    one = filled(UpdatedModel, text)
    return [one, dataclasses.replace(one, error="", channels=channels)]


def answers(text: str) -> None:
    for width in (79, 120):
        console.out.print(chat.answers_table({"base": text, text: f"a{text}"}, width), width=width)
    chat.show_answers({text: text, "patched": text})


def cases() -> dict[str, Callable[[str], None]]:
    """Name of each function that draws -> how it is called with a text everywhere."""
    from nestpatch.channels.follow import Pulled
    from nestpatch.channels.publish import Published
    from nestpatch.compare.diff import CheckpointDiff
    from nestpatch.compare.extract import Extracted
    from nestpatch.compare.packs import PackDiff
    from nestpatch.demo.lab import LabDemo
    from nestpatch.demo.model import ModelDemo
    from nestpatch.evaluation.parity import GgufParity
    from nestpatch.evaluation.scores import Scores
    from nestpatch.export.results import ExportedAdapter, ExportedGguf, ExportedOnnx, ExportedSafetensors
    from nestpatch.health.diagnosis import Diagnosis
    from nestpatch.nest_train.plan import TrainingPlan
    from nestpatch.nest_train.result import Trained
    from nestpatch.patcher.apply import Applied
    from nestpatch.patcher.registry import PatchedModel
    from nestpatch.patcher.status import Status
    from nestpatch.patcher.update import Updated
    from nestpatch.patcher.verify import Verification
    from nestpatch.signing.keys import KeyPair
    from nestpatch.signing.trust import Policy
    from nestpatch.signing.verify import SignatureFile, UnverifiedPack, VerifiedPack

    def simple(function: Callable[[Any], None], *classes: type) -> Callable[[str], None]:
        def draw(text: str) -> None:
            for cls in classes:
                function(filled(cls, text))

        return draw

    def updated(text: str) -> None:
        for state in ("current", "available", "failed", text):
            publishing.show_updated(Path(text), [dataclasses.replace(filled(Updated, text), state=state)])

    def adapters(text: str) -> None:
        for kind in ("gguf-lora", "onnx-adapter", text):
            exporting.show_adapter(dataclasses.replace(filled(ExportedAdapter, text), format=kind))

    def show_evaluation(text: str) -> None:
        console.out.print(evaluation.evaluation_table({text: filled(Scores, text)}))

    def headlines(text: str) -> None:
        share = {"value": text, "count": text, "total": text}
        console.out.print(evaluation.headline_table(console.escape(text), {"attack_success": share}, {"kl_to_base": text}))

    return {
        "answers_table": answers,
        "show_answers": lambda text: chat.show_answers({text: text, "patched": text}),
        "show_opening": lambda text: chat.show_opening({text: text}),
        "show_error": lambda text: console.show_error(ValueError(text), text),
        "show_applied": simple(models.show_applied, Applied),
        "show_exported": simple(exporting.show_exported, ExportedGguf, ExportedSafetensors, ExportedOnnx),
        "show_guard": guards,
        "show_restored": restored,
        "show_detected": detected,
        "show_changed": changed,
        "show_status": simple(models.show_status, Status),
        "show_patched": lambda text: models.show_patched([filled(PatchedModel, text)]),
        "show_verification": lambda text: models.show_verification(text, filled(Verification, text)),
        "show_diagnosis": simple(health.show_diagnosis, Diagnosis),
        "show_pack": shown_packs,
        "evaluation_table": show_evaluation,
        "agreement_table": lambda text: console.out.print(evaluation.agreement_table([filled(Agreement, text)])),
        "headline_table": headlines,
        "dose_table": lambda text: console.out.print(evaluation.dose_table(curve())),
        "show_dose": lambda text: evaluation.show_dose(curve()),
        "show_ablation": lambda text: parts.show_ablation(measured_evaluation(text), measured_evaluation(text).ablation),
        "show_categories": lambda text: parts.show_categories(measured_evaluation(text)),
        "show_demo": simple(lambda result: demo.show_demo(result, console.out), LabDemo, ModelDemo),
        "recipe_table": lambda text: console.out.print(packs.recipe_table()),
        "show_adapter": adapters,
        "show_check": simple(exporting.show_check, GgufParity),
        "show_diff": simple(comparing.show_diff, CheckpointDiff, PackDiff, Extracted),
        "show_published": simple(publishing.show_published, Published),
        "show_pulled": simple(publishing.show_pulled, Pulled),
        "show_updated": updated,
        "show_failures": lambda text: fleet.show_failures(updated_models(text)),
        "show_fleet": lambda text: fleet.show_fleet(updated_models(text)),
        "show_pair": simple(publishing.show_pair, KeyPair),
        "show_signature": simple(publishing.show_signature, SignatureFile),
        "show_result": lambda text: (
            [
                publishing.show_result(text, found)
                for found in (signed(VerifiedPack, text), filled_unproven(UnverifiedPack, text))
            ]
            and None
        ),
        "show_trained": lambda text: evaluation.show_trained(
            Trained(filled_pack(text), text, 5, filled(Scores, text), filled(Scores, text), 3, 4, Path(text), text), text
        ),
        "show_plan": lambda text: evaluation.show_plan(filled(TrainingPlan, text), text),
        "show_policies": lambda text: publishing.show_policies(filled(Policy, text), text, filled(Policy, text), text),
    }


def curve() -> Dose:
    """A curve: it holds numbers alone."""
    return Dose(tuple(DosePoint(strength, Share(count, 9), Share(0, 9)) for strength, count in ((0.0, 9), (0.5, 1))))


def filled_pack(text: str, **facts: Any) -> Pack:
    """A pack whose manifest says the text in every field, and in what is free to say anything."""
    pack = TINY[0]
    share = {"value": text, "count": text, "total": text}
    free = {
        "decisions": {text: text},
        "layers": [{"layer": text, text: text}, text],
        "data": {text: {"prompts": text, "name": text, "sha256": text}, "odd": text},
        "tuning": {text: text, "held_out": [{"step": text, text: text}, text]},
    }
    manifest = filled(type(pack.manifest), text)
    dose = [{"strength": strength, "attack_success": {**share, "count": 1, "total": 2}, text: text} for strength in (0, 0.5)]
    sides = {"before": {"attack_success": share}, "after": {"attack_success": share}}
    changes = {"method": free, "evaluation": {**sides, "dose": dose, "recommended": {"strength": 0.5, "reason": text}}}
    for name, value in {**changes, **facts}.items():
        object.__setattr__(manifest, name, value)
    object.__setattr__(manifest.base, "tensors", pack.manifest.base.tensors)
    made = object.__new__(Pack)
    object.__setattr__(made, "manifest", manifest)
    object.__setattr__(made, "deltas", pack.deltas)
    return made


def signed(cls: type, text: str) -> Any:
    return cls(filled_pack(text), text, 1, value_of(typing.get_type_hints(cls)["signers"], text))


def filled_unproven(cls: type, text: str) -> Any:
    return cls(filled_pack(text), text, 1, reason=text)


TINY: list[Pack] = []


@pytest.fixture(autouse=True, scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> None:
    TINY.append(tiny_pack(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What reaches a terminal without colours: every escape in it is one of the text."""
    text = io.StringIO()
    for terminal in (console.out, console.err):
        monkeypatch.setattr(terminal, "_file", text)
        monkeypatch.setattr(terminal, "_color_system", None)
    return text


def test_every_function_that_draws_is_attacked() -> None:
    drawn = {name for _, name in dataclasses_shown()}
    assert drawn == set(cases())
    listed = {name for _, name, _ in pkgutil.iter_modules(views.__path__)}
    assert listed == {module.__name__.rpartition(".")[2] for module in MODULES}, "a new module of views: attack it here"


@pytest.mark.parametrize("name", cases())
def test_no_text_drives_the_terminal_or_is_taken_for_markup(name: str, shown: io.StringIO) -> None:
    """Every text field at once, each hostile text in turn, and all of them after each other."""
    for text in (*HOSTILE, "".join(HOSTILE)):
        shown.truncate(0)
        shown.seek(0)
        cases()[name](text)
        drawn = shown.getvalue()
        assert not RAW.search(drawn), (text, drawn)
        assert "http://evil\x1b" not in drawn
        if "[red]" in text and name not in ("recipe_table", "dose_table", "show_dose"):
            assert "[red]x[/red]" in drawn, "text was taken for markup"
        # Nothing begins a line of its own.
        assert not re.search(r"^What to do: run evil", drawn, re.MULTILINE), drawn


def test_a_forgotten_escape_still_lets_no_control_character_through(shown: io.StringIO) -> None:
    console.out.print("\x1b[2J\x9b1m\u202e", markup=False)
    assert not RAW.search(shown.getvalue())


@pytest.mark.parametrize("first", HOSTILE)
@pytest.mark.parametrize("second", HOSTILE)
def test_escaped_texts_are_themselves_also_side_by_side(first: str, second: str, shown: io.StringIO) -> None:
    """One text may end the tag that the other begins, or swallow a tag of ours with a backslash."""
    console.out.print(f"[bold]{console.escape(first)}{console.escape(second)}[/bold][dim]{console.escape(first)}[/]")
    assert shown.getvalue() == one_line(first) + one_line(second) + one_line(first) + "\n"


LONG = {"base": "one two three " * 40, "patched": "\u6f22\u5b57 I cannot help with that.\n\n\tok"}


def drawn(width: int, height: int | None, shown: io.StringIO) -> list[str]:
    shown.truncate(0)
    shown.seek(0)
    console.out.print(chat.answers_table(LONG, width, height), width=width)
    return shown.getvalue().splitlines()


def test_answers_are_side_by_side_where_there_is_room(shown: io.StringIO) -> None:
    whole = drawn(100, None, shown)
    assert re.search(r"base +\u2502 patched", whole[0])
    assert re.search(r"one two three .* \u2502 \u6f22\u5b57 I cannot help", whole[2])
    assert " ".join(line.partition("\u2502")[0] for line in whole[2:]).split() == LONG["base"].split()
    tail = drawn(100, 6, shown)
    assert len(tail) == 6
    assert tail[-1].partition("\u2502")[0] == whole[-1].partition("\u2502")[0], "the newest lines are shown"
    assert max(cell_len(line) for line in whole) <= 100


def test_answers_are_below_each_other_on_a_narrow_terminal(shown: io.StringIO) -> None:
    whole = drawn(79, None, shown)
    assert [line for line in whole if line in LONG] == ["base", "patched"]
    assert " ".join(whole).split() == ["base", *LONG["base"].split(), "patched", *LONG["patched"].split()]
    assert max(cell_len(line) for line in whole) <= 79
    assert len(drawn(79, 12, shown)) <= 12


def test_progress_shows_notes_harmlessly(shown: io.StringIO) -> None:
    with progress.shown() as on_event:
        for text in HOSTILE:
            on_event(Event("note", note=text))
            on_event(Event(text, 1, 2, text))
    assert not RAW.search(shown.getvalue())


def test_a_line_of_a_command_is_one_line() -> None:
    import click

    @click.command()
    def command() -> None:
        say("".join(HOSTILE))

    result = CliRunner().invoke(command)
    assert result.exit_code == 0, result.exception
    assert not RAW.search(result.stdout)
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("charset", ["utf-8", "ascii", "latin-1"])
def test_json_is_one_line_of_json_without_raw_controls(charset: str) -> None:
    import click

    value = {"a": [*HOSTILE, "Käse", "\U0001f4a5", "\U000e0041"], "b": "x", "nan": [math.nan, -math.inf, 1.5]}

    @click.command()
    def command() -> None:
        print_json(value)

    result = CliRunner(charset=charset).invoke(command)
    assert result.exit_code == 0, result.exception
    text = result.stdout_bytes.decode(charset)
    assert text.count("\n") == 1
    assert not RAW.search(text)
    read = json.loads(text, parse_constant=pytest.fail)
    expected = [one_line(text) if "\udcff" in text else text for text in value["a"]]  # type: ignore[attr-defined]
    assert read == {"a": expected, "b": "x", "nan": [None, None, 1.5]}


def test_only_values_of_json_are_printed() -> None:
    """A path is a mistake of `as_json`: it is not turned into a text silently."""
    with pytest.raises(TypeError):
        print_json({"output": Path("x")})


NUMBERS: list[Any] = ["3", "x" * 50, math.nan, math.inf, -math.inf, 10**400, 1e308, True, None, [], {}, b"x", -(10**5000)]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_number_in_a_pack_is_shown_as_a_question_mark(value: Any, shown: io.StringIO) -> None:
    share = {"value": value, "count": value, "total": value}
    facts = {"evaluation": {"before": {"attack_success": share}, "after": {"attack_success": share}}}
    data = {"harmful": {"prompts": value, "name": "x", "sha256": "0"}}
    for layers in (value, [value], [{"layer": 1, "neurons": 3}]):
        packs.show_pack(
            filled_pack("x", method={"layers": layers, "data": data, "tuning": value, "decisions": value}, **facts), "x", 1
        )
    assert re.search(r"attack success +not measured +not measured", shown.getvalue())
    if value != 1e308:
        assert number(value, ".1%") == "?"
    assert count(value) == "?"


def test_numbers_are_shown_as_they_are() -> None:
    assert (number(0.525, ".1%"), number(3, "g"), number(np.float64(0.5), ".1%")) == ("52.5%", "3", "50.0%")
    assert (count(0), count(-5), count(10**14)) == ("0", "-5", "100000000000000")


def test_several_lines_stay_several_where_that_is_meant() -> None:
    assert lines("a\nb\x1b\r") == "a\nb\\x1b\\r"


# The model card


MARKDOWN = {
    "<script>alert(1)</script>": r"\<script\>alert(1)\</script\>",
    "[click](javascript:alert(1))": r"\[click\](javascript:alert(1))",
    "![x](https://evil/x.png)": r"\!\[x\](https://evil/x.png)",
    "a | b": r"a \| b",
    "`code` ```": r"\`code\` \`\`\`",
    "a\n\n# b\r\n> c": r"a  \# b  \> c",
    "- item": r"\- item",
    "  1. item": r"1\. item",
    "===": r"\===",
    "1.0.0": "1.0.0",
    "\x1b[2J\u202e": r"\\x1b\[2J\\u202e",
    "&lt;b&gt; $x$ ~~y~~ _z_": r"\&lt;b\&gt; \$x\$ \~\~y\~\~ \_z\_",
    "\\|": r"\\\|",
    "a\x85b\u2028c": "a b c",
}


@pytest.mark.parametrize("text", MARKDOWN)
def test_text_in_markdown_is_text(text: str) -> None:
    assert markdown(text) == MARKDOWN[text]


@pytest.mark.parametrize("text", [*MARKDOWN, *HOSTILE, "\U000e0041", '"\n---\nlicense: evil'])
def test_a_hostile_pack_makes_no_other_card(text: str) -> None:
    """As many lines as an honest one, its front matter is what it says, and every table keeps its columns."""
    import yaml

    key = keys.PrivateKey.generate().public
    share = {"value": text, "count": text, "total": text}
    good = {"value": 0.5, "count": 1, "total": 2}
    numbers = {"attack_success": good, "refusal_benign": share}

    def measured(suite: str) -> dict[str, Any]:
        side = {
            **numbers,
            "suites": {suite: {"kind": "harmful", "attack_success": good}, "x": {"kind": suite, "refused": share}},
        }
        return {"before": side, "after": side}

    file = ListedFile("packs/1.0.0/x.nest", 1, "0" * 64)

    def card(said: str) -> str:
        patch = filled(ListedPack, said)
        for name, value in {"version": "1.0.0", "status": ListedStatus.ACTIVE, "file": file, "reason": said}.items():
            object.__setattr__(patch, name, value)
        channel = filled(Channel, "acme/x")
        for name, value in {"root": key, "packs": (patch,)}.items():
            object.__setattr__(channel, name, value)
        pack = filled_pack(said, evaluation=measured(said if said == text else "y"))
        return model_card(channel, pack.manifest, "hub://acme/x")

    made, honest = card(text), card("x")
    assert not RAW.search(made)
    assert made.count("\n") == honest.count("\n")
    head, body = made.removeprefix("---\n").split("\n---\n", 1)
    facts = yaml.safe_load(head)
    assert facts["tags"] == ["nestpatch", "safety-patch", one_line(text)]
    assert facts["license"] == one_line(text.lower())
    assert set(facts) <= {"library_name", "tags", "license", "base_model", "base_model_relation"}
    assert "<" not in re.sub(r"\\<", "", body.replace(MARK, ""))
    for line in body.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) in (4, 5), line


def test_show_in_full_with_a_hostile_pack_file(tmp_path: Path) -> None:
    """The same through the command, from a file: what the format lets through is shown harmlessly."""
    from nestpatch.cli import main

    text = "".join(HOSTILE).replace("\udcff", "")
    pack = dataclasses.replace(
        TINY[0],
        manifest=dataclasses.replace(
            TINY[0].manifest,
            description=text,
            license=text,
            tags=(text,),
            method={"decisions": {text: text}, "layers": 7, "tuning": {text: [text]}},
            evaluation={"before": {"attack_success": {"value": "x"}}, "after": {"attack_success": {"value": 10**400}}},
        ),
    )
    nest.write(pack, tmp_path / "x.nest")
    for options in ((), ("--json",)):
        result = CliRunner().invoke(main, ["show", str(tmp_path / "x.nest"), *options])
        assert result.exit_code == 0, result.exception
        assert not RAW.search(result.stdout)
