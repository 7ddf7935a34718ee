"""The verb `export_guard`: derives the guard of a patched model from the model and its pack."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import BaseMismatchError
from nestpatch.events import OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.guarding.file import write
from nestpatch.guarding.guard import Guard
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.verify import Verdict, verify
from nestpatch.signing.trust import Policy


@dataclass(frozen=True)
class ExportedGuard:
    """A guard that was written."""

    output: Path
    guard: Guard
    nbytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {"output": str(self.output), "bytes": self.nbytes, **self.guard.as_json(), "seconds": self.seconds}


def export_guard(
    model: str | Path,
    pack: PackLike,
    output: str | Path,
    *,
    strength: float = 1.0,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    on_event: OnEvent = ignore,
) -> ExportedGuard:
    """Exports what a fine-tune of a patched model must leave alone, for `GuardCallback` and `guard_model`.

    Args:
        model: The patched model, a checkpoint of any format.
        pack: The pack in it, checked as by `apply`.
        output: The file to write.
        strength: At which the pack was applied.
        policy: The trust policy for the pack; by default that of this user and this machine.
        trust: "none" skips the check of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        on_event: Receives the progress of a download.

    Returns:
        The guard, and where it is.

    Raises:
        BaseMismatchError: The rows of the model do not hold the pack.
        CheckpointError: The model cannot be read.
        DataError: The strength is out of range.
        OutputError: The output exists or cannot be written.
        PackError: The pack is broken.
        SignatureError: The pack is not signed as the policy requires.
        StateError: The state of the model is broken, or a change was interrupted.
    """
    began, target = time.perf_counter(), Path(output)
    check_strength(strength)
    check_output(target)
    proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    found = verify(model, proven.pack, strength=strength)
    if found.verdict is not Verdict.PATCHED:
        raise BaseMismatchError(
            f"{model} does not hold {proven.pack.label}: {found.detail}",
            advice="A guard is made of the patched model: nestpatch apply MODEL PACK --in-place",
        )
    guard = Guard.of(proven.pack, proven.pack_id, open_model(model)[0], strength)
    return ExportedGuard(target, guard, write(guard, target), time.perf_counter() - began)
