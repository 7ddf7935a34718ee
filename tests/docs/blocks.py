"""The blocks of code in README.md and docs/, and whether they are to be run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ("api.md", "commands.md", "json.md")
"""Pages without commands of their own: docs/build.py writes them."""
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "bench" / "README.md",
        *(ROOT / "packs").glob("*/README.md"),
        *(page for page in (ROOT / "docs").glob("*.md") if page.name not in GENERATED),
    ]
)
MARK = re.compile(r"<!-- not run: (\S.+) -->")
PROGRAMS = ("nestpatch", "sha256sum", "model_signing", "hf", "rsync")
"""What a block that is run may start."""


@dataclass(frozen=True)
class Block:
    """A block of code. `language` is that of its fence, "" for a fence without one, None for an indented block."""

    page: str
    """Path in the repository."""
    line: int
    language: str | None
    text: str
    reason: str | None
    """Why it is not run, from the comment before it; None where it is run."""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The command lines: continued lines are joined, and comments are left out."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()) if line]


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in their order."""
    lines = page.read_text("utf-8").splitlines()
    found: list[Block] = []
    number = 0
    while number < len(lines):
        start, before = number, [line for line in lines[:number] if line][-1:]
        if fence := re.match(r"```(\w*)", lines[number]):
            end = lines.index("```", number + 1)
            language, body, number = fence[1], lines[number + 1 : end], end + 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1]) and not _in_list(lines, number):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
            language, body = None, [line[4:] for line in lines[start:number]]
        else:
            number += 1
            continue
        mark = MARK.fullmatch(before[0]) if before else None
        text = "\n".join(body).rstrip() + "\n"
        found.append(Block(page.relative_to(ROOT).as_posix(), start + 1, language, text, mark[1] if mark else None))
    return found


def _in_list(lines: list[str], number: int) -> bool:
    """Whether an indented line goes on with an item of a list."""
    before = next((line for line in reversed(lines[:number]) if line and not line.startswith("  ")), "")
    return re.match(r"([-*]|\d+\.) ", before) is not None


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
