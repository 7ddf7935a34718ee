"""MatMulNBits models patched where they are: exact from the float base, else measured; undone to the byte."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from nestpatch.compare.diff import CheckpointDiff, diff
from nestpatch.errors import BaseMismatchError, OverlapError, QuantizationError
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.findings import State
from nestpatch.patcher.identity import examine
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.merge import LEAST_RETENTION, QuantizedMerge
from nestpatch.patcher.plan import measure
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.verify import Verdict, verify
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack, tree_digest, write_checkpoint
from tests.onnx.files import build, data_of, narrowed, quantized, run, save

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL, LARGE = 0.006, 0.06
"""Deltas of 6 % of the weights' RMS, and of 60 %."""
FORMS = [(4, 32, True), (4, 32, False), (4, 128, True), (4, 16, False), (8, 32, True), (8, 64, False)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "base", dtype="F32", hidden=128, inter=160)


def pack_of(base: Path, scale: float = SMALL, **options: object) -> Pack:
    return tiny_pack(base, scale=scale, **({"neurons": 24, "delta_dtype": "F32"} | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return apply(base, pack_of(base), tmp_path_factory.mktemp("merged") / "m").output


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMS)
@pytest.mark.parametrize(
    ("style", "packed"), [("genai", ""), ("nameless", ""), ("optimum", "gate first"), ("nameless", "up first")]
)
def test_exact_rows_are_those_of_merging_first(
    bits: int, block: int, symmetric: bool, style: str, packed: str, base: Path, merged: Path, tmp_path: Path
) -> None:
    form = {"bits": bits, "block": block, "symmetric": symmetric}
    path = save(quantized(build(base, style, packed=packed), **form), tmp_path / "m")
    goal = save(quantized(build(merged, style, packed=packed), **form), tmp_path / "goal")
    original, pack = data_of(path), pack_of(base)
    done = apply_in_place(path, pack, base=base)
    assert data_of(path) == data_of(goal)
    assert data_of(path) != original
    assert done.retention is not None
    assert done.retention > LEAST_RETENTION
    assert verify(path).verdict is Verdict.PATCHED
    revert(path)
    assert data_of(path) == original
    assert verify(path, pack).verdict is Verdict.BASE


@pytest.mark.parametrize("where", ["inside", "file each"])
def test_parts_in_several_files(where: str, base: Path, merged: Path, tmp_path: Path) -> None:
    path, goal = (save(quantized(build(m), symmetric=False), tmp_path / n, where) for m, n in ((base, "m"), (merged, "goal")))
    original = data_of(path)
    apply_in_place(path, pack_of(base), base=base)
    assert data_of(path) == data_of(goal)
    copy = apply(goal, pack_of(base, name="other", seed=3), tmp_path / "copy", allow_base_mismatch=True, base=base)
    assert copy.rows == 96
    revert(path)
    assert data_of(path) == original


@pytest.mark.parametrize("kind", ["F16", "F16 later", "BF16"])
def test_scales_of_half_precision(kind: str, base: Path, merged: Path, tmp_path: Path) -> None:
    """Made of a model in that precision, or narrowed when all was quantized: which of them, untouched rows tell."""

    def make(checkpoint: Path, name: str) -> Path:
        if kind == "F16 later":
            return save(narrowed(quantized(build(checkpoint))), tmp_path / name)
        return save(quantized(build(checkpoint, dtype=kind)), tmp_path / name)

    path, goal = make(base, "m"), make(merged, "goal")
    original = data_of(path)
    assert kind[:3] in open_checkpoint(path).info("model.layers.0.mlp.up_proj.weight").dtype
    apply_in_place(path, pack_of(base), base=base)
    assert data_of(path) == data_of(goal)
    revert(path)
    assert data_of(path) == original


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMS)
def test_large_deltas_arrive_without_the_base(bits: int, block: int, symmetric: bool, base: Path, tmp_path: Path) -> None:
    path = save(quantized(build(base), bits=bits, block=block, symmetric=symmetric), tmp_path / "m")
    original, pack = data_of(path), pack_of(base, LARGE)
    before = numbers(path, pack)
    done = apply_in_place(path, pack)
    assert done.retention is not None
    assert done.retention > LEAST_RETENTION
    for delta in pack:
        moved = numbers(path, pack)[delta.name][delta.rows] - before[delta.name][delta.rows]
        share = float((moved * delta.dense()).sum() / np.square(delta.dense()).sum())
        assert share == pytest.approx(1, abs=0.1)
    revert(path)
    assert data_of(path) == original


