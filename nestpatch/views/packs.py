"""How a pack looks to a person, and the settings of the training that makes one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nestpatch.plain import count, number
from nestpatch.views.console import escape, fact_grid, out, size
from nestpatch.views.evaluation import HEADLINES

if TYPE_CHECKING:
    from nestpatch.pack import Pack, TensorDelta


LINES = 25
"""Lines of `show` at most, unless all rows are asked for."""
SHOWN_TENSORS = 4
"""Tensors that `show` lists one by one; more are summed up in a line."""
SHOWN_KINDS = 3
"""Kinds of tensors that this line names."""


def show_pack(pack: Pack, pack_id: str, nbytes: int, *, rows: bool = False) -> None:
    """A pack, explained in LINES lines; with `rows`, every tensor, layer and setting of it."""
    manifest = pack.manifest
    base, touched = manifest.base, sum(delta.neurons for delta in pack)
    amount = f"{size(nbytes)}: {touched} rows of {len(pack.deltas)} tensors through {pack.parameters} numbers"
    facts = [
        ("id", f"sha256 {pack_id}"),
        ("base", f"{base.model_id}{f' at {base.revision}' if base.revision else ''} ({base.architecture}, {base.dtype})"),
        ("made", f"{manifest.created}, license {manifest.license or 'not stated'}"),
        ("size", f"{amount} ({', '.join(pack.delta_dtypes)})"),
        ("tags", ", ".join(manifest.tags)),
        ("supersedes", ", ".join(manifest.supersedes)),
        ("requires", ", ".join(manifest.requires)),
    ]
    facts = [(what, text) for what, text in facts if text]
    deltas = sorted(pack, key=lambda delta: _in_order(delta.name))
    listed = rows or len(deltas) <= SHOWN_TENSORS
    if not listed:
        facts.append(("tensors", _summary(deltas)))
    evaluation = _evaluation(manifest.evaluation)
    out.print(f"[bold]{escape(pack.label)}[/]  {escape(manifest.description)}")
    out.print(_grid(facts))
    if listed:
        out.print(_tensors(pack, deltas))
    used = 1 + len(facts) + (len(deltas) + 1 if listed else 0) + (evaluation.row_count + 2 if evaluation else 0)
    _show_method(_method(manifest.method, rows=rows), None if rows else LINES - used - 2)
    if evaluation:
        out.print()
        out.print(evaluation)


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers in names by their value: layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]{1,9})", name)]


def _grid(facts: Sequence[tuple[str, str]], *, cut: bool = False) -> Table:
    """What -> text, a line each; with `cut`, texts that are longer than the line end in an ellipsis."""
    grid = fact_grid()
    if cut:
        grid.columns[0].no_wrap, grid.columns[0].min_width = True, min(24, max(len(what) for what, _ in facts))
        grid.add_column(no_wrap=True, overflow="ellipsis")
    for what, text in facts:
        grid.add_row(escape(what), escape(text))
    return grid


def _summary(deltas: Sequence[TensorDelta]) -> str:
    """Many tensors in one line: which matrices of which layers, and how many rows of each."""
    names = [re.sub(r"(?<=[./])[0-9]{1,9}(?=[./])", "*", delta.name) for delta in deltas]
    most, least = max(delta.neurons for delta in deltas), min(delta.neurons for delta in deltas)
    kinds = list(dict.fromkeys(names))
    more = f" and {len(kinds) - SHOWN_KINDS} more" if len(kinds) > SHOWN_KINDS else ""
    rows = f"{least} rows each" if most == least else f"{least} to {most} rows each"
    return f"{', '.join(kinds[:SHOWN_KINDS])}{more}; {rows}; --rows lists them"


def _tensors(pack: Pack, deltas: Sequence[TensorDelta]) -> Table:
    import numpy as np

    table = Table("tensor", box=None, pad_edge=False, header_style="dim")
    for title in ("rows", "of", "clusters", "delta RMS"):
        table.add_column(title, justify="right")
    for delta in deltas:
        rows, _ = pack.manifest.base.tensors[delta.name].matrix
        rms = float(np.sqrt(np.square(delta.delta.astype(np.float64)).mean()))
        table.add_row(escape(delta.name), str(delta.neurons), str(rows), str(delta.clusters), f"{rms:.2g}")
    return table


def _method(method: Mapping[str, Any], *, rows: bool) -> list[tuple[str, str]]:
    """Training facts, the telling ones first. Packs come from anywhere: what is missing or odd is left out."""
    found = []
    data = method.get("data")
    for kind, facts in data.items() if isinstance(data, dict) else ():
        if isinstance(facts, dict):
            source = f"{count(facts.get('prompts'))} from {facts.get('name', '?')}, sha256 {str(facts.get('sha256'))[:12]}.."
            found.append((f"{kind} prompts", source))
    listed = method.get("layers")
    layers = [layer for layer in listed if isinstance(layer, dict)] if isinstance(listed, list) else []
    if layers and not rows:
        numbers = [f"layer {layer.get('layer', '?')}" for layer in (layers[0], layers[-1])]
        neurons, clusters = (
            sum(layer[what] for layer in layers if type(layer.get(what)) is int) for what in ("neurons", "clusters")
        )
        text = f"{len(layers)} from {numbers[0]} to {numbers[1]}: {count(neurons)} neurons in {count(clusters)} clusters"
        found.append(("layers", text))
    for layer in layers if rows else ():
        facts_ = ", ".join(f"{str(name).replace('_', ' ')} {value}" for name, value in layer.items() if name != "layer")
        found.append((f"layer {layer.get('layer', '?')}", facts_))
    for part in ("tuning", "decisions"):
        pairs = method.get(part)
        found += [(str(what).replace("_", " "), str(text)) for what, text in pairs.items()] if isinstance(pairs, dict) else []
    return found


def _show_method(facts: Sequence[tuple[str, str]], room: int | None) -> None:
    """The training facts, in `room` lines."""
    if not facts or (room is not None and room < 1):
        return
    left = len(facts) - room + 1 if room is not None and len(facts) > room else 0
    shown = facts[: len(facts) - left]
    out.print("\n[bold]How it was trained[/]")
    out.print(_grid([*shown, *([("", f"and {left} more facts: --rows")] if left else [])], cut=room is not None))


def _evaluation(evaluation: Mapping[str, Any]) -> Table | None:
    before, after = evaluation.get("before"), evaluation.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return None
    table = Table("evaluation", "before", "after", box=None, pad_edge=False, header_style="dim")
    for name, title in HEADLINES.items():
        if isinstance(before.get(name), dict) and isinstance(after.get(name), dict):
            table.add_row(title, _stored_share(before[name]), _stored_share(after[name]))
    return table


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
