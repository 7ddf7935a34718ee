"""A list of trusted keys that cannot be relied on is an error, never a user who trusts nobody and needs no signature."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import nestpatch
from nestpatch.errors import TrustError
from nestpatch.formats import nest
from nestpatch.signing import keys
from nestpatch.signing.store import load_own, load_policy, trust_file
from nestpatch.signing.trust import Policy
from tests.calls import run
from tests.helpers import tiny_checkpoint, tiny_pack, tree_digest

pytestmark = pytest.mark.usefixtures("own_home")
NOTHING_CHECKED = "no key is trusted on this machine: the signature of no-harm 1.0.0 was not checked (nestpatch trust add)"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model and an unsigned pack for it."""
    folder = tmp_path / "place"
    nest.write(tiny_pack(tiny_checkpoint(folder / "model")), folder / "no-harm.nest")
    return folder


def test_a_mistyped_home_does_not_trust_nobody(own_home: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTPATCH_HOME", str(own_home / "typo"))
    before = tree_digest(place)
    refused = run("apply", place / "model", place / "no-harm.nest", "--in-place")
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"TrustError: NESTPATCH_HOME names {own_home / 'typo'}, which is not a folder")
    assert "unset NESTPATCH_HOME" in refused.stderr
    assert tree_digest(place) == before
    with pytest.raises(TrustError):
        nestpatch.apply_in_place(place / "model", place / "no-harm.nest")
    assert run("trust", "list").exit_code == 1
    assert run("trust", "remove", "acme").exit_code == 1
    assert not (own_home / "typo").exists()


def test_a_home_that_is_a_file_is_an_error(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_home / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("NESTPATCH_HOME", str(own_home / "file"))
    with pytest.raises(TrustError, match="is not a folder"):
        load_policy()


def test_adding_a_key_creates_the_home(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTPATCH_HOME", str(own_home / "new"))
    pair = keys.keygen(tmp_path / "acme", None)
    assert run("trust", "add", pair.public).exit_code == 0
    assert [trusted.name for trusted in load_policy().keys] == ["acme"]


def directory(file: Path) -> None:
    file.mkdir()


def empty(file: Path) -> None:
    file.touch()


def no_json(file: Path) -> None:
    file.write_text("keys: []", encoding="utf-8")


def link_to_nowhere(file: Path) -> None:
    file.symlink_to(file.with_name("gone.json"))


def link_in_a_circle(file: Path) -> None:
    file.symlink_to(file.name)


def pipe(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def endless(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(1 << 40)


@pytest.mark.parametrize(
    "spoiled", [directory, empty, no_json, link_to_nowhere, link_in_a_circle, pipe, device, endless], ids=lambda f: f.__name__
)
def test_a_trust_file_that_is_no_policy_stops_everything(place: Path, spoiled: object) -> None:
    spoiled(trust_file())  # type: ignore[operator]
    before = tree_digest(place)
    refused = run("apply", place / "model", place / "no-harm.nest", "--in-place")
    assert (refused.exit_code, refused.stderr.partition(":")[0]) == (1, "TrustError")
    assert str(trust_file()) in refused.stderr.replace("\n", "")
    assert tree_digest(place) == before
    with pytest.raises(TrustError):
        load_own(create=True)


def test_a_folder_that_is_a_link_to_nowhere_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NESTPATCH_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert load_policy() == Policy(), "a fresh machine has no such folder"
    (tmp_path / "xdg").mkdir()
    (tmp_path / "xdg" / "nestpatch").symlink_to(tmp_path / "unmounted")
    with pytest.raises(TrustError, match="is a broken link"):
        load_policy()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_trust_file_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    trust_file().write_text('{"format":"nestpatch-trust/1"}', encoding="utf-8")
    trust_file().chmod(0)
    root = Path(tempfile.gettempdir())
    for folder in (tmp_path, *(p for p in tmp_path.parents if root in p.parents), trust_file().parent):
        folder.chmod(folder.stat().st_mode | 0o055)
    code = """import os
os.setuid(65534)
from nestpatch.errors import TrustError
from nestpatch.signing.store import load_policy
try:
    print("trusts nobody", load_policy())
except TrustError as error:
    print(error)"""
    package = str(Path(nestpatch.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": "1"}
    before = "import cryptography.hazmat.primitives.serialization, nestpatch.signing.trust\n"
    done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, env=environment, check=False)
    assert f"cannot read {trust_file()}: Permission denied" in done.stdout, done.stderr


def test_a_relative_home_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing into the folder of a model that was handed over changes nobody's trust."""
    name = f"relative-{tmp_path.name}"
    for folder in ("a", "b"):
        (tmp_path / folder / name).mkdir(parents=True)
    monkeypatch.setenv("NESTPATCH_HOME", name)
    monkeypatch.chdir(tmp_path / "a")
    assert trust_file() == tmp_path / "a" / name / "trust.json"
    monkeypatch.chdir(tmp_path / "b")
    assert trust_file() == tmp_path / "a" / name / "trust.json"


def test_a_user_without_a_home_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NESTPATCH_HOME")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(TrustError, match="no home folder"):
        load_policy()


# What passes unchecked says so, once.


@pytest.mark.parametrize("more", [(), ("--quiet",), ("--json",), ("--quiet", "--json")])
def test_without_a_trust_list_apply_says_that_nothing_was_checked(place: Path, more: tuple[str, ...]) -> None:
    done = run("apply", place / "model", place / "no-harm.nest", "--in-place", *more)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count(NOTHING_CHECKED) == 1
    assert NOTHING_CHECKED not in done.stdout
    if "--quiet" in more or "--json" in more:
        assert done.stderr == f"{NOTHING_CHECKED}\n"


@pytest.mark.parametrize("target", ["lora", "gguf-lora", "safetensors"])
def test_without_a_trust_list_export_says_that_nothing_was_checked(place: Path, target: str) -> None:
    done = run("export", place / "model", place / "no-harm.nest", "--to", target, "--json")
    assert (done.exit_code, done.stderr) == (0, f"{NOTHING_CHECKED}\n")


def test_apply_on_a_fresh_machine_works(place: Path, tmp_path: Path) -> None:
    """No variable, and no ~/.config: nothing to read. It makes the key of this machine's seals and the list of models only."""
    home = tmp_path / "fresh"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in {"NESTPATCH_HOME", "XDG_CONFIG_HOME"}}
    environment |= {"HOME": str(home), "PYTHONPATH": str(Path(nestpatch.__file__).parents[1])}
    words = ["apply", str(place / "model"), str(place / "no-harm.nest"), "--in-place", "--json"]
    command = [sys.executable, "-m", "nestpatch", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, f"{NOTHING_CHECKED}\n")
    made = {path.name: path for path in home.rglob("*") if path.is_file()}
    assert set(made) == {"machine.key", "machine.lock", "models.json", "models.lock"}
    assert {path.stat().st_mode & 0o777 for path in made.values()} == {0o600}
