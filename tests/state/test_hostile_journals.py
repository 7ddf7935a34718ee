"""A journal travels with a model: it is checked in full before its first byte is written, and is foreign unless confirmed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestpatch.errors import ForeignJournalError, InPlaceError, JournalError, StateError
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher._journal import read_journal
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.ledger import Ledger, write_ledger
from nestpatch.patcher.recovery import Foreign, recover_model
from nestpatch.rows import merge
from nestpatch.signing.verify import sign_pack
from tests.calls import answer, refused, run
from tests.state.conftest import Scene
from tests.state.journals import Header, content_of, forged, genuine, plant

GATE = "model.layers.0.mlp.gate_proj.weight"


def row_bytes(scene: Scene) -> int:
    return open_checkpoint(scene.model).info(GATE).row_bytes


def assert_refused(scene: Scene, error: type[StateError], says: str = "") -> None:
    """Every command that would carry the journal out refuses it, and nothing changes; `remove` drops it alone."""
    weights, journal = scene.weights(), scene.state_dir.journal.read_bytes()
    pack = scene.write(scene.pack())
    for act in (lambda: recover_model(scene.model), lambda: apply_in_place(scene.model, pack)):
        with pytest.raises(error, match=says or None) as caught:
            act()
        assert "--foreign remove" in caught.value.advice
        assert scene.weights() == weights
        assert scene.state_dir.journal.read_bytes() == journal
    assert recover_model(scene.model, Foreign.REMOVE).action == "removed"
    assert scene.weights() == weights
    assert not scene.state_dir.journal.exists()


@pytest.mark.parametrize(
    "rows",
    [[-80], [10**9], [2**62], [-(2**63)], [32], [3, 3], [4, 3], [0, 31, 32]],
    ids=[
        "before the tensor",
        "far behind it",
        "an overflow",
        "the least number",
        "one behind",
        "twice",
        "falling",
        "last too far",
    ],
)
def test_row_numbers_outside_of_the_tensor(scene: Scene, rows: list[int]) -> None:
    """Unchecked, row -80 would overwrite a header, and row 1e9 would grow a file from kilobytes to gigabytes."""
    width = row_bytes(scene)
    content = content_of(rows, [bytes(width)] * len(rows))

    def change(header: Header) -> None:
        header["regions"] = [{"tensor": GATE, "row_bytes": width, "rows": len(rows)}]

    plant(scene, forged(genuine(scene, {GATE: [0, 1]}), change, content=content))
    assert_refused(scene, JournalError, "was written for a tensor model.layers.0.mlp.gate_proj.weight of another shape")


def change_witness(header: Header) -> None:
    header["witness"] = {"rows": [], "sha256": "0" * 64}


HEADERS: dict[str, Callable[[Header], Any]] = {
    "no witness": change_witness,
    "another witness": lambda header: header["witness"].update(sha256="0" * 64),
    "a witness outside of its tensor": lambda header: header["witness"].update(rows=[[GATE, 10**6]]),
    "no sizes": lambda header: header.update(sizes={}),
    "another size": lambda header: header["sizes"].update({next(iter(header["sizes"])): 5}),
    "a file outside": lambda header: header["sizes"].update({"../../outside.safetensors": 5}),
    "no regions": lambda header: header.update(regions=[]),
    "rows of another width": lambda header: header["regions"][0].update(row_bytes=header["regions"][0]["row_bytes"] + 1),
    "negative counts": lambda header: header["regions"][0].update(rows=-1),
    "endless counts": lambda header: header["regions"][0].update(rows=1 << 60),
    "counts as text": lambda header: header["regions"][0].update(rows="2"),
    "another tensor": lambda header: header["regions"][0].update(tensor="model.norm.weight"),
    "a tensor that is not there": lambda header: header["regions"][0].update(tensor="nowhere"),
    "a transaction with a path": lambda header: header.update(transaction="../../outside"),
    "undo records with a path": lambda header: header.update(makes=["../../outside"]),
    "retired records with a path": lambda header: header.update(retires=["../" * 8 + "etc/passwd"]),
    "no transaction": lambda header: header.pop("transaction"),
    "lists in the place of objects": lambda header: header.update(sizes=[1], witness=[2]),
    "numbers of 5000 digits": lambda header: header["regions"][0].update(rows=int("9" * 4000)),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_say_something_else(scene: Scene, what: str) -> None:
    plant(scene, forged(genuine(scene, {GATE: [0, 1]}), HEADERS[what]))
    assert_refused(scene, JournalError)


def test_a_header_of_gigabytes_is_not_read(plain: Scene) -> None:
    journal = bytearray(genuine(plain, {GATE: [0, 1]}))
    journal[20:28] = (1 << 40).to_bytes(8, "little")
    plant(plain, forged_checksum(bytes(journal)))
    assert_refused(plain, JournalError, "its header has 1099511627776 bytes")


def forged_checksum(journal: bytes) -> bytes:
    from hashlib import sha256

    return journal[:-64] + sha256(journal[:-64]).digest() + bytes(32)


def test_a_plausible_journal_of_a_hostile_repository_is_foreign(scene: Scene) -> None:
    """It fits the model in every respect, and would write rows of the attacker's choice."""
    width = row_bytes(scene)
    content = content_of([0, 1], [b"\x11" * width, b"\x22" * width])
    plant(scene, forged(genuine(scene, {GATE: [0, 1]}), content=content))
    assert_refused(scene, ForeignJournalError, f"It would put 2 rows of 1 tensors in .* back: {GATE}")


