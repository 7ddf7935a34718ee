"""Packs with changes of low rank, alone and beside clusters: into every format and back, and how they look."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.compare.diff import diff
from nestpatch.compare.packs import PackDiff
from nestpatch.errors import PackContentError
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.health.presence import presence
from nestpatch.pack import Label, Pack
from nestpatch.packing import build_pack, pack_tensor
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.verify import Verdict, verify
from nestpatch.report.structure import layers
from tests.gguf.files import K_TYPES, NAMES, gguf_of, needs_llama, packed, values
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack, tree_digest, weight_files, write_checkpoint
from tests.onnx.files import build, data_of, save

KINDS = ["low rank", "mixed"]
QUANTIZED = ["Q8_0", "Q4_1", *(pytest.param(kind, marks=needs_llama) for kind in K_TYPES[:1])]


def slow_change(pack: Pack, name: str) -> np.ndarray:
    """The change of a whole matrix by the words of the format document, number by number."""
    delta = next(delta for delta in pack if delta.name == name)
    rows, width = pack.manifest.base.tensors[name].matrix
    change = np.zeros((rows, width), np.float32)
    for place, row in enumerate(delta.rows.tolist()):
        if delta.cluster is not None:
            change[row] = delta.delta[delta.cluster[place]]
            continue
        for column in range(width):
            total = 0.0
            for factor, value in zip(delta.factors[place].tolist(), delta.delta[:, column].tolist(), strict=True):
                total += factor * value
            change[row, column] = total
    return change


def expected(model: Path, pack: Pack, strength: float = 1.0) -> dict[str, bytes]:
    """Tensor -> bytes of the patched model."""
    found = {name: tensor.copy() for name, tensor in load_tensors(model).items()}
    for name in (delta.name for delta in pack):
        wide = found[name].astype(np.float32) + np.float32(strength) * slow_change(pack, name)
        touched = next(delta.rows for delta in pack if delta.name == name)
        found[name][touched] = wide[touched].astype(found[name].dtype)
    return {name: tensor.tobytes() for name, tensor in found.items()}


def stored(model: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_tensors(model).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "delta_dtype"), [("BF16", "BF16"), ("F16", "F32"), ("F32", "F16")])
def test_safetensors_and_back(kind: str, dtype: str, delta_dtype: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base", dtype=dtype, sharded=dtype == "F16")
    pack = tiny_pack(model, clusters=3, delta_dtype=delta_dtype, kind=kind)
    assert pack.format == "nest/2"
    nest.write(pack, tmp_path / "x.nest")
    pack = nest.read(tmp_path / "x.nest")
    before, originals = stored(model), [file.read_bytes() for file in weight_files(model)]
    assert stored(apply(model, pack, tmp_path / "copy").output) == expected(model, pack)
    for strength in (1.0, 0.5):
        wanted = expected(model, pack, strength)
        apply_in_place(model, pack, strength=strength)
        assert stored(model) == wanted != before
        assert verify(model, pack, strength=strength, full=True).verdict is Verdict.PATCHED
        assert verify(model).verdict is Verdict.PATCHED
        revert(model)
        assert [file.read_bytes() for file in weight_files(model)] == originals
    assert verify(model, pack, full=True).verdict is Verdict.BASE


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["F32", "BF16", *QUANTIZED])
def test_gguf_and_back(kind: str, exact: bool, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base", hidden=256, inter=320)
    pack = tiny_pack(model, scale=0.01 if exact else 0.5, neurons=24, kind="mixed")
    path = gguf_of(model, tmp_path / f"{kind}.gguf", kind)
    original, before = path.read_bytes(), values(path)
    apply_in_place(path, pack, base=model if exact else None)
    if exact:
        goal = gguf_of(apply(model, pack, tmp_path / "merged").output, tmp_path / "goal.gguf", kind)
        assert path.read_bytes() == goal.read_bytes()
    after = values(path)
    for delta in pack:
        moved, wanted = after[NAMES[delta.name]] - before[NAMES[delta.name]], slow_change(pack, delta.name)
        assert float((moved * wanted).sum() / np.square(wanted).sum()) == pytest.approx(1, abs=0.15)
        assert not np.delete(moved, delta.rows, 0).any()
    assert verify(path).verdict is Verdict.PATCHED
    revert(path)
    assert path.read_bytes() == original


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_quantized_base(kind: str, tmp_path: Path) -> None:
    """Two reasons for nest/2 at once."""
    model = tiny_checkpoint(tmp_path / "base", hidden=256, inter=320)
    path = gguf_of(model, tmp_path / "base.gguf", kind)
    like = tiny_pack(model, scale=0.5, neurons=24, kind="low rank")
    pack = build_pack(packed(path, like), Label("x"), model_id="x", architecture="LlamaForCausalLM")
    assert len(pack.additions) == 8
    assert nest.encode(nest.decode(nest.encode(pack))) == nest.encode(pack)
    original = path.read_bytes()
    apply_in_place(path, pack)
    assert verify(path, pack).verdict is Verdict.PATCHED
    revert(path)
    assert path.read_bytes() == original


@pytest.mark.parametrize("style", ["kept", "genai", "optimum"])
def test_onnx_and_back(style: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base", dtype="F32")
    pack = tiny_pack(model, kind="mixed")
    path = save(build(model, style), tmp_path / "m")
    goal = data_of(save(build(apply(model, pack, tmp_path / "merged").output, style), tmp_path / "goal"))
    original = data_of(path)
    apply_in_place(path, pack)
    assert data_of(path) == goal != original
    assert verify(path, full=True).verdict is Verdict.PATCHED
    revert(path)
    assert data_of(path) == original


def every_row(model: Path, rank: int, seed: int = 0) -> Pack:
    """A pack that changes all rows of all feed-forward matrices, as an edit in a subspace does."""
    checkpoint, random, tensors = open_checkpoint(model), np.random.default_rng(seed), []
    for name in (name for name in checkpoint.tensors() if "_proj." in name):
        rows, width = checkpoint.info(name).shape
        factors, basis = (random.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, width)))
        tensors.append(pack_tensor(checkpoint, name, np.arange(rows), 0.01 * basis, factors=factors))
    return build_pack(tensors, Label("lox", f"1.{seed}.0"), model_id="tiny", architecture="LlamaForCausalLM")


def test_all_rows_of_a_model(tmp_path: Path) -> None:
    """No row is left that shows what the file was; a newer version, a stack and the way back do not need one."""
    model = tiny_checkpoint(tmp_path / "base")
    first, second, original = every_row(model, 6), every_row(model, 2, seed=1), stored(model)
    apply_in_place(model, first)
    assert stored(model) != original
    assert apply_in_place(model, second).tensors == 6
    shutil.copytree(model, tmp_path / "fresh", ignore=shutil.ignore_patterns("*.nestpatch*"))
    assert verify(model, second, full=True).verdict is Verdict.PATCHED
    found = presence(second, open_checkpoint(tmp_path / "fresh"))
    assert (found.by, found.share) == ("digests", 1.0)
    revert(model)
    assert stored(model) == original


def test_packing_gives_the_smallest_facts_of_the_merge(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base", dtype="F16")
    like, checkpoint = tiny_pack(model, kind="low rank"), open_checkpoint(model)
    for delta in like:
        made = pack_tensor(checkpoint, delta.name, delta.rows.astype(np.int64), delta.delta, factors=delta.factors)
        assert nest.parts(made.delta).keys() == nest.parts(delta).keys()
        assert all(np.array_equal(array, nest.parts(delta)[part]) for part, array in nest.parts(made.delta).items())
        assert made.identity == like.manifest.base.tensors[delta.name]
        assert made.result == like.manifest.result[delta.name]
    one, none = np.ones((1, 16), np.float32), {"cluster": np.array([0]), "factors": np.ones((1, 1), np.float32)}
    for given in (none, {}):
        with pytest.raises(PackContentError, match=r"clusters (and|nor) factors"):
            pack_tensor(checkpoint, like.deltas[0].name, np.array([3]), one, **given)


def test_the_change_is_computed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the number of rows that a pack touches."""
    monkeypatch.setattr("nestpatch.formats.checkpoint.CHUNK", 1 << 18)
    random, peaks = np.random.default_rng(0), []
    for rows in (500, 4_000):
        folder = tmp_path / f"{rows}"
        tensor = (0.1 * random.standard_normal((rows, 256))).astype(np.float32)
        write_checkpoint(folder, {"model.layers.0.mlp.up_proj.weight": tensor, "norm.weight": tensor[:1]})
        pack = every_row(folder, 4)
        tracemalloc.start()
        apply_in_place(folder, pack)
        revert(folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The residual of the undo record, and some numbers per row, are kept; a row itself has 1,024 bytes.
    assert peaks[1] < peaks[0] + 256 * 3_500


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, Callable[[str], Path]]:
    model = tiny_checkpoint(tmp_path / "base")

    def pack(kind: str, version: str = "1.0.0") -> Path:
        path = tmp_path / f"{kind}.nest".replace(" ", "-")
        nest.write(tiny_pack(model, clusters=6, neurons=9, kind=kind, version=version), path)
        return path

    return model, pack


