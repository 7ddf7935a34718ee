"""Merging a pack into a copy of a model: the bytes, the places, the report. Refused bases are in test_apply_base.py."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.delta import TensorDelta
from nestpatch.errors import DataError, OutputError, PackContentError
from nestpatch.events import Event
from nestpatch.formats import checkpoint as interface
from nestpatch.formats import nest
from nestpatch.formats.safetensors import SafetensorsCheckpoint
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from tests.helpers import (
    DTYPES,
    FLOATS,
    assert_same_bytes,
    places,
    tiny_checkpoint,
    tiny_pack,
    tree_digest,
    weight_files,
    write_checkpoint,
)

KINDS = ("file", "directory", "sharded")


def make_model(folder: Path, kind: str, dtype: str = "BF16") -> Path:
    """A model of one of KINDS; for "file", the path of the weights in it."""
    model = tiny_checkpoint(folder / "base", dtype=dtype, sharded=kind == "sharded")
    return model / "model.safetensors" if kind == "file" else model


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to a stored dtype, to nearest even; bfloat16 by integers, without ml_dtypes."""
    if dtype != "BF16":
        return values.astype(DTYPES[dtype])
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(DTYPES["BF16"])


def expected_file(file: Path, pack: Pack, dtype: str, strength: float = 1.0) -> bytes:
    """The bytes of a weight file after the merge, from its bytes before and the arrays of the pack alone."""
    data = bytearray(file.read_bytes())
    found = places(file)
    for change in (change for change in pack.deltas if change.name in found):
        stored, shape, start, _ = found[change.name]
        size = shape[-1] * stored.itemsize
        for row, cluster in zip(change.rows.tolist(), change.cluster.tolist(), strict=True):
            at = slice(start + row * size, start + (row + 1) * size)
            old = np.frombuffer(bytes(data[at]), stored).astype(np.float32)
            new = old + np.float32(strength) * change.delta[cluster].astype(np.float32)
            data[at] = round_to(new, dtype).tobytes()
    return bytes(data)


def assert_merged(model: Path, output: Path, pack: Pack, dtype: str, strength: float = 1.0) -> None:
    """Every weight file of the output holds exactly the expected bytes, and none is missing or more."""
    ours = weight_files(output)
    assert len(ours) == len(weight_files(model))
    for before, after in zip(weight_files(model), ours, strict=True):
        want = expected_file(before, pack, dtype, strength)
        assert want != before.read_bytes()
        assert_same_bytes(after.read_bytes(), want, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_without_sync_and_digest_the_bytes_are_the_same(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, kind)
    pack = tiny_pack(model)
    done = apply(model, pack, tmp_path / "out.safetensors", sync=False)
    assert_merged(model, done.output, pack, "BF16")
    assert all(file.sha256 is None for file in done.files)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_byte_for_byte(kind: str, dtype: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, kind, dtype)
    pack = tiny_pack(model)
    before = tree_digest(tmp_path)
    done = apply(model, pack, tmp_path / "out.safetensors", digest=True)
    assert_merged(model, done.output, pack, dtype)
    after = tree_digest(tmp_path)
    assert {name: after[name] for name in before} == before
    assert [(f.path.name, f.nbytes, f.sha256) for f in done.files] == [
        (file.name, file.stat().st_size, sha256(file.read_bytes()).hexdigest()) for file in weight_files(done.output)
    ]
    assert all(file.path.is_file() for file in done.files)
    row_bytes = 4 * 9 * 16 * DTYPES[dtype].itemsize
    assert (done.tensors, done.rows, done.row_bytes, done.strength, done.dry_run) == (4, 36, row_bytes, 1.0, False)
    assert (done.pack, done.pack_id, done.left_out) == ("no-harm 1.0.0", nest.pack_id(pack), ())


@pytest.mark.parametrize("delta_dtype", FLOATS)
@pytest.mark.parametrize("strength", [0.5, 1.5, 0.3])
def test_strength(strength: float, delta_dtype: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, "directory")
    pack = tiny_pack(model, delta_dtype=delta_dtype, clusters=3)
    done = apply(model, pack, strength=strength)
    assert done.strength == strength
    assert_merged(model, done.output, pack, "BF16", strength)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1e-60, 1.5000001, 2.0, float("nan"), float("inf")])
