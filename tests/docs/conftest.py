"""The folder that documented commands run in: built once, copied for every block."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs.world import PASSWORD, build


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("torch", "llama_cpp", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("documented") / "world"
    folder.mkdir()
    build(folder)
    return folder


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the block's own, which is the current one, and an account of its own."""
    folder = Path(shutil.copytree(template, tmp_path / "world"))
    monkeypatch.chdir(folder)
    (tmp_path / "account").mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(tmp_path / "account"))
    monkeypatch.setenv("NESTPATCH_KEY_PASSWORD", PASSWORD)
    return folder
