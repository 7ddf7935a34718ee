"""A release names its packs in its own metadata: `status` and `verify` compare that with the rows, and call it a claim."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestpatch.errors import BaseMismatchError
from nestpatch.export.safetensors import export_safetensors
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.formats.provenance import read_record, row_ranges
from nestpatch.pack import Pack
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.status import released_packs, status
from nestpatch.patcher.verify import Verdict, verify
from tests.calls import answer, run
from tests.helpers import places, tiny_checkpoint, tiny_pack

GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base")


@pytest.fixture
def pack(model: Path) -> Pack:
    return tiny_pack(model)


@pytest.fixture
def release(model: Path, pack: Pack, tmp_path: Path) -> Path:
    return export_safetensors(model, pack, tmp_path / "release").output


def rewrite(release: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the metadata of a release, and no weight."""
    file = release / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_record(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """The same for the record of the first pack."""

    def act(metadata: dict[str, Any]) -> None:
        record = json.loads(metadata["nestpatch.record"])
        change(record[0])
        metadata["nestpatch.record"] = json.dumps(record)

    return act


def spoil(release: Path, name: str, row: int) -> None:
    file = release / "model.safetensors"
    start = places(file)[name][2] + row * 32
    with open(file, "r+b") as opened:
        opened.seek(start)
        opened.write(b"\x11\x22")


def test_status_names_the_pack_of_a_release_and_checks_its_rows(release: Path, pack: Pack) -> None:
    (found,) = status(release).released
    assert (found.label, found.pack_id, found.strength) == ("no-harm 1.0.0", nest.pack_id(pack), 1)
    assert (found.tensors, found.compared, found.differences, found.consistent) == (4, 4, (), True)
    told = run("status", release)
    assert told.exit_code == 0
    said = " ".join(told.stdout.split())
    assert "released with no-harm 1.0.0" in said
    assert "by the file's metadata, rows of 4 of 4 tensors checked against the digests in it" in said
    assert answer("status", release)["released"][0]["consistent"] is True


def test_verify_calls_the_metadata_of_a_release_a_claim_until_a_pack_proves_it(release: Path, pack: Pack) -> None:
    found = verify(release)
    assert (found.verdict, found.packs, found.tensors, found.known) == (Verdict.CLAIMED, ("no-harm 1.0.0",), 4, False)
    assert "this is a claim of the file" in found.detail
    assert answer("verify", release, code=1)["verdict"] == "claimed"
    assert (verify(release, pack).verdict, verify(release, pack).known) == (Verdict.PATCHED, True)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_release_at_another_strength_is_a_claim_that_the_pack_alone_cannot_prove(tmp_path: Path, sharded: bool) -> None:
    model = tiny_checkpoint(tmp_path / "base", sharded=sharded)
    release = export_safetensors(model, tiny_pack(model), tmp_path / "release", strength=0.5).output
    assert "no-harm 1.0.0 at strength 0.5" in verify(release).detail
    found = verify(release, tiny_pack(model), strength=0.5)
    assert found.verdict is Verdict.ALTERED
    assert "the file's metadata claims it at strength 0.5" in found.detail
    assert "at strength 0.5" in run("status", release).stdout


def test_a_changed_row_of_a_release_is_found(release: Path, pack: Pack) -> None:
    spoil(release, GATE, int(pack.deltas[0].rows[0]))
    found = verify(release)
    assert (found.verdict, [one.tensor for one in found.differences]) == (Verdict.ALTERED, [GATE])
    told = run("status", release)
    assert (told.exit_code, "1 of 4 tensors differ from it" in " ".join(told.stdout.split())) == (1, True)
    assert answer("status", release, code=1)["sound"] is False


def test_metadata_that_was_copied_to_a_base_is_not_believed(release: Path, model: Path, pack: Pack) -> None:
    """The metadata of the release, the rows of the base."""
    for delta in pack:
        _, _, start, _ = places(model / "model.safetensors")[delta.name]
        target = places(release / "model.safetensors")[delta.name][2]
        base = (model / "model.safetensors").read_bytes()
        with open(release / "model.safetensors", "r+b") as opened:
            for row in delta.rows.tolist():
                opened.seek(target + row * 32)
                opened.write(base[start + row * 32 :][:32])
    assert verify(release).verdict is Verdict.ALTERED
    assert len(verify(release).differences) == 4
    assert verify(release, pack).verdict is Verdict.BASE


def test_two_packs_of_a_release_are_compared_where_no_later_one_changed_the_tensor(model: Path, tmp_path: Path) -> None:
    apply_in_place(model, tiny_pack(model, name="below"))
    above = tiny_pack(model, name="above", seed=3, neurons=2, tensors=[GATE])
    release = export_safetensors(model, above, tmp_path / "release").output
    below, top = status(release).released
    assert [(one.label, one.compared, one.tensors) for one in (below, top)] == [("below 1.0.0", 3, 4), ("above 1.0.0", 1, 1)]
    assert verify(release).packs == ("below 1.0.0", "above 1.0.0")


def test_a_release_that_was_patched_again_is_as_its_ledger_says(release: Path) -> None:
    other = tiny_pack(release, name="other", seed=5)
    apply_in_place(release, other)
    found = status(release)
    assert (found.sound, [one.compared for one in found.released]) == (True, [0])
    assert verify(release).packs == ("other 1.0.0",)


def test_metadata_without_digests_proves_nothing(release: Path) -> None:
    rewrite(release, lambda metadata: metadata.pop("nestpatch.record"))
    found = verify(release)
    assert (found.verdict, found.known) == (Verdict.UNKNOWN, False)
    assert "names no-harm 1.0.0 without digests of rows" in found.detail
    assert "which holds no digests of rows" in run("status", release).stdout


ODD: dict[str, Callable[[dict[str, Any]], None]] = {
    "no list": lambda metadata: metadata.update({"nestpatch.record": "{}"}),
    "no JSON": lambda metadata: metadata.update({"nestpatch.record": "["}),
    "deep": lambda metadata: metadata.update({"nestpatch.record": "[" * 100_000}),
    "no tensors": change_record(lambda entry: entry.pop("tensors")),
    "no digest": change_record(lambda entry: entry["tensors"][GATE].update(after="0")),
    "numbers as a list": change_record(lambda entry: entry["tensors"][GATE].update(row_numbers=[1, 2])),
    "descending": change_record(lambda entry: entry["tensors"][GATE].update(row_numbers="5,2")),
    "twice": change_record(lambda entry: entry["tensors"][GATE].update(row_numbers="5,5")),
    "backwards": change_record(lambda entry: entry["tensors"][GATE].update(row_numbers="5-2")),
    "huge": change_record(lambda entry: entry["tensors"][GATE].update(row_numbers="1" * 5000)),
    "rows that are not there": change_record(lambda entry: entry["tensors"][GATE].update(row_numbers="0-9999999999")),
    "a tensor that is not there": change_record(lambda entry: entry["tensors"].update(x=entry["tensors"].pop(GATE))),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_record_is_neither_believed_nor_an_error(name: str, release: Path) -> None:
    rewrite(release, ODD[name])
    assert verify(release).verdict in (Verdict.UNKNOWN, Verdict.ALTERED)
    assert status(release).released[0].consistent is False
    assert run("status", release).exit_code in (0, 1)


@pytest.mark.parametrize(("rows", "text"), [([0], "0"), ([3, 4, 5], "3-5"), ([0, 2, 3, 9], "0,2-3,9"), ([7, 9, 11], "7,9,11")])
def test_row_numbers_as_ranges(rows: list[int], text: str) -> None:
    assert row_ranges(np.array(rows)) == text
    tensor = {"row_numbers": text, "after": "0" * 64}
    record = json.dumps([{"pack_id": "x", "tensors": {"t": tensor}}])
    runs = read_record({"nestpatch.record": record})["x"]["t"].runs
    assert [row for first, stop in runs for row in range(first, stop)] == rows


def test_a_file_without_such_metadata_names_no_pack(tmp_path: Path) -> None:
    from tests.gguf.files import gguf_of

    model = tiny_checkpoint(tmp_path / "base")
    assert released_packs(open_checkpoint(gguf_of(model, tmp_path / "x.gguf", "BF16"))) == ()


def test_applying_the_pack_of_a_release_again_is_refused_as_before(release: Path, pack: Pack) -> None:
    with pytest.raises(BaseMismatchError, match="already patched"):
        apply_in_place(release, pack)
