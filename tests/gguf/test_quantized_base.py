"""Packs whose base is a quantized GGUF file: exact on that very file, by sketches on every other form of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from nestpatch.channels.listing import base_digest
from nestpatch.cli import main
from nestpatch.compare.diff import diff
from nestpatch.compare.packs import PackDiff
from nestpatch.errors import BaseMismatchError, CheckpointError, PackContentError, QuantizationError
from nestpatch.export.adapters import export_gguf_lora
from nestpatch.export.safetensors import export_safetensors
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import float_rows
from nestpatch.formats.gguf.quants import block, codec
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Label, Pack
from nestpatch.packing import build_pack, pack_tensor
from nestpatch.patcher.apply import apply
from nestpatch.patcher.findings import By, State
from nestpatch.patcher.identity import examine, is_base
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.status import status
from nestpatch.patcher.verify import Verdict, verify
from nestpatch.rows import BLOCK_TYPES, sketch
from tests.faults.cases import convert
from tests.gguf.files import NAMES, digest, gguf_of, needs_llama, packed, places, repacked, values, write_gguf
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack, tree_digest, write_checkpoint

SIZES = {"hidden": 256, "inter": 320}
OWN = ["Q4_1", "Q8_0", pytest.param("Q4_K", marks=needs_llama)]
"""Types of the base."""
OTHERS = [
    "Q4_0",
    "Q5_1",
    "F16",
    "BF16",
    "F32",
    pytest.param("Q6_K", marks=needs_llama),
    pytest.param("Q2_K", marks=needs_llama),
]
FileOf = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model."""
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "base", **SIZES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Type -> the float model as such a file; filled as needed, never changed."""
    return {"folder": tmp_path_factory.mktemp("gguf")}


@pytest.fixture
def file_of(base: Path, made: dict[str, Path], tmp_path: Path) -> FileOf:
    """Type -> a copy of its own."""

    def get(kind: str, name: str = "") -> Path:
        if kind not in made:
            made[kind] = gguf_of(base, made["folder"] / f"{kind}.gguf", kind)
        return Path(shutil.copy(made[kind], tmp_path / f"{name or kind}.gguf"))

    return get


def pack_of(base: Path, file: Path, scale: float = 0.05, **options: Any) -> Pack:
    """A pack whose base is the file."""
    return repacked(file, tiny_pack(base, scale=scale, **({"neurons": 24} | options)))


def flip(path: Path, tensor: str, row: int) -> None:
    """Changes the numbers of the row's last block by a little."""
    _, start, size, _ = places(path)[tensor]
    with open(path, "r+b") as file:
        file.seek(start + (row + 1) * size - 1)
        (last,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([last ^ 0x11]))


def forget(model: Path) -> None:
    """Removes all that nestpatch keeps beside a model."""
    shutil.rmtree(state_dir_of(model).folder)
    state_dir_of(model).ledger.unlink()


# The very file


@pytest.mark.parametrize("kind", OWN)
def test_the_very_file_is_exact(kind: str, base: Path, file_of: FileOf) -> None:
    path = file_of(kind)
    pack, original = pack_of(base, path), digest(path)
    assert (pack.format, pack.manifest.base.dtype) == ("nest/2", kind)
    assert verify(path, pack, full=True).by == "digests"
    done = apply_in_place(path, pack)
    assert done.retention is not None
    assert done.retention > 0.9
    records = read_ledger(state_dir_of(path)).applied[0].tensors
    for name, identity in pack.manifest.base.tensors.items():
        assert (records[name].before, records[name].after) == (identity.rows_sha256, pack.manifest.result[name])
    assert status(path).sound
    for asked in (None, pack):
        assert verify(path, asked, full=True).verdict is Verdict.PATCHED
    assert verify(path, pack).by == "digests"
    revert(path)
    assert digest(path) == original
    assert (verify(path, pack).verdict, verify(path, pack).by) == (Verdict.BASE, "digests")


