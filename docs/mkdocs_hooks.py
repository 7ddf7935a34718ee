"""Hooks of MkDocs for the site: pages that are outside of docs/, and the links between them and docs/.

On the code host and on a disk every link leads to a file of the repository. In the site docs/ is the top folder, and the other
pages keep their path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/LOG.md",
    "bench/README.md",
    "nestpatch/prompts/sets/README.md",
    "packs/smollm2-135m-instruct/README.md",
)
"""Pages of the site, by their path in the repository."""
LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)\s#]+)")
"""The target of a relative link, without its anchor."""


def on_files(files: Files, config: Any) -> Files:
    for path in OUTSIDE:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    return LINK.sub(lambda match: f"]({in_site(uri, match[1])}", markdown)


def in_site(uri: str, target: str) -> str:
    """The target of a link of the page `uri`, as the site needs it."""
    source = uri if uri in OUTSIDE else f"docs/{uri}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(uri) or ".")
