"""nestpatch diff: what differs between two models or packs, and the pack that makes the one model of the other."""

from __future__ import annotations

import dataclasses
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nestpatch.cli import main
from nestpatch.compare.diff import LayerChange, Mismatch, compare, diff
from nestpatch.compare.packs import PackDiff, compare_packs
from nestpatch.errors import CheckpointFormatError, DataError, InterruptedChangeError, PackError
from nestpatch.formats import nest
from nestpatch.patcher.recovery import open_model, recover_model
from tests.helpers import DTYPES, FLOATS, load_tensors, tiny_checkpoint, tiny_pack, tree_digest, write_checkpoint
from tests.pairs import GATE, NORM, UP, compared, models, small_blocks, tensors_of

# --- two models


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chunk", [7, 300, 8 << 20])
def test_a_model_is_identical_to_itself_in_shards(
    tmp_path: Path, dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = models(tmp_path, tensors_of(dtype), dtype=dtype, sharded=True)
    small_blocks(monkeypatch, chunk)
    found = compared(a, b)
    assert found.identical
    assert (found.compared, found.mismatches, found.changed) == (8, (), ())
    assert found.layers == (LayerChange("model.layers", 0, 0, 64), LayerChange("model.layers", 1, 0, 64))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("chunk", [7, 300, 1000, 8 << 20])
def test_changed_rows_are_named_with_their_norms(
    tmp_path: Path, dtype: str, sharded: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tensors_of(dtype), tensors_of(dtype)
    after[GATE][[3, 17]] *= 2
    after[GATE][23, 15] = 0
    after[NORM][5] = 7
    a, b = models(tmp_path, after, dtype=dtype, sharded=sharded)
    small_blocks(monkeypatch, chunk)
    found = compared(a, b)
    assert not found.identical
    assert [tensor.name for tensor in found.changed] == [GATE, NORM]
    gate, norm = found.changed
    assert (gate.rows, gate.changed, gate.first_rows, gate.shape, gate.dtype) == (24, 3, (3, 17, 23), (24, 16), dtype)
    assert (norm.rows, norm.changed, norm.first_rows) == (1, 1, (0,))
    wide = before[GATE].astype(np.float64), after[GATE].astype(np.float64)
    change = wide[1] - wide[0]
    touched = [3, 17, 23]
    assert gate.relative == pytest.approx(np.linalg.norm(change) / np.linalg.norm(wide[0][touched]), rel=1e-12)
    rows = np.linalg.norm(change, axis=1)
    assert (gate.largest, gate.largest_row) == (pytest.approx(rows.max(), rel=1e-12), rows.argmax())
    # A row of one dimension is longer than the smallest chunk; its norm covers the elements that did not change too.
    old = before[NORM].astype(np.float64)
    assert norm.relative == pytest.approx((7 - old[5]) / np.linalg.norm(old), rel=1e-12)
    assert found.layers == (LayerChange("model.layers", 0, 0, 64), LayerChange("model.layers", 1, 3, 64))


def test_no_more_than_five_rows_are_named(tmp_path: Path) -> None:
    after = tensors_of()
    after[UP][2:] += 1
    (tensor,) = compared(*models(tmp_path, after)).changed
    assert (tensor.changed, tensor.first_rows) == (22, (2, 3, 4, 5, 6))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(GATE), Mismatch(GATE, "only in A", "[24, 16]", "")),
        (lambda t: t.update(extra=np.zeros((2, 3), np.int8)), Mismatch("extra", "only in B", "", "[2, 3]")),
        (lambda t: t.update({GATE: t[GATE][:23]}), Mismatch(GATE, "shape", "[24, 16]", "[23, 16]")),
        (lambda t: t.update({GATE: t[GATE].reshape(16, 24)}), Mismatch(GATE, "shape", "[24, 16]", "[16, 24]")),
        (lambda t: t.update({GATE: t[GATE].astype(np.float32)}), Mismatch(GATE, "dtype", "BF16", "F32")),
        (lambda t: t.update({GATE: t[GATE].view(np.int16)}), Mismatch(GATE, "dtype, not compared", "BF16", "I16")),
    ],
)
def test_tensors_that_are_not_alike_are_named(tmp_path: Path, change: Any, expected: Mismatch) -> None:
    after = tensors_of()
    change(after)
    found = compared(*models(tmp_path, after))
    assert found.mismatches == (expected,)
    assert found.changed == ()
    assert not found.identical
    assert found.compared == (8 if expected.what in ("only in B", "dtype") else 7)


