"""The site: it builds strictly, loads nothing from other servers, and its links lead somewhere on the code host too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import GENERATED, PAGES, ROOT

LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>|url\(["']?(?:https?:)?//"""
)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]+)?\)")


@pytest.fixture
def mkdocs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """mkdocs, which is part of the extra `docs`."""
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    return pytest.importorskip("mkdocs")


def build(site: Path, **other: Any) -> Path:
    from mkdocs.commands.build import build as run
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), strict=True, **other)
    config.plugins.on_startup(command="build", dirty=False)
    run(config)
    return site


def test_it_builds_and_loads_nothing_from_other_servers(mkdocs: Any, tmp_path: Path) -> None:
    site = build(tmp_path / "site")
    pages = sorted(site.rglob("*.html"))
    assert {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")} <= {page.name for page in pages}
    for file in [*pages, *site.rglob("*.css")]:
        text = file.read_text("utf-8")
        assert not LOADS.search(text), file
        assert not re.search(r'<link[^>]*rel="?(stylesheet|preconnect|preload)[^>]*href="?(https?:)?//', text), file
    assert not list(site.rglob("*.py"))


@pytest.mark.parametrize("link", ["[a](missing.md)", "[a](index.md#missing)"])
def test_a_broken_link_fails(mkdocs: Any, tmp_path: Path, link: str) -> None:
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{link}\n", "utf-8")
    with pytest.raises(Abort):
        build(tmp_path / "site", docs_dir=str(tmp_path / "docs"), nav=None, hooks=[])


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "docs" / name for name in GENERATED)], ids=lambda page: page.name)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page}: {target}"
