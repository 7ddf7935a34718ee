"""The workflow of docs/ci-gate.md: it is valid YAML, and its commands run on a small model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import nestpatch
from nestpatch.formats import nest
from nestpatch.signing.keys import keygen, read_private
from nestpatch.signing.verify import sign_pack
from tests.gguf.files import places
from tests.gguf_files import needs_llama, write_gguf
from tests.helpers import tiny_pack

PAGE = Path(__file__).parents[2] / "docs" / "ci-gate.md"
INSTALL = "pip install 'nestpatch[train]'"


def job() -> dict[str, Any]:
    """The job of the one workflow on the page."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    workflow = yaml.safe_load(text)
    assert set(workflow) == {"name", True, "permissions", "jobs"}  # YAML 1.1 reads `on` as true
    (found,) = workflow["jobs"].values()
    return dict(found)


class Gate:
    """The steps of the workflow, run as GitHub runs them: each by bash -e, in a folder with the model, the pack and the key."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.steps = folder, [step for step in job()["steps"] if "run" in step]
        own = {"MODEL": "models/llama.gguf", "PROMPTS": "2", "MOST_ATTACKS": "1", "MOST_REFUSALS": "1"}
        self.environment = {**os.environ, **job()["env"], **own}
        self.model, pack, key = (folder / self.environment[name] for name in ("MODEL", "PACK", "PUBLISHER_KEY"))
        for file in (self.model, pack, key):
            file.parent.mkdir()
        write_gguf(model, self.model)  # llama.cpp starts faster than PyTorch
        nest.write(tiny_pack(model), pack)
        keygen(key.with_suffix(""), None)
        sign_pack(pack, read_private(key.with_suffix(".key"), None))
        nestpatch.apply_in_place(self.model, pack, trust="none")
        program = folder / "bin" / "nestpatch"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nestpatch "$@"\n')
        program.chmod(0o755)
        (folder / "home").mkdir(mode=0o700)
        self.environment |= {"PATH": f"{program.parent}:{os.environ['PATH']}", "NESTPATCH_HOME": str(folder / "home")}
        self.environment |= {"PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1"}

    def run(self, command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """The one step whose command begins so."""
        (step,) = [step["run"] for step in self.steps if step["run"].startswith(command)]
        words = ["bash", "-e", "-c", step]
        environment = {**self.environment, **settings}
        return subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def gate(tmp_path: Path, models: Callable[[str], Path]) -> Gate:
    return Gate(tmp_path.resolve(), models("llama"))


def test_the_workflow_has_the_steps_of_the_page() -> None:
    commands = [step["run"] for step in job()["steps"] if "run" in step]
    assert commands[0] == INSTALL
    assert [command.split()[1] for command in commands[1:]] == ["trust", "verify", "doctor", "eval"]
    assert all("uses" in step or "run" in step for step in job()["steps"])


@needs_llama
def test_the_commands_pass_a_patched_model_and_stop_others(gate: Gate) -> None:
    for command in ("nestpatch trust", "nestpatch verify", "nestpatch doctor", "nestpatch eval"):
        done = gate.run(command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert (gate.folder / "answers.jsonl").is_file()
    # A model of random weights refuses nothing.
    (gate.folder / "answers.jsonl").unlink()
    done = gate.run("nestpatch eval", MOST_ATTACKS=job()["env"]["MOST_ATTACKS"])
    assert (done.returncode, "FAILED: attack_success" in done.stderr) == (1, True), done.stderr
    data = bytearray(gate.model.read_bytes())
    for name, (_, start, width, rows) in places(gate.model).items():
        if "ffn_up" in name:
            data[start : start + width * rows] = bytes(width * rows)
    gate.model.write_bytes(data)
    for command in ("nestpatch verify", "nestpatch doctor"):
        assert gate.run(command).returncode == 1, command
