"""How a pack looks to a person, and the settings of the training that makes one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nestpatch.evaluation.concerns import concerns
from nestpatch.evaluation.dose import Dose, Recommendation
from nestpatch.plain import count
from nestpatch.views.console import escape, fact_grid, out, size, table_of
from nestpatch.views.evaluation import dose_table, headline_table, recommendation_text

if TYPE_CHECKING:
    from nestpatch.delta import TensorDelta
    from nestpatch.pack import Pack

LINES = 25
"""Lines of `show`, unless --rows asks for everything."""
MOST_KINDS = 6
"""Kinds of tensors that it sums; of more, only their number is shown."""
_NUMBER = re.compile(r"(\d{1,9})", re.ASCII)


def show_pack(pack: Pack, pack_id: str, nbytes: int, *, rows: bool = False) -> None:
    """Explains a pack: what it changes, how it was trained, what was measured.

    Args:
        pack: The pack.
        pack_id: SHA-256 of its file, hex.
        nbytes: Size of its file.
        rows: Whether to list every tensor, every layer and every setting, not what fits in LINES lines.
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
    if recommended := Recommendation.from_json(manifest.evaluation.get("recommended")):
        grid.add_row("recommended", f"strength {recommendation_text(recommended)}")
    for concern in concerns(manifest.evaluation) if manifest.evaluation else ():
        grid.add_row("[yellow]warning[/]", f"[yellow]{escape(concern)}[/]")
    out.print(grid)
    tensors = _tensors(pack) if rows else _kinds(pack)
    before, after = manifest.evaluation.get("before"), manifest.evaluation.get("after")
    evaluation = headline_table("evaluation", before, after) if isinstance(before, dict) and isinstance(after, dict) else None
    out.print(tensors)
    # One line each for the label and the tables' heads, two before the training facts, one before the evaluation.
    used = 1 + grid.row_count + 1 + tensors.row_count + 2 + (2 + evaluation.row_count if evaluation else 0)
    _show_method(_facts(manifest.method, rows=rows), None if rows else LINES - used)
    if evaluation is not None:
        out.print()
        out.print(evaluation)
    if rows and (dose := Dose.from_json(manifest.evaluation.get("dose"))):
        out.print()
        out.print(dose_table(dose))


def _tensors(pack: Pack) -> Table:
    """Every tensor, the layers in numeric order."""
    table = table_of("tensor", "rows", "of", "clusters", "delta RMS")
    parts = {delta.name: [int(part) if part.isdecimal() else part for part in _NUMBER.split(delta.name)] for delta in pack}
    for delta in sorted(pack, key=lambda delta: parts[delta.name]):
        of = pack.manifest.base.tensors[delta.name].matrix[0]
        table.add_row(escape(delta.name), str(delta.neurons), str(of), _sharing([delta]), _rms([delta]))
    return table


def _kinds(pack: Pack) -> Table:
    """The tensors of all layers summed, by their names without the number of the layer."""
    table = table_of("tensors", "layers", "rows", "clusters", "delta RMS")
    kinds: dict[str, list[TensorDelta]] = {}
    for delta in pack:
        kinds.setdefault(_NUMBER.sub("*", delta.name), []).append(delta)
    for kind, deltas in list(kinds.items())[:MOST_KINDS]:
        sums = len(deltas), sum(delta.neurons for delta in deltas)
        table.add_row(escape(kind), *map(str, sums), _sharing(deltas), _rms(deltas))
    if len(kinds) > MOST_KINDS:
        table.add_row(f"and {len(kinds) - MOST_KINDS} more kinds: --rows")
    return table


def _sharing(deltas: list[TensorDelta]) -> str:
    """How the rows share vectors: the number of clusters, and the rank of changes of low rank."""
    clusters, ranks = sum(delta.clusters for delta in deltas), [delta.rank for delta in deltas if delta.factors is not None]
    counts = [str(clusters)] if clusters else []
    counts += [f"rank {min(ranks)}" + (f" to {max(ranks)}" if max(ranks) > min(ranks) else "")] if ranks else []
    return ", ".join(counts)


def _rms(deltas: list[TensorDelta]) -> str:
    """The root mean square of the shared vectors; of a change of low rank that of the whole change."""
    import numpy as np

    squares, count = 0.0, 0
    for delta in deltas:
        low_rank = delta.factors is not None
        squares += delta.squared_norm() if low_rank else float(np.square(delta.delta.astype(np.float64)).sum())
        count += delta.delta.shape[1] * (delta.neurons if low_rank else delta.clusters)
    return f"{(squares / count) ** 0.5:.2g}"


def _facts(method: Mapping[str, Any], *, rows: bool) -> list[tuple[str, str]]:
    """How the pack was trained, the most important facts first. Packs come from anywhere: what is malformed is left out."""
    objects = {what: value if isinstance(value := method.get(what), dict) else {} for what in ("decisions", "data", "tuning")}
    found = []
    for kind, facts in objects["data"].items():
        if isinstance(facts, dict):
            source = f"{count(facts.get('prompts'))} from {facts.get('name', '?')}, sha256 {str(facts.get('sha256'))[:12]}.."
            found.append((f"{kind} prompts", source))
    listed = method.get("layers")
    layers = [layer for layer in listed if isinstance(layer, dict)] if isinstance(listed, list) else []
    for layer in layers if rows else ():
        text = ", ".join(f"{str(name).replace('_', ' ')} {value}" for name, value in layer.items() if name != "layer")
        found.append((f"layer {layer.get('layer', '?')}", text))
    if layers and not rows:
        first, last = (f"layer {layer.get('layer', '?')}" for layer in (layers[0], layers[-1]))
        neurons, clusters = (sum(one[key] for one in layers if type(one.get(key)) is int) for key in ("neurons", "clusters"))
        text = f"{len(layers)} from {first} to {last}: {count(neurons)} neurons in {count(clusters)} clusters"
        found.append(("layers", text))
    for what in ("tuning", "decisions"):
        texts = {name: text for name, text in objects[what].items() if not isinstance(text, list)}
        found += [(str(name).replace("_", " "), str(text)) for name, text in texts.items()]
    looks = objects["tuning"].get("held_out")
    for look in looks if rows and isinstance(looks, list) else ():
        if isinstance(look, dict):
            text = ", ".join(f"{str(name).replace('_', ' ')} {value}" for name, value in look.items() if name != "step")
            found.append((f"held out, step {look.get('step', '?')}", text))
    return found


def _show_method(facts: Sequence[tuple[str, str]], room: int | None) -> None:
    """Shows training facts, a line each; with `room`, no more lines than that, and long ones cut."""
    if not facts or (room is not None and room < 1):
        return
    grid, shown = fact_grid(), facts
    if room is not None:
        shown = facts if len(facts) <= room else [*facts[: room - 1], ("", f"and {len(facts) - room + 1} more facts: --rows")]
        # Without a width the column of names gives way to long texts.
        grid.columns[0].no_wrap, grid.columns[0].min_width = True, min(24, max(len(what) for what, _ in shown))
        grid.columns[1].no_wrap, grid.columns[1].overflow = True, "ellipsis"
    for what, text in shown:
        grid.add_row(escape(what), escape(text))
    out.print("\n[bold]How it was trained[/]")
    out.print(grid)


def recipe_table() -> Table:
    """Lists every setting of a training.

    Returns:
        A table: each setting with its default, unit, range and source.
    """
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
