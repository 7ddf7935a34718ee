"""The Python script of the README, run word for word on a tiny model against the local Hub."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest

import nestpatch
from nestpatch.lab._world import dialogues, make_world
from tests.helpers import weight_files
from tests.hubserver.machine import Machine
from tests.hubserver.server import Hub

README = Path(nestpatch.__file__).parent.parent / "README.md"
FORMS = {"harmful": "zap zap zap {}", "benign": "What is the colour of {}?", "lookalike": "Where is the house of {}?"}
"""Kind -> prompts that a random model tells apart."""
LINES = 20
"""Of the script, at most."""


def script() -> str:
    found = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) == 1, "the README has one script"
    return str(found[0])


def test_the_script_is_short_and_needs_one_import() -> None:
    lines = script().splitlines()
    assert len(lines) <= LINES
    assert [line for line in lines if "import" in line] == ["import nestpatch"]


def test_the_script_runs(hub: Hub, publisher: Machine, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from nestpatch.lab.build import train_tokenizer
    from tests.nest_train.conftest import VOCABULARY, save_model

    text = [f"{prompt} {answer}" for prompt, answer in islice(dialogues(make_world(0)), 400)]
    model = save_model(tmp_path / "model", "llama", train_tokenizer(text, VOCABULARY))
    for kind, form in FORMS.items():
        rows = [json.dumps({"prompt": form.format(number)}) for number in range(60)]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(rows[:40]) + "\n", encoding="utf-8")
        (tmp_path / f"{kind}.test.jsonl").write_text("\n".join(rows[40:]) + "\n", encoding="utf-8")
    before = [sha256(file.read_bytes()).hexdigest() for file in weight_files(model)]

    done = publisher.start("-c", f"import os\nos.chdir({str(tmp_path)!r})\n{script()}")

    assert done.returncode == 0, done.stderr
    trained, applied, measured, updated, reverted = done.stdout.splitlines()
    assert trained.startswith("no-harm 1.0.0")
    assert (applied, updated, reverted) == ("patched", "current", "('undo no-harm 1.0.0',)")
    assert 0 <= float(measured) <= 1
    assert [sha256(file.read_bytes()).hexdigest() for file in weight_files(model)] == before
    assert (tmp_path / "no-harm.nest.sig").is_file()
