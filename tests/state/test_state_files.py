"""Anything may be in the place of a state file: links to other users' files, pipes, folders, devices. No command writes
through it or waits for it, and every refusal has a name.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nestpatch import errors
from nestpatch.errors import NestpatchError
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.ledger import read_ledger
from tests.calls import run
from tests.helpers import tree_digest
from tests.state.conftest import Scene
from tests.state.users import at_most, needs_root

SECRET = b"the victim's own words\n"


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("not there"))


def hard_link(path: Path, victim: Path) -> None:
    os.link(victim, path)


def pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, victim: Path) -> None:
    path.mkdir()
    (path / "inside").write_bytes(SECRET)


def device(path: Path, victim: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero: reading it never ends


def socket(path: Path, victim: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o666)


ODD: list[object] = [link, dangling, hard_link, pipe, folder, socket, pytest.param(device, marks=needs_root)]


def the_lock(scene: Scene) -> Path:
    return scene.state_dir.lock


def the_journal(scene: Scene) -> Path:
    return scene.state_dir.journal


def the_ledger(scene: Scene) -> Path:
    return scene.state_dir.ledger


def the_undo_record(scene: Scene) -> Path:
    return next(scene.state_dir.folder.glob("*.undo"))


def the_kept_pack(scene: Scene) -> Path:
    return next(scene.state_dir.folder.glob("*.nest"))


def the_kept_signature(scene: Scene) -> Path:
    return next(scene.state_dir.folder.glob("*.nest.sig"))


FILES = [the_lock, the_journal, the_ledger, the_undo_record, the_kept_pack, the_kept_signature]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_bytes(SECRET)
    file.chmod(0o644)
    return file


def commands(scene: Scene, out: Path) -> Iterator[list[object]]:
    """Every command that uses the state of a model."""
    newer = scene.write(scene.pack(version="1.1.0", seed=2), scene.acme)
    yield ["status", scene.model]
    yield ["verify", scene.model]
    yield ["verify", scene.model, scene.write(scene.pack(), scene.acme), "--full"]
    yield ["apply", scene.model, newer, "-o", out / "copy"]
    yield ["export", scene.model, "--to", "safetensors", "-o", out / "release"]
    yield ["recover", scene.model]
    yield ["recover", scene.model, "--foreign", "roll-back"]
    yield ["apply", scene.model, newer, "--in-place"]
    yield ["revert", scene.model]
    yield ["recover", scene.model, "--foreign", "remove"]
    yield ["revert", scene.model]


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("odd", ODD)
def test_something_else_in_place_of_a_state_file_harms_nobody(
    plain: Scene, victim: Path, what: Callable[[Scene], Path], odd: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    plain.trust(acme=plain.acme)
    apply_in_place(plain.model, plain.write(plain.pack(), plain.acme))
    place = what(plain)
    place.unlink(missing_ok=True)
    odd(place, victim)
    outside = victim.stat()
    (tmp_path / "out").mkdir()
    for words in commands(plain, tmp_path / "out"):
        with at_most(20):
            result = run(*words)  # an error that does not become a message is raised
        assert result.exit_code in (0, 1), (words, result.output)
        if result.exit_code and words[0] not in ("verify", "status"):
            error = getattr(errors, result.stderr.split(":")[0].split()[-1])
            assert issubclass(error, NestpatchError), (words, result.stderr)
            assert "What to do:" in result.stderr
        assert victim.read_bytes() == SECRET, words
        now = victim.stat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (outside.st_mode, outside.st_uid, outside.st_gid), words
    assert not victim.with_name("not there").exists()


def test_a_state_folder_that_is_a_link_is_not_entered(scene: Scene, tmp_path: Path) -> None:
    """Even if the link leads to the complete state of another model."""
    elsewhere = tmp_path / "elsewhere"
    apply_in_place(scene.model, scene.pack(), base=scene.base)
    shutil.move(scene.state_dir.folder, elsewhere)
    (elsewhere / "journal").write_bytes(b"x")
    place = scene.state_dir
    place.folder.symlink_to(elsewhere, target_is_directory=True)
    before = tree_digest(scene.folder), tree_digest(elsewhere)
    out = tmp_path / "out"
    out.mkdir()
    for words in commands(scene, out):
        if words[0] == "export" and scene.kind in ("gguf", "onnx"):
            continue
        result = run(*words)
        assert result.exit_code == 1, words
        assert "StateError:" in result.stderr, (words, result.stderr)
        assert "nestpatch follows no links there" in result.stderr
        assert (tree_digest(scene.folder), tree_digest(elsewhere)) == before, words
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("odd", [pipe, hard_link, pytest.param(device, marks=needs_root)])
def test_a_state_folder_that_is_no_folder_is_named(plain: Scene, victim: Path, odd: Callable[[Path, Path], None]) -> None:
    odd(plain.state_dir.folder, victim)
    for words in (
        ["apply", plain.model, plain.write(plain.pack()), "--in-place"],
        ["recover", plain.model],
        ["status", plain.model],
    ):
        with at_most(20):
            result = run(*words)
        assert result.exit_code == 1, words
        assert result.stderr.startswith("StateError:"), result.stderr
    assert victim.read_bytes() == SECRET


def test_the_key_of_seals_and_its_lock_are_not_read_through_links(plain: Scene, home: Path, victim: Path) -> None:
    (home / "machine.key").symlink_to(victim)
    result = run("apply", plain.model, plain.write(plain.pack()), "--in-place")
    assert victim.read_bytes() == SECRET
    assert (result.exit_code, read_ledger(plain.state_dir).applied == ()) in ((0, False), (1, True)), result.stderr
    (home / "machine.key").unlink()
    os.mkfifo(home / "machine.lock")
    with at_most(20):
        run("revert", plain.model)
    assert victim.read_bytes() == SECRET
