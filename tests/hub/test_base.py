"""Quantized models patched exactly, with the float base on the Hub: the same bytes as with the base on this disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nestpatch.formats import nest
from nestpatch.patcher.inplace import apply_in_place
from tests.gguf.files import gguf_of
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.hub.models import MODEL, put, weight_bytes
from tests.hubserver import faults
from tests.hubserver.machine import Machine
from tests.hubserver.server import Hub


@pytest.fixture
def base(hub: Hub, tmp_path: Path) -> Path:
    """The float model, here and on the Hub."""
    folder = tiny_checkpoint(tmp_path / "base", hidden=256, inter=2048, sharded=True)
    put(hub, folder)
    return folder


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return gguf_of(base, tmp_path / "model.gguf", "Q8_0")


@pytest.fixture
def pack(base: Path, tmp_path: Path) -> Path:
    nest.write(tiny_pack(base, scale=0.006, neurons=24), tmp_path / "p.nest")
    return tmp_path / "p.nest"


def test_exact_rows_with_the_base_on_the_hub(
    hub: Hub, base: Path, model: Path, pack: Path, machine: Callable[..., Machine]
) -> None:
    original = model.read_bytes()
    local = Path(shutil.copy(model, model.with_name("local.gguf")))
    apply_in_place(local, pack, base=base)
    ours = machine()
    done = ours.start("-m", "nestpatch", "apply", str(model), str(pack), "--in-place", "--base", MODEL)
    assert done.returncode == 0, done.stderr
    assert model.read_bytes() == local.read_bytes() != original
    told = re.search(r"read (\S+ \S+) of the (\S+ \S+) of acme/tiny-llama@[0-9a-f]{12}", done.stderr)
    assert told is not None, done.stderr
    received = sum(seen.sent for seen in hub.log)
    assert received < weight_bytes(base)
    assert len(hub.log) < 20
    back = ours.start("-m", "nestpatch", "revert", str(model), "--json")
    assert back.returncode == 0, back.stderr
    assert model.read_bytes() == original


def test_only_touched_rows_are_read(hub: Hub, model: Path, pack: Path, machine: Callable[..., Machine]) -> None:
    """The gap that is read along, taken away: what is left are headers and rows."""
    code = """
from nestpatch.hub import remote
from nestpatch.hub.remote import open_base
from nestpatch.patcher.inplace import apply_in_place
remote._byte_ranges.__kwdefaults__["gap"] = 0
base = open_base("acme/tiny-llama")
header = base.meter.bytes
apply_in_place(sys.argv[1], sys.argv[2], base=base)
result = [base.meter.bytes - header, base.meter.requests]
"""
    rows, _ = machine().run(code, str(model), str(pack))
    assert rows == 4 * 24 * 256 * 2, "each row is looked at twice, and fetched once"


@pytest.mark.parametrize("bend", [faults.status(503), faults.truncated(5), faults.corrupted()])
def test_a_hub_in_trouble_changes_nothing(
    hub: Hub, model: Path, pack: Path, machine: Callable[..., Machine], bend: faults.Bend
) -> None:
    before = model.read_bytes()
    hub.fault(r"GET /[0-9a-f]{64}\?", bend, skip=2)
    code = "from nestpatch.hub import retry\nretry.WAITS = (0.0,)\nfrom nestpatch.cli import main\n"
    command = f"{code}main(['apply', {str(model)!r}, {str(pack)!r}, '--in-place', '--base', 'acme/tiny-llama', '--json'])"
    done = machine().start("-c", command)
    assert (done.returncode, list(json.loads(done.stdout))) == (1, ["error"]), done.stderr
    assert re.match(r"(HubUnavailable|BaseMismatch)Error: ", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert model.read_bytes() == before


def test_a_base_that_is_nowhere(hub: Hub, model: Path, pack: Path, machine: Callable[..., Machine]) -> None:
    before = model.read_bytes()
    done = machine().start("-m", "nestpatch", "apply", str(model), str(pack), "--in-place", "--base", "acme/none")
    assert done.returncode == 1
    assert done.stderr.startswith(f"HubNotFoundError: {hub.url} has no model repository acme/none")
    assert model.read_bytes() == before
    facts = machine().start("-m", "nestpatch", "status", str(model), "--json")
    assert json.loads(facts.stdout)["applied"] == []
