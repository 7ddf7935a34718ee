"""GGUF files patched where they are: every type, exact and measured, undone to the byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.compare.diff import CheckpointDiff, diff
from nestpatch.compare.extract import extract
from nestpatch.errors import (
    BaseMismatchError,
    CheckpointFormatError,
    ExtractionError,
    OverlapError,
    QuantizationError,
)
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Label, Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.findings import State
from nestpatch.patcher.identity import examine
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.merge import LEAST_RETENTION, QuantizedMerge
from nestpatch.patcher.plan import measure
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.verify import Verdict, verify
from tests.gguf.files import K_TYPES, NAMES, PLAIN, ROUND, digest, gguf_of, needs_llama, places, values, write_gguf
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack, write_checkpoint

TYPES = [*PLAIN, *ROUND, *(pytest.param(kind, marks=needs_llama) for kind in K_TYPES)]
SIZES = {"hidden": 256, "inter": 320}
"""Blocks of the K types have 256 elements."""
SMALL, LARGE = 0.006, 0.05
"""Deltas of 6 % of the weights' RMS, and of 50 %."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "base", **SIZES)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Type -> the base as such a file; filled as needed, never changed."""
    return {"folder": tmp_path_factory.mktemp("gguf")}


@pytest.fixture
def file_of(base: Path, made: dict[str, Path], tmp_path: Path):
    """Type -> a copy of its own."""

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = gguf_of(base, made["folder"] / f"{kind}.gguf", kind)
        return Path(shutil.copy(made[kind], tmp_path / f"{kind}.gguf"))

    return get


def pack_of(base: Path, scale: float = SMALL, **options: object) -> Pack:
    return tiny_pack(base, scale=scale, **({"neurons": 24} | options))  # type: ignore[arg-type]


def merged_checkpoint(base: Path, pack: Pack, folder: Path) -> Path:
    """The base with the pack merged, by the copy that `apply` makes of the safetensors model."""
    return apply(base, pack, folder).output


def touched_bytes(path: Path, pack: Pack) -> np.ndarray:
    """Which bytes of a file belong to rows that the pack touches."""
    inside = np.zeros(path.stat().st_size, bool)
    where = places(path)
    for delta in pack.deltas:
        _, start, size, _ = where[NAMES[delta.name]]
        for row in delta.rows.tolist():
            inside[start + row * size : start + (row + 1) * size] = True
    return inside


@pytest.mark.parametrize("kind", TYPES)
def test_exact_rows_are_those_of_merging_first(kind: str, base: Path, file_of, tmp_path: Path) -> None:
    pack, path = pack_of(base), file_of(kind)
    before = np.fromfile(path, np.uint8)
    done = apply_in_place(path, pack, base=base)
    after = np.fromfile(path, np.uint8)
    goal = gguf_of(merged_checkpoint(base, pack, tmp_path / "merged"), tmp_path / "goal.gguf", kind)
    assert after.tobytes() == goal.read_bytes()
    inside = touched_bytes(path, pack)
    assert not (before != after)[~inside].any()
    assert (before != after)[inside].any()
    assert (done.retention is None) == (kind == "BF16")
    assert done.retention is None or done.retention > 0.85
    assert verify(path).verdict is Verdict.PATCHED
    revert(path)
    assert np.array_equal(np.fromfile(path, np.uint8), before)
    assert verify(path, pack).verdict is Verdict.BASE


