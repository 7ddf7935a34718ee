"""What the verbs that merge have in common before they open a model: a pack that passed the gate, and what is allowed."""

from __future__ import annotations

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
from nestpatch.values import dataclass


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
    """Checks the strength, passes the pack through the gate, and opens the float base.

    Args:
        model: The model as the user names it.
        pack: As `apply` takes it.
        strength: Factor on the deltas.
        allowed: What the user has permitted beyond the version rules.
        policy: Whose signatures count; None means the policy of this user and this machine.
        trust: "none" skips the judgement of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        base: The float model, or its path.
        dither: Adds noise before quantized rows are rounded.
        on_event: Receives progress.

    Returns:
        The merge, which `plan` fits to a model.

    Raises:
        DataError: The strength is not over 0 and at most 1.5.
        SignatureError: Too few trusted keys signed the pack, or a signature is wrong.
        PackError: The pack is broken.
        ChannelError: The channel breaks a rule.
        HubError: A server did not return what was requested.
        CheckpointError: The float base cannot be opened.
    """
    check_strength(strength)
    rules = policy_of(policy, trust)
    proven = prove(pack, model, policy=rules, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    return Request(proven, strength, Judge(rules, model, allow_unsigned), allowed, quantized_merge(base, dither=dither))
