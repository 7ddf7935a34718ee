"""Guards: the value, its file, and what a changed model tells the doctor. Trainings are in test_training.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

import nestpatch
from nestpatch.errors import GuardFormatError
from nestpatch.formats import nest
from nestpatch.formats.manifest import canonical_json
from nestpatch.formats.opening import open_checkpoint
from nestpatch.guarding.file import decode, encode, write
from nestpatch.guarding.guard import Guard, GuardedMatrix, patched_rows
from nestpatch.health.checks import Check, Health
from nestpatch.pack import Pack
from nestpatch.rows import row_space
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack, write_checkpoint
from tests.schemas import require_schema

FIRST = "model.layers.0.mlp.gate_proj.weight"


class Scene:
    """A base, its pack, and the patched model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny_checkpoint(folder / "base", dtype="F32", hidden=64, inter=48)
        self.pack: Pack = tiny_pack(self.base, neurons=20, clusters=3, scale=0.05)
        self.file = folder / "p.nest"
        nest.write(self.pack, self.file)
        self.model = folder / "model"
        nestpatch.apply(self.base, self.file, self.model)

    def guard(self) -> Guard:
        """A guard as `export_guard` makes it, of any directions."""
        rows = patched_rows(self.pack, open_checkpoint(self.model), 1.0)
        random = np.random.default_rng(0)
        names = sorted(one.name for one in rows)
        bases = {name: np.linalg.qr(random.standard_normal((64, 5)))[0].T.astype(np.float32).copy() for name in names}
        matrices = tuple(GuardedMatrix(name, basis) for name, basis in bases.items())
        return Guard(self.pack.label, nest.pack_id(self.pack), 1.0, 0.9, 7, rows, matrices)

    def tuned(self, move: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Path:
        """The patched model, whose protected rows moved: (rows, basis) -> their change."""
        tensors = {name: part.copy() for name, part in load_tensors(self.model).items()}
        for delta in self.pack:
            rows = tensors[delta.name][delta.rows]
            tensors[delta.name][delta.rows] = rows + move(rows, row_space(delta.delta))
        return write_checkpoint(self.folder / "tuned", tensors)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path.resolve())


def test_the_patched_model_is_known_by_what_its_rows_hold_of_the_pack(scene: Scene) -> None:
    patched, base = load_tensors(scene.model), load_tensors(scene.base)
    for tensor, delta in zip(scene.guard().tensors, scene.pack, strict=True):
        assert tensor.name == delta.name
        np.testing.assert_array_equal(tensor.rows, delta.rows)
        np.testing.assert_allclose(tensor.basis @ tensor.basis.T, np.eye(3), atol=1e-6)
        dense = delta.dense()
        np.testing.assert_allclose(dense @ tensor.basis.T @ tensor.basis, dense, atol=1e-6)
        np.testing.assert_allclose(patched[tensor.name][tensor.rows] @ tensor.basis.T, tensor.coordinates, atol=1e-6)
        off = np.linalg.norm(base[tensor.name][tensor.rows] @ tensor.basis.T - tensor.coordinates)
        assert off == pytest.approx(tensor.change, rel=1e-4)


def test_deltas_that_depend_on_each_other_span_fewer_directions(scene: Scene) -> None:
    first, *others = scene.pack.deltas
    same = np.stack([first.delta[0], first.delta[0] * 2, first.delta[2]])
    pack = Pack(scene.pack.manifest, (replace(first, delta=same), *others))
    assert [len(one.basis) for one in patched_rows(pack, open_checkpoint(scene.model), 1.0)] == [2, 3, 3, 3]