@pytest.mark.parametrize("kind", OWN)
def test_digests_are_those_of_the_stored_blocks(kind: str, base: Path, file_of: FileOf) -> None:
    """By gguf's own reader."""
    path = file_of(kind)
    pack, data = pack_of(base, path), path.read_bytes()
    for delta in pack:
        identity = pack.manifest.base.tensors[delta.name]
        _, start, size, rows = places(path)[NAMES[delta.name]]
        assert identity.shape == (rows, 256)
        assert identity.sha256 == sha256(data[start : start + rows * size]).hexdigest()
        touched = b"".join(data[start + row * size : start + (row + 1) * size] for row in delta.rows.tolist())
        assert identity.rows_sha256 == sha256(touched).hexdigest()
        plain = values(path)[NAMES[delta.name]][delta.rows]
        assert np.array_equal(delta.sketch, sketch(plain))
        assert np.array_equal(float_rows(open_checkpoint(path), delta.name, delta.rows), plain)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("with_base", [False, True])
def test_one_changed_block_is_refused(kind: str, with_base: bool, base: Path, file_of: FileOf, tmp_path: Path) -> None:
    path = file_of(kind)
    pack = pack_of(base, path)
    delta = pack.deltas[1]
    row = int(delta.rows[5])
    flip(path, NAMES[delta.name], row)
    before = tree_digest(tmp_path)
    with pytest.raises(BaseMismatchError) as caught:
        apply_in_place(path, pack, base=base if with_base else None)
    assert f"1 of 4 tensors of {path} are not the base" in str(caught.value)
    assert f"{delta.name}: near the base, but changed" in str(caught.value)
    assert f"{kind}, rows sha256" in str(caught.value)
    assert f"1 of 24 rows differ by their sketches, first row {row}" in str(caught.value)
    assert tree_digest(tmp_path) == before
    found = verify(path, pack)
    assert (found.verdict, found.by, found.differences[0].rows) == (Verdict.ALTERED, "", (row,))
    apply_in_place(path, pack, allow_base_mismatch=True)
    assert verify(path).verdict is Verdict.PATCHED


def test_a_block_changed_elsewhere(base: Path, file_of: FileOf) -> None:
    """Only the touched rows are read, unless the whole tensors are asked for."""
    path = file_of("Q8_0")
    pack = pack_of(base, path)
    delta = pack.deltas[0]
    flip(path, NAMES[delta.name], int(np.setdiff1d(np.arange(320), delta.rows)[7]))
    assert verify(path, pack).verdict is Verdict.BASE
    found = verify(path, pack, full=True)
    assert (found.verdict, [one.tensor for one in found.differences]) == (Verdict.ALTERED, [delta.name])
    altered = digest(path)
    apply_in_place(path, pack)
    assert verify(path).verdict is Verdict.PATCHED
    found = verify(path, full=True)
    assert (found.verdict, [one.tensor for one in found.differences]) == (Verdict.ALTERED, [delta.name])
    revert(path)
    assert digest(path) == altered


def test_a_patched_file_without_ledger_is_not_patched_twice(base: Path, file_of: FileOf) -> None:
    path = file_of("Q4_1")
    pack = pack_of(base, path)
    apply_in_place(path, pack)
    forget(path)
    assert {(finding.state, finding.by) for finding in examine(pack, open_checkpoint(path))} == {(State.PATCHED, By.DIGESTS)}
    with pytest.raises(BaseMismatchError, match="already patched"):
        apply_in_place(path, pack)


def test_another_build_of_the_quantizer_is_no_error(base: Path, file_of: FileOf) -> None:
    """The result of quantized rows is a hint: rows that differ from it hold the pack by the ledger, and by their sketches."""
    path = file_of("Q4_1")
    pack = pack_of(base, path)
    other = replace(pack, manifest=replace(pack.manifest, result=dict.fromkeys(pack.manifest.result, "0" * 64)))
    apply_in_place(path, other)
    assert verify(path, full=True).verdict is Verdict.PATCHED
    found = verify(path, other)
    assert (found.verdict, found.by) == (Verdict.PATCHED, "sketches")
    forget(path)
    assert verify(path, other).verdict is Verdict.PATCHED
    with pytest.raises(BaseMismatchError, match="already patched"):
        apply_in_place(path, other)


