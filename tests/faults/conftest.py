"""Fixtures of the tests with kills and failing disks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import Case, make_case
from tests.faults.interrupting import CaseOf
from tests.faults.killer import Killer, build_shim


@pytest.fixture(scope="session")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    killer = Killer(build_shim(tmp_path_factory.mktemp("shim")))
    yield killer
    killer.close()


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """(operation, layout) -> its case, built once."""
    known: dict[tuple[str, str], Case] = {}

    def find(operation: str, layout: str = "bf16-sharded") -> Case:
        if (operation, layout) not in known:
            folder = tmp_path_factory.mktemp(f"{operation}-{layout}").resolve()
            known[operation, layout] = make_case(folder, operation, layout)
        return known[operation, layout]

    return find


@pytest.fixture(autouse=True)
def _lazy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process recovers hundreds of models, and needs no protection from power cuts."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a copy of a template goes."""
    return tmp_path.resolve() / "model"
