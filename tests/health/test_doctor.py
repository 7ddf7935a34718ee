"""The health of models that were patched, fine-tuned, reverted, forged and left half done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

import nestpatch
from nestpatch import Diagnosis, doctor
from nestpatch.errors import BaseMismatchError, MissingExtraError
from nestpatch.formats import nest
from nestpatch.health.checks import NAMES, Check, Health
from nestpatch.pack import Pack
from tests.calls import answer, run
from tests.gguf.files import NAMES as GGUF_NAMES
from tests.gguf.files import gguf_of, repacked, values
from tests.helpers import DTYPES, load_tensors, tiny_checkpoint, tiny_pack, tree_digest
from tests.onnx.files import build
from tests.onnx.files import save as save_onnx
from tests.schemas import require_schema

LABEL = "no-harm 1.0.0"
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def the(found: Diagnosis, name: str) -> Check:
    """The one check of that name."""
    (check,) = [check for check in found.checks if check.name == name]
    return check


def states(found: Diagnosis) -> dict[str, str]:
    return {check.name: check.state.value for check in found.checks}


class Scene:
    """A base, its pack, and the model with the pack applied in place."""

    def __init__(self, folder: Path, dtype: str = "F32") -> None:
        self.folder = folder
        self.base = tiny_checkpoint(folder / "base", dtype=dtype, hidden=64, inter=48)
        self.pack: Pack = tiny_pack(self.base, neurons=20, scale=0.02)
        self.file = folder / "no-harm.nest"
        nest.write(self.pack, self.file)
        self.model = Path(shutil.copytree(self.base, folder / "model"))
        nestpatch.apply_in_place(self.model, self.file)

    def tuned(self, dtype: str, change: Change) -> Path:
        """The patched weights, changed in the rows of the pack and saved anew: another name, no ledger."""
        random, stored = np.random.default_rng(7), load_tensors(self.model)
        tensors = {name: values.astype(np.float32) for name, values in stored.items()}
        for delta in self.pack:
            rows = tensors[delta.name][delta.rows]
            tensors[delta.name][delta.rows] = change(rows, random)
        folder = self.folder / "tuned"
        folder.mkdir()
        file = folder / "merged.safetensors"
        file.write_bytes(save({name: values.astype(DTYPES[dtype]) for name, values in tensors.items()}))
        return file


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path.resolve())


def noise(size: float, rows: slice = slice(None)) -> Change:
    """Noise of `size` times the norm of each of some rows."""

    def change(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
        moved = random.standard_normal(values[rows].shape)
        moved *= size * np.linalg.norm(values[rows], axis=1, keepdims=True) / np.linalg.norm(moved, axis=1, keepdims=True)
        values = values.copy()
        values[rows] += moved
        return values

    return change


def test_a_patched_model_is_healthy_and_nothing_is_written(scene: Scene) -> None:
    before = tree_digest(scene.folder)
    for folder in (scene.model / ".nestpatch", scene.model):
        folder.chmod(0o500)
    try:
        found = doctor(scene.model)
    finally:
        for folder in (scene.model, scene.model / ".nestpatch"):
            folder.chmod(0o700)
    assert found.healthy, found.checks
    assert found.packs == (LABEL,)
    assert {name: states(found)[name] for name in ("journal", "ledger", "pack", "rows", "undo", "leftovers")} == dict.fromkeys(
        ("journal", "ledger", "pack", "rows", "undo", "leftovers"), "ok"
    )
    assert "all 80 rows of 4 tensors" in the(found, "rows").detail
    assert tree_digest(scene.folder) == before
    assert {check.name for check in found.checks} <= set(NAMES)


def test_no_pack_is_no_health(scene: Scene) -> None:
    found = doctor(scene.base)
    assert not found.healthy
    assert the(found, "pack").detail == "no ledger and no file names a pack"
    unpatched = doctor(scene.base, [scene.file])
    assert the(unpatched, "pack").state is Health.FAILED
    assert "hold its base" in the(unpatched, "pack").detail


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_another_dtype_or_name_alone_changes_no_row(scene: Scene, dtype: str) -> None:
    found = doctor(scene.tuned(dtype, lambda rows, _: rows), [scene.file])
    assert found.healthy
    assert (states(found)["pack"], states(found)["rows"]) == ("ok", "ok")
    assert ("not to the byte" in the(found, "pack").detail) is (dtype == "BF16")


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("with_base", [False, True])
def test_a_small_fine_tune_leaves_the_delta(scene: Scene, dtype: str, with_base: bool) -> None:
    tuned = scene.tuned(dtype, noise(0.03, slice(0, 5)))
    found = doctor(tuned, [scene.file], base=scene.base if with_base else None)
    assert found.healthy, found.checks
    assert the(found, "rows").state is Health.WARNING
    measured = found.presence[LABEL]
    assert (measured.by, measured.changed, measured.overwritten) == ("base" if with_base else "sketches", 20, 0)
    assert measured.share == pytest.approx(1, abs=0.05)
    assert [one.changed for one in measured.tensors] == [5] * 4


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("with_base", [False, True])
def test_a_large_fine_tune_overwrites_rows(scene: Scene, dtype: str, with_base: bool) -> None:
    found = doctor(scene.tuned(dtype, noise(2.0, slice(0, 5))), [scene.file], base=scene.base if with_base else None)
    assert not found.healthy
    assert the(found, "rows").state is Health.FAILED
    assert found.presence[LABEL].overwritten == 20
    rows = {delta.name: delta.rows for delta in scene.pack}
    for one in found.presence[LABEL].tensors:
        assert one.overwritten_at == tuple(rows[one.tensor][:5].tolist())
    assert "20 of 80 rows were changed" in the(found, "rows").detail


def test_every_row_overwritten_is_another_model(scene: Scene) -> None:
    found = doctor(scene.tuned("F32", lambda rows, random: random.standard_normal(rows.shape)), [scene.file])
    assert not found.healthy
    assert "another model" in the(found, "pack").detail
    assert the(found, "rows").state is Health.NOT_CHECKED


@pytest.mark.parametrize("with_base", [False, True])
def test_a_part_of_the_delta_is_measured(scene: Scene, with_base: bool) -> None:
    """A fine-tune that took most of the delta back."""
    whole = {delta.name: iter([delta.dense()]) for delta in scene.pack}
    order = iter(whole.values())
    tuned = scene.tuned("BF16", lambda rows, _: rows - 0.6 * next(next(order)))
    found = doctor(tuned, [scene.file], base=scene.base if with_base else None)
    assert the(found, "pack").state is Health.FAILED
    assert found.presence[LABEL].share == pytest.approx(0.4, abs=0.01)
    assert "40% of its change" in the(found, "pack").detail
    at = doctor(tuned, [scene.file], strength=0.4)
    assert the(at, "pack").state is Health.OK


def test_the_fine_tuned_directory_in_place(scene: Scene) -> None:
    """The ledger is there, sealed, and rows have changed beneath it."""
    name = scene.pack.deltas[0].name
    tensors = {key: value.copy() for key, value in load_tensors(scene.model).items()}
    row = int(scene.pack.deltas[0].rows[0])
    tensors[name][row] *= 1.05
    (scene.model / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    found = doctor(scene.model)
    assert found.healthy
    assert the(found, "rows").state is Health.WARNING
    measured = found.presence[LABEL]
    assert (measured.changed, [one.tensor for one in measured.tensors if not one.exact]) == (1, [name])


def test_a_forged_ledger_is_not_believed(scene: Scene) -> None:
    state = {file: file.read_bytes() for file in (scene.model / ".nestpatch").iterdir() if file.is_file()}
    ledger = scene.model / "nestpatch.json"
    state[ledger] = ledger.read_bytes()
    nestpatch.revert(scene.model)
    for file, content in state.items():
        file.write_bytes(content)
    for sealed in (True, False):
        if not sealed:
            ledger.write_text(json.dumps({**json.loads(ledger.read_text()), "seal": "0" * 64}))
        found = doctor(scene.model)
        assert not found.healthy, sealed
        assert the(found, "pack").state is Health.FAILED
        assert "the ledger names it" in the(found, "pack").detail
        assert the(found, "ledger").state is (Health.OK if sealed else Health.NOT_CHECKED)


def test_a_broken_ledger_fails(scene: Scene) -> None:
    (scene.model / "nestpatch.json").write_text("{")
    found = doctor(scene.model, [scene.file])
    assert states(found)["ledger"] == "failed"
    assert states(found)["pack"] == "not checked"


def test_what_is_missing_beside_the_model_is_a_warning(scene: Scene) -> None:
    for record in (scene.model / ".nestpatch").glob("*.undo"):
        record.unlink()
    (scene.model / ".model.safetensors.abcdefgh.tmp").write_bytes(b"x")
    found = doctor(scene.model)
    assert found.healthy, found.checks
    assert (states(found)["undo"], states(found)["leftovers"], states(found)["pack"]) == ("warning", "warning", "ok")


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", dtype="F32", hidden=64, inter=64)
    file = gguf_of(base, tmp_path / "m.gguf", kind)
    pack = tmp_path / "p.nest"
    nest.write(tiny_pack(base, neurons=20), pack)
    assert not doctor(file, [pack]).healthy
    moved = tmp_path / "elsewhere.gguf"
    nestpatch.apply_in_place(file, pack)
    shutil.copy(file, moved)
    assert doctor(file).healthy
    found = doctor(moved, [pack])
    assert found.healthy, found.checks
    assert found.presence[LABEL].share == pytest.approx(1, abs=0.05)
    assert states(found)["generation"] == "not checked"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_fine_tune_of_a_pack_for_a_quantized_file(tmp_path: Path, kind: str) -> None:
    """The pack was merged into blocks: their rounding is no change, in float files that were made of them."""
    base = tiny_checkpoint(tmp_path / "base", dtype="F32", hidden=64, inter=64)
    file = gguf_of(base, tmp_path / "m.gguf", kind)
    pack = repacked(file, tiny_pack(base, neurons=40))
    nestpatch.apply_in_place(file, pack)
    ours = {name: key for key, name in GGUF_NAMES.items()}
    tensors = {ours[name]: rows for name, rows in values(file).items() if name in ours}
    for changed in (0, 3):
        for delta in pack:
            tensors[delta.name][delta.rows[:changed]] *= -1
        (tmp_path / "tuned.safetensors").write_bytes(save({name: np.ascontiguousarray(t) for name, t in tensors.items()}))
        found = doctor(tmp_path / "tuned.safetensors", [pack])
        assert states(found)["pack"] == "ok", found.checks
        assert states(found)["rows"] == ("warning" if changed else "ok"), found.checks
        if changed:
            assert (found.presence[LABEL].changed, found.presence[LABEL].overwritten) == (12, 12)


def test_onnx(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", dtype="F32")
    save_onnx(build(base), tmp_path / "model")
    nest.write(tiny_pack(base), tmp_path / "p.nest")
    nestpatch.apply_in_place(tmp_path / "model", tmp_path / "p.nest")
    found = doctor(tmp_path / "model")
    assert found.healthy, found.checks
    assert states(found)["pack"] == "ok"


def test_another_base_is_refused(scene: Scene) -> None:
    other = tiny_checkpoint(scene.folder / "other", dtype="F32", hidden=64, inter=48, seed=5)
    with pytest.raises(BaseMismatchError, match="not the base"):
        doctor(scene.model, base=other)


def test_numbers_are_compared_with_those_of_the_pack(scene: Scene) -> None:
    asked: list[int] = []

    def measured() -> dict[str, Any]:
        asked.append(1)
        share = {"value": 0.5, "count": 50, "total": 100, "low": 0.404, "high": 0.596}
        return {"suites": {"builtin:harmful.test": {"kind": "harmful", "sha256": "0" * 64, "attack_success": share}}}

    found = doctor(scene.model, measure=measured)
    assert asked == [1]
    assert the(found, "measurement").state is Health.NOT_CHECKED


def test_numbers_of_strength_1_are_not_those_of_another(scene: Scene) -> None:
    nestpatch.revert(scene.model)
    nestpatch.apply_in_place(scene.model, scene.file, strength=0.5)
    found = doctor(scene.model, measure=lambda: {"suites": {}})
    check = the(found, "measurement")
    assert (check.state, "was applied at strength 0.5" in check.detail) == (Health.NOT_CHECKED, True)


def test_an_evaluation_that_fails_does_not_cost_the_diagnosis(scene: Scene) -> None:
    def measured() -> dict[str, Any]:
        raise MissingExtraError("train", "evaluating")

    found = doctor(scene.model, measure=measured)
    assert the(found, "rows").state is Health.OK
    failed = the(found, "measurement")
    assert (failed.state, "the evaluation failed: " in failed.detail, bool(failed.advice)) == (Health.NOT_CHECKED, True, True)


def test_the_command(scene: Scene) -> None:
    value = answer("doctor", scene.model)
    require_schema(value, "doctor")
    assert value["healthy"] is True
    broken = answer("doctor", scene.tuned("BF16", noise(2.0)), "--pack", scene.file, code=1)
    require_schema(broken, "doctor")
    assert broken["presence"][0]["rows"] == 80
    text = run("doctor", scene.base, "--pack", scene.file)
    assert text.exit_code == 1
    assert "What to do: nestpatch apply" in text.stdout
    assert text.stdout.splitlines()[-1].startswith("not healthy")
    assert run("doctor", scene.file).exit_code == 2
    assert run("doctor", scene.folder / "none").exit_code == 2
