"""The reference pages are what the code gives: api.md, commands.md, json.md."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def build() -> ModuleType:
    """docs/build.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["api.md", "commands.md", "json.md"])
def test_a_generated_page_is_fresh(page: str) -> None:
    pages = build().PAGES
    assert set(pages) == {"api.md", "commands.md", "json.md"}
    assert (DOCS / page).read_text(encoding="utf-8") == pages[page](), f"docs/{page} is old: run `make docs`"