def test_strength_and_dither(base: Path, file_of: FileOf) -> None:
    path = file_of("Q4_1")
    pack, original = pack_of(base, path, 0.02), digest(path)
    apply_in_place(path, pack, strength=0.5, dither=True)
    assert verify(path, pack, strength=0.5).verdict is Verdict.PATCHED
    assert verify(path, pack).verdict is Verdict.ALTERED
    assert verify(path, full=True).verdict is Verdict.PATCHED
    revert(path)
    assert digest(path) == original


# --base


def test_small_deltas_come_through_the_float_model(base: Path, file_of: FileOf) -> None:
    path = file_of("Q4_1")
    pack, original = pack_of(base, path, 0.006), digest(path)
    with pytest.raises(QuantizationError, match="of the change would be left") as caught:
        apply_in_place(path, pack)
    assert all(way in caught.value.advice for way in ("--base", "gguf-lora", "--dither"))
    done = apply_in_place(path, pack, base=base)
    assert done.retention is not None
    assert done.retention > 0.9
    assert verify(path, full=True).verdict is Verdict.PATCHED
    found = verify(path, pack, base=open_checkpoint(base))
    assert (found.verdict, found.by) == (Verdict.PATCHED, "float base")
    revert(path)
    assert digest(path) == original


def test_what_is_no_float_model_of_the_base(base: Path, file_of: FileOf, tmp_path: Path) -> None:
    path = file_of("Q4_1")
    pack, original = pack_of(base, path, 0.02), digest(path)
    tuned = {n: (t + 0.025 * np.sign(t.astype(np.float32))).astype(t.dtype) for n, t in load_tensors(base).items()}
    wrong = {
        "have likeness": tiny_checkpoint(tmp_path / "stranger", seed=9, **SIZES),
        "expected floats": file_of("Q8_0"),
        "hold the pack already": apply(base, pack, tmp_path / "patched").output,
        "was quantized from": write_checkpoint(tmp_path / "tuned", tuned),
    }
    for says, model in wrong.items():
        with pytest.raises(BaseMismatchError, match=says):
            apply_in_place(path, pack, base=model)
        assert digest(path) == original


# Other forms of the same model


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_recognised_by_sketches(own: str, kind: str, base: Path, file_of: FileOf) -> None:
    pack, path = pack_of(base, file_of(own)), file_of(kind, "other")
    original, before = digest(path), values(path)
    assert {(finding.state, finding.by) for finding in examine(pack, open_checkpoint(path))} == {(State.ROUNDED, By.SKETCHES)}
    apply_in_place(path, pack)
    after = values(path)
    for delta in pack:
        moved = after[NAMES[delta.name]][delta.rows] - before[NAMES[delta.name]][delta.rows]
        assert float((moved * delta.dense()).sum() / np.square(delta.dense()).sum()) == pytest.approx(1, abs=0.1)
    assert verify(path, full=True).verdict is Verdict.PATCHED
    found = verify(path, pack, full=True)
    assert (found.verdict, found.by) == (Verdict.PATCHED, "sketches")
    revert(path)
    assert digest(path) == original
    forget(path)
    found = verify(path, pack, full=True)
    assert (found.verdict, found.by) == (Verdict.BASE, "sketches")


@pytest.mark.parametrize("form", ["m.columns.onnx", "m.blocks.onnx"])
@pytest.mark.parametrize("with_base", [False, True])
def test_onnx_models(form: str, with_base: bool, base: Path, file_of: FileOf, tmp_path: Path) -> None:
    """In float32, and in the blocks of MatMulNBits."""
    pack, folder = pack_of(base, file_of("Q4_1")), Path(shutil.copytree(base, tmp_path / "onnx"))
    convert(folder, form)
    path = folder / form
    before = tree_digest(folder)
    apply_in_place(path, pack, base=base if with_base else None)
    assert verify(path).verdict is Verdict.PATCHED
    assert verify(path, pack).verdict is Verdict.PATCHED
    revert(path)
    assert {name: found for name, found in tree_digest(folder).items() if name in before} == before