def numbers(path: Path, pack: Pack) -> dict[str, np.ndarray]:
    """What the quantized matrices stand for."""
    checkpoint = open_checkpoint(path)
    names = [delta.name for delta in pack]
    return {n: checkpoint.info(n).coding.decode(checkpoint.read_rows(n, np.arange(checkpoint.info(n).rows))) for n in names}


def test_small_deltas_are_refused_with_the_ways_out(base: Path, tmp_path: Path) -> None:
    path, pack = save(quantized(build(base)), tmp_path / "m"), pack_of(base)
    before = tree_digest(tmp_path)
    with pytest.raises(QuantizationError, match="of the change would be left") as caught:
        apply_in_place(path, pack)
    assert all(way in caught.value.advice for way in ("--base", "onnx-adapter", "--dither"))
    assert tree_digest(tmp_path) == before
    shares = [
        [g.share for g in measure(pack, 1.0, open_checkpoint(path), QuantizedMerge(dither=d)).values()] for d in (False, True)
    ]
    assert max(shares[0]) < 0.8 < LEAST_RETENTION < min(shares[1])
    apply_in_place(path, pack, dither=True)
    assert read_ledger(state_dir_of(path)).applied[0].rounding == "from the quantized rows, dithered"
    revert(path)
    assert data_of(path).keys() == {"model.onnx", "model.onnx_data"}
    assert {n: d for n, d in tree_digest(tmp_path).items() if "nestpatch" not in n} == before


def test_results_in_onnxruntime(base: Path, merged: Path, tmp_path: Path) -> None:
    path, goal = (save(quantized(build(model)), tmp_path / name) for model, name in ((base, "m"), (merged, "goal")))
    before = run(path)
    apply_in_place(path, pack_of(base), base=base)
    assert np.array_equal(run(path), run(goal))
    assert not np.array_equal(run(path), before)