@pytest.mark.parametrize("kind", TYPES)
def test_large_deltas_arrive_without_the_base(kind: str, base: Path, file_of) -> None:
    pack, path = pack_of(base, LARGE), file_of(kind)
    original, before = digest(path), values(path)
    done = apply_in_place(path, pack)
    after = values(path)
    for delta in pack.deltas:
        name = NAMES[delta.name]
        moved = after[name][delta.rows] - before[name][delta.rows]
        share = float((moved * delta.dense()).sum() / np.square(delta.dense()).sum())
        assert share == pytest.approx(1, abs=0.1), f"{delta.name}: {share:.3f} of the delta arrived"
        assert np.array_equal(np.delete(after[name], delta.rows, 0), np.delete(before[name], delta.rows, 0))
    assert done.retention is None or done.retention > LEAST_RETENTION
    revert(path)
    assert digest(path) == original


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_numbers_follow_the_merge_rule(kind: str, base: Path, file_of) -> None:
    """Without a base the dtype of the file decides, as for safetensors."""
    pack, path = pack_of(base), file_of(kind)
    before = values(path)
    apply_in_place(path, pack)
    after, types = values(path), {"F32": np.float32, "F16": np.float16}
    for delta in pack.deltas:
        wanted = before[NAMES[delta.name]][delta.rows] + delta.dense()
        rounded = wanted.astype(types[kind]) if kind in types else (wanted.astype(delta.delta.dtype))
        assert np.array_equal(after[NAMES[delta.name]][delta.rows], rounded.astype(np.float32))


@pytest.mark.parametrize("kind", ["Q4_0", *(pytest.param(kind, marks=needs_llama) for kind in ("Q4_K", "IQ4_NL"))])
def test_small_deltas_are_refused_with_the_ways_out(kind: str, base: Path, file_of) -> None:
    pack, path = pack_of(base), file_of(kind)
    original = digest(path)
    with pytest.raises(QuantizationError) as caught:
        apply_in_place(path, pack)
    assert "of the change would be left" in str(caught.value)
    assert all(way in caught.value.advice for way in ("--base", "gguf-lora", "--dither"))
    assert digest(path) == original
    assert not state_dir_of(path).folder.exists()
    done = apply_in_place(path, pack, dither=True)
    assert done.retention is not None
    assert done.retention > LEAST_RETENTION
    entry = read_ledger(state_dir_of(path)).applied[0]
    assert entry.rounding == "from the quantized rows, dithered"
    revert(path)
    assert digest(path) == original


def test_dither_is_the_same_at_every_run(base: Path, file_of, tmp_path: Path) -> None:
    pack = pack_of(base)
    outputs = [apply(file_of("Q4_0"), pack, tmp_path / f"{n}.gguf", dither=True, digest=True).files[0].sha256 for n in range(2)]
    assert outputs[0] == outputs[1]


def test_dither_brings_more_than_rounding(base: Path, file_of) -> None:
    checkpoint, pack = open_checkpoint(file_of("Q4_0")), pack_of(base)
    shares = [
        [retention.share for retention in measure(pack, 1.0, checkpoint, QuantizedMerge(dither=d)).values()]
        for d in (False, True)
    ]
    assert max(shares[0]) < 0.7 < LEAST_RETENTION < min(shares[1])


def test_copy_upgrade_and_strength(base: Path, file_of, tmp_path: Path) -> None:
    path = file_of("Q8_0")
    original = digest(path)
    one, two = pack_of(base), pack_of(base, version="2.0.0", seed=5)
    copy = apply(path, one, tmp_path / "copy.gguf", base=base).output
    assert digest(path) == original
    done = apply_in_place(copy, two, base=base, strength=0.5)
    assert done.steps == ("undo no-harm 1.0.0", "apply no-harm 2.0.0")
    direct = apply(path, two, tmp_path / "direct.gguf", base=base, strength=0.5).output
    assert digest(copy) == digest(direct)
    revert(copy, "1.0.0", base=base)
    assert digest(copy) == digest(apply(path, one, tmp_path / "again.gguf", base=base).output)
    revert(copy)
    assert digest(copy) == original


