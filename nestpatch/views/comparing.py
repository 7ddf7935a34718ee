"""How differences look to a person: two models, or two packs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from nestpatch.views.console import escape, fact_grid, out, size, table_of

if TYPE_CHECKING:
    from nestpatch.compare.diff import CheckpointDiff, LayerChange
    from nestpatch.compare.extract import Extracted
    from nestpatch.compare.packs import PackDiff


MOST_TENSORS = 40
"""Changed tensors that are listed; of more, only their number is shown."""


def show_diff(found: CheckpointDiff | PackDiff | Extracted) -> None:
    """Shows what differs between two models or two packs.

    Args:
        found: The difference, or the pack that was extracted from one.
    """
    from nestpatch.compare.diff import CheckpointDiff
    from nestpatch.compare.packs import PackDiff

    if isinstance(found, PackDiff):
        _show_pack_diff(found)
        return
    if isinstance(found, CheckpointDiff):
        _show_checkpoint_diff(found)
        return
    _show_checkpoint_diff(found.difference)
    counts = f"{found.rows} rows in {found.clusters} clusters"
    out.print(f"wrote [bold]{escape(found.pack)}[/]: {counts}, {size(found.nbytes)}, sha256 {escape(found.pack_id)}")


def _show_checkpoint_diff(found: CheckpointDiff) -> None:
    where = f"{escape(found.a)} and {escape(found.b)}"
    if found.identical:
        out.print(f"[green]identical[/]  {where}: {found.compared} tensors")
        return
    rows = sum(tensor.changed for tensor in found.changed)
    counts = f"{rows} rows of {len(found.changed)} tensors changed, {found.compared} tensors compared"
    out.print(f"[bold]different[/]  {where}: {counts}")
    for odd in found.mismatches[:10]:
        sides = " and ".join(filter(None, (odd.a, odd.b)))
        out.print(f"  {escape(odd.name)}: {escape(odd.what)} {escape(sides)}")
    if len(found.mismatches) > 10:
        out.print(f"  and {len(found.mismatches) - 10} more tensors of other shapes, types or names")
    if found.changed:
        table = table_of("tensor", "rows", "of", "relative norm", "largest")
        table.add_column("first rows")
        for tensor in found.changed[:MOST_TENSORS]:
            first = ", ".join(map(str, tensor.first_rows)) + (", .." if tensor.changed > len(tensor.first_rows) else "")
            norms = _number(tensor.relative), f"{_number(tensor.largest)} in row {tensor.largest_row}"
            table.add_row(escape(tensor.name), str(tensor.changed), str(tensor.rows), *norms, first)
        if len(found.changed) > MOST_TENSORS:
            table.add_row(f"and {len(found.changed) - MOST_TENSORS} more")
        out.print(table)
    for stack in dict.fromkeys(layer.stack for layer in found.layers):
        out.print(_strip(stack, [layer for layer in found.layers if layer.stack == stack]))


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _strip(stack: str, layers: list[LayerChange]) -> str:
    """One character for each layer: the darker, the more rows of it changed."""
    # stdout may be ASCII.
    shades = "·░▒▓█" if out.encoding.lower().startswith("utf") else ".-+*#"
    most = max(layer.changed for layer in layers)
    # Rounded up, so that a single changed row is visible.
    cells = "".join(shades[-(-4 * layer.changed // most) if most else 0] for layer in layers)
    legend = f"layers {layers[0].layer} to {layers[-1].layer}, {shades[-1]} = {most} rows" if most else "no layer changed"
    return f"{escape(stack or 'layers')}  {cells}  [dim]{legend}[/]"


def _show_pack_diff(found: PackDiff) -> None:
    """Shows what an update from one pack to the other changes."""
    out.print(f"[bold]{escape(found.a)}[/] to [bold]{escape(found.b)}[/]{': the same pack' if found.identical else ''}")
    grid = fact_grid()
    grid.add_row("ids", f"sha256 {escape(found.ids[0])}\nsha256 {escape(found.ids[1])}")
    base = {
        True: "the same",
        False: "[bold red]another[/]: " + escape(", ".join(found.foreign[:3])),
        None: "no tensor in common",
    }
    grid.add_row("base", base[found.same_base])
    alone: Counter[tuple[str, str]] = Counter()
    for field in found.fields:
        # Of the evaluation only the headline numbers; --json has all of it.
        if field.field.startswith("evaluation.") and (".suites." in field.field or not field.field.endswith(".value")):
            continue
        group = ".".join(field.field.split(".")[:2])
        if None in (field.a, field.b) and field.field != group:
            alone[group, found.a if field.b is None else found.b] += 1
            continue
        sides = ["nothing" if side in (None, "") else escape(str(side)[:200]) for side in (field.a, field.b)]
        grid.add_row(escape(field.field), " [dim]to[/] ".join(sides))
    for (group, pack), count in alone.items():
        fields = "1 field" if count == 1 else f"{count} fields"
        grid.add_row(f"{escape(group)}.*", f"{fields} in {escape(pack)} alone")
    out.print(grid)
    table = table_of("tensor", "rows kept", "added", "removed", "with other deltas", "relative norm", "clusters")
    for tensor in found.tensors:
        counts = tensor.kept, tensor.added, tensor.removed, tensor.changed
        kinds = zip(tensor.clusters, tensor.ranks, strict=True)
        clusters = " to ".join(f"rank {rank}" if rank else str(count) for count, rank in kinds)
        table.add_row(escape(tensor.name), *map(str, counts), _number(tensor.relative), clusters)
    out.print(table)