@pytest.mark.parametrize(("ours", "theirs"), [("BF16", "F32"), ("F32", "BF16"), ("F16", "F32"), ("BF16", "F16")])
def test_values_of_another_dtype_are_compared_widened(tmp_path: Path, ours: str, theirs: str) -> None:
    # Multiples of 1/16 are the same in all three.
    values = {name: np.round(t.astype(np.float32) * 16) / 16 for name, t in tensors_of("F32").items()}
    values[GATE][4, 0], values[GATE][4, 1] = -0.0, np.nan
    a = write_checkpoint(tmp_path / "a", {name: t.astype(DTYPES[ours]) for name, t in values.items()})
    values[GATE][4, 0] = 0.0
    values[UP][9, 9] += 1
    b = write_checkpoint(tmp_path / "b", {name: t.astype(DTYPES[theirs]) for name, t in values.items()})
    found = compared(a, b)
    assert {(m.what, m.a, m.b) for m in found.mismatches} == {("dtype", ours, theirs)}
    assert len(found.mismatches) == found.compared == 8
    (tensor,) = found.changed
    assert (tensor.name, tensor.first_rows, tensor.largest) == (UP, (9,), pytest.approx(1))


def test_bits_count_where_dtypes_are_the_same(tmp_path: Path) -> None:
    before, after = tensors_of(), tensors_of()
    for values in (before, after):
        values[GATE][:] = np.nan
    before[GATE][0], after[GATE][0] = 0.0, -0.0
    a, b = write_checkpoint(tmp_path / "a", before), write_checkpoint(tmp_path / "b", after)
    (tensor,) = compared(a, b).changed
    assert (tensor.first_rows, tensor.relative, tensor.largest) == ((0,), None, 0.0)


def test_values_that_are_no_numbers_give_no_norms(tmp_path: Path) -> None:
    after = tensors_of()
    after[GATE][2, 2], after[GATE][5] = np.nan, 0
    found = compared(*models(tmp_path, after))
    (tensor,) = found.changed
    assert (tensor.changed, tensor.relative, tensor.largest, tensor.largest_row) == (2, None, None, 2)
    json.dumps(found.as_json(), default=str, allow_nan=False)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_other_dtypes_are_compared_too(tmp_path: Path, dtype: str) -> None:
    before, after = tensors_of() | {"codes": np.zeros((4, 6), np.int8)}, tensors_of() | {"codes": np.zeros((4, 6), np.int8)}
    after["codes"][1:3, 4] = 0x38
    for values in (before, after):
        values["codes"] = values["codes"].view(DTYPES[dtype])
    found = compared(write_checkpoint(tmp_path / "a", before), write_checkpoint(tmp_path / "b", after))
    (tensor,) = found.changed
    assert (tensor.changed, tensor.first_rows, tensor.dtype) == (2, (1, 2), dtype)
    assert tensor.largest == (1.0 if dtype == "F8_E4M3" else None)


def test_odd_shapes(tmp_path: Path) -> None:
    """No dimension, no elements, no columns, and stacked experts."""
    odd = {
        "scale": np.array(1, np.float32),
        "none": np.empty((0, 4), np.float32),
        "thin": np.empty((3, 0), np.float32),
        "model.layers.3.experts.7.w": np.ones((2, 3, 4), np.float32),
    }
    changed = {name: value.copy() for name, value in odd.items()}
    changed["scale"] += 1
    changed["model.layers.3.experts.7.w"][1, 1] = 5
    found = compared(write_checkpoint(tmp_path / "a", odd), write_checkpoint(tmp_path / "b", changed))
    assert [(t.name, t.rows, t.first_rows) for t in found.changed] == [
        ("model.layers.3.experts.7.w", 6, (4,)),
        ("scale", 1, (0,)),
    ]
    assert found.layers == (LayerChange("model.layers", 3, 1, 6),)


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    wide = {"rows": np.zeros((4096, 1024), np.float32), "flat": np.zeros(1 << 22, np.float32)}
    a = write_checkpoint(tmp_path / "a", wide)
    b = write_checkpoint(tmp_path / "b", {name: value + 1 for name, value in wide.items()})
    # 32 MB: two tensors of 16 MB on either side.
    tracemalloc.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            small_blocks(patch, 1 << 19)
            found = compared(a, b)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [tensor.changed for tensor in found.changed] == [1, 4096]
    assert peak < 4 << 20


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match="there is no model"):
        diff(tiny_checkpoint(tmp_path / "a"), tmp_path / "b")