def test_strength_out_of_range(strength: float, tmp_path: Path) -> None:
    """1e-60 is 0 in float32: it would change nothing and say that it had."""
    model = make_model(tmp_path, "directory")
    before = tree_digest(tmp_path)
    with pytest.raises(DataError, match=r"strength must be over 0 and at most 1\.5"):
        apply(model, tiny_pack(model), strength=strength)
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize("rows_at_once", [1, 2, 8, 9])
def test_blocks_of_rows_do_not_show(rows_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are held in memory by the block; where a block ends makes no difference."""
    model = make_model(tmp_path, "directory")
    pack = tiny_pack(model)
    monkeypatch.setattr(interface, "CHUNK", rows_at_once * 32 + 31)
    blocks = list(interface.row_blocks(9, 32))
    assert blocks[0] == slice(0, rows_at_once)
    assert [row for block in blocks for row in range(9)[block]] == list(range(9))
    assert_merged(model, apply(model, pack).output, pack, "BF16")


@pytest.mark.parametrize("row_bytes", [None, 64])
def test_many_rows_are_read_a_block_at_a_time(row_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = SafetensorsCheckpoint(make_model(tmp_path, "directory"))
    name = next(name for name in checkpoint.tensors() if len(checkpoint.info(name).shape) == 2)
    info = checkpoint.info(name)
    rows = np.arange(0, info.rows, 2, dtype=np.int32)
    monkeypatch.setattr(interface, "CHUNK", 3 * (row_bytes or info.row_bytes))
    found = list(checkpoint.iter_rows(name, rows, row_bytes=row_bytes))
    assert [part.stop - part.start for part, _ in found[:-1]] == [3] * (len(found) - 1)
    assert len(found) > 1
    whole = checkpoint.read_rows(name, rows.astype(np.int64))
    for part, values in found:
        assert_same_bytes(values.tobytes(), whole[part].tobytes(), info.dtype)
    assert found[-1][0].stop == len(rows)


def test_stacked_experts(tmp_path: Path) -> None:
    """Rows of a [experts, out, in] tensor count through all experts."""
    weights = (0.1 * np.random.default_rng(1).standard_normal((3, 6, 16))).astype(np.float16)
    model = write_checkpoint(tmp_path / "base", {"experts.gate_up": weights, "other.weight": weights[0]})
    pack = tiny_pack(model, tensors=["experts.gate_up"])
    assert pack.deltas[0].rows[-1] > 6
    assert_merged(model, apply(model, pack).output, pack, "F16")


def test_rows_in_64_and_clusters_in_16_bits(tmp_path: Path) -> None:
    model = make_model(tmp_path, "directory")
    pack = tiny_pack(model)
    wide = [replace(d, rows=d.rows.astype(np.int64), cluster=d.cluster.astype(np.uint16)) for d in pack.deltas]
    pack = replace(pack, deltas=tuple(wide))
    assert_merged(model, apply(model, nest.decode(nest.encode(pack))).output, pack, "BF16")


@pytest.mark.parametrize("kind", ["directory", "sharded"])
def test_companions_are_copied_and_other_weights_are_named(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, kind)
    companions = {"tokenizer.json": b"{}", "tokenizer.model": b"spm", "README.md": b"# hi", "chat_template.jinja": b"x"}
    others = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.onnx", "base-Q8_0.gguf", "tf_model.h5"]
    # A second copy in safetensors would hold unpatched weights too.
    others += ["consolidated.safetensors"] if kind == "directory" else ["model.safetensors", "extra.safetensors.index.json"]
    for name, content in companions.items():
        (model / name).write_bytes(content)
    for name in others:
        (model / name).write_bytes(b"unpatched")
    done = apply(model, tiny_pack(tiny_checkpoint(tmp_path / "twin")))
    assert done.left_out == tuple(sorted(others))
    kept = {name: digest for name, digest in tree_digest(model).items() if name not in others}
    copied = {name: digest for name, digest in tree_digest(done.output).items() if "nestpatch" not in name}
    assert copied.keys() == kept.keys()
    same = {name for name in kept if copied[name] == kept[name]}
    assert same == {name for name in kept if not name.endswith(".safetensors")}
    assert {"config.json", *companions} <= same


def test_the_mode_of_files_is_kept(tmp_path: Path) -> None:
    model = make_model(tmp_path, "directory")
    (model / "model.safetensors").chmod(0o640)
    (model / "config.json").chmod(0o600)
    output = apply(model, tiny_pack(model)).output
    assert (output / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert (output / "config.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("kind", "name"), [("file", "model-no-harm-1.0.0.safetensors"), ("directory", "base-no-harm-1.0.0")])
def test_default_output_lies_beside_the_model(kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path, kind)
    pack = tiny_pack(model)
    monkeypatch.chdir(model.parent)
    output = apply(model.name, pack).output
    assert output == model.parent / name
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError, match=f"{name} exists already"):
        apply(model, pack)
    assert tree_digest(tmp_path) == before


def test_a_model_given_as_dot_gets_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path, "directory")
    pack = tiny_pack(model)
    monkeypatch.chdir(model)
    assert apply(".", pack).output == tmp_path / "base-no-harm-1.0.0"


TARGETS: dict[str, tuple[str, str]] = {
    "the model": ("base", "exists already"),
    "a file": ("taken", "exists already"),
    "an empty directory": ("empty", "exists already"),
    "a dangling link": ("dangling", "exists already"),
    "inside the model": ("base/out", "is inside the model"),
    "inside the model by a link": ("link/out", "is inside the model"),
    "nowhere": ("missing/out", "there is no directory"),
    "below a file": ("taken/out", "there is no directory"),
}


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("dry_run", [False, True])
def test_outputs_that_are_refused(case: str, dry_run: bool, tmp_path: Path) -> None:
    model = make_model(tmp_path, "directory")
    (tmp_path / "taken").write_bytes(b"precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(model)
    name, says = TARGETS[case]
    pack = tiny_pack(model)
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError, match=says):
        apply(model, pack, tmp_path / name, dry_run=dry_run)
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize("length", [250, 300])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_output_name_that_the_file_system_cannot_hold(kind: str, length: int, tmp_path: Path) -> None:
    """A name of 250 characters fits, but the temporary name beside it does not."""
    model = make_model(tmp_path, kind)
    pack = tiny_pack(model)
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError, match="too long"):
        apply(model, pack, tmp_path / ("x" * length))
    assert tree_digest(tmp_path) == before


def test_a_version_that_the_file_system_cannot_hold(tmp_path: Path) -> None:
    """As long as the format allows; the default output's name is made of it and of the model's."""
    model = make_model(tmp_path, "directory").rename(tmp_path / ("m" * 150))
    pack = tiny_pack(model, version="1.0.0-" + "x" * 58)
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError):
        apply(model, pack)
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_dry_run_writes_nothing(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, kind)
    pack = tiny_pack(model)
    before = tree_digest(tmp_path)
    dry = apply(model, pack, dry_run=True)
    assert tree_digest(tmp_path) == before
    done = apply(model, pack)
    assert dry.dry_run
    assert dry.files == ()
    assert replace(dry, files=done.files, seconds=done.seconds, dry_run=False) == done


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_linked_base_is_read_and_left_alone(kind: str, tmp_path: Path) -> None:
    """The Hub's cache keeps blobs and links to them: the output holds files, the blobs stay as they are."""
    blobs = tiny_checkpoint(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..", "blobs", file.name))
    model = tmp_path / "snapshot" / "model.safetensors" if kind == "file" else tmp_path / "snapshot"
    pack = tiny_pack(model)
    before = tree_digest(tmp_path)
    output = apply(model, pack, tmp_path / "out.safetensors").output
    assert_merged(model, output, pack, "BF16")
    assert not any(file.is_symlink() for file in [output, *output.rglob("*")])
    after = tree_digest(tmp_path)
    assert {name: after[name] for name in before} == before


@pytest.fixture
def unprivileged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user to whom file modes apply; root may write what is read-only."""
    if os.name == "nt" or os.geteuid() != 0:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, -1)
        monkeypatch.setenv("XDG_CONFIG_HOME", folder)
        os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_base_can_be_patched(kind: str, unprivileged: Path) -> None:
    """Shared stores and caches hand out models read-only; the copy belongs to whoever makes it."""
    model = make_model(unprivileged, kind)
    for file in weight_files(model):
        file.chmod(0o444)
    pack = tiny_pack(model)
    assert_merged(model, apply(model, pack, unprivileged / "out.safetensors").output, pack, "BF16")


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt("stop")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("failure", "error", "says"), [(no_space, OutputError, "No space"), (interrupt, KeyboardInterrupt, "stop")]
)
def test_an_interrupted_copy_leaves_nothing(
    kind: str, failure: Callable[..., None], error: type, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path, kind)
    pack = tiny_pack(model)
    before = tree_digest(tmp_path)
    monkeypatch.setattr(SafetensorsCheckpoint, "write_rows", failure)
    with pytest.raises(error, match=says):
        apply(model, pack)
    assert tree_digest(tmp_path) == before


def test_a_wrong_promise_is_not_kept(tmp_path: Path) -> None:
    """The merged rows are compared with the pack's own digests before the output gets its name."""
    model = make_model(tmp_path, "directory")
    pack = tiny_pack(model)
    result = {**pack.manifest.result, pack.deltas[-1].name: "0" * 64}
    before = tree_digest(tmp_path)
    wrong = rf"^{pack.deltas[-1].name}: the merged rows differ from the result that no-harm 1\.0\.0 names"
    with pytest.raises(PackContentError, match=wrong):
        apply(model, replace(pack, manifest=replace(pack.manifest, result=result)))
    assert tree_digest(tmp_path) == before


def test_a_merge_that_leaves_the_range_of_the_dtype(tmp_path: Path) -> None:
    model = make_model(tmp_path, "directory", "F16")
    pack = tiny_pack(model)

    def grown(change: TensorDelta) -> TensorDelta:
        return replace(change, delta=np.full(change.delta.shape, 3e38, np.float32))

    before = tree_digest(tmp_path)
    with pytest.raises(PackContentError, match="the merged weights leave the range of F16"):
        apply(model, replace(pack, deltas=tuple(map(grown, pack.deltas))))
    assert tree_digest(tmp_path) == before


def test_events_name_every_stage(tmp_path: Path) -> None:
    model = make_model(tmp_path, "sharded")
    heard: list[Event] = []
    apply(model, tiny_pack(model), digest=True, on_event=heard.append)
    assert [(e.stage, e.done, e.total) for e in heard] == [
        *(("copy", n, 4) for n in (1, 2, 3, 4)),
        *(("merge", n, 4) for n in (1, 2, 3, 4)),
        *(("digest", 0, 0) for _ in range(2)),
    ]


def test_the_command_answers_in_json(tmp_path: Path) -> None:
    model = make_model(tmp_path, "directory")
    pack_id = nest.write(tiny_pack(model), tmp_path / "x.nest")
    dry = CliRunner().invoke(main, ["apply", str(model), str(tmp_path / "x.nest"), "--dry-run", "--json"])
    wet = CliRunner().invoke(main, ["apply", str(model), str(tmp_path / "x.nest"), "--json"])
    unchecked = "no key is trusted on this machine: the signature of no-harm 1.0.0 was not checked (nestpatch trust add)\n"
    assert (dry.exit_code, wet.exit_code, wet.stderr) == (0, 0, unchecked)
    answers = [json.loads(result.stdout) for result in (dry, wet)]
    assert [(a["pack_id"], a["rows"], a["dry_run"], len(a["files"])) for a in answers] == [
        (pack_id, 36, True, 0),
        (pack_id, 36, False, 1),
    ]
    assert answers[1]["files"][0]["path"] == str(tmp_path / "base-no-harm-1.0.0" / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--strength", "nan"], 2), (["--strength", "x"], 2), (["-o", "/no/dir/x"], 1)]
)
def test_exit_codes(arguments: list[str], code: int, tmp_path: Path) -> None:
    model = make_model(tmp_path, "directory")
    nest.write(tiny_pack(model), tmp_path / "x.nest")
    result = CliRunner().invoke(main, ["apply", str(model), str(tmp_path / "x.nest"), *arguments])
    assert (result.exit_code, result.stdout) == (code, "")
    assert "Traceback" not in result.stderr