def test_packs_stack_in_different_rows_only(base: Path, file_of) -> None:
    path = file_of("Q8_0")
    original, names = digest(path), sorted(pack_of(base).manifest.result)
    one, other = (pack_of(base, name=name, tensors=part) for name, part in (("a", names[:2]), ("b", names[2:])))
    apply_in_place(path, one, base=base)
    apply_in_place(path, other, base=base)
    both = digest(path)
    with pytest.raises(OverlapError, match="stored quantized"):
        apply_in_place(path, pack_of(base, name="c", tensors=names[:1]), base=base, allow_overlap=True)
    assert digest(path) == both
    assert verify(path).packs == ("a 1.0.0", "b 1.0.0")
    revert(path)
    assert digest(path) == original


@pytest.mark.parametrize("kind", TYPES)
def test_other_models_are_refused(kind: str, base: Path, file_of, tmp_path: Path) -> None:
    stranger = tiny_checkpoint(tmp_path / "stranger", seed=9, **SIZES)
    path = file_of(kind)
    original = digest(path)
    for quantized in ({}, {"base": stranger}):
        with pytest.raises(BaseMismatchError):
            apply_in_place(path, pack_of(stranger, LARGE), **quantized)
    with pytest.raises(BaseMismatchError):
        apply_in_place(path, pack_of(stranger), base=base)
    assert digest(path) == original


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q5_1"])
def test_a_fine_tuned_file_is_told_from_the_base(kind: str, base: Path, tmp_path: Path) -> None:
    """Rows that were made from the base would throw the tuning away."""
    random = np.random.default_rng(3)
    tuned = {n: (t + 0.02 * random.standard_normal(t.shape)).astype(t.dtype) for n, t in load_tensors(base).items()}
    path = gguf_of(write_checkpoint(tmp_path / "tuned", tuned), tmp_path / "tuned.gguf", kind)
    with pytest.raises(BaseMismatchError, match="times the error of rounding"):
        apply_in_place(path, pack_of(base), base=base)


