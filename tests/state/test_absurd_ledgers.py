"""Invalid values in a ledger are refused by name, in every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nestpatch.channels.publish import push
from tests.calls import run
from tests.state import forging
from tests.state.conftest import Scene
from tests.state.forging import harmless

GIANT = int("9" * 4000)
ABSURD: list[Any] = [None, True, -1, 0, 3, GIANT, 0.5, float("nan"), float("inf"), "", "x", "\x1b[2J", "a\0b", "../../x",
                     "é" * 3000, f"{'9' * 5000}.0.0", "A" * 64, [], [[]], ["x"], {}, {"x": {}}, [[[[[[[]]]]]]]]  # fmt: skip
FIELDS = [
    "pack_id", "name", "version", "strength", "when", "tool", "transaction", "tensors", "supersedes", "requires",
    "base_mismatch_allowed", "rounding", "signers", "roots", "foreign",
]  # fmt: skip


@pytest.fixture
def patched(plain: Scene, tmp_path: Path) -> tuple[Scene, list[list[object]]]:
    """A patched model, and every command that reads its ledger."""
    plain.trust(acme=plain.acme)
    file, channel = harmless(plain), tmp_path / "channel"
    push(file, str(channel), plain.acme)
    assert run("apply", plain.model, file, "--in-place").exit_code == 0
    later = plain.write(plain.pack(version="1.1.0", seed=2), plain.acme)
    commands: list[list[object]] = [
        ["status", plain.model],
        ["verify", plain.model],
        ["verify", plain.model, later],
        ["apply", plain.model, later, "--in-place", "--dry-run"],
        ["apply", plain.model, later, "--dry-run", "-o", tmp_path / "copy"],
        ["revert", plain.model, "--dry-run"],
        ["update", plain.model, "--quiet", "--channel", channel.as_uri()],
        ["export", plain.model, "--to", "safetensors", "-o", tmp_path / "release"],
    ]
    return plain, commands


def broken(scene: Scene, commands: list[list[object]], value: object) -> None:
    """All commands end with 1 and a named error. `recover` has nothing to do and reads no ledger."""
    for words in commands:
        result = run(*words)
        assert result.exit_code == 1, (value, words, result.stdout)
        named = result.stderr.startswith("LedgerError: ") and "What to do: " in result.stderr
        # A well-formed ledger that contradicts its packs: `status` still shows it, and says so.
        assert named or (words[0] == "status" and "cannot be compared with the rows" in result.stdout), (
            value,
            words,
            result.stderr,
        )
        assert "\x1b" not in result.stderr
    assert run("recover", scene.model).exit_code == 0


def plausible(field: str, value: Any) -> bool:
    """Whether a value is valid in a field, so that only rows and packs can refute it."""
    number = type(value) in (int, float)
    fine = {
        "tool": isinstance(value, str) and len(value) <= 2048,
        "rounding": isinstance(value, str) and len(value) <= 2048,
        "strength": number and 0 < value <= 2,
        "name": value in ("x", "A" * 64),
        "retention": value is None or (number and abs(value) < 1e300),
        "rows": type(value) is int and 0 < value < 1 << 40,
        "base_mismatch_allowed": value is True,
        "foreign": value is True,
        "transaction": False,
        **dict.fromkeys(("supersedes", "requires", "roots"), value == []),
        **dict.fromkeys(("signers", "tensors"), value == {}),
    }
    return bool(fine.get(field, False))


@pytest.mark.parametrize("field", FIELDS)
def test_absurd_values_in_an_entry_are_refused_by_name(patched: tuple[Scene, list[list[object]]], field: str) -> None:
    scene, commands = patched
    good = forging.content(scene.state_dir)
    for value in ABSURD:
        if not plausible(field, value):
            (entry,) = good["applied"]
            forging.write_ledger(scene.state_dir, good | {"applied": [entry | {field: value}]})
            broken(scene, commands[:1] if value not in ("x", GIANT) else commands, value)
    forging.write_ledger(
        scene.state_dir, good | {"applied": [{name: v for name, v in good["applied"][0].items() if name != field}]}
    )
    if field not in {"foreign", "roots", "signers", "rounding"}:
        broken(scene, commands, "missing")


@pytest.mark.parametrize("field", ["format", "transaction", "applied", "history", "follows", "offered"])
def test_absurd_values_in_a_ledger_are_refused_by_name(patched: tuple[Scene, list[list[object]]], field: str) -> None:
    scene, commands = patched
    good = forging.content(scene.state_dir)
    for value in ABSURD:
        if (
            value != []
            and not (field == "transaction" and value == "")
            and not (field in {"follows", "offered"} and value == ["x"])
        ):
            forging.write_ledger(scene.state_dir, good | {field: value})
            broken(scene, commands[:1] if value != GIANT else commands, value)


@pytest.mark.parametrize("field", ["rows", "before", "after", "retention"])
def test_absurd_values_in_a_tensor_are_refused_by_name(patched: tuple[Scene, list[list[object]]], field: str) -> None:
    scene, commands = patched
    good = forging.content(scene.state_dir)
    name = next(iter(good["applied"][0]["tensors"]))
    for value in ABSURD:
        if not plausible(field, value):
            changed = json.loads(json.dumps(good))
            changed["applied"][0]["tensors"][name][field] = value
            forging.write_ledger(scene.state_dir, changed)
            broken(scene, commands[:1], value)


def test_other_nonsense_is_refused_by_name(patched: tuple[Scene, list[list[object]]]) -> None:
    scene, commands = patched
    good, state_dir = forging.content(scene.state_dir), scene.state_dir
    (entry,) = good["applied"]
    event = good["history"][0]
    for value in (
        good | {"applied": [entry, entry]},
        good | {"applied": [entry | {"more": 1}]},
        good | {"history": [event | {"what": "\x1b[2J"}]},
        good | {"history": [event | {"foreign": "yes"}]},
        good | {"history": [event | {"more": 1}]},
        good | {"history": [event | {"pack_id": "../../../etc/passwd"}]},
    ):  # fmt: skip
        forging.write_ledger(state_dir, value)
        broken(scene, commands, value)


def test_a_ledger_that_disagrees_with_its_pack_is_refused_by_name(patched: tuple[Scene, list[list[object]]]) -> None:
    scene, commands = patched
    good = forging.content(scene.state_dir)
    (entry,) = good["applied"]
    some = next(iter(entry["tensors"].values()))
    for lie in ({"tensors": {}}, {"tensors": entry["tensors"] | {"\x1b[2J": some}}, {"name": "other"}, {"version": "2.0.0"}):
        forging.write_ledger(scene.state_dir, good | {"applied": [entry | lie]})
        # With a pack, `verify` reads only the rows.
        broken(scene, [words for words in commands if len(words) != 3], lie)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "1e400", "NaN", "[" * 100_000, '{"format": "nestpatch-ledger/1"}', '{"a":1}' * 2, "\0", '"\\ud800"',
     '{"format": ' + "9" * 5000 + "}", '{"format":"nestpatch-ledger/9"}'],
)  # fmt: skip
def test_what_is_no_ledger_is_refused_by_name(patched: tuple[Scene, list[list[object]]], text: str) -> None:
    scene, commands = patched
    scene.state_dir.ledger.write_text(text, encoding="utf-8")
    broken(scene, commands, text[:20])


def test_terminal_codes_of_a_ledger_do_not_reach_the_terminal(plain: Scene) -> None:
    plain.trust(acme=plain.acme)
    code = "\x1b[2J\x07[bold]"
    forging.plant(plain, harmless(plain), tool=code, rounding=code, signers={code: "0" * 64})
    forging.edit(plain.state_dir, lambda value: value.update(follows=[code], offered=[code]))
    for words in (["status"], ["verify"], ["update"], ["revert", "--dry-run"]):
        result = run(words[0], plain.model, *words[1:])
        assert "\x1b" not in result.stdout + result.stderr
        assert "\x07" not in result.stdout + result.stderr
