"""Models of all families, made once for this folder's tests, and exported once to F32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from nestpatch.export._gguf_writer import write_gguf
from nestpatch.formats.opening import open_checkpoint
from tests.export.families import WIDE, make


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> the directory of a float32 model of that family."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: make(name, root / name))


@pytest.fixture(scope="session")
def exported(family: Callable[[str], Path]) -> Callable[[str], Path]:
    """Name -> its GGUF file in F32."""

    @cache
    def export(name: str) -> Path:
        folder = family(name)
        return write_gguf(open_checkpoint(folder), folder.with_suffix(".gguf"), kind="f32").output

    return export


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 model whose rows every block type fits."""
    return make("llama3", tmp_path_factory.mktemp("wide") / "wide", dtype="bfloat16", **WIDE)