@pytest.mark.parametrize("own", OWN)
def test_the_float_model_follows_the_merge_rule(own: str, base: Path, file_of: FileOf, tmp_path: Path) -> None:
    pack = pack_of(base, file_of(own))
    copy = apply(base, pack, tmp_path / "copy").output
    before, after = load_tensors(base), load_tensors(copy)
    for delta in pack:
        wanted = before[delta.name].astype(np.float32)
        wanted[delta.rows] += delta.dense()
        assert np.array_equal(after[delta.name], wanted.astype(before[delta.name].dtype))
    # A base has nothing to add to floats.
    assert load_tensors(apply(base, pack, tmp_path / "again", base=base).output).keys() == after.keys()
    assert all(np.array_equal(load_tensors(tmp_path / "again")[name], after[name]) for name in after)
    assert (verify(copy, pack).verdict, verify(copy, pack).by) == (Verdict.PATCHED, "sketches")
    forget(copy)
    with pytest.raises(BaseMismatchError, match="already patched"):
        apply_in_place(copy, pack)


def test_other_quantized_rows_are_made_from_the_float_model(base: Path, file_of: FileOf, tmp_path: Path) -> None:
    """Byte for byte what merging first and quantizing then gives."""
    pack, path = pack_of(base, file_of("Q4_1"), 0.02), file_of("Q5_0")
    apply_in_place(path, pack, base=base)
    goal = gguf_of(apply(base, pack, tmp_path / "merged").output, tmp_path / "goal.gguf", "Q5_0")
    assert digest(path) == digest(goal)


def test_blocks_of_another_quantizer(base: Path, file_of: FileOf, tmp_path: Path) -> None:
    """A file of the base's own type that shares no row with it, as one that was made with an importance matrix."""
    pack = pack_of(base, file_of("Q4_1"))
    tensors = {NAMES[name]: tensor.astype(np.float32) * np.float32(1.003) for name, tensor in load_tensors(base).items()}
    path = write_gguf(tmp_path / "other.gguf", tensors, "Q4_1")
    original = digest(path)
    assert {(finding.state, finding.by) for finding in examine(pack, open_checkpoint(path))} == {(State.ROUNDED, By.SKETCHES)}
    assert verify(path, pack, full=True).verdict is Verdict.BASE
    apply_in_place(path, pack)
    assert verify(path, full=True).verdict is Verdict.PATCHED
    revert(path)
    assert digest(path) == original


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "safetensors"])
def test_other_models_are_refused(kind: str, base: Path, file_of: FileOf, tmp_path: Path) -> None:
    stranger = tiny_checkpoint(tmp_path / "stranger", seed=9, **SIZES)
    pack = pack_of(base, file_of("Q4_1"))
    path = stranger if kind == "safetensors" else gguf_of(stranger, tmp_path / "stranger.gguf", kind)
    before = tree_digest(path)
    for more in ({}, {"base": stranger}, {"base": base}):
        with pytest.raises(BaseMismatchError):
            apply_in_place(path, pack, **more)
    assert tree_digest(path) == before


@pytest.mark.parametrize("kind", ["F16", "safetensors"])
def test_floats_in_doubt_are_refused(kind: str, base: Path, file_of: FileOf, tmp_path: Path) -> None:
    """A change far below the rounding of the base: the sketches cannot tell whether it is there."""
    pack = pack_of(base, file_of("Q4_1"), 1e-4)
    path = Path(shutil.copytree(base, tmp_path / "copy")) if kind == "safetensors" else file_of(kind)
    with pytest.raises(BaseMismatchError, match="the sketches cannot tell whether it holds no-harm"):
        apply_in_place(path, pack)
    apply_in_place(path, pack, allow_base_mismatch=True)