def test_a_leftover_journal_has_to_be_recovered_first(tmp_path: Path) -> None:
    from nestpatch.patcher import _transaction as transaction
    from nestpatch.patcher import inplace

    a, b = tiny_checkpoint(tmp_path / "a"), tiny_checkpoint(tmp_path / "b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transaction, "write_ledger", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        # As if the process had died between the rows and the ledger.
        patch.setattr(transaction.Transaction, "_close_journal", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            inplace.apply_in_place(b, tiny_pack(b))
    assert load_tensors(a)[GATE].tobytes() != load_tensors(b)[GATE].tobytes()
    before = tree_digest(b)
    with pytest.raises(InterruptedChangeError, match="was interrupted"):
        diff(a, b)
    assert tree_digest(b) == before, "diff only looks"
    assert recover_model(b).action == "rolled back"
    assert compared(a, b).identical


# --- two packs


def test_a_pack_is_identical_to_itself(tmp_path: Path) -> None:
    pack = tiny_pack(tiny_checkpoint(tmp_path / "a"))
    found = compare_packs(pack, pack)
    assert found.identical
    assert (found.same_base, found.foreign, found.fields) == (True, (), ())
    assert [(t.kept, t.added, t.removed, t.changed, t.relative) for t in found.tensors] == [(9, 0, 0, 0, 0.0)] * 4


def test_an_update_is_audited(tmp_path: Path) -> None:
    a = tiny_checkpoint(tmp_path / "a")
    old = tiny_pack(a, tensors=[GATE, UP])
    new = tiny_pack(a, tensors=[GATE], seed=1, version="1.1.0", neurons=11, clusters=3)
    method = {"seed": 1, "rate": 0.001, "recipe": {"steps": 9}, "list": [1, 2]}
    evaluation = {"after": {"attack_success": {"value": 0.1, "count": 1, "total": 10}}}
    new = dataclasses.replace(new, manifest=dataclasses.replace(new.manifest, method=method, evaluation=evaluation))
    found = compare_packs(old, new)
    assert (found.a, found.b, found.ids) == ("no-harm 1.0.0", "no-harm 1.1.0", (nest.pack_id(old), nest.pack_id(new)))
    assert not found.identical
    assert (found.same_base, found.foreign) == (True, ())
    up, gate = found.tensors
    assert (up.name, up.kept, up.removed, up.added, up.relative, up.clusters) == (UP, 0, 9, 0, None, (2, 0))
    ours, theirs = (next(delta for delta in pack if delta.name == GATE) for pack in (old, new))
    kept = sorted(set(ours.rows.tolist()) & set(theirs.rows.tolist()))
    assert 0 < len(kept) < 9
    assert (gate.kept, gate.added, gate.removed, gate.changed) == (len(kept), 11 - len(kept), 9 - len(kept), len(kept))
    dense = [delta.dense()[np.isin(delta.rows, kept)].astype(np.float64) for delta in (ours, theirs)]
    assert gate.relative == pytest.approx(np.linalg.norm(dense[1] - dense[0]) / np.linalg.norm(dense[0]), rel=1e-6)
    assert gate.first_added == tuple(sorted(set(theirs.rows.tolist()) - set(kept))[:5])
    assert gate.first_removed == tuple(sorted(set(ours.rows.tolist()) - set(kept))[:5])
    assert {field.field: (field.a, field.b) for field in found.fields} == {
        "method.seed": (0, 1),
        "method.recipe.steps": (None, 9),
        "method.list": (None, "[1,2]"),
        "evaluation": ("{}", None),
        "evaluation.after.attack_success.value": (None, 0.1),
        "evaluation.after.attack_success.count": (None, 1),
        "evaluation.after.attack_success.total": (None, 10),
    }


def test_another_base_is_named(tmp_path: Path) -> None:
    packs = [tiny_pack(tiny_checkpoint(tmp_path / str(seed), seed=seed), tensors=[GATE]) for seed in (0, 1)]
    found = compare_packs(*packs)
    assert (found.same_base, found.foreign) == (False, (GATE,))
    wider = tiny_pack(tiny_checkpoint(tmp_path / "wide", hidden=20), tensors=[GATE])
    (tensor,) = compare_packs(packs[0], wider).tensors
    assert (tensor.changed, tensor.relative) == (tensor.kept, None)
    other = tiny_pack(tiny_checkpoint(tmp_path / "c"), tensors=[UP])
    assert compare_packs(packs[0], other).same_base is None


def test_packs_are_known_by_their_content_too(tmp_path: Path) -> None:
    pack = tiny_pack(tiny_checkpoint(tmp_path / "a"))
    nest.write(pack, tmp_path / "one.nest")
    nest.write(pack, tmp_path / "blob")
    found = diff(tmp_path / "one.nest", tmp_path / "blob")
    assert isinstance(found, PackDiff)
    assert found.identical


def test_a_pack_and_a_model_are_not_compared(tmp_path: Path) -> None:
    a = tiny_checkpoint(tmp_path / "a")
    nest.write(tiny_pack(a), tmp_path / "x.nest")
    for pair in ((a, tmp_path / "x.nest"), (tmp_path / "x.nest", a / "model.safetensors")):
        with pytest.raises(DataError, match="is a pack, the other a model"):
            diff(*pair)


def test_a_broken_pack_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.nest").write_bytes(b"nonsense of some length")
    with pytest.raises(PackError, match=r"x\.nest"):
        diff(tmp_path / "x.nest", tmp_path / "x.nest")


# --- the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)])


def test_the_command_on_identical_models(tmp_path: Path) -> None:
    a, b = models(tmp_path, tensors_of(), sharded=True)
    told, as_json = run(a, b), run(a, b, "--json")
    assert (told.exit_code, as_json.exit_code) == (0, 0)
    assert told.stdout.startswith("identical")
    facts = json.loads(as_json.stdout)
    assert (facts["kind"], facts["identical"], facts["changed"], facts["compared"]) == ("checkpoints", True, [], 8)


def test_the_command_on_different_models(tmp_path: Path) -> None:
    before, after = tensors_of(layers=6), tensors_of(layers=6)
    after.pop(NORM)
    for layer, rows in ((1, 1), (2, 8), (4, 24)):
        after[f"model.layers.{layer}.mlp.gate_proj.weight"][:rows] += 1
    a, b = write_checkpoint(tmp_path / "a", before), write_checkpoint(tmp_path / "b", after)
    told, as_json = run(a, b), run(a, b, "--json")
    assert (told.exit_code, as_json.exit_code) == (1, 1)
    assert "33 rows of 3 tensors changed, 19 tensors compared" in told.stdout
    assert f"{NORM}: only in A [16]" in told.stdout
    assert "model.layers  ·░▒·█·  layers 0 to 5, █ = 24 rows" in told.stdout
    assert GATE in told.stdout
    facts = json.loads(as_json.stdout)
    assert facts["mismatches"] == [{"tensor": NORM, "what": "only in A", "a": "[16]", "b": ""}]
    assert [(t["changed_rows"], t["first_rows"]) for t in facts["changed"]] == [(n, list(range(min(n, 5)))) for n in (1, 8, 24)]
    assert [layer["changed_rows"] for layer in facts["layers"]] == [0, 1, 8, 0, 24, 0]


def test_the_strip_survives_a_terminal_of_ascii(tmp_path: Path) -> None:
    after = tensors_of()
    after[GATE][0] += 1
    a, b = models(tmp_path, after)
    told = CliRunner(charset="ascii").invoke(main, ["diff", str(a), str(b)])
    assert told.exit_code == 1
    assert "model.layers  .#  layers 0 to 1, # = 1 rows" in told.stdout


def test_the_command_extracts(tmp_path: Path) -> None:
    after = tensors_of()
    after[GATE][3:5] += 1
    a, b = models(tmp_path, after)
    options = ["--version", "1.2.3", "--description", "d", "--license", "MIT", "--quiet"]
    told = run(a, b, "-o", tmp_path / "no-nonsense.nest", *options)
    assert told.exit_code == 0, told.output
    assert "2 rows in 1 clusters" in told.stdout
    pack = nest.read(tmp_path / "no-nonsense.nest")
    assert pack.label == "no-nonsense 1.2.3"
    as_json = run(a, b, "-o", tmp_path / "other.nest", "--name", "named", "--json")
    facts = json.loads(as_json.stdout)
    again = nest.read(tmp_path / "other.nest")
    assert (again.label, facts["pack_id"], facts["clusters"]) == ("named 1.0.0", nest.pack_id(again), 1)
    assert facts["bytes"] == (tmp_path / "other.nest").stat().st_size
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "other.nest")])
    assert "turns a into b, exact at strength 1" in shown.stdout


