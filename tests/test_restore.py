"""Restoring: packs made of a base, its aligned version and a fine-tune, against the formulas written out here."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nestpatch.errors import (
    BaseMismatchError,
    CheckpointFormatError,
    DataError,
    NestpatchError,
    OutputError,
    RestorationError,
)
from nestpatch.formats import nest
from nestpatch.formats.gguf.checkpoint import GgufCheckpoint
from nestpatch.pack import Label
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.verify import Verdict, verify
from nestpatch.restore.carry import carry
from nestpatch.restore.extrapolate import extrapolate
from nestpatch.restore.transplant import transplant
from nestpatch.rows import merge, sketch
from tests.calls import answer, run
from tests.export.families import make
from tests.gguf_files import write_gguf
from tests.helpers import FLOATS, load_tensors, tiny_checkpoint, tiny_pack, tiny_tensors, tree_digest, write_checkpoint
from tests.pairs import GATE, UP, small_blocks

Tensors = dict[str, np.ndarray]
LABEL = Label("restored", "1.0.0")


def added(tensors: Mapping[str, np.ndarray], seed: int, scale: float, *, share: float = 1.0) -> Tensors:
    """Copies in which a share of the rows of the feed-forward matrices got random numbers added."""
    random = np.random.default_rng(seed)
    found = dict(tensors)
    for name, tensor in tensors.items():
        if ".mlp." in name:
            rows = random.random(len(tensor)) < share
            noise = scale * random.standard_normal(tensor.shape) * rows[:, None]
            found[name] = (tensor.astype(np.float32) + noise.astype(np.float32)).astype(tensor.dtype)
    return found


class Three:
    """A base, an aligned version in which half of the rows changed, and a fine-tune of that, in memory and on disk."""

    def __init__(self, folder: Path, dtype: str = "BF16", *, sharded: bool = False) -> None:
        self.base = tiny_tensors(dtype=dtype, seed=0, hidden=16, inter=24, layers=2)
        self.aligned = added(self.base, 1, 0.05, share=0.5)
        self.tuned = added(self.aligned, 2, 0.05)
        self.paths = [
            write_checkpoint(folder / name, tensors, sharded=sharded)
            for name, tensors in (("tuned", self.tuned), ("base", self.base), ("aligned", self.aligned))
        ]
        self.output = folder / "x.nest"

    def cosines(self) -> dict[tuple[str, int], float]:
        """The rows that the alignment changed, each with its cosine."""
        found = {}
        for name in self.base:
            if ".mlp." not in name:
                continue
            base, aligned, tuned = (t[name].astype(np.float64) for t in (self.base, self.aligned, self.tuned))
            for row in range(len(base)):
                u, v = tuned[row] - base[row], aligned[row] - base[row]
                if np.linalg.norm(v):
                    found[name, row] = float(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))
        return found


def rows_of(pack: Path) -> set[tuple[str, int]]:
    return {(delta.name, int(row)) for delta in nest.read(pack) for row in delta.rows}


# --- transplant


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_below_the_cosine_become_those_of_the_reference(tmp_path: Path, dtype: str, sharded: bool) -> None:
    three = Three(tmp_path, dtype, sharded=sharded)
    done = transplant(*three.paths, three.output, LABEL, cosine=0.7)
    wanted = {place for place, cosine in three.cosines().items() if cosine < 0.7}
    assert 5 < len(wanted) < len(three.cosines())
    assert rows_of(three.output) == wanted
    assert (done.rows, done.considered) == (len(wanted), len(three.cosines()))
    before = tree_digest(three.paths[0])
    apply(three.paths[0], three.output, tmp_path / "restored")
    wrong = 0
    for name, tensor in load_tensors(tmp_path / "restored").items():
        for row in range(len(tensor)):
            source = three.aligned if (name, row) in wanted else three.tuned
            if tensor[row].tobytes() != source[name][row].tobytes():
                wrong += 1
    assert wrong == done.inexact
    assert wrong == 0 or dtype == "F32"
    assert verify(tmp_path / "restored", three.output).verdict is Verdict.PATCHED
    apply_in_place(three.paths[0], three.output)
    assert tree_digest(three.paths[0]) != before
    revert(three.paths[0])
    assert {name: tree_digest(three.paths[0])[name] for name in before} == before


@pytest.mark.parametrize("share", [0.1, 0.37, 1.0])
def test_a_share_takes_the_lowest_cosines(tmp_path: Path, share: float) -> None:
    three = Three(tmp_path)
    done = transplant(*three.paths, three.output, LABEL, share=share)
    cosines = three.cosines()
    count = int(np.ceil(share * len(cosines)))
    assert rows_of(three.output) == set(sorted(cosines, key=lambda place: cosines[place])[:count])
    assert done.rows == count


def test_without_a_limit_all_rows_that_the_alignment_changed_are_replaced(tmp_path: Path) -> None:
    three = Three(tmp_path)
    assert transplant(*three.paths, three.output, LABEL).rows == len(three.cosines())
    assert transplant(*three.paths, tmp_path / "y.nest", LABEL, cosine=1.0).rows == len(three.cosines())


def test_the_reference_is_extrapolated(tmp_path: Path) -> None:
    three = Three(tmp_path)
    done = transplant(*three.paths, three.output, LABEL, extrapolate=0.5, tensors=[GATE])
    apply(three.paths[0], three.output, tmp_path / "restored")
    base, aligned = (tensors[GATE].astype(np.float32) for tensors in (three.base, three.aligned))
    wanted = (aligned + np.float32(0.5) * (aligned - base)).astype(three.base[GATE].dtype)
    changed = [row for name, row in three.cosines() if name == GATE]
    restored = load_tensors(tmp_path / "restored")
    assert restored[GATE][changed].tobytes() == wanted[changed].tobytes()
    assert restored[UP].tobytes() == three.tuned[UP].tobytes()
    assert [tensor.name for tensor in done.tensors] == [GATE]


def test_a_row_that_the_fine_tune_left_at_the_base_has_cosine_zero(tmp_path: Path) -> None:
    three = Three(tmp_path)
    transplant(three.paths[1], *three.paths[1:], three.output, LABEL, cosine=0.1)
    apply(three.paths[1], three.output, tmp_path / "restored")
    restored = load_tensors(tmp_path / "restored")
    assert all(restored[name].tobytes() == three.aligned[name].tobytes() for name in restored)


def test_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    three = Three(tmp_path)
    pack, near = tiny_pack(three.paths[1]), write_checkpoint(tmp_path / "near", added(three.base, 5, 0.01))
    transplant(*three.paths, three.output, LABEL, share=0.5, extrapolate=0.2)
    carry(pack, near, three.paths[1], tmp_path / "c.nest", LABEL, refit=True)
    small_blocks(monkeypatch, 700)
    transplant(*three.paths, tmp_path / "blocks.nest", LABEL, share=0.5, extrapolate=0.2)
    carry(pack, near, three.paths[1], tmp_path / "c-blocks.nest", LABEL, refit=True)
    assert (tmp_path / "blocks.nest").read_bytes() == three.output.read_bytes()
    assert (tmp_path / "c-blocks.nest").read_bytes() == (tmp_path / "c.nest").read_bytes()


def test_a_patched_model_is_a_reference(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    nest.write(pack := tiny_pack(base), tmp_path / "p.nest")
    patched = apply(base, pack, tmp_path / "patched").output
    tuned = write_checkpoint(tmp_path / "tuned", added(load_tensors(patched), 3, 0.01))
    transplant(tuned, base, patched, tmp_path / "x.nest", LABEL)
    assert rows_of(tmp_path / "x.nest") == rows_of(tmp_path / "p.nest")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_gguf_files_are_read_and_restored(tmp_path: Path, kind: str) -> None:
    model = make("llama3", tmp_path / "model")
    tensors = load_tensors(model)
    aligned = added(tensors, 1, 0.05, share=0.5)
    sources = {"tuned": added(aligned, 2, 0.05), "base": tensors, "aligned": aligned}
    files = []
    for name, values in sources.items():
        folder = shutil.copytree(model, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        shutil.copy(write_checkpoint(tmp_path / f"{name}-weights", values) / "model.safetensors", folder)
        files.append(write_gguf(folder, tmp_path / f"{name}.gguf", kind))
    done = transplant(*files, tmp_path / "x.nest", LABEL, share=0.5)
    before = files[0].read_bytes()
    apply_in_place(files[0], tmp_path / "x.nest")
    patched, reference = GgufCheckpoint(files[0]), GgufCheckpoint(files[2])
    wrong = 0
    for delta in nest.read(tmp_path / "x.nest"):
        rows = delta.rows.astype(np.int64)
        assert delta.name.startswith("model.layers.")
        pair = [c.info(delta.name).decoded(c.read_rows(delta.name, rows)) for c in (patched, reference)]
        wrong += int((pair[0] != pair[1]).any(axis=1).sum())
    assert wrong == done.inexact
    assert kind != "F16" or wrong == 0
    assert done.rows == int(np.ceil(0.5 * done.considered))
    revert(files[0])
    assert files[0].read_bytes() == before


def broken(tensors: Tensors, case: str) -> Tensors:
    """The base with something that does not fit."""
    found = dict(tensors)
    if case == "lacks":
        del found[GATE]
    if case == "shape":
        found[GATE] = found[GATE][:-1]
    if case == "dtype":
        found[GATE] = found[GATE].astype(np.float16)
    if case == "nan":
        found = {name: tensor.copy() for name, tensor in found.items()}
        found[GATE][:] = np.nan
    return found


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("lacks", f"has no tensor {GATE}, which TUNED"),
        ("shape", rf"{GATE} has shape \[24, 16\] in TUNED and \[23, 16\] in REFERENCE"),
        ("dtype", f"{GATE} is BF16 in TUNED .* and F16 in REFERENCE"),
        ("nan", f"{GATE}: a row of one of the models holds NaN"),
        ("same", "hold the same rows in 6 matrices"),
    ],
)
def test_models_that_do_not_match_are_refused(tmp_path: Path, case: str, message: str) -> None:
    three = Three(tmp_path)
    reference = write_checkpoint(tmp_path / "odd", broken(three.base, case))
    with pytest.raises(RestorationError, match=message):
        transplant(*three.paths[:2], reference, three.output, LABEL)
    assert not three.output.exists()


def test_nothing_left_to_restore_is_refused(tmp_path: Path) -> None:
    three = Three(tmp_path)
    with pytest.raises(RestorationError, match="holds the restored rows already"):
        transplant(three.paths[2], *three.paths[1:], three.output, LABEL)
    with pytest.raises(RestorationError, match=r"no row of .* is to be changed"):
        transplant(*three.paths, three.output, LABEL, cosine=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cosine": 0.5, "share": 0.5}, "give one of them"),
        ({"cosine": 1.5}, "between -1 and 1"),
        ({"cosine": float("nan")}, "between -1 and 1"),
        ({"share": 0.0}, "above 0 and at most 1"),
        ({"share": 1.1}, "above 0 and at most 1"),
        ({"extrapolate": float("inf")}, "extrapolate is above -1"),
        ({"tensors": ["*.attention"]}, r"no matrix of .* matches \*.attention"),
    ],
)
def test_settings_are_checked(tmp_path: Path, options: dict[str, float], message: str) -> None:
    three = Three(tmp_path)
    with pytest.raises(DataError, match=message):
        transplant(*three.paths, three.output, LABEL, **options)


def test_a_pack_that_is_too_large_is_refused_before_any_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three = Three(tmp_path)
    monkeypatch.setattr("nestpatch.restore._rows.MAX_BYTES", 1000)
    with pytest.raises(RestorationError, match="the pack would take"):
        transplant(*three.paths, three.output, LABEL)


@pytest.mark.parametrize(
    ("error", "label", "place"),
    [(DataError, Label("a/b"), "x.nest"), (DataError, Label("a", "1"), "x.nest"), (OutputError, LABEL, "tuned")],
)
def test_the_label_and_the_output_are_checked_first(
    tmp_path: Path, error: type[NestpatchError], label: Label, place: str
) -> None:
    three = Three(tmp_path)
    with pytest.raises(error):
        transplant(*three.paths, tmp_path / place, label)
    with pytest.raises(error):
        carry(tiny_pack(three.paths[1]), three.paths[0], three.paths[1], tmp_path / place, label)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    three = Three(tmp_path)
    with pytest.raises(CheckpointFormatError, match="there is no model at"):
        transplant(three.paths[0], tmp_path / "none", three.paths[2], three.output, LABEL)


# --- extrapolate


def truncated(change: np.ndarray, rank: int) -> np.ndarray:
    """The part of a matrix of some rank, by a full SVD."""
    left, values, right = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("onto", [False, True])
def test_the_main_directions_are_extrapolated(tmp_path: Path, onto: bool, sharded: bool) -> None:
    three = Three(tmp_path, "F32", sharded=sharded)
    tuned, base, aligned = three.paths
    model, source = (tuned, three.tuned) if onto else (aligned, three.aligned)
    done = extrapolate(aligned, base, three.output, LABEL, rank=2, alpha=0.75, onto=tuned if onto else None)
    assert done.model == model
    apply(model, three.output, tmp_path / "restored")
    for name, tensor in load_tensors(tmp_path / "restored").items():
        change = three.aligned[name] - three.base[name]
        part = truncated(change, 2) if ".mlp." in name else 0.0
        np.testing.assert_allclose(tensor, source[name] + 0.75 * part, atol=2e-4)
        untouched = ~change.any(axis=-1)
        assert tensor[untouched].tobytes() == source[name][untouched].tobytes()
    before = tree_digest(model)
    apply_in_place(model, three.output)
    assert verify(model, three.output).verdict is Verdict.PATCHED
    revert(model)
    assert {name: tree_digest(model)[name] for name in before} == before


def test_a_patch_of_few_clusters_has_their_rank(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", dtype="F32")
    pack = tiny_pack(base, clusters=2)
    patched = apply(base, pack, tmp_path / "patched").output
    extrapolate(patched, base, tmp_path / "x.nest", LABEL, rank=8, alpha=1.0)
    found = nest.read(tmp_path / "x.nest")
    assert {delta.delta.shape[0] for delta in found} == {2}
    for ours, theirs in zip(found, pack, strict=True):
        assert np.array_equal(ours.rows, theirs.rows)
        np.testing.assert_allclose(ours.dense(), theirs.dense(), atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (0, 1.0, "the rank is from 1"),
        (257, 1.0, "the rank is from 1"),
        (1, 0.0, "alpha is above 0"),
        (1, float("nan"), "alpha is"),
    ],
)
def test_rank_and_alpha_are_checked(tmp_path: Path, rank: int, alpha: float, message: str) -> None:
    three = Three(tmp_path)
    with pytest.raises(DataError, match=message):
        extrapolate(three.paths[2], three.paths[1], three.output, LABEL, rank=rank, alpha=alpha)


def test_models_without_an_alignment_are_refused(tmp_path: Path) -> None:
    three = Three(tmp_path)
    with pytest.raises(RestorationError, match="hold the same rows in 6 matrices"):
        extrapolate(three.paths[1], three.paths[1], three.output, LABEL, rank=2, alpha=1.0)
    odd = write_checkpoint(tmp_path / "odd", broken(three.base, "nan"))
    with pytest.raises(RestorationError, match=f"{GATE}: a row .* NaN"):
        extrapolate(odd, three.paths[1], three.output, LABEL, rank=2, alpha=1.0)


# --- carry


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("refit", [False, True])
def test_a_pack_is_carried_to_a_fine_tune(tmp_path: Path, dtype: str, refit: bool) -> None:
    base = tiny_checkpoint(tmp_path / "base", dtype=dtype)
    pack = tiny_pack(base, delta_dtype="F32")
    grown = {name: (1.5 * tensor.astype(np.float32)).astype(tensor.dtype) for name, tensor in load_tensors(base).items()}
    tuned = write_checkpoint(tmp_path / "tuned", added(grown, 2, 0.01), sharded=True)
    label = Label("no-harm-tuned", "2.0.0", "for the fine-tune", "Apache-2.0")
    done = carry(pack, tuned, base, tmp_path / "x.nest", label, refit=refit)
    carried, stored = nest.read(tmp_path / "x.nest"), load_tensors(tuned)
    assert (carried.label, carried.manifest.license, done.moved) == ("no-harm-tuned 2.0.0", "Apache-2.0", 0)
    assert carried.manifest.method["carried"] == "no-harm 1.0.0"
    assert carried.manifest.method["carried_id"] == nest.pack_id(pack)
    assert not carried.manifest.evaluation
    apply(tuned, carried, tmp_path / "patched")
    patched, start = load_tensors(tmp_path / "patched"), load_tensors(base)
    for old, new in zip(pack, carried, strict=True):
        assert np.array_equal(old.rows, new.rows)
        assert np.array_equal(new.sketch, sketch(stored[old.name][old.rows]))
        factors = np.ones(old.clusters)
        if refit:
            for cluster in range(old.clusters):
                rows = old.rows[old.cluster == cluster]
                sides = (t[old.name][rows].astype(np.float64) for t in (stored, start))
                factors[cluster] = np.divide(*(np.linalg.norm(side) for side in sides))
            assert (abs(factors - 1.5) < 0.1).all()
        delta = (old.delta * factors[:, None]).astype(np.float32)
        np.testing.assert_allclose(new.delta, delta, rtol=1e-6)
        want = merge(stored[old.name][old.rows], new.dense())
        assert patched[old.name][old.rows].tobytes() == want.tobytes()


def test_a_change_of_low_rank_is_carried(tmp_path: Path) -> None:
    three = Three(tmp_path, "F32")
    _, base, aligned = three.paths
    extrapolate(aligned, base, tmp_path / "low.nest", LABEL, rank=2, alpha=1.0, onto=base)
    near = {name: (2 * tensor).astype(tensor.dtype) for name, tensor in added(three.base, 5, 0.002).items()}
    carry(tmp_path / "low.nest", write_checkpoint(tmp_path / "near", near), base, tmp_path / "x.nest", LABEL, refit=True)
    for old, new in zip(nest.read(tmp_path / "low.nest"), nest.read(tmp_path / "x.nest"), strict=True):
        sides = (np.linalg.norm(tensors[old.name][old.rows].astype(np.float64), axis=1) for tensors in (near, three.base))
        np.testing.assert_allclose(new.dense(), np.divide(*sides)[:, None] * old.dense(), atol=1e-5)


def swapped(model: Path, target: Path, name: str, a: int, b: int) -> Path:
    """A copy of a model in which two rows of a matrix have changed places."""
    tensors = {key: value.copy() for key, value in load_tensors(model).items()}
    tensors[name][[a, b]] = tensors[name][[b, a]]
    return write_checkpoint(target, tensors)


def test_moved_rows_are_refused_or_followed(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    pack = tiny_pack(base)
    delta = next(delta for delta in pack if delta.name == UP)
    touched = int(delta.rows[0])
    free = next(row for row in range(23, -1, -1) if row not in delta.rows)
    tuned = swapped(base, tmp_path / "tuned", UP, touched, free)
    with pytest.raises(RestorationError, match=rf"1 of 36 touched rows .* {UP} row {touched} is nearest to row {free}"):
        carry(pack, tuned, base, tmp_path / "x.nest", LABEL)
    done = carry(pack, tuned, base, tmp_path / "x.nest", LABEL, rematch=True)
    assert done.moved == 1
    apply(tuned, tmp_path / "x.nest", tmp_path / "patched")
    apply(base, pack, tmp_path / "wanted")
    back = load_tensors(swapped(tmp_path / "patched", tmp_path / "back", UP, touched, free))
    wanted = load_tensors(tmp_path / "wanted")
    assert all(back[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_two_rows_that_meet_are_refused(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    pack = tiny_pack(base)
    rows = next(delta for delta in pack if delta.name == UP).rows
    tensors = {key: value.copy() for key, value in load_tensors(base).items()}
    # The second row lost its own direction, and a third row is between both.
    free = next(row for row in range(24) if row not in rows)
    tensors[UP][free] = tensors[UP][rows[0]] + tensors[UP][rows[1]]
    tensors[UP][rows[:2]] = 0
    with pytest.raises(RestorationError, match=f"several touched rows of {UP} are most similar to row {free}"):
        carry(pack, write_checkpoint(tmp_path / "tuned", tensors), base, tmp_path / "x.nest", LABEL, rematch=True)


def test_a_fine_tune_of_the_patched_model_is_refused(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    pack = tiny_pack(base)
    tensors = load_tensors(apply(base, pack, tmp_path / "patched").output)
    tuned = write_checkpoint(tmp_path / "tuned", added(tensors, 2, 0.005))
    with pytest.raises(RestorationError, match=r"holds (9\d|10\d) % of the change"):
        carry(pack, tuned, base, tmp_path / "x.nest", LABEL)


def test_a_pack_of_another_base_is_refused(tmp_path: Path) -> None:
    base, other = tiny_checkpoint(tmp_path / "base"), tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatchError):
        carry(tiny_pack(other), base, base, tmp_path / "x.nest", LABEL)
    small = tiny_checkpoint(tmp_path / "small", layers=1)
    with pytest.raises(RestorationError, match="has no tensor"):
        carry(tiny_pack(base), small, base, tmp_path / "x.nest", LABEL)


# --- the command line


def test_the_commands_write_packs_and_say_what_is_next(tmp_path: Path) -> None:
    three = Three(tmp_path)
    words = ("restore", "transplant", three.paths[0], "--base", three.paths[1], "--reference", three.paths[2], "-q")
    said = run(*words, "-o", three.output, "--cosine", "0.7", "--license", "MIT", "--version", "1.2.0")
    assert said.exit_code == 0, said.stderr
    assert f"nestpatch eval {three.paths[0]}" in said.stdout.replace("\n", "")
    pack = nest.read(three.output)
    assert (pack.label, pack.manifest.license, pack.manifest.method["name"]) == ("x 1.2.0", "MIT", "transplant")
    nest.write(tiny_pack(three.paths[1]), tmp_path / "p.nest")
    near = write_checkpoint(tmp_path / "near", added(three.base, 5, 0.01))
    carried = answer("restore", "carry", tmp_path / "p.nest", near, "--base", three.paths[1], "-o", tmp_path / "c.nest")
    assert (carried["method"], carried["rows"], carried["moved_rows"]) == ("carry", 36, 0)
    assert run("restore", "transplant", three.paths[0], "-o", tmp_path / "y.nest").exit_code == 2
