"""What the verbs that merge have in common before they open a model: a pack that passed the gate, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestpatch.events import OnEvent
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.gate import PackLike, Proven, Trust, policy_of, prove
from nestpatch.patcher.chain import Allowed
from nestpatch.patcher.ledger import Ledger
from nestpatch.patcher.merge import QuantizedMerge, quantized_merge
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.state_dir import StateDir
from nestpatch.patcher.steps import Judge, PlannedSteps, plan_apply
from nestpatch.signing.trust import Policy


@dataclass(frozen=True, eq=False)
class Request:
    """A merge whose pack and strength were checked before the model is opened."""

    proven: Proven
    strength: float
    judge: Judge
    allowed: Allowed
    quantized: QuantizedMerge

    def plan(self, checkpoint: Checkpoint, state_dir: StateDir, ledger: Ledger) -> PlannedSteps:
        """Plans the steps of the merge on a model.

        Args:
            checkpoint: The model.
            state_dir: Where its state is.
            ledger: What is applied to it.

        Returns:
            The plan, made after the rows were compared. Its errors are those of `plan_apply`.
        """
        base = self.quantized.base
        return plan_apply(checkpoint, state_dir, ledger, self.proven, self.strength, self.judge, self.allowed, base)


def request(
    model: str | Path,
    pack: PackLike,
    strength: float,
    allowed: Allowed,
    *,
    policy: Policy | None,
    trust: Trust,
    allow_unsigned: bool,
    base: str | Path | Checkpoint | None,
    dither: bool,
    on_event: OnEvent,
) -> Request:
    """Passes the pack through the gate, and opens the float base. Arguments and errors are those of `apply_in_place`."""
    check_strength(strength)
    rules = policy_of(policy, trust)
    proven = prove(pack, model, policy=rules, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    return Request(proven, strength, Judge(rules, model, allow_unsigned), allowed, quantized_merge(base, dither=dither))