def test_what_a_foreign_journal_would_do_is_done_only_when_asked(scene: Scene) -> None:
    before = scene.weights()
    width = row_bytes(scene)
    plant(scene, forged(genuine(scene, {GATE: [0, 1]}), content=content_of([0, 1], [b"\x11" * width] * 2)))
    assert "not written here" in refused("ForeignJournalError", "recover", scene.model)
    assert scene.weights() == before
    done = answer("recover", scene.model, "--foreign", "roll-back")
    assert done == {"model": str(scene.model), "action": "rolled back", "proof": "the user asked for it"}
    rows = open_checkpoint(scene.model).read_rows(GATE, np.array([0, 1])).view(np.uint8)
    assert rows.tobytes() == b"\x11" * 2 * width


def test_the_seal_of_this_machine_is_for_one_model(scene: Scene) -> None:
    """A genuine journal of one model is foreign beside a copy of that model."""
    journal = genuine(scene, {GATE: [0, 1]})
    other = scene.sent()
    apply_in_place(other.model, scene.pack())
    plant(other, journal)
    with pytest.raises(JournalError):
        recover_model(other.model)
    plant(scene, journal)
    assert recover_model(scene.model).proof == "the seal of this machine"


def test_a_machine_that_lost_its_key_asks(scene: Scene, home: Path) -> None:
    """As in a container that is created again: its own earlier journal is foreign to it."""
    before = scene.weights()
    journal = genuine(scene, {GATE: [0, 1]})
    (home / "machine.key").unlink()
    plant(scene, journal)
    with pytest.raises(ForeignJournalError):
        recover_model(scene.model)
    assert recover_model(scene.model, Foreign.ROLL_BACK).action == "rolled back"
    assert scene.weights() == before


