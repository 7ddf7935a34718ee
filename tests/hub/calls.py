"""Commands called in this process, and what they leave behind."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from nestpatch.cli import main
from nestpatch.patcher.ledger import Ledger, read_ledger
from nestpatch.patcher.place import place_of
from nestpatch.signing.keys import PrivateKey
from tests.helpers import weight_files
from tests.hub.scene import Scene


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert "Traceback" not in result.stderr
    return result


def answer(*words: object, code: int = 0) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)


def key_file(scene: Scene, key: PrivateKey, name: str) -> Path:
    file = scene.folder / f"{name}.key"
    file.write_bytes(key.pem(None))
    file.with_suffix(".pub").write_text(key.public.pem, encoding="ascii")
    return file


def ledger_of(model: Path) -> Ledger:
    return read_ledger(place_of(model))


def weights(model: Path) -> list[str]:
    return [sha256(file.read_bytes()).hexdigest() for file in weight_files(model)]