def test_show_names_the_rank(scene: tuple[Path, Callable[[str], Path]]) -> None:
    _, pack = scene
    assert "rank 6" in command("show", pack("low rank"))
    text = command("show", pack("mixed"), "--rows")
    assert (text.count("rank 6"), "clusters" in text) == (2, True)
    assert "rank" not in command("show", pack("clusters"))


def test_diff_of_both_kinds(scene: tuple[Path, Callable[[str], Path]]) -> None:
    _, pack = scene
    one, two = pack("clusters"), pack("low rank", "1.1.0")
    found = diff(one, two)
    assert isinstance(found, PackDiff)
    packs = [nest.read(path) for path in (one, two)]
    for tensor, ours, theirs in zip(found.tensors, *packs, strict=True):
        assert (tensor.clusters, tensor.ranks) == ((6, 0), (0, 6))
        kept = np.intersect1d(ours.rows, theirs.rows)
        changes = [delta.dense()[np.isin(delta.rows, kept)] for delta in (ours, theirs)]
        assert tensor.changed == int((changes[0] != changes[1]).any(axis=1).sum())
        assert len(kept) == 0 or tensor.relative == pytest.approx(
            np.linalg.norm(changes[1] - changes[0]) / np.linalg.norm(changes[0]), rel=1e-5
        )
    assert "6 to rank 6" in command("diff", one, two, code=1)