def test_a_file_is_read_as_it_was_written(scene: Scene) -> None:
    guard, file = scene.guard(), scene.folder / "guard.safetensors"
    assert write(guard, file) == file.stat().st_size
    assert encode(nestpatch.load_guard(file)) == file.read_bytes() == encode(guard)
    assert guard.directions == pytest.approx(5 / 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda facts, _: facts.update(format="nestpatch-guard/2"), "this nestpatch reads"),
        (lambda facts, _: facts.update(more=1), "and no others"),
        (lambda facts, _: facts.pop("pack"), "and no others"),
        (lambda facts, _: facts.update(strength=1), "not of type float"),
        (lambda facts, _: facts.update(strength=7.0), "out of range"),
        (lambda facts, _: facts.update(pack_id="abc"), "not a SHA-256"),
        (lambda facts, _: facts.update(energy=1.0), "energy 1.0 is out of range"),
        (lambda facts, _: facts.update(prompts=0), "0 prompts are none"),
        (lambda _, arrays: [arrays.pop(name) for name in list(arrays) if name.endswith(":inputs")], "a guard needs matrices"),
        (lambda _, arrays: arrays.update({f"{FIRST}:inputs": arrays[f"{FIRST}:inputs"] * 2}), "directions are not orthonormal"),
        (lambda _, arrays: arrays.update({f"{FIRST}:inputs": arrays[f"{FIRST}:inputs"][0]}), "no float32 matrix"),
        (lambda facts, _: facts["tensors"].clear(), "needs tensors"),
        (lambda facts, _: facts["tensors"].popitem(), "not in canonical form"),
        (lambda facts, _: next(iter(facts["tensors"].values())).update(shape=[4, -64]), "impossible shape"),
        (lambda facts, _: next(iter(facts["tensors"].values())).update(shape=[5, 64]), "out of range; the matrix has 5"),
        (lambda facts, _: next(iter(facts["tensors"].values())).update(change=-1.0), "change is -1.0"),
        (lambda _, arrays: arrays.pop(min(arrays)), "lacks its basis"),
        (lambda _, arrays: arrays.update(more=np.zeros(3)), "not in canonical form"),
        (lambda _, arrays: arrays.update({min(arrays): arrays[min(arrays)] * 2}), "not orthonormal"),
        (lambda _, arrays: arrays.update({min(arrays): arrays[min(arrays)] * np.float32(np.nan)}), "NaN"),
        (lambda _, arrays: arrays.update({min(arrays): arrays[min(arrays)][:2]}), "should be"),
        (lambda _, arrays: arrays.update({max(arrays): arrays[max(arrays)][::-1]}), "unsorted"),
        (lambda _, arrays: arrays.update({max(arrays): arrays[max(arrays)].astype(np.int32)}), "no list of numbers"),
    ],
)
def test_a_file_that_is_not_quite_a_guard_is_refused(scene: Scene, change: Callable, reason: str) -> None:
    data = encode(scene.guard())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts, arrays = json.loads(header["__metadata__"]["nestpatch_guard"]), load(data)
    change(facts, arrays)
    bad = save({name: np.ascontiguousarray(part) for name, part in arrays.items()}, {"nestpatch_guard": canonical_json(facts)})
    with pytest.raises(GuardFormatError, match=reason):
        decode(bad)


def test_other_files_are_refused(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(GuardFormatError, match="cannot read the guard"):
        nestpatch.load_guard(tmp_path / "none")
    for content in (b"", b"junk" * 9, scene.file.read_bytes(), (scene.model / "model.safetensors").read_bytes()):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(GuardFormatError, match="it is no guard"):
            nestpatch.load_guard(tmp_path / "bad")


def subspace(scene: Scene, model: Path) -> tuple[Check, nestpatch.Diagnosis]:
    found = nestpatch.doctor(model, [scene.file], base=scene.base)
    (check,) = [check for check in found.checks if check.name == "subspace"]
    return check, found


def test_a_change_along_the_deltas_is_a_warning(scene: Scene) -> None:
    check, found = subspace(scene, scene.tuned(lambda rows, basis: 0.1 * np.ones((len(rows), len(basis)), np.float32) @ basis))
    measured = found.subspace[scene.pack.label]
    assert check.state is Health.WARNING
    assert measured.share == pytest.approx(1, abs=1e-4)
    assert measured.random == pytest.approx(3 / 64)
    assert "100.0% of the squared change" in check.detail


def test_a_change_in_all_directions_is_none(scene: Scene) -> None:
    random = np.random.default_rng(0)
    move = lambda rows, _: 0.05 * random.standard_normal(rows.shape).astype(np.float32)  # noqa: E731
    check, found = subspace(scene, scene.tuned(move))
    measured = found.subspace[scene.pack.label]
    assert check.state is Health.OK
    assert measured.share == pytest.approx(3 / 64, rel=0.4)
    require_schema({**found.as_json()}, "doctor")


def test_a_model_that_was_not_changed_has_no_share(scene: Scene) -> None:
    check, found = subspace(scene, scene.model)
    assert (check.state, found.subspace[scene.pack.label].share) == (Health.OK, None)
    assert "no row" in check.detail
    assert not nestpatch.doctor(scene.model, [scene.file]).subspace
