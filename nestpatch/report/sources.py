"""What a report is about: a pack, a model, or the stored numbers of an evaluation, each read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestpatch.compare.diff import is_pack
from nestpatch.errors import DataError, UnsignedError, UntrustedError
from nestpatch.events import OnEvent, ignore
from nestpatch.files.reading import MAX_JSON, read_text
from nestpatch.gate import Proven, look, prove
from nestpatch.measured import strength_of
from nestpatch.patcher.status import Status, status
from nestpatch.signing.store import load_policy
from nestpatch.signing.trust import Policy

_ADVICE = "Write it with: nestpatch eval MODEL PACK --json > eval.json"


@dataclass(frozen=True, eq=False)
class SignedPack:
    """A pack, and what its signatures are worth here.

    Attributes:
        name: The file name or the address of the channel.
        proven: The pack, with its origin.
        lack: Why it does not count as signed; empty where the policy's keys have signed it.
    """

    name: str
    proven: Proven
    lack: str = ""

    @property
    def verdict(self) -> str:
        """Whether it is "signed", "not trusted" or "not signed"."""
        if not self.lack:
            return "signed"
        return "not trusted" if self.proven.origin.signatures else "not signed"

    @property
    def reason(self) -> str:
        """Why it is not "signed", for people."""
        return self.lack if self.proven.origin.signatures else f"no signature of {self.proven.pack.label} was found"


@dataclass(frozen=True, eq=False)
class Subject:
    """What a page is about.

    Attributes:
        source: The path or channel as it was given.
        pack: The pack to describe; None where none was given.
        model: What is applied to a model; None for a page about a pack or an evaluation.
        evaluation: The stored numbers, {"before", "after", ..}; empty where there are none.
        measured: The model and the pack that an evaluation file names; empty for the numbers inside of a pack.
        from_file: Whether the numbers come from an evaluation file and not from the pack.
    """

    source: str
    pack: SignedPack | None = None
    model: Status | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    measured: str = ""
    from_file: bool = False


def read_subject(source: str, pack: str | None = None, policy_file: Path | None = None, on_event: OnEvent = ignore) -> Subject:
    """Reads what a report is about.

    Args:
        source: A pack or its channel, a model, or a JSON file that `eval --json` printed.
        pack: A pack to describe as well, where the source is a model or an evaluation.
        policy_file: Whose signatures count; None means the policy of this user and this machine.
        on_event: Receives the progress of a download.

    Returns:
        The content of the page.

    Raises:
        DataError: The file is no evaluation, or is one of another pack; or two packs were given.
        SignatureError: A signature of the pack is wrong.
        PackError: The pack cannot be read.
        CheckpointError: The model cannot be read.
        StateError: The state beside the model is broken, or a change was interrupted.
    """
    policy = load_policy(policy_file, needs_home=False)
    if is_pack(source):
        if pack is not None:
            raise DataError(f"{source} is a pack already: --pack goes with a model or an evaluation")
        own = _signed(source, policy, on_event)
        return Subject(source, own, evaluation=own.proven.pack.manifest.evaluation)
    evaluation = _evaluation(Path(source)) if _may_be_evaluation(Path(source)) else None
    signed = None if pack is None else _signed(pack, policy, on_event)
    if evaluation is None:
        stored = signed.proven.pack.manifest.evaluation if signed else {}
        return Subject(source, signed, status(source, policy), stored)
    named = evaluation.get("pack")
    if signed is not None and named is not None and named != signed.proven.pack.label:
        raise DataError(f"{source} measures {named}, and --pack gives {signed.proven.pack.label}")
    return Subject(source, signed, evaluation=evaluation, measured=_measured(evaluation), from_file=True)


def _measured(evaluation: Mapping[str, Any]) -> str:
    """Whose numbers an evaluation file holds: of the model alone, or also of the model with a pack at some strength."""
    added = evaluation.get("pack") or evaluation.get("adapter") if isinstance(evaluation.get("after"), Mapping) else None
    facts = [str(fact) for fact in (evaluation.get("model"), added) if fact]
    strength = strength_of(evaluation)
    return " with ".join(facts) + (f" at strength {strength:g}" if added and strength != 1 else "")


def _signed(pack: str, policy: Policy, on_event: OnEvent) -> SignedPack:
    """Opens a pack for reading: one that the policy would not let pass is described all the same, a wrong signature is not."""
    try:
        proven = prove(pack, policy=policy, allow_unsigned=True, on_event=on_event)
        lack = proven.warning or proven.unchecked
    except (UnsignedError, UntrustedError) as error:  # the administrator's rules allow no exception
        proven, lack = look(pack, policy=policy, on_event=on_event), str(error)
    name = pack if "://" in pack else Path(pack).name
    return SignedPack(name, proven, lack)


def _may_be_evaluation(path: Path) -> bool:
    return path.suffix.lower() == ".json" and not path.name.endswith(".index.json") and path.is_file()


def _evaluation(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(read_text(path, MAX_JSON, error=DataError))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", advice=_ADVICE) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", advice=_ADVICE) from error
    if not isinstance(value, Mapping) or not isinstance(value.get("before"), Mapping):
        raise DataError(f"{path} is not an evaluation: it has no object `before`", advice=_ADVICE)
    return value
