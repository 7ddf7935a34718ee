"""A pack on disk, and keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from nestpatch.formats import nest
from nestpatch.signing import keys, store
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.trust import Policy, TrustedKey
from tests.helpers import tiny_checkpoint, tiny_pack


@dataclass(frozen=True)
class People:
    """Four publishers; acme and audit are trusted in most tests."""

    acme: PrivateKey
    audit: PrivateKey
    third: PrivateKey
    evil: PrivateKey

    def policy(self, *names: str) -> Policy:
        """Trusts these people for everything."""
        return Policy(tuple(TrustedKey(name, getattr(self, name).public) for name in names))


def spoil(file: Path) -> None:
    """Flips one bit of a file."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="session")
def people() -> People:
    return People(*(keys.PrivateKey.generate() for _ in range(4)))


@pytest.fixture(scope="session")
def pack_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return nest.encode(tiny_pack(tiny_checkpoint(tmp_path_factory.mktemp("pack") / "model")))


@pytest.fixture
def pack(tmp_path: Path, pack_bytes: bytes) -> Path:
    file = tmp_path / "no-harm.nest"
    file.write_bytes(pack_bytes)
    return file


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's trust file lies. The administrator of this machine has none."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("NESTPATCH_HOME", str(home))
    monkeypatch.setattr(store, "SYSTEM_FILE", tmp_path / "etc" / "nestpatch" / "trust.json")
    monkeypatch.delenv("NESTPATCH_KEY_PASSWORD", raising=False)
    return home
