"""How channels look to a person."""

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
    """A change to a channel."""
    out.print(f"[bold]{escape(done.place)}[/]: {escape(done.done)}")
    latest = f"latest version {done.latest}" if done.latest else "no version is active"
    out.print(f"number {count(done.serial)}, good until {escape(done.expires)}, {escape(latest)}")


def show_pulled(done: Pulled) -> None:
    """A pack that was fetched."""
    who = (
        f"signed by {escape(', '.join(done.signers))}"
        if done.signers
        else "[bold yellow]not signed by anybody whom you trust[/]"
    )
    out.print(f"[bold]{escape(done.pack)}[/] of {escape(done.channel)}, {who}")
    out.print(f"wrote [bold]{escape(done.file)}[/], sha256 {escape(done.pack_id)}")


def show_updated(model: Path, results: Sequence[Updated]) -> None:
    """What the channels of a model meant for it."""
    for result in results:
        if result.state == "failed":
            show_failed(result)
            continue
        before, after = result.before or "base", result.after or "base"
        line = f"[bold]{escape(model)}[/], {escape(result.channel)}: "
        if result.state == "current":
            out.print(f"{line}{escape(before)} is up to date; the channel is good until {escape(result.expires)}")
            continue
        revoked = f" ({before} was revoked: {result.reason or 'no reason given'})" if result.reason else ""
        # The same version again: the rows did not hold it as they should.
        revoked = f" ({result.reason})" if before == after else revoked
        verb = "would go" if result.state == "available" else "went"
        out.print(f"{line}{verb} from {escape(before)} to {escape(after)}{escape(revoked)}")


def show_failed(result: Updated) -> None:
    """A channel that was refused or could not be reached: its error, as errors look elsewhere, and the channel."""
    err.print(f"[bold red]{escape(result.error)}[/]: {escape(result.reason)}")
    err.print(f"[bold]What to do[/]: {escape(result.advice)}")
    err.print(f"Nothing was applied from [bold]{escape(result.channel)}[/].")
