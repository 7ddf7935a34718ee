"""The lock and the state belong to the owner of the model's folder, and no other user can keep writers out."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nestpatch.errors import InPlaceError
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher._journal import Region, write_journal
from nestpatch.patcher._lock import locked
from nestpatch.patcher._rollback import files_of
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.recovery import recover_model
from nestpatch.patcher.status import status
from nestpatch.patcher.verify import Verdict, verify
from tests.calls import refused
from tests.state.conftest import KINDS, Scene, make_scene
from tests.state.users import NOBODY, as_nobody, by_nobody, needs_root


@pytest.fixture(params=KINDS)
def theirs(request: pytest.FixtureRequest, templates: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A model in another user's folder, while this process runs as root."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        scene = make_scene(templates, root, request.param)
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        for home in ("root", "nobody"):
            (root / home).mkdir(mode=0o700)
        os.chown(root / "nobody", NOBODY, NOBODY)
        monkeypatch.setenv("NESTPATCH_HOME", str(root / "root"))
        yield scene


def as_owner(scene: Scene, act: Callable[[], object]) -> str:
    """The result that the owner of the folder gets."""

    def call() -> object:
        os.environ["NESTPATCH_HOME"] = str(scene.base.parent.parent / "nobody")
        return act()

    return by_nobody(call)


def state_files(scene: Scene) -> list[Path]:
    return [scene.state_dir.ledger, scene.state_dir.folder, *scene.state_dir.folder.iterdir()]


@needs_root
def test_after_root_applied_once_the_owner_can_do_everything(theirs: Scene) -> None:
    original = theirs.weights()
    apply_in_place(theirs.model, theirs.write(theirs.pack(), theirs.acme), base=theirs.base)
    for file in state_files(theirs):
        found = file.lstat()
        assert (found.st_uid, found.st_gid) == (NOBODY, NOBODY), file
    assert theirs.state_dir.lock.stat().st_mode & 0o777 == 0o600
    assert as_owner(theirs, lambda: status(theirs.model).sound) == "True"
    assert as_owner(theirs, lambda: verify(theirs.model).verdict) == str(Verdict.PATCHED)
    assert as_owner(theirs, lambda: revert(theirs.model, base=theirs.base).applied) == "()"
    assert theirs.weights() == original
    assert as_owner(theirs, lambda: apply_in_place(theirs.model, theirs.pack(), base=theirs.base).applied) == (
        "('no-harm 1.0.0',)"
    )


@needs_root
@pytest.mark.parametrize("mode", [0o644, 0o666, 0o640])
def test_a_lock_that_an_older_version_left_open_is_closed(plain: Scene, mode: int) -> None:
    """Every user who can open the lock can hold it."""
    plain.state_dir.folder.mkdir()
    plain.state_dir.lock.touch()
    plain.state_dir.lock.chmod(mode)
    os.chown(plain.state_dir.lock, NOBODY, NOBODY)
    os.chown(plain.folder, 1234, 1234)
    with locked(plain.state_dir):
        found = plain.state_dir.lock.stat()
        assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o600, 1234, 1234)


@needs_root
def test_another_user_cannot_hold_the_lock(templates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        root.chmod(0o755)
        (root / "home").mkdir()
        monkeypatch.setenv("NESTPATCH_HOME", str(root / "home"))
        scene = make_scene(templates, root, "safetensors")
        apply_in_place(scene.model, scene.pack())

        def hold() -> object:
            return [os.open(scene.state_dir.lock, how) for how in (os.O_RDONLY, os.O_WRONLY)]

        assert by_nobody(hold).startswith("PermissionError")
        assert by_nobody(lambda: status(scene.model).sound) == "True"
        assert by_nobody(lambda: revert(scene.model)).startswith("InPlaceError: cannot write beside the model")


@pytest.mark.parametrize("spared", ["read-only", "a link", "somebody else's"])
def test_untouched_shards_do_not_hold_up_a_recovery(templates: Path, spared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files with touched rows are opened for writing and synced."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        scene = make_scene(templates, root, "sharded")
        (root / "home").mkdir()
        monkeypatch.setenv("NESTPATCH_HOME", str(root / "home"))
        checkpoint = open_checkpoint(scene.model)
        name = scene.pack().deltas[0].name
        (touched,) = files_of(checkpoint, [name])
        (other,) = set(checkpoint.files) - {touched}
        if os.geteuid() == 0:
            for path in (root, *root.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        if spared == "a link":
            other.rename(root / "blob")
            other.symlink_to(root / "blob")
        elif spared == "somebody else's" and os.geteuid() == 0:
            os.chown(other, 0, 0)
        other.chmod(0o444)
        whole, rows = touched.read_bytes(), np.arange(4)
        with as_nobody():
            scene.state_dir.folder.mkdir()
            write_journal(scene.state_dir, "ab" * 8, checkpoint, [Region(checkpoint.info(name), rows)])
            checkpoint.write_rows(name, rows, checkpoint.read_rows(name, rows)[::-1])
            assert touched.read_bytes() != whole
            done = recover_model(scene.model)
            assert (done.action, done.proof) == ("rolled back", "the seal of this machine")
        assert touched.read_bytes() == whole
        assert not scene.state_dir.journal.exists()


def test_a_file_system_without_locks_is_named(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks, other writers cannot be detected."""
    pack = scene.write(scene.pack())
    newer = scene.pack(version="1.1.0", seed=2)
    apply_in_place(scene.model, pack, base=scene.base)
    before = scene.weights()

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for words in (["apply", scene.model, scene.write(newer), "--in-place"], ["revert", scene.model], ["recover", scene.model]):
        said = refused("InPlaceError", *words)
        assert "offers no locks: No locks available" in said
        assert "another nestpatch" not in said
        assert "Copy the model to a local disk" in said
    with pytest.raises(InPlaceError):
        apply_in_place(scene.model, newer, base=scene.base)
    assert scene.weights() == before
    # Reading needs no lock: changes of the source are detected by the states of its files.
    assert verify(scene.model).verdict is Verdict.PATCHED
    name = "copy" if scene.kind == "onnx" else f"copy{scene.model.suffix}"
    copy = apply(scene.model, newer, tmp_path / name, base=scene.base)
    assert [entry.entry.version for entry in status(copy.output).applied] == ["1.1.0"]
