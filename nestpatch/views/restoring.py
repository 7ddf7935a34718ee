"""How the packs of `restore` look to a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nestpatch.views.console import escape, out, size

if TYPE_CHECKING:
    from nestpatch.restore.result import Restored


def show_restored(done: Restored) -> None:
    """Shows the pack that was made, and what is to be done with it.

    Args:
        done: The result.
    """
    out.print(
        f"wrote [bold]{escape(done.output)}[/] for {escape(done.model)}: {size(done.nbytes)}, sha256 {escape(done.pack_id)}"
    )
    out.print(f"{done.rows} of {done.considered} rows of {len(done.tensors)} matrices changed")
    if done.inexact:
        out.print(f"[yellow]{done.inexact} rows[/] get other stored values than wanted: the merge rounds them")
    if done.moved:
        out.print(f"[yellow]{done.moved} rows[/] have another number than in the base")
    out.print(escape(done.note))
