"""`export` killed at every system call: the file or folder exists completely, byte for byte, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestpatch.patcher.inplace import apply_in_place
from tests.export.families import model_around
from tests.export.tokenizers_made import LLAMA3, byte_level
from tests.faults.cases import write_packs
from tests.faults.killer import Killer, needs_shim
from tests.faults.making import Making, kills_of, make, settle_all
from tests.helpers import tiny_checkpoint

pytestmark = needs_shim

EXPORTS = {
    # What is exported -> (only every n-th call, kill points, at least)
    "safetensors file": (1, 10),
    "safetensors directory": (1, 10),
    "safetensors patched": (1, 10),
    "safetensors upgraded": (3, 25),
    "gguf bf16": (1, 15),
    "gguf q8_0": (1, 15),
    "gguf upgraded": (4, 18),
    "lora": (1, 8),
    "gguf-lora": (1, 8),
}


def exporting(killer: Killer, folder: Path, what: str) -> Making:
    """A model, and the command that exports it. "upgraded": its pack is replaced by a newer one in a copy first."""
    target, _, how = what.partition(" ")
    folder.mkdir()
    if target == "gguf":
        (folder / "base").mkdir()
        byte_level(folder / "base", LLAMA3, whole_words=True)
        model = model_around(folder / "made")
        for file in model.iterdir():
            file.rename(folder / "base" / file.name)
        model.rmdir()
        model = folder / "base"
    else:
        model = tiny_checkpoint(folder / "base", sharded=how == "directory", layers=1, hidden=32, inter=32)
    packs = write_packs(folder, model)
    if how == "upgraded":
        apply_in_place(model, packs.one)
    source = model / "model.safetensors" if how == "file" else model
    pack = {"upgraded": packs.two, "patched": packs.one}.get(how, packs.one if "lora" in target else None)
    output = folder / {"gguf": "new.gguf", "gguf-lora": "new.gguf"}.get(target, "new.safetensors" if how == "file" else "new")
    words = [str(source)] if "lora" not in target else []
    words += [str(pack)] if pack else []
    words += ["--type", how] if how in ("bf16", "q8_0") else []
    return make(killer, folder, ["export", *words, "--to", target, "-o", str(output), "--json"], output)


@pytest.mark.parametrize("what", EXPORTS)
def test_an_export_killed_at_every_call(killer: Killer, folder: Path, what: str) -> None:
    every, least = EXPORTS[what]
    making = exporting(killer, folder, what)
    states = settle_all(killer, making, kills_of(killer, making, every=every))
    assert len(states) >= least
    assert states == sorted(states, reverse=True)
    assert "nothing" in states
    assert every > 1 or "all" in states


@pytest.mark.parametrize("what", ["safetensors directory", "gguf q8_0", "lora"])
def test_an_export_killed_in_the_middle_of_writes(killer: Killer, folder: Path, what: str) -> None:
    making = exporting(killer, folder, what)
    states = settle_all(killer, making, kills_of(killer, making, tear=True, every=2))
    assert len(states) >= 1
    assert set(states) == {"nothing"}