def otherwise_quantized(base: Path, how: str, folder: Path) -> onnx.ModelProto:
    """By another quantizer of onnxruntime's, or by its own from numbers that are a little larger."""
    if how == "scaled":
        scaled = {name: tensor * np.float32(1.003) for name, tensor in load_tensors(base).items()}
        return quantized(build(write_checkpoint(folder, scaled)))
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    proto = build(base)
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"n{number}"
    algorithm = {"RTN": library.RTNWeightOnlyQuantConfig, "k-quant": library.KQuantWeightOnlyQuantConfig}.get(how)
    config = algorithm() if algorithm is not None else library.HQQWeightOnlyQuantConfig(block_size=32)
    quantizer = library.MatMulNBitsQuantizer(proto, bits=4, block_size=32, algo_config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of arrays that it must not write
        quantizer.process()
    made: onnx.ModelProto = getattr(quantizer.model, "model", quantizer.model)
    return made


@pytest.mark.parametrize("how", ["scaled", "k-quant", "HQQ"])
def test_other_quantizers_are_refused_by_name(how: str, tmp_path: Path) -> None:
    """Rows of rounding to nearest among others would be a model that was never measured."""
    # An even number of blocks in every row: those quantizers stumble over others.
    base = tiny_checkpoint(tmp_path / "base", dtype="F32", hidden=128, inter=192)
    if how == "HQQ":
        pytest.importorskip("torch")
    path = save(otherwise_quantized(base, how, tmp_path / "scaled"), tmp_path / "m")
    before = tree_digest(tmp_path)
    says = "zero points are not packed" if how == "HQQ" else "not quantized by onnxruntime's default quantizer"
    with pytest.raises(QuantizationError, match=says) as caught:
        apply_in_place(path, pack_of(base), base=base)
    assert "adapter" in caught.value.advice
    assert tree_digest(tmp_path) == before


def test_another_quantizer_with_the_same_bytes_will_do(tmp_path: Path) -> None:
    """Rows decide, not names: that of Neural Compressor comes to the same where blocks have numbers of both signs."""
    base = tiny_checkpoint(tmp_path / "base", dtype="F32", hidden=128, inter=192)
    merged = apply(base, pack_of(base), tmp_path / "merged").output
    path, goal = (save(otherwise_quantized(m, "RTN", tmp_path), tmp_path / n) for m, n in ((base, "m"), (merged, "goal")))
    apply_in_place(path, pack_of(base), base=base)
    assert data_of(path) == data_of(goal)


def test_a_foreign_base_is_named_as_such(base: Path, tmp_path: Path) -> None:
    stranger = tiny_checkpoint(tmp_path / "stranger", seed=9, dtype="F32", hidden=128, inter=160)
    path = save(quantized(build(base)), tmp_path / "m")
    with pytest.raises(BaseMismatchError, match="not the float base that the pack was made for"):
        apply_in_place(path, pack_of(base), base=stranger)
    with pytest.raises(BaseMismatchError, match="another model"):
        apply_in_place(path, pack_of(stranger, LARGE))


def test_packs_stack_in_different_rows_only(base: Path, tmp_path: Path) -> None:
    path = save(quantized(build(base)), tmp_path / "m")
    original, names = data_of(path), sorted(pack_of(base).manifest.result)
    one, other = (pack_of(base, name=name, tensors=part) for name, part in (("a", names[:2]), ("b", names[2:])))
    apply_in_place(path, one, base=base)
    apply_in_place(path, other, base=base)
    with pytest.raises(OverlapError, match="stored quantized"):
        apply_in_place(path, pack_of(base, name="c", tensors=names[:1]), base=base, allow_overlap=True)
    assert verify(path).packs == ("a 1.0.0", "b 1.0.0")
    revert(path)
    assert data_of(path) == original


def test_upgrade_and_strength(base: Path, tmp_path: Path) -> None:
    path = save(quantized(build(base), symmetric=False), tmp_path / "m")
    original, one, two = data_of(path), pack_of(base), pack_of(base, version="2.0.0", seed=5)
    apply_in_place(path, one, base=base)
    apply_in_place(path, two, base=base, strength=0.5)
    patched = data_of(path)
    revert(path, "1.0.0", base=base)
    revert(path)
    assert data_of(path) == original
    copy = apply(path, two, tmp_path / "copy", base=base, strength=0.5).output
    assert {name: data for name, data in data_of(copy / "model.onnx").items() if name in patched} == patched


@pytest.mark.parametrize("proof", ["sketches", "base"])
def test_a_patched_file_without_ledger_is_recognised(proof: str, base: Path, tmp_path: Path) -> None:
    path, pack = save(quantized(build(base), symmetric=False), tmp_path / "m"), pack_of(base, 0.03)
    apply_in_place(path, pack, base=base)
    shutil.rmtree(state_dir_of(path).folder)
    state_dir_of(path).ledger.unlink()
    assert verify(path, pack).verdict is Verdict.PATCHED
    found = examine(pack, open_checkpoint(path), open_checkpoint(base) if proof == "base" else None)
    assert {finding.state for finding in found} == {State.PATCHED}


def test_differences(base: Path, tmp_path: Path) -> None:
    path, pack = save(quantized(build(base), symmetric=False), tmp_path / "m"), pack_of(base, LARGE)
    copy = apply(path, pack, tmp_path / "copy").output
    found = diff(path, copy)
    assert isinstance(found, CheckpointDiff)
    names = {delta.name.replace(".weight", ".MatMul.weight_Q4"): delta.neurons for delta in pack}
    assert {tensor.name: tensor.changed for tensor in found.changed} == names
    assert all(tensor.relative is not None and 0.3 < tensor.relative < 0.9 for tensor in found.changed)
    assert not any(name.endswith(("_scales", "_zero_points")) for name in open_checkpoint(path).tensors())
    (row,) = (tensor.first_rows[0] for tensor in found.changed[:1])
    info = open_checkpoint(path).info(found.changed[0].name)
    assert (info.dtype, info.shape) == ("INT4_32_F32_ZP", (160, 128))
    assert 0 <= row < 160


def test_half_patched_rows_are_named(base: Path, tmp_path: Path) -> None:
    """A single scale that was put back is enough."""
    path, pack = save(quantized(build(base)), tmp_path / "m"), pack_of(base)
    original = open_checkpoint(path)
    delta = pack.deltas[0]
    row = np.array([int(delta.rows[3])])
    held = original.read_rows(delta.name, row)
    apply_in_place(path, pack, base=base)
    checkpoint = open_checkpoint(path)
    patched = checkpoint.read_rows(delta.name, row)
    checkpoint.write_rows(delta.name, row, held)
    assert (verify(path).verdict, verify(path).differences[0].rows) == (Verdict.HALF, (int(row[0]),))
    patched[0, -1] ^= 1
    checkpoint.write_rows(delta.name, row, patched)
    assert verify(path).verdict is Verdict.ALTERED
