"""The whole story with the real client and a fresh home for everybody: publish, follow, withdraw, go back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from nestpatch.formats import nest
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.state_dir import state_dir_of
from tests.helpers import tiny_checkpoint, tiny_pack, weight_files
from tests.hubserver.machine import Machine
from tests.hubserver.server import Hub

REPO = "acme/no-harm"
Done = subprocess.CompletedProcess[str]


def tool(machine: Machine, *words: object, code: int = 0) -> Any:
    """Runs a command with --json in a process of its own; its answer, or where it was refused what it says on stderr."""
    done = machine.start("-m", "nestpatch", *map(str, words), "--json")
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    return done.stderr if list(found) == ["error"] else found


def digests(model: Path) -> list[str]:
    return [sha256(file.read_bytes()).hexdigest() for file in weight_files(model)]


@pytest.fixture
def keys(publisher: Machine, tmp_path: Path) -> Path:
    """The folder of acme.key and acme.pub."""
    folder = tmp_path / "keys"
    folder.mkdir()
    tool(publisher, "keygen", folder / "acme", "--no-password")
    return folder


def version_of(model: Path, folder: Path, version: str, seed: int) -> Path:
    file = folder / f"no-harm-{version}.nest"
    nest.write(tiny_pack(model, version=version, seed=seed), file)
    return file


def test_the_whole_story(hub: Hub, publisher: Machine, machine: Callable[..., Machine], keys: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", sharded=True)
    original = digests(model)
    one, two = (version_of(model, tmp_path, version, seed) for version, seed in (("1.0.0", 0), ("1.1.0", 1)))
    key = ("--key", keys / "acme.key")

    # The publisher makes the repository with its first version.
    first = tool(publisher, "push", one, REPO, *key)
    assert (first["serial"], first["latest"], first["tag"]) == (1, "1.0.0", "v1.0.0")

    # Another machine, with a home of its own and a token that may only read.
    fleet = machine("fleet")
    refused = tool(fleet, "pull", REPO, "-o", tmp_path / "got.nest", code=1)
    assert refused.startswith("ChannelKeyError")
    assert not (tmp_path / "got.nest").exists()
    tool(fleet, "trust", "add", keys / "acme.pub", "--name", "acme")
    pulled = tool(fleet, "pull", f"{REPO}@1.0.0", "-o", tmp_path / "got.nest")
    assert (tmp_path / "got.nest").read_bytes() == one.read_bytes()
    assert list(pulled["signers"]) == ["acme"]
    assert tool(fleet, "verify-signature", tmp_path / "got.nest")["verdict"] == "signed"
    assert tool(fleet, "verify", model, tmp_path / "got.nest", code=1)["verdict"] == "base"

    tool(fleet, "apply", model, f"hub://{REPO}@1.0.0", "--in-place")
    at_one = digests(model)
    assert at_one != original
    known = tool(fleet, "status", model)
    assert known["follows"] == [f"hub://{REPO}"]
    assert list(known["applied"][0]["signers"]) == ["acme"]
    assert tool(fleet, "update", model)["channels"][0]["state"] == "current"

    # A new version: one transaction.
    assert tool(publisher, "push", two, REPO, *key)["serial"] == 2
    told = tool(fleet, "update", model, "--check", code=10)["channels"][0]
    assert (told["state"], told["before"], told["after"]) == ("available", "1.0.0", "1.1.0")
    assert digests(model) == at_one
    before = read_ledger(state_dir_of(model)).transaction
    done = tool(fleet, "update", model)["channels"][0]
    assert (done["state"], done["steps"]) == ("updated", ["undo no-harm 1.0.0", "apply no-harm 1.1.0"])
    ledger = read_ledger(state_dir_of(model))
    assert [event["what"] for event in ledger.history] == ["applied", "undone", "applied"]
    assert ledger.transaction == ledger.applied[0].transaction != before
    assert tool(fleet, "verify", model)["verdict"] == "patched"

    # It is withdrawn: back to the version before.
    assert tool(publisher, "yank", REPO, "1.1.0", "--reason", "refuses too much", *key)["latest"] == "1.0.0"
    told = tool(fleet, "update", model, "--check", code=10)["channels"][0]
    assert (told["after"], told["reason"]) == ("1.0.0", "refuses too much")
    done = tool(fleet, "update", model)["channels"][0]
    assert done["steps"] == ["undo no-harm 1.1.0", "apply no-harm 1.0.0"]
    assert digests(model) == at_one
    assert "YankedError" in tool(fleet, "pull", f"{REPO}@1.1.0", "-o", tmp_path / "bad.nest", code=1)
    assert tool(fleet, "update", model, "--check")["channels"][0]["state"] == "current"

    tool(fleet, "revert", model)
    assert digests(model) == original
    assert "follows no channel" in tool(fleet, "update", model, code=1)
