"""A base, a pack for it, and the two merged; never changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from tests.helpers import tiny_checkpoint, tiny_pack


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "base", dtype="F32", hidden=32, inter=48)


@pytest.fixture(scope="module")
def pack(base: Path) -> Pack:
    return tiny_pack(base, delta_dtype="F32", clusters=3)


@pytest.fixture(scope="module")
def merged(base: Path, pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return apply(base, pack, tmp_path_factory.mktemp("merged") / "m").output


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a pack for it."""
    folder = tmp_path_factory.mktemp("shop")
    nest.write(tiny_pack(tiny_checkpoint(folder / "base", dtype="F32", hidden=32, inter=48)), folder / "p.nest")
    return folder