def test_float_rows_that_an_undo_record_may_lead_to(base: Path, file_of: FileOf) -> None:
    """The base less the change merges to the base: an undo record that came with a model could claim that it is patched."""
    checkpoint, pack = open_checkpoint(base), pack_of(base, file_of("Q4_1"))
    for delta in pack:
        identity = pack.manifest.base.tensors[delta.name]
        rows = checkpoint.read_rows(delta.name, delta.rows.astype(np.int64))
        for sign, is_it in ((0, True), (1, False), (-1, False), (-0.8, False)):
            shifted = (rows.astype(np.float32) + sign * delta.dense()).astype(rows.dtype)
            assert is_base(delta, identity, checkpoint, shifted) is is_it


def test_blocks_that_an_undo_record_may_lead_to(base: Path, file_of: FileOf) -> None:
    checkpoint = open_checkpoint(file_of("Q8_0"))
    pack = pack_of(base, checkpoint.path)
    for delta in pack:
        identity = pack.manifest.base.tensors[delta.name]
        rows = np.array(checkpoint.read_rows(delta.name, delta.rows.astype(np.int64)))
        assert is_base(delta, identity, checkpoint, rows)
        rows[3, -1] ^= 1
        assert not is_base(delta, identity, checkpoint, rows)


# Mixed packs and chains


def mixed(base: Path, folder: Path) -> tuple[Path, Pack]:
    """A file of Q8_0 whose up projections are BF16, and a pack whose base it is."""
    tensors = {NAMES[name]: tensor for name, tensor in load_tensors(base).items()}
    kinds = {name: "BF16" for name in tensors if "ffn_up" in name}
    path = write_gguf(folder / "mixed.gguf", tensors, "Q8_0", kinds=kinds)
    return path, pack_of(base, path)


def test_a_mixed_pack(base: Path, tmp_path: Path) -> None:
    path, pack = mixed(base, tmp_path)
    assert (pack.format, pack.manifest.base.dtype) == ("nest/2", "BF16/Q8_0")
    assert nest.encode(nest.decode(nest.encode(pack))) == nest.encode(pack)
    original = digest(path)
    apply_in_place(path, pack)
    assert (verify(path, pack, full=True).verdict, verify(path, pack).by) == (Verdict.PATCHED, "digests")
    revert(path)
    assert digest(path) == original
    # The float model has the digests of its own tensors, and the sketches of the others.
    found = {finding.name: (finding.state, finding.by) for finding in examine(pack, open_checkpoint(base))}
    known = {True: (State.BASE, By.DIGESTS), False: (State.ROUNDED, By.SKETCHES)}
    assert found == {name: known["up_proj" in name] for name in found}
    assert verify(base, pack).by == "sketches"


def test_the_float_tensors_of_a_mixed_pack_promise_their_result(base: Path, tmp_path: Path) -> None:
    path, pack = mixed(base, tmp_path)
    original = digest(path)
    for part, refused in (("gate_proj", False), ("up_proj", True)):
        name = f"model.layers.0.mlp.{part}.weight"
        lying = replace(pack, manifest=replace(pack.manifest, result={**pack.manifest.result, name: "0" * 64}))
        if refused:
            with pytest.raises(PackContentError, match="differ from the result"):
                apply_in_place(path, lying)
        else:
            apply_in_place(path, lying)
            revert(path)
        assert digest(path) == original


def test_an_update_from_a_float_base_to_this_one(base: Path, file_of: FileOf) -> None:
    path = file_of("Q8_0")
    old, new = tiny_pack(base, neurons=24), pack_of(base, path, version="2.0.0", seed=5)
    original = digest(path)
    apply_in_place(path, old)
    done = apply_in_place(path, new)
    assert done.steps == ("undo no-harm 1.0.0", "apply no-harm 2.0.0")
    assert (verify(path, new).verdict, verify(path, new).by) == (Verdict.PATCHED, "digests")
    revert(path, "1.0.0")
    assert verify(path).packs == ("no-harm 1.0.0",)
    revert(path)
    assert digest(path) == original


