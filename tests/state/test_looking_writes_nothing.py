"""Read-only commands change nothing in a model's folder: no lock or key is created, nothing is rolled back or removed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from nestpatch.channels.publish import push
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher._journal import Region, write_journal
from nestpatch.patcher.inplace import apply_in_place
from tests.calls import run
from tests.state.conftest import KINDS, Scene, make_scene
from tests.state.users import NOBODY, as_nobody

KEPT = "aaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb.undo"


def photograph(folder: Path) -> dict[str, tuple[object, ...]]:
    """Name -> mode, owner, time of change and content of all that is in a folder, and of the folder."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        state = path.lstat()
        content = sha256(path.read_bytes()).hexdigest() if path.is_file() and os.access(path, os.R_OK) else ""
        found[path.relative_to(folder).as_posix()] = (state.st_mode, state.st_uid, state.st_ino, state.st_mtime_ns, content)
    return found


def journal_of(scene: Scene) -> bytes:
    """A complete journal that was written for this model in another folder."""
    other = scene.sent("other")
    checkpoint, place = open_checkpoint(other.model), other.state_dir
    place.folder.mkdir(exist_ok=True)
    name = other.pack().deltas[0].name
    write_journal(place, "ab" * 8, checkpoint, [Region(checkpoint.info(name), np.arange(4))])
    data = place.journal.read_bytes()
    shutil.rmtree(other.folder)
    return data


def litter(scene: Scene) -> None:
    """Leftovers of killed commands, and an undo record that no ledger names."""
    scene.state_dir.folder.mkdir(exist_ok=True)
    weights = open_checkpoint(scene.model).files[0]
    for name in (f".{weights.name}.0a1b2c3d.tmp", f".{scene.state_dir.ledger.name}.0a1b2c3d.tmp"):
        (weights.parent / name).write_bytes(b"half")
    (scene.state_dir.folder / ".x.0a1b2c3d.tmp").write_bytes(b"half")
    (scene.state_dir.folder / KEPT).write_bytes(b"needed, or not")


def patched(scene: Scene) -> None:
    apply_in_place(scene.model, scene.write(scene.pack(), scene.acme), base=_base(scene))


