"""The verb `doctor`: what can be said about the health of a deployed, patched model. Writes nothing beside the model.

State beside a model is a hint where to look. Rows, the packs' own digests and sketches, and signatures decide.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import (
    BaseMismatchError,
    BusyError,
    InterruptedChangeError,
    NestpatchError,
    SignatureError,
    StateError,
)
from nestpatch.events import OnEvent, ignore
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.gate import PackLike, Proven, look, prove
from nestpatch.health.chat import generation_check, template_check
from nestpatch.health.checks import NAMES, Check, Health
from nestpatch.health.measured import Measure, measurement_check
from nestpatch.health.packs import KnownPack, rows_of_all, rows_of_pack
from nestpatch.health.presence import Presence
from nestpatch.health.records import leftovers_check, undo_check
from nestpatch.health.standing import channel_check, find_channels, given_signature, kept_signature
from nestpatch.health.subspace import ChangeAlong, change_along, subspace_check
from nestpatch.pack import Pack
from nestpatch.patcher.findings import APPLICABLE
from nestpatch.patcher.identity import examine
from nestpatch.patcher.kept import load_pack
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.recovery import require_settled
from nestpatch.patcher.state_dir import StateDir, state_dir_of
from nestpatch.patcher.status import ReleasedPack, Status, released_packs
from nestpatch.patcher.status import status as read_status
from nestpatch.runtimes.chat_form import read_chat_form
from nestpatch.signing.store import load_policy
from nestpatch.signing.trust import Policy


@dataclass(frozen=True)
class Diagnosis:
    """The health of a model."""

    model: Path
    checks: tuple[Check, ...]
    """In the order of `checks.NAMES`; those of packs in the order of `packs`."""
    packs: tuple[str, ...]
    """Labels of the packs that were looked for."""
    presence: Mapping[str, Presence]
    """Label -> how much of the pack is in the rows, for packs that digests do not answer for."""
    subspace: Mapping[str, ChangeAlong]
    """Label -> how much of what changed since lies along the pack's deltas; only with the base."""

    @property
    def healthy(self) -> bool:
        """Whether no check failed. Warnings, and what could not be checked, do not count."""
        return not any(check.state is Health.FAILED for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The diagnosis for `--json`.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "model": str(self.model),
            "healthy": self.healthy,
            "packs": list(self.packs),
            "checks": [check.as_json() for check in self.checks],
            "presence": [{"pack": label, **found.as_json()} for label, found in self.presence.items()],
            "subspace": [{"pack": label, **found.as_json()} for label, found in self.subspace.items()],
        }


def doctor(
    model: str | Path,
    packs: Sequence[PackLike] = (),
    *,
    strength: float = 1.0,
    base: str | Path | None = None,
    policy: Policy | None = None,
    online: bool = False,
    measure: Measure | None = None,
    on_event: OnEvent = ignore,
) -> Diagnosis:
    """Checks the health of a patched model. Writes nothing beside it; no network, unless something named here is remote.

    Args:
        model: A checkpoint of any format.
        packs: Packs that the model should hold, beside those that its ledger and its files name.
        strength: At which `packs` should be applied, where no ledger says so.
        base: The packs' base: tells what digests and sketches cannot, and what its chat template was.
        policy: Whose signatures count; None means the policy of this user and this machine.
        online: Reads the channels of the packs now, instead of remembering.
        measure: Evaluates the model as it is, as `nestpatch.evaluate(model, suites).model.as_json` does. It may take minutes.
        on_event: Receives the progress of downloads.

    Returns:
        What was found.

    Raises:
        CheckpointError: The model cannot be read, or `base` is not the base of the packs.
        PackError: A pack cannot be read.
        SignatureError: A signature of a given pack is wrong, or the policy cannot be read.
        DataError: `strength` is none.
    """
    check_strength(strength)
    rules = load_policy(needs_home=False) if policy is None else policy
    checkpoint, state_dir = open_checkpoint(model), state_dir_of(model)
    given = [_judged(pack, rules, model, on_event) for pack in packs]
    work = _Doctor(Path(model), checkpoint, state_dir, rules, [])
    work.look_at_state()
    known = work.known(given, strength)
    reference = _opened_base(base, [one.pack for one in known if one.pack is not None])
    presence = work.look_at_rows(known, reference)
    along = work.look_along(known, reference)
    work.look_at_standing(known, online=online)
    work.look_at_chat(known, base)
    if measure is not None:
        work.compare(known, measure)
    checks = sorted(work.checks, key=lambda check: NAMES.index(check.name))
    return Diagnosis(Path(model), tuple(checks), tuple(one.label for one in known), presence, along)


