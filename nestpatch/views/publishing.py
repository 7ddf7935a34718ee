"""How keys, signatures, policies and the results of push, yank, renew, pull and update are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.plain import count
from nestpatch.views.console import err, escape, out

if TYPE_CHECKING:
    from nestpatch.channels.follow import Pulled
    from nestpatch.channels.publish import Published
    from nestpatch.patcher.update import Updated
    from nestpatch.signing.keys import KeyPair
    from nestpatch.signing.trust import Policy
    from nestpatch.signing.verify import SignatureFile, SignatureResult


def show_pair(pair: KeyPair) -> None:
    """Shows a new key pair.

    Args:
        pair: The files that were written.
    """
    out.print(f"wrote [bold]{escape(pair.private)}[/]: keep it secret, and keep a copy in a safe place")
    out.print(f"wrote [bold]{escape(pair.public)}[/]: give it to those who are to trust your packs")
    out.print(f"key id {escape(pair.key_id)}")


def show_signature(done: SignatureFile) -> None:
    """Shows a new signature.

    Args:
        done: The file that was written.
    """
    out.print(f"wrote [bold]{escape(done.file)}[/] for sha256 {escape(done.pack_id)}, with key {escape(done.key_id[:12])}..")


def show_result(pack: str, found: SignatureResult) -> None:
    """Shows who signed a pack, or why the pack is not proven.

    Args:
        pack: The pack as the user named it.
        found: The result of the check.
    """
    from nestpatch.signing.verify import VerifiedPack

    if not isinstance(found, VerifiedPack):
        out.print(f"[bold yellow]unproven[/]  {escape(found.reason)}")
        return
    label = found.pack.manifest
    out.print(
        f"[bold green]signed[/]  {escape(pack)}: {escape(label.name)} {escape(label.version)}, sha256 {escape(found.pack_id)}"
    )
    for signer in found.signers:
        out.print(f"  by [bold]{escape(signer.name)}[/], key {escape(signer.key_id[:12])}.., in {escape(signer.file)}")


def show_policies(own: Policy, file: str, system: Policy, system_file: str) -> None:
    """Shows the trusted keys and the rules.

    Args:
        own: Those of this user.
        file: Where they are stored.
        system: Those of the administrator of this machine; shown where there are any.
        system_file: Where these are stored.
    """
    if not own.keys and not own.rules:
        out.print(f"no key is trusted yet ({escape(file)}): nestpatch trust add KEY.pub --name NAME")
    for policy in (own, system):
        if not policy.keys and not policy.rules:
            continue
        if policy is system:
            out.print(f"by the administrator of this machine, in {escape(system_file)}:")
        table = Table("key", "id", "models", box=None, pad_edge=False, header_style="dim")
        for trusted in policy.keys:
            table.add_row(escape(trusted.name), f"{escape(trusted.key.key_id[:12])}..", escape(", ".join(trusted.models)))
        out.print(table)
        for rule in policy.rules:
            keys = f" of {', '.join(rule.keys)}" if rule.keys else ""
            out.print(f"packs for {escape(rule.model)} need {count(rule.require)} signatures{escape(keys)}")


def show_published(done: Published) -> None:
    """Shows the state of a channel after a change.

    Args:
        done: What `push`, `yank` or `renew` returned.
    """
    out.print(f"[bold]{escape(done.address)}[/]: {escape(done.message)}")
    latest = f"latest version {done.latest}" if done.latest else "no version is active"
    out.print(f"number {count(done.serial)}, valid until {escape(done.expires)}, {escape(latest)}")


def show_pulled(done: Pulled) -> None:
    """Shows a pack that was downloaded.

    Args:
        done: What `pull` returned.
    """
    who = (
        f"signed by {escape(', '.join(done.signers))}" if done.signers else "[bold yellow]not signed by a key that you trust[/]"
    )
    out.print(f"[bold]{escape(done.pack)}[/] of {escape(done.address)}, {who}")
    out.print(f"wrote [bold]{escape(done.file)}[/], sha256 {escape(done.pack_id)}")


def show_updated(model: Path, results: Sequence[Updated]) -> None:
    """Shows what the channels of a model changed, or would change.

    A channel that was refused or could not be reached is shown on stderr, like any other error.

    Args:
        model: The model.
        results: One for each channel.
    """
    for result in results:
        if result.state == "failed":
            err.print(f"[bold red]{escape(result.error)}[/]: {escape(result.reason)}")
            err.print(f"[bold]What to do[/]: {escape(result.advice)}")
            err.print(f"Nothing was applied from [bold]{escape(result.address)}[/].")
            continue
        before, after = result.before or "base", result.after or "base"
        line = f"[bold]{escape(model)}[/], {escape(result.address)}: "
        if result.state == "current":
            out.print(f"{line}{escape(before)} is up to date; the channel is valid until {escape(result.expires)}")
            continue
        yanked = f" ({before} was yanked: {result.reason or 'no reason given'})" if result.reason else ""
        # The same version again: the rows did not contain it.
        yanked = f" ({result.reason})" if before == after else yanked
        verb = "would go" if result.state == "available" else "went"
        out.print(f"{line}{verb} from {escape(before)} to {escape(after)}{escape(yanked)}")