def half_a_journal(scene: Scene) -> None:
    data = journal_of(scene)
    scene.state_dir.folder.mkdir(exist_ok=True)
    scene.state_dir.journal.write_bytes(data[: len(data) // 2])


def foreign_journal(scene: Scene) -> None:
    data = journal_of(scene)
    scene.state_dir.folder.mkdir(exist_ok=True)
    scene.state_dir.journal.write_bytes(data)


def foreign_journal_on_top(scene: Scene) -> None:
    patched(scene)
    litter(scene)
    foreign_journal(scene)


SETTLED: dict[str, Callable[[Scene], None]] = {"fresh": lambda scene: None, "patched": patched, "littered": litter}
INTERRUPTED: dict[str, Callable[[Scene], None]] = {
    "half a journal": half_a_journal,
    "a whole foreign journal": foreign_journal,
    "patched, littered and a foreign journal": foreign_journal_on_top,
}


def _base(scene: Scene) -> Path | None:
    return scene.base if scene.kind == "gguf" else None


def looks(scene: Scene, out: Path) -> dict[str, tuple[list[object], set[int]]]:
    """Name of a read-only command -> its arguments, and the exit codes that are allowed if nothing is wrong."""
    model, pack = scene.model, scene.write(scene.pack(), scene.acme)
    newer = scene.write(scene.pack(version="1.1.0", seed=2), scene.acme)
    base: list[object] = ["--base", scene.base] if scene.kind == "gguf" else []
    found: dict[str, tuple[list[object], set[int]]] = {
        "status": (["status", model], {0}),
        "status --json": (["status", model, "--json"], {0}),
        "verify": (["verify", model], {0}),
        "verify --full": (["verify", model, "--full"], {0, 1}),
        "verify PATCH": (["verify", model, pack, *base], {0, 1}),
        "verify PATCH --full": (["verify", model, pack, *base, "--full"], {0, 1}),
        "diff": (["diff", model, model], {0}),
        "apply --dry-run": (["apply", model, newer, "--dry-run", "-o", out / "copy", *base], {0}),
        "apply --in-place --dry-run": (["apply", model, newer, "--in-place", "--dry-run", *base], {0}),
        "apply --detach --dry-run": (["apply", model, newer, "--in-place", "--detach", "--dry-run", *base], {0}),
        "revert --dry-run": (["revert", model, "--dry-run", *base], {0, 1}),
        "update --check": (["update", model, "--check", "--channel", channel(scene), *base], {0, 10}),
        "export --to lora": (["export", model, pack, "--to", "lora", "-o", out / "lora"], {0}),
        "export --to gguf-lora": (["export", model, pack, "--to", "gguf-lora", "-o", out / "lora.gguf"], {0, 1}),
    }
    for target in ("safetensors", "gguf"):
        words: list[object] = ["export", model, "--to", target, "-o", out / f"export.{target}"]
        found[f"export --to {target}"] = (words, {0, 1})
        found[f"export PATCH --to {target}"] = ([*words[:2], newer, *words[2:-1], out / f"patched.{target}"], {0, 1})
    return found


def channel(scene: Scene) -> str:
    """A published version, in a folder."""
    place = f"file://{scene.base.parent / 'channel'}"
    if not (scene.base.parent / "channel").exists():
        home = os.environ["NESTPATCH_HOME"]
        os.environ["NESTPATCH_HOME"] = str(scene.base.parent / "publisher")
        try:
            push(scene.write(scene.pack(version="3.0.0", seed=3), scene.acme), place, scene.acme)
        finally:
            os.environ["NESTPATCH_HOME"] = home
    return place


@pytest.mark.parametrize("state", SETTLED)
def test_looking_changes_nothing(scene: Scene, state: str, tmp_path: Path) -> None:
    scene.trust(acme=scene.acme)
    SETTLED[state](scene)
    (tmp_path / "out").mkdir()
    commands = looks(scene, tmp_path / "out")
    before, key = photograph(scene.folder), Path(os.environ["NESTPATCH_HOME"], "machine.key")
    for name, (words, codes) in commands.items():
        result = run(*words)
        assert photograph(scene.folder) == before, name
        unknown = name.startswith(("verify", "revert")) and state != "patched"
        assert result.exit_code in (codes | {1} if unknown else codes), (name, result.output)
        assert "InterruptedChangeError" not in result.stderr, name
    pack_id = nest.pack_id(scene.pack())
    shown = run("show", scene.state_dir.pack(pack_id) if state == "patched" else scene.write(scene.pack()))
    assert shown.exit_code == 0, shown.output
    assert photograph(scene.folder) == before
    assert key.exists() is (state == "patched"), "a key is made to seal something, and nothing was sealed"


@pytest.mark.parametrize("state", INTERRUPTED)
def test_looking_at_an_interrupted_change_says_so_and_changes_nothing(scene: Scene, state: str, tmp_path: Path) -> None:
    scene.trust(acme=scene.acme)
    INTERRUPTED[state](scene)
    (tmp_path / "out").mkdir()
    commands = looks(scene, tmp_path / "out")
    before = photograph(scene.folder)
    for name, (words, _) in commands.items():
        result = run(*words)
        assert photograph(scene.folder) == before, name
        assert result.exit_code == 1, (name, result.output)
        assert "InterruptedChangeError:" in result.stderr, (name, result.stderr)
        assert "`nestpatch recover " in result.stderr, (name, result.stderr)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture(params=KINDS)
def stored(request: pytest.FixtureRequest, templates: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A scene in a folder that this user may only read. Root may write everywhere, so it runs the command as another user."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        root.chmod(0o755)
        (root / "owner").mkdir()
        monkeypatch.setenv("NESTPATCH_HOME", str(root / "owner"))
        yield make_scene(templates, root, request.param)
        for path in (root, *root.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755)


@pytest.mark.parametrize("state", [*SETTLED, *INTERRUPTED])
def test_looking_at_a_read_only_folder_with_a_read_only_home(
    stored: Scene, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, root = stored, stored.base.parent.parent
    {**SETTLED, **INTERRUPTED}[state](scene)
    out, home = root / "out", root / "home"
    out.mkdir()
    home.mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(home))
    scene.trust(acme=scene.acme)
    commands = looks(scene, out)
    for path in root.rglob("*"):
        if path.name not in ("lock", "journal"):  # for their owner alone, as they are written
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = photograph(scene.folder), photograph(home)
    if os.geteuid() == 0:
        os.chown(home, NOBODY, -1)
        before = photograph(scene.folder), photograph(home)
        os.chown(out, NOBODY, -1)
    out.chmod(0o755)
    with as_nobody():
        for name, (words, codes) in commands.items():
            result = run(*words)
            unknown = name.startswith(("verify", "revert", "apply --in-place", "apply --detach", "update")) or "lora" in name
            expected = {1} if state in INTERRUPTED else codes | {1} if unknown else codes
            assert result.exit_code in expected, (name, result.output)
            assert state not in INTERRUPTED or "nestpatch recover" in result.stderr, (name, result.stderr)
    assert (photograph(scene.folder), photograph(home)) == before


def test_an_onnx_export_of_an_interrupted_change_is_refused(plain: Scene, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    foreign_journal(plain)
    before = photograph(plain.folder)
    result = run("export", plain.model, "--to", "onnx", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "InterruptedChangeError:" in result.stderr, result.stderr
    assert photograph(plain.folder) == before
