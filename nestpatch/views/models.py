"""How a model looks to a person: what was applied to it, what changed, and the state that it is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.plain import count, number
from nestpatch.views.console import escape, fact_grid, out, size

if TYPE_CHECKING:
    from nestpatch.patcher.apply import Applied
    from nestpatch.patcher.inplace import Changed
    from nestpatch.patcher.registry import PatchedModel
    from nestpatch.patcher.status import AppliedPack, ReleasedPack, Status
    from nestpatch.patcher.verify import Verification


_UNSIGNED = " [yellow](came with the model, no key that you trust has signed it)[/]"


def show_applied(done: Applied) -> None:
    """Shows what `apply` wrote.

    Args:
        done: The result; that of a dry run is shown as what would be written.
    """
    verb = "would write" if done.dry_run else "wrote"
    out.print(f"[bold]{escape(done.pack)}[/]{_at(done.strength)} {verb} [bold]{escape(done.output)}[/] in {done.seconds:.2f} s")
    grid = fact_grid()
    grid.add_row("changed", f"{done.rows} rows of {done.tensors} tensors, {size(done.row_bytes)}")
    _add_retention(grid, done.retention)
    for file in done.files:
        digest = f"  sha256 {escape(file.sha256)}" if file.sha256 else ""
        grid.add_row("file", f"{escape(file.path.name)}  {size(file.nbytes)}{digest}")
    if done.left_out:
        grid.add_row("left out", f"{escape(', '.join(done.left_out))} (unpatched weights, or links out of the model)")
    out.print(grid)


def _at(strength: object) -> str:
    """The strength of a pack, where it is not 1."""
    return "" if strength == 1 else f" at strength {number(strength, 'g')}"


def show_changed(done: Changed) -> None:
    """Shows what an in-place command changed.

    Args:
        done: The result; that of a dry run is shown as what would change.
    """
    if not done.steps:
        out.print(f"{escape(done.model)}: nothing to do, the rows hold {escape(', '.join(done.applied) or 'the base')} already")
        return
    verb = "would change" if done.dry_run else "changed"
    counts = f"{done.rows} rows of {done.tensors} tensors, {size(done.row_bytes)}"
    out.print(f"[bold]{escape(done.model)}[/] {verb} in place{_at(done.strength)}: {counts}, in {done.seconds:.2f} s")
    grid = fact_grid()
    for step in done.steps:
        grid.add_row("step", escape(step))
    _add_retention(grid, done.retention)
    if not done.dry_run:
        grid.add_row("now", escape(", ".join(done.applied) or "base"))
    out.print(grid)


def _add_retention(grid: Table, retention: float | None) -> None:
    if retention is not None:
        grid.add_row("retention", f"{retention:.1%} of the pack's change at least, after rounding")


def show_status(found: Status) -> None:
    """Shows what is applied to a model, and what confirms it.

    Args:
        found: What the ledger, the rows, the signatures and the weight files say.
    """
    ledger = found.ledger
    names = ", ".join(one.entry.label for one in found.applied)
    claimed = ", ".join(one.label for one in found.released)
    names = names or (f"nothing applied here, its files name {claimed}" if claimed else "nothing applied")
    doubt = "" if found.sound else " [bold red](the rows do not hold it)[/]"
    out.print(f"[bold]{escape(found.model)}[/]: {escape(names)}{doubt}")
    if found.problem:
        out.print(f"  [bold red]cannot be compared with the rows[/]: {escape(found.problem)}")
    grid = fact_grid()
    for released in found.released:
        grid.add_row("released with", _released_line(released))
        for difference in released.differences[:3]:
            grid.add_row("", f"[red]{escape(difference.tensor)}: {escape(difference.detail)}[/]")
    for one in found.applied:
        grid.add_row(escape(one.entry.when), _applied_line(one))
        for difference in one.missing_in[:3]:
            grid.add_row("", f"[red]{escape(difference.tensor)}: {escape(difference.detail)}[/]")
    for channel in ledger.follows:
        grid.add_row("follows", escape(channel))
    for channel in ledger.offered:
        grid.add_row("came with", f"{escape(channel)} [dim](not followed; to follow it: nestpatch update MODEL --channel)[/]")
    for event in ledger.history:
        what = f"{event.get('what')} {event.get('name')} {event.get('version')}"
        came = " (came with the model)" if event.get("foreign") else ""
        grid.add_row(f"[dim]{escape(event.get('when'))}", f"[dim]{escape(what)}{came}")
    out.print(grid)


def _applied_line(one: AppliedPack) -> str:
    """An applied pack, on one line."""
    entry = one.entry
    came = ""
    if entry.foreign:
        came = " [dim](came with the model)[/]" if one.signers else _UNSIGNED
    rows = sum(record.rows for record in entry.tensors.values())
    strength = _at(entry.strength)
    mismatch = " [bold red]onto another base than its own[/]" if entry.base_mismatch_allowed else ""
    rounded = f", retention {number(entry.retention, '.1%')} {escape(entry.rounding)}" if entry.retention is not None else ""
    signed = f", signed by {escape(', '.join(one.signers))}" if one.signers else ""
    claimed = f", [yellow]claims to be signed by {escape(', '.join(one.claims))}[/]" if one.claims else ""
    pack = f"{escape(entry.label)}{strength}: {count(rows)} rows, pack sha256 {escape(entry.pack_id[:12])}.."
    return f"{pack}{signed}{claimed}, by {escape(entry.tool)}{rounded}{mismatch}{came}"


def _released_line(one: ReleasedPack) -> str:
    """A pack that the metadata of the files names, on one line."""
    label = escape(f"{one.label}{_at(one.strength)}, pack sha256 {one.pack_id[:12]}..")
    if one.differences:
        return f"{label} [bold red](by the file's metadata; {len(one.differences)} of {one.compared} tensors differ from it)[/]"
    checked = f"rows of {one.compared} of {one.tensors} tensors checked against the digests in it"
    checked = checked if one.tensors else "which holds no digests of rows"
    return f"{label} [dim](by the file's metadata, {checked}; `nestpatch verify MODEL PACK` proves it)[/]"


def show_patched(models: Sequence[PatchedModel]) -> None:
    """Shows the models that this user has patched.

    Args:
        models: What the list remembers, the last one first.
    """
    if not models:
        out.print("no patched models: nestpatch has patched none for this user, or all were reverted")
        return
    for one in models:
        applied = ", ".join(entry.label + _at(entry.strength) for entry in one.applied)
        what = {"gone": "gone; it is no longer listed", "base": "nothing applied any more; it is no longer listed"}
        text = applied or what.get(one.state) or one.problem or "nothing applied"
        channels = f" [dim](follows {escape(', '.join(one.follows))})[/]" if one.follows else ""
        out.print(f"[bold]{escape(one.model)}[/]: {escape(text)}{channels}")
    out.print("[dim]by their ledgers; `nestpatch status MODEL` compares the rows")


def show_verification(model: object, found: Verification) -> None:
    """Shows the state of a model, and the first tensors that differ.

    Args:
        model: The model as the user named it.
        found: Its state.
    """
    colour = "green" if found.known else "bold red"
    out.print(f"[{colour}]{escape(found.verdict.value)}[/]  {escape(model)}: {escape(found.detail)}")
    for difference in found.differences[:10]:
        out.print(f"  {escape(difference.tensor)}: {escape(difference.detail)}")
    if len(found.differences) > 10:
        out.print(f"  and {len(found.differences) - 10} more tensors")
    what = "whole tensors" if found.full else "patched rows"
    by = f", recognised by {escape(found.by)}" if found.by else ""
    out.print(f"[dim]{what} of {found.tensors} tensors read in {found.seconds:.2f} s{by}")
