"""How a pack looks to a person, and the settings of the training that makes one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nestpatch.plain import count, number
from nestpatch.views.console import escape, fact_grid, out, size, table_of
from nestpatch.views.evaluation import HEADLINES

if TYPE_CHECKING:
    from nestpatch.pack import Pack, TensorDelta

MOST_LAYERS = 4
"""Layers whose training is shown; --rows shows all."""
_NUMBER = re.compile(r"(\d{1,9})", re.ASCII)


def show_pack(pack: Pack, pack_id: str, nbytes: int, *, rows: bool = False) -> None:
    """Explains a pack: what it changes, how it was trained, what was measured.

    Args:
        pack: The pack.
        pack_id: SHA-256 of its file, hex.
        nbytes: Size of its file.
        rows: Whether to list every tensor and every layer, not their sums.
    """
    manifest, base = pack.manifest, pack.manifest.base
    out.print(f"[bold]{escape(pack.label)}[/]  {escape(manifest.description)}")
    grid = fact_grid()
    revision = f" at {base.revision}" if base.revision else ""
    grid.add_row("id", f"sha256 {escape(pack_id)}")
    grid.add_row("base", escape(f"{base.model_id}{revision} ({base.architecture}, {base.dtype})"))
    grid.add_row("made", f"{escape(manifest.created)}, license {escape(manifest.license or 'not stated')}")
    changed = f"{sum(delta.neurons for delta in pack)} rows of {len(pack.deltas)} tensors through {pack.parameters} numbers"
    grid.add_row("size", f"{size(nbytes)}: {changed} ({', '.join(pack.delta_dtypes)})")
    for what, listed in (("tags", manifest.tags), ("supersedes", manifest.supersedes), ("requires", manifest.requires)):
        if listed:
            grid.add_row(what, escape(", ".join(listed)))
    out.print(grid)
    out.print(_tensors(pack) if rows else _kinds(pack))
    _show_method(manifest.method, None if rows else MOST_LAYERS)
    _show_stored_evaluation(manifest.evaluation)


def _tensors(pack: Pack) -> Table:
    """Every tensor, the layers in numeric order."""
    table = table_of("tensor", "rows", "of", "clusters", "delta RMS")
    parts = {delta.name: [int(part) if part.isdecimal() else part for part in _NUMBER.split(delta.name)] for delta in pack}
    for delta in sorted(pack, key=lambda delta: parts[delta.name]):
        of = pack.manifest.base.tensors[delta.name].matrix[0]
        table.add_row(escape(delta.name), str(delta.neurons), str(of), str(delta.clusters), _rms([delta]))
    return table


def _kinds(pack: Pack) -> Table:
    """The tensors of all layers summed, by their names without the number of the layer."""
    table = table_of("tensors", "layers", "rows", "clusters", "delta RMS")
    kinds: dict[str, list[TensorDelta]] = {}
    for delta in pack:
        kinds.setdefault(_NUMBER.sub("*", delta.name), []).append(delta)
    for kind, deltas in kinds.items():
        sums = len(deltas), sum(delta.neurons for delta in deltas), sum(delta.clusters for delta in deltas)
        table.add_row(escape(kind), *map(str, sums), _rms(deltas))
    return table


def _rms(deltas: list[TensorDelta]) -> str:
    """The root mean square of the shared vectors."""
    import numpy as np

    values = np.concatenate([delta.delta.astype(np.float64).ravel() for delta in deltas])
    return f"{float(np.sqrt(np.square(values).mean())):.2g}"


def _show_method(method: Mapping[str, Any], most: int | None) -> None:
    """How the pack was trained. Packs come from anywhere: what is missing or malformed is left out."""
    objects = {what: value if isinstance(value := method.get(what), dict) else {} for what in ("decisions", "data", "tuning")}
    grid = fact_grid()
    for what, text in objects["decisions"].items():
        grid.add_row(escape(what), escape(text))
    found = method.get("layers")
    layers = [layer for layer in found if isinstance(layer, dict)] if isinstance(found, list) else []
    for layer in layers[:most]:
        facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in layer.items() if name != "layer")
        grid.add_row(f"layer {escape(layer.get('layer', '?'))}", escape(facts))
    if most is not None and len(layers) > most:
        grid.add_row("", f"and {len(layers) - most} more layers (--rows shows all)")
    for kind, facts in objects["data"].items():
        if isinstance(facts, dict):
            source = f"{count(facts.get('prompts'))} from {facts.get('name', '?')}, sha256 {str(facts.get('sha256'))[:12]}.."
            grid.add_row(f"{escape(kind)} prompts", escape(source))
    for what, text in objects["tuning"].items():
        grid.add_row(escape(what.replace("_", " ")), escape(text))
    if grid.row_count:
        out.print("\n[bold]How it was trained[/]")
        out.print(grid)


def _show_stored_evaluation(evaluation: Mapping[str, Any]) -> None:
    """The numbers that the publisher measured."""
    before, after = evaluation.get("before"), evaluation.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return
    table = Table("evaluation", "before", "after", box=None, pad_edge=False, header_style="dim")
    for name, title in HEADLINES.items():
        sides = [side for side in (before.get(name), after.get(name)) if isinstance(side, dict)]
        if len(sides) == 2:
            parts = [(number(s.get("value"), "6.1%"), count(s.get("count")), count(s.get("total"))) for s in sides]
            table.add_row(title, *(f"{value}  [dim]{some} of {total}[/dim]" for value, some, total in parts))
    out.print()
    out.print(table)


def recipe_table() -> Table:
    """Every setting of a training run: its default, unit, range and source."""
    import dataclasses

    from nestpatch.nest_train.recipe import Recipe

    table = Table("setting", "default", "what it is", "source", box=None, pad_edge=False, header_style="bold")
    for knob in dataclasses.fields(Recipe):
        meta = knob.metadata
        low = f"at least {meta['low']}" if meta["low"] is not None else ""
        high = f"at most {meta['high']}" if meta["high"] else ""
        limits = ", ".join(filter(None, (low, high))) or " | ".join(meta["choices"])
        what = meta["unit"] + (f" ({limits})" if limits else "")
        table.add_row(*map(escape, (knob.name, knob.default, what, meta["source"])))
    return table