def test_the_report_has_ranks_beside_clusters(scene: tuple[Path, Callable[[str], Path]], tmp_path: Path) -> None:
    _, pack = scene
    path = pack("mixed")
    found = nest.read(path)
    lines = layers(found)
    assert sorted((line.rank, len(line.cells)) for line in lines) == [(0, 6), (0, 6), (6, 0), (6, 0)]
    for line in lines:
        delta = next(d for d in found if f"layers.{line.name}.mlp.{line.matrices[0]}" in d.name)
        assert line.norm == pytest.approx(float(np.square(delta.dense()).sum()) ** 0.5, rel=1e-5)
    command("report", path, "-o", tmp_path / "mixed.html")
    assert "A change of low rank" in (tmp_path / "mixed.html").read_text(encoding="utf-8")
    command("report", pack("low rank"), "-o", tmp_path / "low.html")
    text = (tmp_path / "low.html").read_text(encoding="utf-8")
    assert "A change of low rank" in text
    assert "A cell is a cluster" not in text


def test_the_doctor_finds_rows_that_were_overwritten(scene: tuple[Path, Callable[[str], Path]]) -> None:
    model, pack = scene
    made = nest.read(pack("low rank"))
    apply_in_place(model, made)
    delta, checkpoint = made.deltas[0], open_checkpoint(model)
    rows = delta.rows[:3].astype(np.int64)
    checkpoint.write_rows(delta.name, rows, checkpoint.read_rows(delta.name, rows)[::-1].copy())
    found = presence(made, open_checkpoint(model))
    assert found.changed == found.overwritten == 3 - (len(rows) % 2)
    assert found.share == pytest.approx(1, abs=0.05)


def test_a_pack_of_low_rank_is_refused_by_another_model(scene: tuple[Path, Callable[[str], Path]], tmp_path: Path) -> None:
    _, pack = scene
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    before = tree_digest(other)
    result = CliRunner().invoke(main, ["apply", str(other), str(pack("low rank")), "--in-place"])
    assert result.exit_code == 1
    assert "BaseMismatchError" in result.output
    assert tree_digest(other) == before


def test_a_result_that_the_merge_does_not_give_is_refused(scene: tuple[Path, Callable[[str], Path]]) -> None:
    """A pack whose maker summed otherwise has another digest."""
    model, pack = scene
    made = nest.read(pack("low rank"))
    wrong = replace(made, manifest=replace(made.manifest, result={delta.name: "0" * 64 for delta in made}))
    with pytest.raises(PackContentError, match="differ from the result"):
        apply_in_place(model, wrong)
