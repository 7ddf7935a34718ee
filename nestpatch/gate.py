"""The gate that every pack passes before it is used: who signed it, and is that enough for this model?

`(file, channel or Pack, policy, model) -> Proven`, or a SignatureError, ChannelError, HubError or PackError with the reason.
Commands and Python callers use the same function. What skips it is named: `trust="none"`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from nestpatch.errors import PackError, UnsignedError
from nestpatch.events import OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.signing.subject import EVERYTHING, Origin, subject_of
from nestpatch.signing.trust import Policy, Rule, load_for_looking, load_policy
from nestpatch.signing.verify import SignatureResult, UnverifiedPack, ValidSignatures, apply_policy, signers_of, verify_file

if TYPE_CHECKING:
    from nestpatch.channels.follow import Downloaded

CHANNELS = ("hub://", "file://", "https://", "http://")
"""How a patch is named by its channel instead of by a file."""
Trust: TypeAlias = Literal["policy", "none"]
"""Whether the trusted keys decide, or nobody: "none" takes any well-formed pack."""


@dataclass(frozen=True, eq=False)
class Proven:
    """A pack that passed the gate."""

    pack: Pack
    """What was checked. Use this value: the file may change afterwards."""
    pack_id: str
    """SHA-256 of the pack's bytes, hex."""
    origin: Origin = field(default_factory=Origin)
    warning: str = ""
    """Why it would not have passed without the caller's permission; empty when the policy is met."""
    unchecked: str = ""
    """Why no signature was asked for; empty when the policy asked for one."""


PackLike: TypeAlias = "str | Path | Pack | Proven"
"""What verbs take as a patch: a file, a channel as text, a pack in memory, or what passed the gate already."""


def prove(
    pack: PackLike,
    model: str | Path | None = None,
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    on_event: OnEvent = ignore,
) -> Proven:
    """Opens a patch and judges its signatures.

    Args:
        pack: A file, a channel (hub://owner/name[@VERSION], https://..., file://...), a Pack, or a Proven, which passes as
            it is. A Pack in memory has no signature, so a policy that asks for one refuses it.
        model: What the patch is for, as the user names it: decides which rules and keys of the policy count, together with
            what the pack says of its base.
        policy: None means that of this user and this machine; a value is taken as it is.
        trust: "none" skips the judgement of signatures; a channel is still followed by its rules.
        allow_unsigned: Lets a patch pass that too few trusted keys have signed. A wrong signature never passes, nor does what
            the administrator's rules refuse.
        on_event: Hears of the download.

    Raises:
        SignatureError: Too few trusted keys signed it, or a signature is wrong.
        PackError: The file is no pack.
        ChannelError: The channel breaks a rule.
        HubError: A server did not give what was asked for.
    """
    if isinstance(pack, Proven):
        return pack
    rules = policy_of(policy, trust)
    if isinstance(pack, Pack):
        done = _in_memory(pack, rules, model, allow_unsigned=allow_unsigned)
    elif is_channel(pack):
        from nestpatch.channels.follow import fetch_pack

        done = passed(fetch_pack(str(pack), rules, model, allow_unsigned=allow_unsigned or trust == "none", on_event=on_event))
    else:
        outcome, signatures = _judge_file(pack, rules, model, allow_unsigned=allow_unsigned)
        done = _passed(outcome, Origin(signers_of(outcome), signatures=signatures))
    return replace(done, unchecked=_why_unchecked(done, rules, trust)) if done.unchecked else done


def look(pack: PackLike, *, policy: Policy | None = None, on_event: OnEvent = ignore) -> Proven:
    """Opens a patch that is only read: shown, compared, looked for in a model. It need not be signed.

    What signatures it has must be sound, by the keys of the policy, and a channel holds to its rules. Raises as `prove` does.
    """
    known = load_for_looking() if policy is None else policy
    anybody = Policy(known.keys, (Rule(EVERYTHING, 0),))
    return prove(pack, policy=anybody, allow_unsigned=True, on_event=on_event)


def is_channel(pack: object) -> bool:
    """Whether a patch is named by its channel."""
    return isinstance(pack, str) and pack.startswith(CHANNELS)


def policy_of(policy: Policy | None, trust: Trust = "policy") -> Policy:
    """The policy that counts: none of all for trust="none", this user's where none is given. Raises TrustError."""
    return Policy() if trust == "none" else load_policy() if policy is None else policy


def passed(done: Downloaded) -> Proven:
    """A version that was fetched from a channel, and judged on the way."""
    return _passed(done.result, done.origin)


def _passed(outcome: SignatureResult, origin: Origin) -> Proven:
    reason = outcome.reason if isinstance(outcome, UnverifiedPack) else ""
    if isinstance(outcome, UnverifiedPack) and not outcome.required:
        return Proven(outcome.pack, outcome.pack_id, origin, unchecked=reason)
    return Proven(outcome.pack, outcome.pack_id, origin, warning=reason)


def _why_unchecked(done: Proven, policy: Policy, trust: Trust) -> str:
    label = done.pack.label
    if trust == "none":
        return f"the caller answers for {label}: nothing was asked of its signatures"
    if not policy.keys:
        return f"no key is trusted on this machine: the signature of {label} was not checked (nestpatch trust add)"
    return f"{done.unchecked}, and no rule asks for a signature: nobody answers for {label}"


def _in_memory(pack: Pack, policy: Policy, model: str | Path | None, *, allow_unsigned: bool) -> Proven:
    file = f"{pack.label}, a value in memory,"
    try:
        outcome = apply_policy(
            pack, nest.pack_id(pack), ValidSignatures({}), policy, subject_of(model), file=file, allow_unsigned=allow_unsigned
        )
    except UnsignedError as error:
        advice = 'Give the pack\'s file with its .sig beside it, or answer for it: trust="none".'
        raise UnsignedError(str(error), advice=advice) from error
    return _passed(outcome, Origin())


def _judge_file(
    pack: str | Path, policy: Policy, model: str | Path | None, *, allow_unsigned: bool
) -> tuple[SignatureResult, dict[str, bytes]]:
    """The judgement, and what follows the pack's file name -> content of each signature that was judged."""
    name = Path(pack).name
    try:
        outcome, signatures = verify_file(pack, policy, model, allow_unsigned=allow_unsigned)
        return outcome, {file.removeprefix(name): content for file, content in signatures.items()}
    except PackError as error:
        if not Path(pack).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", str(pack)):
            error.advice = f"Check the path. A channel of the Hub is named with its scheme: hub://{pack}"
        raise