def interrupted_apply(scene: Scene, pack_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves a model like a kill between writing the rows and the commit."""
    from nestpatch.patcher import _transaction as transaction

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transaction, "write_ledger", dies)
        patch.setattr(transaction.Transaction, "_close_journal", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            apply_in_place(scene.model, pack_file)
    assert scene.state_dir.journal.exists()


@pytest.mark.parametrize("kind", ["safetensors", "sharded"])
def test_signed_packs_confirm_a_journal_without_the_seal(
    kind: str, templates: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.state.conftest import make_scene

    scene = make_scene(templates, tmp_path, kind)
    before = scene.weights()
    scene.trust(acme=scene.acme)
    interrupted_apply(scene, scene.write(scene.pack(), scene.acme), monkeypatch)
    (home / "machine.key").unlink()
    assert scene.weights() != before
    done = recover_model(scene.model)
    assert (done.action, done.proof) == ("rolled back", "the signed digests of no-harm 1.0.0")
    assert scene.weights() == before


@pytest.mark.parametrize("signer", ["nobody", "evil", "a signature of other bytes"])
def test_packs_that_nobody_trusted_signed_confirm_nothing(
    plain: Scene, home: Path, monkeypatch: pytest.MonkeyPatch, signer: str
) -> None:
    plain.trust(acme=plain.acme)
    interrupted_apply(plain, plain.write(plain.pack(), plain.acme), monkeypatch)
    (home / "machine.key").unlink()
    (kept,) = plain.state_dir.folder.glob("*.nest")
    signature = kept.with_name(f"{kept.name}.sig")
    signature.unlink()
    if signer == "evil":
        sign_pack(kept, plain.evil)
    elif signer == "a signature of other bytes":
        other = plain.write(plain.pack(version="2.0.0"), plain.acme)
        shutil.copy(other.with_name(f"{other.name}.sig"), signature)
    patched = plain.weights()
    with pytest.raises(ForeignJournalError):
        recover_model(plain.model)
    assert plain.weights() == patched


def test_signed_packs_confirm_no_other_rows(plain: Scene) -> None:
    """A hostile repository ships the real signed pack beside a journal that also writes one row of its own."""
    plain.trust(acme=plain.acme)
    pack = plain.pack()
    apply_in_place(plain.model, plain.write(pack, plain.acme))
    delta = next(delta for delta in pack if delta.name == GATE)
    spare = next(row for row in range(32) if row not in delta.rows)
    rows = sorted([*delta.rows.tolist(), spare])
    base = open_checkpoint(plain.base)
    stored = {row: base.read_rows(GATE, np.array([row])).tobytes() for row in rows}
    width = row_bytes(plain)

    def journal(numbers: list[int]) -> bytes:
        def change(header: Header) -> None:
            header["regions"] = [{"tensor": GATE, "row_bytes": width, "rows": len(numbers)}]
            header["transaction"] = "cd" * 8

        return forged(genuine(plain, {GATE: numbers}), change, content=content_of(numbers, [stored[n] for n in numbers]))

    before = plain.weights()
    stored[spare] = b"\x33" * width
    plant(plain, journal(rows))
    with pytest.raises(ForeignJournalError):
        recover_model(plain.model)
    assert plain.weights() == before
    recover_model(plain.model, Foreign.REMOVE)
    # Without that row, all rows are named by the publisher.
    plant(plain, journal(delta.rows.tolist()))
    assert recover_model(plain.model).proof == "the signed digests of no-harm 1.0.0"


def test_a_row_that_is_nearly_the_publishers_is_not(plain: Scene) -> None:
    plain.trust(acme=plain.acme)
    pack = plain.pack()
    apply_in_place(plain.model, plain.write(pack, plain.acme))
    delta = next(delta for delta in pack if delta.name == GATE)
    old = open_checkpoint(plain.base).read_rows(GATE, delta.rows.astype(np.int64))
    half = merge(old, delta.dense() * np.float32(0.5))
    numbers = delta.rows.tolist()

    def change(header: Header) -> None:
        header["transaction"] = "cd" * 8

    plant(plain, forged(genuine(plain, {GATE: numbers}), change, content=content_of(numbers, [half.tobytes()])))
    with pytest.raises(ForeignJournalError):
        recover_model(plain.model)


def test_a_forged_ledger_does_not_turn_an_interrupted_change_into_a_finished_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the forged ledger were believed, the journal would be dropped and half a change would stay."""
    before = scene.weights()
    interrupted_apply(scene, scene.write(scene.pack()), monkeypatch)
    journal = read_journal(scene.state_dir)
    assert journal is not None
    (tmp_path / "mallory").mkdir()
    with monkeypatch.context() as mallory:
        mallory.setenv("NESTPATCH_HOME", str(tmp_path / "mallory"))
        write_ledger(scene.state_dir, Ledger(transaction=journal.transaction))
    assert recover_model(scene.model).action == "rolled back"
    assert scene.weights() == before


@pytest.mark.parametrize("what", ["a pipe", "a directory", "a link", "a dangling link", "a device"])
def test_something_else_in_the_place_of_the_journal(scene: Scene, tmp_path: Path, what: str) -> None:
    """No command waits for it, follows it or removes it."""
    victim = tmp_path / "victim"
    victim.write_bytes(genuine(scene, {GATE: [0, 1]}))
    scene.state_dir.folder.mkdir()
    journal = scene.state_dir.journal
    {
        "a pipe": lambda: os.mkfifo(journal),
        "a directory": journal.mkdir,
        "a link": lambda: journal.symlink_to(victim),
        "a dangling link": lambda: journal.symlink_to(tmp_path / "nowhere"),
        "a device": lambda: journal.symlink_to("/dev/zero"),
    }[what]()
    before, target = scene.weights(), victim.read_bytes()
    for words in (["status", scene.model], ["verify", scene.model]):
        refused("InterruptedChangeError", *words)
    pack = scene.write(scene.pack())
    for words in (["recover", scene.model], ["apply", scene.model, pack, "--in-place"], ["revert", scene.model]):
        refused("JournalError", *words)
    assert scene.weights() == before
    assert victim.read_bytes() == target
    assert os.path.lexists(journal)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may give files away")
def test_a_journal_of_another_user(scene: Scene) -> None:
    """Any user who may write into the folder could leave one."""
    before = scene.weights()
    os.chown(plant(scene, genuine(scene, {GATE: [0, 1]})), 12345, -1)
    assert "12345" in refused("JournalError", "recover", scene.model)
    assert scene.weights() == before


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_a_rollback_does_not_write_through_links(scene: Scene, tmp_path: Path, kind: str) -> None:
    """Even a journal with the seal of this machine: the weight file may have been replaced with a link since."""
    file = next(iter(open_checkpoint(scene.model).info(GATE).files))
    plant(scene, genuine(scene, {GATE: [0, 1]}))
    shared = tmp_path / "shared"
    if kind == "symlink":
        file.rename(shared)
        file.symlink_to(shared)
    else:
        os.link(file, shared)
    content = shared.read_bytes()
    with pytest.raises(InPlaceError, match="link"):
        recover_model(scene.model)
    assert shared.read_bytes() == content


def test_the_state_folder_is_no_link(scene: Scene, tmp_path: Path) -> None:
    """Through a link, the journal of another model would be carried out."""
    plant(scene, genuine(scene, {GATE: [0, 1]}))
    scene.state_dir.folder.rename(tmp_path / "elsewhere")
    scene.state_dir.folder.symlink_to(tmp_path / "elsewhere")
    for words in (["recover", scene.model], ["status", scene.model], ["revert", scene.model]):
        assert "follows no links" in refused("StateError", *words)
    assert (tmp_path / "elsewhere" / "journal").exists()


def test_a_journal_for_every_row_of_a_model_is_known_by_another_tensor(plain: Scene) -> None:
    """All rows of all patched matrices change: the witness is a row of another matrix."""
    pack = plain.pack(neurons=32)
    before = plain.weights()
    apply_in_place(plain.model, pack)
    assert answer("verify", plain.model)["verdict"] == "patched"
    assert run("revert", plain.model).exit_code == 0
    assert plain.weights() == before
    assert nest.pack_id(pack)