def test_the_command_on_packs(tmp_path: Path) -> None:
    a = tiny_checkpoint(tmp_path / "a")
    paths = [tmp_path / "1.nest", tmp_path / "2.nest"]
    nest.write(tiny_pack(a), paths[0])
    nest.write(tiny_pack(a, seed=1, version="1.0.1", neurons=4), paths[1])
    told, as_json, same = run(*paths), run(*paths, "--json"), run(paths[0], paths[0])
    assert (told.exit_code, as_json.exit_code, same.exit_code) == (1, 1, 0)
    assert "no-harm 1.0.0 to no-harm 1.0.1" in told.stdout
    assert "method.seed" in told.stdout
    assert "the same pack" in same.stdout
    facts = json.loads(as_json.stdout)
    assert (facts["kind"], facts["identical"], facts["same_base"], len(facts["changed"])) == ("packs", False, True, 4)


def test_fields_that_one_pack_alone_has_are_counted(tmp_path: Path) -> None:
    """A trained pack beside an extracted one would fill a screen with its recipe."""
    plain = tiny_pack(tiny_checkpoint(tmp_path / "a"))
    recipe = {**plain.manifest.method, "recipe": {f"setting-{number}": number for number in range(30)}, "note": "x"}
    nest.write(plain, tmp_path / "1.nest")
    nest.write(
        dataclasses.replace(plain, manifest=dataclasses.replace(plain.manifest, method=recipe, version="1.1.0")),
        tmp_path / "2.nest",
    )
    shown = run(tmp_path / "1.nest", tmp_path / "2.nest").stdout
    assert re.search(r"method\.recipe\.\* +30 fields in no-harm 1\.1\.0 alone", shown)
    assert re.search(r"method\.note +nothing to x", shown)
    assert "setting-7" not in shown


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["a", "missing"], 2, "MissingInputError"),
        (["a", "x.nest"], 2, "DataError"),
        (["x.nest", "x.nest", "-o", "y.nest"], 2, "DataError"),
        (["a", "a", "-o", "y.nest"], 1, "ExtractionError"),
        (["a", "a", "-o", "x.nest"], 1, "OutputError"),
        (["a", "a", "--name", "n"], 2, "go with -o"),
        (["a", "a", "-o", "y.nest", "--version", "one"], 2, "not semver"),
        (["a"], 2, "Missing argument"),
    ],
)
def test_failures_are_named(
    tmp_path: Path, arguments: list[str], code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nest.write(tiny_pack(tiny_checkpoint(Path("a"))), "x.nest")
    failed = run(*arguments, "--json")
    assert failed.exit_code == code
    assert text in failed.stderr
    error = json.loads(failed.stdout)["error"]
    assert (error["exit_code"], text in error["type"] + error["message"]) == (code, True)
    assert failed.exception is None or isinstance(failed.exception, SystemExit)
    assert not Path("y.nest").exists()


def test_the_help_tells_the_exit_codes() -> None:
    assert "Exit code 0: identical, 1: different" in " ".join(run("--help").stdout.split())


def test_open_checkpoints_can_be_compared(tmp_path: Path) -> None:
    a, b = models(tmp_path, tensors_of())
    heard: list[int] = []
    found = compare(open_model(a)[0], open_model(b)[0], on_event=lambda event: heard.append(event.done))
    assert found.identical
    assert heard == list(range(1, 9))
