"""`apply -o` killed at every system call: the source stays as it is, the copy is there whole or not at all, and the same command
run again makes it and clears everything away that the killed one left.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nestpatch.patcher.inplace import apply_in_place
from tests.faults.cases import LAYOUTS, convert, digests, write_packs
from tests.faults.killer import Killer, needs_shim
from tests.faults.making import Making, kills_of, make, settle_all
from tests.helpers import tiny_checkpoint

pytestmark = needs_shim


def copying(killer: Killer, folder: Path, layout: str, *options: str) -> Making:
    """A model, and the command that copies it. `options`: "patched" for a model that has a pack already, or of the command."""
    dtype, sharded, inside = LAYOUTS[layout]
    model = tiny_checkpoint(folder / "base", dtype=dtype, sharded=sharded, layers=1, hidden=32, inter=32)
    packs = write_packs(folder, model)
    if inside.endswith((".gguf", ".onnx")):
        convert(model, inside)
        (model / "model.safetensors").unlink()
    elif inside:
        (model / "model.safetensors").rename(model / inside)
    source, base = model / inside, digests(model / inside)
    if "patched" in options:
        apply_in_place(source, packs.one)
    in_one_file = inside and len(base) == 1
    target = model / f"new{source.suffix}" if in_one_file else folder / "new"
    pack = packs.two if "patched" in options else packs.one
    words = ["apply", str(source), str(pack), "-o", str(target), "--json", *(o for o in options if o.startswith("-"))]
    copy = target / inside if inside and not in_one_file else target
    if in_one_file:
        base = {"new" + source.suffix: base[inside]}
    return make(killer, folder, words, target, copy, base)


COPIES = {
    # (layout, option) -> kill points, at least
    ("f16-named", ""): 30,
    ("f16-named", "patched"): 30,
    ("f32-single", ""): 30,
    ("bf16-sharded", ""): 30,
    ("bf16-sharded", "patched"): 30,
    ("bf16-sharded", "--hard-link"): 30,
    ("q8_0-gguf", ""): 30,
    ("q8_0-gguf", "patched"): 30,
    ("inside-onnx", ""): 30,
    ("columns-onnx", ""): 30,
}


@pytest.mark.parametrize(("layout", "option"), COPIES)
def test_a_copy_killed_at_every_call(killer: Killer, folder: Path, layout: str, option: str) -> None:
    making = copying(killer, folder, layout, *filter(None, [option]))
    states = settle_all(killer, making, kills_of(killer, making))
    assert len(states) >= COPIES[layout, option]
    # It has its name at one moment: no kill before it leads to a target, none after it to none.
    assert states == sorted(states, reverse=True)
    assert set(states) == {"all", "nothing"}
