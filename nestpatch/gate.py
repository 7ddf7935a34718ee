"""The gate that every pack passes before it is used: who signed it, and whether that is enough for this model.

`prove` takes a file, a channel or a Pack and returns a Proven, or raises a SignatureError, ChannelError, HubError or PackError
with the reason. Commands and Python callers use the same function. The only way around it has a name: `trust="none"`.
"""

from __future__ import annotations

import re
from dataclasses import field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from nestpatch.errors import PackError, UnsignedError
from nestpatch.events import OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.signing.store import load_policy
from nestpatch.signing.subject import EVERYTHING, Origin, Subject
from nestpatch.signing.trust import Policy, Rule
from nestpatch.signing.verify import SignatureResult, UnverifiedPack, apply_policy, verify_signature
from nestpatch.values import dataclass

CHANNELS = ("hub://", "file://", "https://", "http://")
"""Beginnings of texts that name a pack by its channel instead of by a file."""
Trust: TypeAlias = Literal["policy", "none"]
"""Whether the trusted keys decide; "none" accepts any well-formed pack."""


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
    """Why no signature was required; empty when the policy required one."""


PackLike: TypeAlias = "str | Path | Pack | Proven"
"""What verbs take as a pack: a file, a channel as text, a pack in memory, or one that passed the gate already."""


def prove(
    pack: PackLike,
    model: str | Path | None = None,
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    on_event: OnEvent = ignore,
) -> Proven:
    """Opens a pack and judges its signatures.

    Args:
        pack: A file, a channel (hub://owner/name[@VERSION], https://..., file://...), a Pack, or a Proven, which passes as
            it is. A Pack in memory has no signature, so a policy that requires one refuses it.
        model: What the pack is for, as the user names it. Together with the base in the pack's manifest it decides which rules
            and keys of the policy count.
        policy: Whose signatures count; None means the policy of this user and this machine.
        trust: "none" skips the judgement of signatures; a channel is still followed by its rules.
        allow_unsigned: Accepts a pack that too few trusted keys have signed. A wrong signature is never accepted, nor is what
            the administrator's rules refuse.
        on_event: Receives the progress of a download.

    Returns:
        The pack that was checked, with its origin.

    Raises:
        SignatureError: Too few trusted keys signed it, or a signature is wrong.
        PackError: The file is not a pack.
        ChannelError: The channel breaks a rule.
        HubError: A server did not return what was requested.
    """
    if isinstance(pack, Proven):
        return pack
    rules = policy_of(policy, trust)
    if isinstance(pack, Pack):
        done = _in_memory(pack, rules, model, allow_unsigned=allow_unsigned)
    elif is_channel(pack):
        from nestpatch.channels.follow import fetch_pack

        fetched = fetch_pack(str(pack), rules, model, allow_unsigned=allow_unsigned or trust == "none", on_event=on_event)
        done = passed(fetched.result, fetched.origin)
    else:
        outcome = _judge_file(pack, rules, model, allow_unsigned=allow_unsigned)
        suffixes = {name.removeprefix(Path(pack).name): content for name, content in outcome.signatures.items()}
        done = passed(outcome, Origin(outcome.key_ids, signatures=suffixes))
    return replace(done, unchecked=_why_unchecked(done, rules, trust)) if done.unchecked else done


def look(pack: PackLike, *, policy: Policy | None = None, on_event: OnEvent = ignore) -> Proven:
    """Opens a pack that is only read: shown, compared, or searched for in a model. It need not be signed.

    Args:
        pack: As for `prove`.
        policy: Whose keys its signatures are checked with; None means the policy of this user and this machine.
        on_event: Receives the progress of a download.

    Returns:
        The pack, with its origin.

    Raises:
        SignatureError: A signature that it has is wrong.
        PackError: The file is not a pack.
        ChannelError: The channel breaks a rule.
        HubError: A server did not return what was requested.
    """
    known = load_policy(needs_home=False) if policy is None else policy
    unsigned = Policy(known.keys, (Rule(EVERYTHING, 0),))
    return prove(pack, policy=unsigned, allow_unsigned=True, on_event=on_event)


def is_channel(pack: object) -> bool:
    """Whether a pack is named by its channel.

    Args:
        pack: What a verb takes as a pack.

    Returns:
        True for a text that begins like one of CHANNELS.
    """
    return isinstance(pack, str) and pack.startswith(CHANNELS)


def policy_of(policy: Policy | None, trust: Trust = "policy") -> Policy:
    """The policy that counts.

    Args:
        policy: As a verb takes it; None means the policy of this user and this machine.
        trust: "none" means an empty policy.

    Returns:
        The policy.

    Raises:
        TrustError: The policy of this user cannot be read.
    """
    return Policy() if trust == "none" else load_policy() if policy is None else policy


def passed(outcome: SignatureResult, origin: Origin) -> Proven:
    """The Proven of a pack whose signatures were judged.

    Args:
        outcome: The judgement, with the pack.
        origin: Where the pack came from.

    Returns:
        The pack, with its origin and what the caller or the policy let pass.
    """
    reason = outcome.reason if isinstance(outcome, UnverifiedPack) else ""
    if isinstance(outcome, UnverifiedPack) and not outcome.required:
        return Proven(outcome.pack, outcome.pack_id, origin, unchecked=reason)
    return Proven(outcome.pack, outcome.pack_id, origin, warning=reason)


def _why_unchecked(done: Proven, policy: Policy, trust: Trust) -> str:
    label = done.pack.label
    if trust == "none":
        return f"the caller asked for it: the signatures of {label} were not checked"
    if not policy.keys:
        return f"no key is trusted on this machine: the signature of {label} was not checked (nestpatch trust add)"
    return f"{done.unchecked}, and no rule requires a signature of {label}"


def _in_memory(pack: Pack, policy: Policy, model: str | Path | None, *, allow_unsigned: bool) -> Proven:
    file = f"{pack.label}, a value in memory,"
    try:
        outcome = apply_policy(pack, nest.pack_id(pack), policy, Subject.of(model), file=file, allow_unsigned=allow_unsigned)
    except UnsignedError as error:
        advice = 'Give the pack\'s file with its .sig beside it, or accept the pack without a signature: trust="none".'
        raise UnsignedError(str(error), advice=advice) from error
    return passed(outcome, Origin())


def _judge_file(pack: str | Path, policy: Policy, model: str | Path | None, *, allow_unsigned: bool) -> SignatureResult:
    try:
        return verify_signature(pack, policy, model, allow_unsigned=allow_unsigned)
    except PackError as error:
        if not Path(pack).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", str(pack)):
            error.advice = f"Check the path. A channel of the Hub is named with its scheme: hub://{pack}"
        raise