# What else reads the dtype of a base


def test_differences_of_packs(base: Path, file_of: FileOf, tmp_path: Path) -> None:
    path = file_of("Q8_0")
    old, new = tiny_pack(base, neurons=24), pack_of(base, path)
    assert base_digest(old.manifest) != base_digest(new.manifest)
    files = tmp_path / "old.nest", tmp_path / "new.nest"
    for pack, file in zip((old, new), files, strict=True):
        nest.write(pack, file)
    found = diff(*files)
    assert isinstance(found, PackDiff)
    assert (found.same_base, len(found.foreign)) == (False, 4)
    assert ("format", "nest/1", "nest/2") in {(one.field, one.a, one.b) for one in found.fields}
    assert {one.changed for one in found.tensors} == {0}


def test_adapters_and_releases(base: Path, file_of: FileOf, tmp_path: Path) -> None:
    pack = pack_of(base, file_of("Q4_1"))
    adapter = export_gguf_lora(pack, tmp_path / "lora.gguf", trust="none")
    assert adapter.matrices == 4
    done = export_safetensors(base, pack, tmp_path / "release", trust="none")
    assert done.packs == ("no-harm 1.0.0",)
    assert verify(tmp_path / "release", pack).verdict is Verdict.PATCHED


def test_the_commands(base: Path, file_of: FileOf, tmp_path: Path) -> None:
    path, patch = file_of("Q8_0"), tmp_path / "p.nest"
    nest.write(pack_of(base, path), patch)

    def run(*words: object) -> str:
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code in (0, 1), result.output
        return result.output

    assert "Q8_0)" in run("show", patch)
    manifest = json.loads(run("show", patch, "--json"))["manifest"]
    assert manifest["format"] == "nest/2"
    assert {tensor["dtype"] for tensor in manifest["base"]["tensors"].values()} == {"Q8_0"}
    assert "recognised by digests" in run("verify", path, patch)
    run("apply", path, patch, "--in-place")
    assert json.loads(run("verify", path, patch, "--json"))["by"] == "digests"
    assert json.loads(run("verify", path, "--json"))["by"] is None
    assert "recognised by sketches" in run("verify", base, patch)


# Packing


@needs_llama
def test_the_types_of_bases_are_those_that_can_be_merged() -> None:
    for name, sizes in BLOCK_TYPES.items():
        assert block(name) == sizes == tuple(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]])
        kind = codec(name)
        kind.require()
        rows = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
        assert kind.decode(kind.encode(rows)).shape == rows.shape


def test_a_base_that_cannot_be_merged_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    path, code = tmp_path / "raw.gguf", gguf.GGMLQuantizationType.IQ2_XXS
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    _, nbytes = gguf.GGML_QUANT_SIZES[code]
    writer.add_tensor("blk.0.ffn_gate.weight", np.zeros((320, nbytes), np.uint8), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name = "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(QuantizationError, match="IQ2_XXS, which no pack can have as its base") as caught:
        pack_tensor(open_checkpoint(path), name, np.array([3]), np.ones((1, 256), np.float32), cluster=np.array([0]))
    assert "Q4_K" in caught.value.advice


def test_a_merge_out_of_range_is_refused(base: Path, file_of: FileOf) -> None:
    checkpoint, name = open_checkpoint(file_of("Q8_0")), "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises((PackContentError, CheckpointError)):
        pack_tensor(checkpoint, name, np.array([3]), np.full((1, 256), 3e38, np.float32), cluster=np.array([0]))


def test_a_base_of_one_type_gives_one_pack(base: Path, file_of: FileOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canonical bytes: the same file and deltas, the same pack."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795435200")
    like = tiny_pack(base, neurons=24)
    files = [nest.encode(build_pack(packed(file_of("Q8_0", name), like), Label("x"), model_id="m")) for name in ("one", "two")]
    assert files[0] == files[1]
    assert nest.encode(nest.decode(files[0])) == files[0]
