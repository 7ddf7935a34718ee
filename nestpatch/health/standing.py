"""Whether a pack is still one that this machine accepts: its signatures by the policy, and what its channel says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nestpatch.channels.known import KnownChannel, known_addresses, known_channel, read_channel
from nestpatch.channels.listing import ListedStatus
from nestpatch.channels.rules import Upgrade, decide
from nestpatch.errors import NestpatchError, SignatureError, StateError
from nestpatch.gate import Proven, passed
from nestpatch.health.checks import Check, Health
from nestpatch.patcher.kept import judge_kept
from nestpatch.patcher.state_dir import StateDir
from nestpatch.signing.subject import Origin
from nestpatch.signing.trust import Policy

_TRUST = "Trust the publisher's key (nestpatch trust add KEY.pub), or take the pack out of the model: nestpatch revert MODEL"


def kept_signature(state_dir: StateDir, pack_id: str, label: str, policy: Policy, model: Path) -> Check:
    """Judges the signatures that are kept beside a model, by the policy of today.

    Args:
        state_dir: Where the state of the model is.
        pack_id: The pack.
        label: Its name and version.
        policy: Whose signatures count.
        model: The model as the user names it.

    Returns:
        The check.
    """
    try:
        outcome = judge_kept(state_dir, pack_id, policy, model)
    except SignatureError as error:
        return Check("signature", Health.FAILED, f"the policy no longer accepts {label}: {error}", _TRUST, label)
    except StateError as error:
        return Check("signature", Health.NOT_CHECKED, str(error), error.advice, label)
    return given_signature(passed(outcome, Origin(outcome.key_ids)), policy)


def given_signature(proven: Proven, policy: Policy, refusal: SignatureError | None = None) -> Check:
    """Judges a pack that the user named.

    Args:
        proven: The pack, as the gate passed it.
        policy: Whose signatures count.
        refusal: Why the gate refused it; None where it did not.

    Returns:
        The check.
    """
    label = proven.pack.label
    if refusal is not None:
        return Check("signature", Health.FAILED, f"the policy does not accept {label}: {refusal}", _TRUST, label)
    if proven.origin.signers:
        return Check("signature", Health.OK, f"signed by {', '.join(sorted(proven.origin.signers))}", pack=label)
    why = (
        "no key is trusted on this machine"
        if not policy.keys
        else "the policy requires no signature, and no trusted key signed"
    )
    return Check("signature", Health.NOT_CHECKED, f"{why}: who made {label} is not known", "nestpatch trust add KEY.pub", label)


@dataclass(frozen=True)
class Channels:
    """The channels that are known here, and why others are not."""

    known: tuple[KnownChannel, ...]
    problems: tuple[str, ...]


def find_channels(follows: Sequence[str], policy: Policy, model: Path, *, online: bool) -> Channels:
    """Collects the channels that this user has read, and those that the model follows.

    Args:
        follows: Addresses in a ledger that this machine wrote.
        policy: Whose keys count.
        model: The model as the user names it.
        online: Reads them now, instead of remembering.

    Returns:
        The channels.
    """
    known, problems = [], []
    for address in dict.fromkeys((*follows, *known_addresses())):
        try:
            found = read_channel(address, policy, str(model)) if online else known_channel(address)
            known += [found] if found is not None else []
        except (NestpatchError, OSError) as error:
            problems.append(f"{address}: {error}")
    return Channels(tuple(known), tuple(problems))


def channel_check(channels: Channels, pack_id: str, version: str, label: str) -> Check:
    """Whether the channel of a pack still offers it.

    Args:
        channels: What is known.
        pack_id: The pack.
        version: Its version.
        label: Its name and version.

    Returns:
        The check.
    """
    listing = [one for one in channels.known if any(pack.file.sha256 == pack_id for pack in one.channel.packs)]
    if not listing:
        why = f"; {channels.problems[0]}" if channels.problems else ""
        return Check("channel", Health.NOT_CHECKED, f"no channel that this user has read lists {label}{why}", pack=label)
    checks = [_by_channel(one, pack_id, version, label) for one in listing]
    order = [Health.FAILED, Health.WARNING, Health.OK]
    return min(checks, key=lambda check: order.index(check.state))


def _by_channel(known: KnownChannel, pack_id: str, version: str, label: str) -> Check:
    channel, where = known.channel, known.address
    when = f"as last read, of {channel.issued}" if known.remembered else f"of {channel.issued}"
    online = "nestpatch doctor --online asks the channel itself." if known.remembered else ""
    listed = next(pack for pack in channel.packs if pack.file.sha256 == pack_id)
    if listed.status is ListedStatus.YANKED:
        reason = listed.reason or "no reason given"
        return Check("channel", Health.FAILED, f"{where} withdrew {label}: {reason} ({when})", "nestpatch update MODEL", label)
    decision = decide(channel, (version, pack_id))
    if isinstance(decision, Upgrade):
        detail = f"{where} offers {decision.pack.label} instead of {label} ({when})"
        return Check("channel", Health.WARNING, detail, "nestpatch update MODEL", label)
    return Check("channel", Health.OK, f"the latest version of {where} ({when})", online, label)
