"""How the results of push, yank, renew, pull and update are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nestpatch.plain import count
from nestpatch.views.console import err, escape, out

if TYPE_CHECKING:
    from nestpatch.channels.follow import Pulled
    from nestpatch.channels.publish import Published
    from nestpatch.patcher.update import Updated


def show_published(done: Published) -> None:
    """The state of a channel after a change."""
    out.print(f"[bold]{escape(done.address)}[/]: {escape(done.message)}")
    latest = f"latest version {done.latest}" if done.latest else "no version is active"
    out.print(f"number {count(done.serial)}, valid until {escape(done.expires)}, {escape(latest)}")


def show_pulled(done: Pulled) -> None:
    """A pack that was downloaded."""
    who = (
        f"signed by {escape(', '.join(done.signers))}" if done.signers else "[bold yellow]not signed by a key that you trust[/]"
    )
    out.print(f"[bold]{escape(done.pack)}[/] of {escape(done.address)}, {who}")
    out.print(f"wrote [bold]{escape(done.file)}[/], sha256 {escape(done.pack_id)}")


def show_updated(model: Path, results: Sequence[Updated]) -> None:
    """What the channels of a model changed, or would change."""
    for result in results:
        if result.state == "failed":
            show_failed(result)
            continue
        before, after = result.before or "base", result.after or "base"
        line = f"[bold]{escape(model)}[/], {escape(result.channel)}: "
        if result.state == "current":
            out.print(f"{line}{escape(before)} is up to date; the channel is valid until {escape(result.expires)}")
            continue
        revoked = f" ({before} was revoked: {result.reason or 'no reason given'})" if result.reason else ""
        # The same version again: the rows did not contain it.
        revoked = f" ({result.reason})" if before == after else revoked
        verb = "would go" if result.state == "available" else "went"
        out.print(f"{line}{verb} from {escape(before)} to {escape(after)}{escape(revoked)}")


def show_failed(result: Updated) -> None:
    """A channel that was refused or could not be reached: its error, shown like any other, and the channel."""
    err.print(f"[bold red]{escape(result.error)}[/]: {escape(result.reason)}")
    err.print(f"[bold]What to do[/]: {escape(result.advice)}")
    err.print(f"Nothing was applied from [bold]{escape(result.channel)}[/].")
