"""How keys, signatures and policies are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.plain import count
from nestpatch.views.console import escape, out

if TYPE_CHECKING:
    from nestpatch.signing.keys import KeyPair
    from nestpatch.signing.trust import Policy
    from nestpatch.signing.verify import SignatureFile, SignatureResult


def show_pair(pair: KeyPair) -> None:
    """A new key pair."""
    out.print(f"wrote [bold]{escape(pair.private)}[/]: keep it secret, and keep a copy in a safe place")
    out.print(f"wrote [bold]{escape(pair.public)}[/]: give it to those who are to trust your packs")
    out.print(f"key id {escape(pair.key_id)}")


def show_signature(done: SignatureFile) -> None:
    """A new signature."""
    out.print(f"wrote [bold]{escape(done.file)}[/] for sha256 {escape(done.pack_id)}, with key {escape(done.key_id[:12])}..")


def show_result(pack: str, found: SignatureResult) -> None:
    """Who signed a pack, or why that does not count."""
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


def show_policy(policy: Policy, file: str) -> None:
    """The trusted keys and the rules."""
    if not policy.keys and not policy.rules:
        out.print(f"no key is trusted yet ({escape(file)}): nestpatch trust add KEY.pub --name NAME")
        return
    _show_rules(policy)


def show_system_policy(policy: Policy, file: str) -> None:
    """The administrator's keys and rules, where there are any."""
    if policy.keys or policy.rules:
        out.print(f"by the administrator of this machine, in {escape(file)}:")
        _show_rules(policy)


def _show_rules(policy: Policy) -> None:
    table = Table("key", "id", "models", box=None, pad_edge=False, header_style="dim")
    for trusted in policy.keys:
        table.add_row(escape(trusted.name), f"{escape(trusted.key.key_id[:12])}..", escape(", ".join(trusted.models)))
    out.print(table)
    for rule in policy.rules:
        keys = f" of {', '.join(rule.keys)}" if rule.keys else ""
        out.print(f"packs for {escape(rule.model)} need {count(rule.require)} signatures{escape(keys)}")