@pytest.mark.parametrize("quantized", ["sketches", "base"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q5_0", pytest.param("Q4_K", marks=needs_llama)])
def test_a_patched_file_without_ledger_is_recognised(kind: str, quantized: str, base: Path, file_of) -> None:
    path, pack = file_of(kind), pack_of(base, 0.02)
    apply_in_place(path, pack, base=base)
    shutil.rmtree(state_dir_of(path).folder)
    state_dir_of(path).ledger.unlink()
    assert verify(path, pack).verdict is Verdict.PATCHED
    with pytest.raises(BaseMismatchError, match="already patched"):
        apply_in_place(path, pack, base=base if quantized == "base" else None)


def test_otherwise_quantized_rows_are_the_base_too(base: Path, tmp_path: Path) -> None:
    """Another quantizer's choices, as with an importance matrix: scales one per cent off."""
    tensors = {NAMES[n]: t.astype(np.float32) * np.float32(1.0) for n, t in load_tensors(base).items()}
    path = write_gguf(tmp_path / "other.gguf", {n: t * np.float32(1.003) for n, t in tensors.items()}, "Q5_0")
    findings = examine(pack_of(base), open_checkpoint(path), open_checkpoint(base))
    assert {finding.state for finding in findings} == {State.ROUNDED}
    apply_in_place(path, pack_of(base), base=base)
    assert verify(path).verdict is Verdict.PATCHED


RAW = {"IQ2_XXS": "importance matrix", "IQ1_S": "importance matrix", "NVFP4": "scales are in another tensor"}


@pytest.mark.parametrize("kind", RAW)
def test_types_that_cannot_be_written_are_refused_by_name(kind: str, base: Path, tmp_path: Path) -> None:
    import gguf

    path, code = tmp_path / f"{kind}.gguf", gguf.GGMLQuantizationType[kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[code]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    for name in NAMES.values():
        if "ffn" in name and name.startswith(("blk.0", "blk.1")):
            shape = (256, 320) if "down" in name else (320, 256)
            data = np.zeros((shape[0], shape[1] // elements * nbytes), np.uint8)
            writer.add_tensor(name, data, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    original = digest(path)
    with pytest.raises((QuantizationError, CheckpointFormatError), match=RAW[kind]) as caught:
        apply_in_place(path, pack_of(base), allow_base_mismatch=True)
    assert "gguf-lora" in caught.value.advice
    assert digest(path) == original


@pytest.mark.parametrize(
    ("extra", "says"), [({"general.type": "adapter"}, "not a model"), ({"split.count": 3}, "split into 3")]
)
def test_files_that_are_no_whole_model(extra: Mapping[str, str | int], says: str, base: Path, tmp_path: Path) -> None:
    tensors = {NAMES[name]: tensor for name, tensor in load_tensors(base).items()}
    path = write_gguf(tmp_path / "m.gguf", tensors, "Q8_0", extra=extra)
    with pytest.raises(CheckpointFormatError, match=says):
        open_checkpoint(path)


def test_without_llama_cpp(base: Path, file_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """gguf does Q8_0 with the same bytes, and K types are refused with the command that helps."""
    from nestpatch.formats.gguf import quants

    with_library = file_of("Q8_0")
    apply_in_place(with_library, pack_of(base), base=base)
    patched = with_library.read_bytes()
    revert(with_library)
    monkeypatch.setattr(quants, "_ggml", lambda: None)
    apply_in_place(with_library, pack_of(base), base=base)
    assert with_library.read_bytes() == patched
    with pytest.raises(QuantizationError, match="needs llama") as caught:
        quants.GgmlCodec("Q4_K").require()
    assert "nestpatch[llama]" in caught.value.advice


def test_differences_of_quantized_files(base: Path, file_of, tmp_path: Path) -> None:
    path, pack = file_of("Q8_0"), pack_of(base, LARGE)
    copy = apply(path, pack, tmp_path / "copy.gguf").output
    assert diff(path, path).identical
    found = diff(path, copy)
    assert isinstance(found, CheckpointDiff)
    assert {tensor.name: tensor.changed for tensor in found.changed} == {NAMES[d.name]: d.neurons for d in pack.deltas}
    assert all(tensor.relative is not None and 0.3 < tensor.relative < 0.8 for tensor in found.changed)
    with pytest.raises(ExtractionError, match="is a converted model"):
        extract(path, copy, tmp_path / "x.nest", Label("x"))


def test_the_commands(base: Path, file_of, tmp_path: Path) -> None:
    path, patch = file_of("Q4_0"), tmp_path / "p.nest"
    nest.write(pack_of(base), patch)
    original = digest(path)

    def run(*words: object, code: int = 0) -> str:
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return result.output

    assert "would be left" in run("apply", path, patch, "--in-place", code=1)
    assert "retention" in run("apply", path, patch, "--in-place", "--base", base)
    assert "from the float base" in run("status", path)
    told = json.loads(run("status", path, "--json"))
    assert all(0.9 < record["retention"] < 1.1 for record in told["applied"][0]["records"].values())
    assert "patched" in run("verify", path)
    run("revert", path)
    assert digest(path) == original


def test_half_patched_and_altered_rows_are_named(base: Path, file_of) -> None:
    path, pack = file_of("Q8_0"), pack_of(base)
    before = path.read_bytes()
    apply_in_place(path, pack, base=base)
    delta = pack.deltas[0]
    _, start, size, _ = places(path)[NAMES[delta.name]]
    at = start + int(delta.rows[3]) * size
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(before[at : at + size])
    found = verify(path)
    assert found.verdict is Verdict.HALF
    assert (found.differences[0].tensor, found.differences[0].rows) == (delta.name, (int(delta.rows[3]),))
    with open(path, "r+b") as file:
        file.seek(at + 5)
        file.write(bytes([before[at + 5] ^ 0x10]))
    assert verify(path).verdict is Verdict.ALTERED
    assert replace(found, seconds=0) != replace(verify(path), seconds=0)
