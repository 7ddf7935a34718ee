"""Which models a pack takes for its base, and what it says of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.errors import BaseMismatchError, ChainError, CheckpointFormatError
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.findings import State
from nestpatch.patcher.identity import examine
from nestpatch.patcher.plan import make_plan
from tests.helpers import (
    DTYPES,
    FLOATS,
    assert_same_bytes,
    load_tensors,
    places,
    tiny_checkpoint,
    tiny_pack,
    tree_digest,
    write_checkpoint,
)

GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"


def copy_with(folder: Path, model: Path, **changed: np.ndarray | None) -> Path:
    """A copy of a model with other tensors, given by "gate" and "up" of the first layer; None leaves one out."""
    tensors = load_tensors(model)
    for short, values in changed.items():
        name = {"gate": GATE, "up": UP}[short]
        if values is None:
            del tensors[name]
        else:
            tensors[name] = values
    return write_checkpoint(folder, tensors)


def mismatch(model: Path, pack: Pack) -> BaseMismatchError:
    """The error of applying; it leaves nothing beside the model."""
    before = tree_digest(model.parent)
    with pytest.raises(BaseMismatchError) as caught:
        apply(model, pack)
    assert tree_digest(model.parent) == before
    assert caught.value.advice.strip()
    return caught.value


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base")


@pytest.fixture
def pack(model: Path) -> Pack:
    return tiny_pack(model)


def without_ledger(model: Path) -> Path:
    """A model whose history was lost: only its rows can tell."""
    (model / "nestpatch.json").unlink()
    shutil.rmtree(model / ".nestpatch")
    return model


def states(pack: Pack, model: Path) -> list[State]:
    return [finding.state for finding in examine(pack, open_checkpoint(model))]


def test_the_base(model: Path, pack: Pack) -> None:
    assert states(pack, model) == [State.BASE] * 4
    plan = make_plan(pack, open_checkpoint(model))
    rows = [tensor.delta.neurons for tensor in plan.tensors]
    nbytes = [tensor.delta.neurons * tensor.info.row_bytes for tensor in plan.tensors]
    assert (sum(rows), sum(nbytes)) == (36, 36 * 32)


def test_only_the_touched_rows_decide(model: Path, pack: Pack, tmp_path: Path) -> None:
    """A row that the pack does not touch may differ: it is kept as it is."""
    gate = load_tensors(model)[GATE].copy()
    free = next(row for row in range(24) if row not in pack.deltas[0].rows)
    gate[free] = 1
    other = copy_with(tmp_path / "other", model, gate=gate)
    output = apply(other, pack).output
    assert (load_tensors(output)[GATE][free] == 1).all()


@pytest.mark.parametrize(("narrow", "wide"), [("BF16", "F32"), ("F16", "F32")])
def test_a_wider_copy_is_the_base_and_merged_in_its_own_dtype(narrow: str, wide: str, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", dtype=narrow)
    pack = tiny_pack(base)
    copy = write_checkpoint(tmp_path / "copy", {n: t.astype(DTYPES[wide]) for n, t in load_tensors(base).items()})
    findings = examine(pack, open_checkpoint(copy))
    assert [f.state for f in findings] == [State.WIDENED] * 4
    assert {f.detail for f in findings} == {f"{wide} instead of {narrow}"}
    expected = {name: tensor.copy() for name, tensor in load_tensors(copy).items()}
    for change in pack:
        expected[change.name][change.rows] += change.delta.astype(np.float32)[change.cluster]
    got = load_tensors(apply(copy, pack).output)
    for name, tensor in expected.items():
        assert_same_bytes(got[name].tobytes(), tensor.tobytes(), wide)


def test_a_wider_copy_that_was_trained_on_is_not_the_base(model: Path, pack: Pack, tmp_path: Path) -> None:
    """One step of float32 that bfloat16 would round away."""
    tensors = {name: tensor.astype(np.float32) for name, tensor in load_tensors(model).items()}
    row = int(pack.deltas[0].rows[0])
    tensors[GATE][row, 0] = np.nextafter(tensors[GATE][row, 0], np.float32(9))
    other = write_checkpoint(tmp_path / "other", tensors)
    assert states(pack, other) == [State.CHANGED, State.WIDENED, State.WIDENED, State.WIDENED]
    assert f"1 of 4 tensors of {other} are not the base of no-harm 1.0.0:\n  {GATE}: near the base" in str(
        mismatch(other, pack)
    )


def test_a_narrower_copy_is_not_called_wider(tmp_path: Path) -> None:
    """patching.md takes a wider copy for the base. In a narrower one the merge would round the deltas away."""
    narrow = tiny_checkpoint(tmp_path / "narrow")
    base = write_checkpoint(tmp_path / "base", {n: t.astype(np.float32) for n, t in load_tensors(narrow).items()})
    assert State.WIDENED not in states(tiny_pack(base), narrow)


@pytest.mark.parametrize("stored", FLOATS)
def test_another_model(stored: str, pack: Pack, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", seed=1, dtype=stored)
    error = mismatch(other, pack)
    first, *lines = str(error).split("\n")
    assert first == f"4 of 4 tensors of {other} are not the base of no-harm 1.0.0:"
    assert [line.split(": ")[0].strip() for line in lines] == [*(d.name for d in pack.deltas[:3]), "and 1 more"]
    promised = pack.manifest.base.tensors[GATE].rows_sha256
    assert lines[0].startswith(f"  {GATE}: another model (rows sha256 ")
    assert f" instead of {promised[:12]}.., likeness " in lines[0]
    assert f", first at row {pack.deltas[0].rows[0]}, 9 of 9 rows differ)" in lines[0]
    assert error.advice == (
        "The pack is for tiny/llama at 0123abc. A fine-tuned copy of it needs its own pack: nestpatch train."
    )


@pytest.mark.parametrize("position", [0, 4, 8])
def test_one_changed_row_is_named(position: int, model: Path, pack: Pack, tmp_path: Path) -> None:
    up = load_tensors(model)[UP].copy()
    row = int(pack.deltas[1].rows[position])
    up[row] = -up[row]
    other = copy_with(tmp_path / "other", model, up=up)
    error = str(mismatch(other, pack))
    assert error.startswith(f"1 of 4 tensors of {other} are not the base")
    assert f"\n  {UP}: " in error
    assert f"first at row {row}, 1 of 9 rows differ" in error
    assert GATE not in error


def test_one_changed_bit_is_noticed(model: Path, pack: Pack, tmp_path: Path) -> None:
    """A change far too small for a sketch: the digest tells."""
    gate = load_tensors(model)[GATE].copy()
    gate.view(np.uint16)[int(pack.deltas[0].rows[-1]), -1] ^= 1
    error = str(mismatch(copy_with(tmp_path / "other", model, gate=gate), pack))
    assert f"{GATE}: near the base, but changed" in error
    assert "likeness 1.00" in error


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["BF16", "F32"])
def test_a_damaged_model_is_named_without_a_warning(stored: str, value: float, model: Path, pack: Pack, tmp_path: Path) -> None:
    tensors = {name: tensor.astype(DTYPES[stored]) for name, tensor in load_tensors(model).items()}
    tensors[GATE][int(pack.deltas[0].rows[2])] = value
    assert GATE in str(mismatch(write_checkpoint(tmp_path / "other", tensors), pack))


def test_shifted_rows_are_foreign(model: Path, pack: Pack, tmp_path: Path) -> None:
    """The same rows one further down, as after a neuron was pruned."""
    gate = np.roll(load_tensors(model)[GATE], 1, axis=0)
    assert states(pack, copy_with(tmp_path / "other", model, gate=gate))[:2] == [State.FOREIGN, State.BASE]


def test_a_transposed_tensor(model: Path, pack: Pack, tmp_path: Path) -> None:
    gate = np.ascontiguousarray(load_tensors(model)[GATE].T)
    error = str(mismatch(copy_with(tmp_path / "other", model, gate=gate), pack))
    assert f"{GATE}: of another shape ([16, 24] instead of [24, 16])" in error


def test_a_missing_tensor(model: Path, pack: Pack, tmp_path: Path) -> None:
    error = str(mismatch(copy_with(tmp_path / "other", model, up=None), pack))
    assert error.endswith(f"\n  {UP}: missing")


def test_a_patched_model_says_so(model: Path, pack: Pack) -> None:
    patched = apply(model, pack).output
    with pytest.raises(ChainError, match=r"no-harm 1\.0\.0 is applied to .* already"):
        apply(patched, pack)
    error = mismatch(without_ledger(patched), pack)
    assert str(error).count("already patched with this pack") == 3
    assert str(error).endswith("\n  and 1 more")
    assert error.advice == "Nothing to do: the model has this pack."


def test_a_half_patched_model_says_so(model: Path, pack: Pack, tmp_path: Path) -> None:
    gate = load_tensors(apply(model, pack).output)[GATE]
    other = copy_with(tmp_path / "other", model, gate=gate)
    error = mismatch(other, pack)
    assert str(error) == (
        f"1 of 4 tensors of {other} are not the base of no-harm 1.0.0:\n  {GATE}: already patched with this pack"
    )
    assert error.advice == "The model is half patched: start again from the base."


def test_patched_and_changed_is_no_plain_half(model: Path, pack: Pack, tmp_path: Path) -> None:
    """The advice for a half patched model would be wrong where another tensor is foreign."""
    gate = load_tensors(apply(model, pack).output)[GATE]
    error = mismatch(copy_with(tmp_path / "other", model, gate=gate, up=None), pack)
    assert "half patched" not in error.advice
    assert "The pack is for tiny/llama" in error.advice


def test_a_mismatch_can_be_allowed(pack: Pack, tmp_path: Path) -> None:
    """Rows of the right shape are merged, whatever they held."""
    other = tiny_checkpoint(tmp_path / "other", seed=1, dtype="F32")
    expected = {name: tensor.copy() for name, tensor in load_tensors(other).items()}
    for change in pack:
        expected[change.name][change.rows] += change.delta.astype(np.float32)[change.cluster]
    got = load_tensors(apply(other, pack, allow_base_mismatch=True).output)
    for name, tensor in expected.items():
        assert_same_bytes(got[name].tobytes(), tensor.tobytes())


def test_some_mismatches_cannot_be_allowed(model: Path, pack: Pack, tmp_path: Path) -> None:
    gate = load_tensors(model)[GATE]
    refused = {
        "missing": copy_with(tmp_path / "missing", model, gate=None),
        "of another shape": copy_with(tmp_path / "shape", model, gate=gate[:23]),
        "already patched": without_ledger(apply(model, pack).output),
    }
    for says, other in refused.items():
        with pytest.raises(BaseMismatchError, match=says):
            apply(other, pack, tmp_path / "out", allow_base_mismatch=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stored", "dtype"), [("I8", np.dtype(np.int8)), ("F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn))], ids=["I8", "F8_E4M3"]
)
def test_a_quantized_tensor_is_named(stored: str, dtype: np.dtype, model: Path, pack: Pack, tmp_path: Path) -> None:
    gate = (load_tensors(model)[GATE].astype(np.float32) * 100).astype(dtype)
    other = copy_with(tmp_path / "other", model, gate=gate)
    assert places(other / "model.safetensors")[GATE][0] == dtype
    before = tree_digest(tmp_path)
    with pytest.raises(CheckpointFormatError, match=rf"tensor {GATE} is stored as {stored}; only F32, BF16, F16") as caught:
        apply(other, pack)
    assert caught.value.advice == "Patch the model before it is quantized."
    assert tree_digest(tmp_path) == before


def test_the_base_changes_while_it_is_copied(model: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked and copied at two moments: the copy is checked again."""
    from nestpatch.patcher import copies as module

    real = module.copy_file

    def copy_damaged(source: Path, target: Path, *, flush: bool) -> None:
        real(source, target, flush=flush)
        if target.name == "model.safetensors":
            start = places(target)[GATE][2] + int(pack.deltas[0].rows[0]) * 32
            with open(target, "r+b") as file:
                file.seek(start)
                file.write(b"\0\0")

    monkeypatch.setattr(module, "copy_file", copy_damaged)
    assert "1 of 4 tensors" in str(mismatch(model, pack))


def test_the_command_shows_the_difference(model: Path, pack: Pack, tmp_path: Path) -> None:
    nest.write(pack, tmp_path / "x.nest")
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    result = CliRunner().invoke(main, ["apply", str(other), str(tmp_path / "x.nest")])
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert lines[0] == f"BaseMismatchError: 4 of 4 tensors of {other} are not the base of no-harm 1.0.0:"
    assert lines[1].startswith(f"  {GATE}: another model (rows sha256 ")
    assert lines[-1].startswith("What to do: The pack is for tiny/llama at 0123abc.")