def _judged(pack: PackLike, policy: Policy, model: str | Path, on_event: OnEvent) -> tuple[Proven, SignatureError | None]:
    """A pack that the user named, and why the policy refuses it. A wrong signature is raised."""
    try:
        return prove(pack, model, policy=policy, on_event=on_event), None
    except SignatureError as error:
        return look(pack, policy=policy, on_event=on_event), error


def _opened_base(base: str | Path | None, packs: Sequence[Pack]) -> Checkpoint | None:
    """The base, which must be that of all packs. Raises BaseMismatchError."""
    if base is None:
        return None
    from nestpatch.hub.remote import open_base

    checkpoint = open_base(base)
    for pack in packs:
        odd = [finding for finding in examine(pack, checkpoint) if finding.state not in APPLICABLE]
        if odd:
            raise BaseMismatchError(
                f"{checkpoint.path} is not the base of {pack.label}: {odd[0].name}: {odd[0].state.value}",
                advice=f"Give the base that `nestpatch show` names: {pack.manifest.base.model_id}.",
            )
    return checkpoint


@dataclass(eq=False)
class _Doctor:
    """A model, opened, and what was found so far."""

    model: Path
    checkpoint: Checkpoint
    state_dir: StateDir
    policy: Policy
    checks: list[Check]
    status: Status | None = None
    """None where a change was interrupted or the ledger is broken: then rows are not compared."""

    def look_at_state(self) -> None:
        """The journal, the ledger, and what interrupted commands left."""
        try:
            require_settled(self.state_dir, self.model)
        except (InterruptedChangeError, BusyError) as error:
            self.checks.append(Check("journal", Health.FAILED, str(error), error.advice))
            return
        self.checks.append(Check("journal", Health.OK, "no change of the model was interrupted"))
        self.checks.append(leftovers_check(self.state_dir, self.checkpoint))
        try:
            self.status = read_status(self.model, self.policy)
        except StateError as error:
            self.checks.append(Check("ledger", Health.FAILED, str(error), error.advice))
            return
        ledger = self.status.ledger
        if not ledger.applied:
            detail = "there is no ledger of applied packs: packs are looked for in the rows"
        elif ledger.sealed:
            detail = "the ledger was written on this machine, for this model"
        else:
            detail = "the ledger came with the model: packs and rows have to confirm it"
        self.checks.append(Check("ledger", Health.OK if ledger.sealed else Health.NOT_CHECKED, detail))
        self.checks += [undo_check(self.state_dir, entry) for entry in ledger.applied]

    def known(self, given: Sequence[tuple[Proven, SignatureError | None]], strength: float) -> list[KnownPack]:
        """Every pack that the ledger, the user or the files name, once."""
        found: dict[str, KnownPack] = {}
        named = {proven.pack_id: (proven, refusal) for proven, refusal in given}
        for applied in self.status.applied if self.status else ():
            entry = applied.entry
            proven, refusal = named.pop(entry.pack_id, (None, None))
            pack = proven.pack if proven else self._kept(entry.pack_id, entry.label)
            found[entry.pack_id] = KnownPack(
                entry.pack_id, entry.label, entry.version, entry.strength, pack, proven, refusal, applied
            )
        claims = {one.pack_id: one for one in (self.status.released if self.status else released_packs(self.checkpoint))}
        for pack_id, (proven, refusal) in named.items():
            claim, pack = claims.pop(pack_id, None), proven.pack
            found[pack_id] = KnownPack(
                pack_id, pack.label, pack.manifest.version, _strength(claim, strength), pack, proven, refusal, released=claim
            )
        for pack_id, claim in claims.items():
            if pack_id not in found:
                found[pack_id] = KnownPack(pack_id, claim.label, claim.version, 1.0, released=claim)
        return list(found.values())

    def _kept(self, pack_id: str, label: str) -> Pack | None:
        try:
            return load_pack(self.state_dir, pack_id, label)
        except StateError:
            return None

    def look_at_rows(self, known: Sequence[KnownPack], base: Checkpoint | None) -> dict[str, Presence]:
        """Whether the packs are in the rows."""
        if not known:
            detail = "no ledger and no file names a pack"
            self.checks.append(Check("pack", Health.FAILED, detail, "Give the pack: nestpatch doctor MODEL --pack PACK"))
        presence = {}
        for one in known:
            if self.status is None:
                detail = f"whether the rows hold {one.label} is known when the state of the model is settled"
                self.checks.append(Check("pack", Health.NOT_CHECKED, detail, pack=one.label))
                continue
            others = [other for other in known if other is not one]
            found = rows_of_pack(one, others, self.checkpoint, base, self.policy, self.status.problem)
            self.checks += found.checks
            if found.presence is not None:
                presence[one.label] = found.presence
        return presence

    def look_along(self, known: Sequence[KnownPack], base: Checkpoint | None) -> dict[str, ChangeAlong]:
        """How much of what changed since the packs were applied lies along their deltas."""
        shares = {}
        for one in known:
            if base is None or one.pack is None or self.status is None:
                continue
            others = rows_of_all([other for other in known if other is not one])
            found = change_along(one.pack, self.checkpoint, base, strength=one.strength, others=others)
            self.checks.append(subspace_check(one.label, found))
            if found is not None:
                shares[one.label] = found
        return shares

    def look_at_standing(self, known: Sequence[KnownPack], *, online: bool) -> None:
        """Signatures and channels."""
        follows = self.status.ledger.follows if self.status else ()
        channels = find_channels(follows, self.policy, self.model, online=online)
        for one in known:
            if one.given is not None:
                self.checks.append(given_signature(one.given, self.policy, one.refusal))
            elif one.applied is not None:
                self.checks.append(kept_signature(self.state_dir, one.pack_id, one.label, self.policy, self.model))
            else:
                detail = f"there is no copy of {one.label} here"
                self.checks.append(Check("signature", Health.NOT_CHECKED, detail, pack=one.label))
            self.checks.append(channel_check(channels, one.pack_id, one.version, one.label))

    def look_at_chat(self, known: Sequence[KnownPack], base: str | Path | None) -> None:
        """The chat template and the generation settings, compared with those of the base as far as they are known."""
        facts, source = _chat_facts(known, base)
        try:
            form = read_chat_form(self.checkpoint.path)
        except NestpatchError as error:
            self.checks.append(Check("template", Health.FAILED, str(error), error.advice))
            return
        self.checks += [template_check(form, facts, source), generation_check(form, facts, source)]

    def compare(self, known: Sequence[KnownPack], measure: Measure) -> None:
        """Numbers that are measured now, with those of the pack on top."""
        try:
            measured = measure()
        except NestpatchError as error:  # the other checks stand without it
            self.checks.append(Check("measurement", Health.NOT_CHECKED, f"the evaluation failed: {error}", error.advice))
            return
        packs = [(one.pack, one.strength) for one in known if one.pack is not None]
        if not packs:
            self.checks.append(Check("measurement", Health.NOT_CHECKED, "there is no pack to compare the numbers with"))
        for pack, strength in packs[-1:]:
            if strength == 1:
                self.checks.append(measurement_check(pack.label, pack.manifest.evaluation, measured))
                continue
            detail = f"{pack.label} was applied at strength {strength:g}, and states its numbers for strength 1"
            self.checks.append(Check("measurement", Health.NOT_CHECKED, detail, pack=pack.label))


def _strength(claim: ReleasedPack | None, given: float) -> float:
    """The strength that the files name, where it is one; else the one that the user gave."""
    found = claim.strength if claim is not None else None
    if isinstance(found, (int, float)) and not isinstance(found, bool) and 0 < found <= 2:
        return float(found)
    return given


def _chat_facts(known: Sequence[KnownPack], base: str | Path | None) -> tuple[Mapping[str, Any] | None, str]:
    """(what is known of the chat form of the base, who says so): a pack that recorded it, else the base itself."""
    for one in known:
        facts = one.pack.manifest.method.get("chat") if one.pack is not None else None
        if isinstance(facts, Mapping) and isinstance(facts.get("prompt"), str):
            return facts, f"the base of {one.label}"
    if base is None or not os.path.exists(base):  # noqa: PTH110 - answers no where Path.exists raises
        return None, ""
    try:
        return read_chat_form(Path(base)).facts(), "the base"
    except NestpatchError:
        return None, ""
