"""Commands called in this process, and what they leave behind."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from nestpatch.patcher.ledger import Ledger, read_ledger
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.signing.keys import PrivateKey
from tests.helpers import weight_files
from tests.hub.scene import Scene


def key_file(scene: Scene, key: PrivateKey, name: str) -> Path:
    file = scene.folder / f"{name}.key"
    file.write_bytes(key.pem(None))
    file.with_suffix(".pub").write_text(key.public.pem, encoding="ascii")
    return file


def ledger_of(model: Path) -> Ledger:
    return read_ledger(state_dir_of(model))


def weights(model: Path) -> list[str]:
    return [sha256(file.read_bytes()).hexdigest() for file in weight_files(model)]
