"""--detach replaces a link with a copy that keeps all attributes, and only after all checks have passed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from nestpatch.errors import BadSignatureError, BaseMismatchError, BusyError, DowngradeError
from nestpatch.files import copying
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher import _transaction as detaching
from nestpatch.patcher._transaction import detach
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.verify import verify
from tests.calls import refused
from tests.helpers import tiny_checkpoint, tiny_pack, tree_digest
from tests.state.conftest import Scene
from tests.state.users import NOBODY, needs_root

LINKS = ("symbolic link", "relative link", "hard link", "Hub cache")


def shared(scene: Scene, kind: str) -> tuple[Path, Path]:
    """(model, file that it shares with other models)."""
    file, blob = scene.folder / "model.safetensors", scene.folder.with_name("blob")
    if kind == "Hub cache":
        cache = scene.folder.with_name("models--acme--tiny")
        (cache / "blobs").mkdir(parents=True)
        (cache / "snapshots").mkdir()
        snapshot = scene.folder.rename(cache / "snapshots" / "0123abc")
        for name in ("model.safetensors", "config.json"):
            (snapshot / name).rename(cache / "blobs" / f"sha-of-{name}")
            (snapshot / name).symlink_to(Path("..", "..", "blobs", f"sha-of-{name}"))
        return snapshot, cache / "blobs" / "sha-of-model.safetensors"
    if kind == "hard link":
        os.link(file, blob)
    else:
        file.rename(blob)
        file.symlink_to(blob if kind == "symbolic link" else Path("..", "blob"))
    return scene.folder, blob


def is_shared(model: Path) -> bool:
    file = model / "model.safetensors"
    return file.is_symlink() or file.stat().st_nlink > 1


@pytest.mark.parametrize("kind", LINKS)
def test_the_others_keep_what_they_have(plain: Scene, kind: str) -> None:
    model, blob = shared(plain, kind)
    original = blob.read_bytes()
    apply_in_place(model, plain.pack(), detach=True)
    assert not is_shared(model)
    assert blob.read_bytes() == original
    assert verify(model).packs == ("no-harm 1.0.0",)
    revert(model)
    assert (model / "model.safetensors").read_bytes() == original


@pytest.mark.parametrize("kind", LINKS)
def test_a_refused_pack_leaves_the_link(plain: Scene, kind: str) -> None:
    model, _ = shared(plain, kind)
    plain.trust(acme=plain.acme)
    other = tiny_checkpoint(plain.base.parent / "other", seed=5, hidden=32, inter=32)
    wrong = plain.write(tiny_pack(other, name="wrong"), plain.acme)
    forged = plain.write(plain.pack(name="forged"), plain.acme)
    forged.with_name(f"{forged.name}.sig").write_bytes(wrong.with_name(f"{wrong.name}.sig").read_bytes())
    before = tree_digest(plain.base.parent)
    for pack, error in ((wrong, BaseMismatchError), (forged, BadSignatureError)):
        with pytest.raises(error):
            apply_in_place(model, pack, detach=True)
        assert tree_digest(plain.base.parent) == before
        assert is_shared(model)


@pytest.mark.parametrize("kind", ["symbolic link", "hard link"])
def test_a_downgrade_leaves_the_link(plain: Scene, kind: str) -> None:
    """The model was patched, and then its file became a link, as a deduplicating tool makes it."""
    apply_in_place(plain.model, plain.pack(version="2.0.0"))
    model, _ = shared(plain, kind)
    before = tree_digest(plain.base.parent)
    with pytest.raises(DowngradeError):
        apply_in_place(model, plain.pack(version="1.0.0", seed=2), detach=True)
    assert tree_digest(plain.base.parent) == before
    assert is_shared(model)
    apply_in_place(model, plain.pack(version="3.0.0", seed=3), detach=True)
    assert not is_shared(model)
    revert(model)
    assert (model / "model.safetensors").read_bytes() == (plain.base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_the_file_is_as_the_shared_one_was(plain: Scene, kind: str, mode: int) -> None:
    model, blob = shared(plain, kind)
    blob.chmod(mode)
    if os.geteuid() == 0:
        os.chown(blob, NOBODY, NOBODY)
    os.utime(blob, ns=(1_500_000_000_123_456_789, 1_600_000_000_987_654_321))
    try:
        os.setxattr(blob, "user.where", b"from a mirror")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    detach(open_checkpoint(model))
    file = model / "model.safetensors"
    found, was = file.lstat(), blob.stat()
    assert not is_shared(model)
    assert found.st_mode & 0o7777 == mode | 0o200, "it has to be writable for its owner, and nothing more"
    assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (was.st_uid, was.st_gid, was.st_mtime_ns)
    assert os.getxattr(file, "user.where") == b"from a mirror"


def test_a_private_file_is_private_while_it_is_copied(plain: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    model, blob = shared(plain, "symbolic link")
    blob.chmod(0o600)
    seen, copy = [], copying._reflink

    def watched(read: int, write: int) -> str | None:
        seen.append(os.fstat(write).st_mode & 0o777)
        return copy(read, write)

    monkeypatch.setattr(copying, "_reflink", watched)
    apply_in_place(model, plain.pack(), detach=True)
    assert seen == [0o600]
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o600


@needs_root
def test_the_file_of_another_user_stays_that_users(plain: Scene) -> None:
    model, blob = shared(plain, "symbolic link")
    blob.chmod(0o600)
    os.chown(blob, NOBODY, NOBODY)
    apply_in_place(model, plain.pack(), detach=True)
    found = (model / "model.safetensors").lstat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o600, NOBODY, NOBODY)


def test_a_file_that_changes_while_it_is_copied_stays_a_link(plain: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that writes to the file under its other name holds another lock, or none."""
    model, blob = shared(plain, "symbolic link")
    copy = copying.copy_file

    def changing(source: Path, target: Path) -> str:
        how = copy(source, target)
        with open(blob, "r+b") as file:
            file.seek(-2, 2)
            file.write(b"!!")
        os.utime(blob, ns=(1, 1))
        return how

    monkeypatch.setattr(detaching, "copy_file", changing)
    with pytest.raises(BusyError, match="was changed while it was copied"):
        apply_in_place(model, plain.pack(), detach=True)
    assert is_shared(model)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


def test_rows_that_changed_after_the_check_are_no_base(plain: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = shared(plain, "symbolic link")
    delta = plain.pack().deltas[0]

    def late(checkpoint):  # type: ignore[no-untyped-def]
        rows = delta.rows[:1].astype(np.int64)
        checkpoint.write_rows(delta.name, rows, checkpoint.read_rows(delta.name, rows)[:, ::-1])
        return detach(checkpoint)

    monkeypatch.setattr("nestpatch.patcher._transaction.detach", late)
    with pytest.raises(BaseMismatchError):
        apply_in_place(model, plain.pack(), detach=True)


def test_a_link_to_a_patched_model_is_not_detached(plain: Scene) -> None:
    """The copy would hold the patch without its ledger."""
    apply_in_place(plain.model, plain.pack())
    other = plain.folder.with_name("other")
    other.mkdir()
    (other / "model.safetensors").symlink_to(plain.folder / "model.safetensors")
    newer = plain.write(plain.pack(version="2.0.0", seed=2))
    before = tree_digest(plain.base.parent)
    said = refused("InPlaceError", "apply", other, newer, "--in-place", "--detach")
    assert f"of a model that nestpatch has patched: {plain.state_dir.ledger}" in said
    assert tree_digest(plain.base.parent) == before
