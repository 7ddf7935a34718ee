"""How a pack looks to a person, and the settings of the training that makes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nestpatch.plain import count, number
from nestpatch.views.console import escape, fact_grid, out, size
from nestpatch.views.evaluation import HEADLINES

if TYPE_CHECKING:
    from nestpatch.pack import Pack


def show_pack(pack: Pack, pack_id: str, nbytes: int) -> None:
    """A pack, explained."""
    manifest = pack.manifest
    out.print(f"[bold]{escape(pack.label)}[/]  {escape(manifest.description)}")
    grid = fact_grid()
    base = manifest.base
    revision = f" at {base.revision}" if base.revision else ""
    grid.add_row("id", f"sha256 {escape(pack_id)}")
    grid.add_row("base", escape(f"{base.model_id}{revision} ({base.architecture}, {base.dtype})"))
    grid.add_row("made", f"{escape(manifest.created)}, license {escape(manifest.license or 'not stated')}")
    rows = sum(delta.neurons for delta in pack)
    changed = f"{rows} rows of {len(pack.deltas)} tensors through {pack.parameters} numbers"
    grid.add_row("size", f"{size(nbytes)}: {changed} ({', '.join(pack.delta_dtypes)})")
    if manifest.tags:
        grid.add_row("tags", escape(", ".join(manifest.tags)))
    for what, listed in (("supersedes", manifest.supersedes), ("requires", manifest.requires)):
        if listed:
            grid.add_row(what, escape(", ".join(listed)))
    out.print(grid)
    out.print(_pack_tensors(pack))
    _show_method(manifest.method)
    _show_pack_evaluation(manifest.evaluation)


def _pack_tensors(pack: Pack) -> Table:
    import numpy as np

    table = Table("tensor", box=None, pad_edge=False, header_style="dim")
    for title in ("rows", "of", "clusters", "delta RMS"):
        table.add_column(title, justify="right")
    for delta in pack:
        rows, _ = pack.manifest.base.tensors[delta.name].matrix
        rms = float(np.sqrt(np.square(delta.delta.astype(np.float64)).mean()))
        table.add_row(escape(delta.name), str(delta.neurons), str(rows), str(delta.clusters), f"{rms:.2g}")
    return table


def _show_method(method: Mapping[str, Any]) -> None:
    """Training facts. Packs come from anywhere: what is missing or odd is left out."""
    grid = fact_grid()
    for what, text in _pairs(method.get("decisions")):
        grid.add_row(escape(what), escape(text))
    layers = method.get("layers")
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict):
            found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in layer.items() if name != "layer")
            grid.add_row(f"layer {escape(layer.get('layer', '?'))}", escape(found))
    data = method.get("data")
    for kind, facts in data.items() if isinstance(data, dict) else ():
        if isinstance(facts, dict):
            source = f"{count(facts.get('prompts'))} from {facts.get('name', '?')}, sha256 {str(facts.get('sha256'))[:12]}.."
            grid.add_row(f"{escape(kind)} prompts", escape(source))
    for what, text in _pairs(method.get("tuning")):
        grid.add_row(escape(what.replace("_", " ")), escape(text))
    if grid.row_count:
        out.print("\n[bold]How it was trained[/]")
        out.print(grid)


def _pairs(value: Any) -> list[tuple[str, str]]:
    return [(str(key), str(entry)) for key, entry in value.items()] if isinstance(value, dict) else []


def _show_pack_evaluation(evaluation: Mapping[str, Any]) -> None:
    before, after = evaluation.get("before"), evaluation.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return
    table = Table("evaluation", "before", "after", box=None, pad_edge=False, header_style="dim")
    for name, title in HEADLINES.items():
        if isinstance(before.get(name), dict) and isinstance(after.get(name), dict):
            table.add_row(title, _stored_share(before[name]), _stored_share(after[name]))
    out.print()
    out.print(table)


def _stored_share(share: Mapping[str, Any]) -> str:
    return f"{number(share.get('value'), '6.1%')}  [dim]{count(share.get('count'))} of {count(share.get('total'))}[/dim]"


def recipe_table() -> Table:
    """Every setting of a training run."""
    import dataclasses

    from nestpatch.nest_train.recipe import Recipe

    table = Table("setting", "default", "what it is", "source", box=None, pad_edge=False, header_style="bold")
    for knob in dataclasses.fields(Recipe):
        meta = knob.metadata
        bounds = [
            f"at least {meta['low']}" if meta["low"] is not None else "",
            f"at most {meta['high']}" if meta["high"] else "",
        ]
        limits = ", ".join(filter(None, bounds)) or " | ".join(meta["choices"])
        table.add_row(
            escape(knob.name),
            escape(knob.default),
            escape(meta["unit"] + (f" ({limits})" if limits else "")),
            escape(meta["source"]),
        )
    return table
