"""`doctor` of models whose change was killed: it names the interrupted change, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestpatch.health.checks import Health
from nestpatch.health.diagnosis import doctor
from nestpatch.patcher.recovery import recover_model
from tests.faults.interrupting import INTERRUPTIONS, CaseOf, calls_of, interrupted
from tests.faults.killer import Killer, needs_shim
from tests.helpers import tree_digest

pytestmark = needs_shim


@pytest.mark.parametrize("layout", ["bf16-sharded", "q8_0-gguf"])
def test_a_killed_apply_is_no_health(killer: Killer, case_of: CaseOf, folder: Path, layout: str) -> None:
    case = case_of("apply", layout)
    number = INTERRUPTIONS["half the rows"][0](calls_of(killer, case, folder))
    model = case.model(interrupted(killer, case, folder, number))
    before = tree_digest(folder)
    found = doctor(model, [case.pack])
    states = {check.name: check.state for check in found.checks}
    assert not found.healthy
    assert (states["journal"], states["pack"]) == (Health.FAILED, Health.NOT_CHECKED)
    assert "nestpatch recover" in found.checks[0].advice
    assert tree_digest(folder) == before
    recover_model(model)
    after = {check.name: check.state for check in doctor(model, [case.pack]).checks}
    assert (after["journal"], after["pack"]) == (Health.OK, Health.FAILED)
