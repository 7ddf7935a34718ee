"""How results look to a person: rich tables on stdout, progress on stderr. Beside cli.py the only module that draws.

Whatever is not a word of this module goes through `escape`: strings come from packs, models, channels and ledgers of others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table

from nestpatch.events import Event, OnEvent, ignore
from nestpatch.plain import count, lines, number, one_line

if TYPE_CHECKING:
    from nestpatch.evaluation.suites import Scores, Share
    from nestpatch.export.models import Exported
    from nestpatch.lab.demo import FormatResult
    from nestpatch.pack import Pack
    from nestpatch.patcher.apply import Applied
    from nestpatch.patcher.inplace import Changed
    from nestpatch.patcher.status import AppliedPack, Status
    from nestpatch.patcher.verify import Verification

STAGES = {
    "lab.train": "training the lab's base model",
    "lab.write": "writing the lab",
    "load": "loading",
    "distil": "asking the base",
    "probe": "probing neurons",
    "select": "selecting neurons",
    "cluster": "clustering neurons",
    "tune": "tuning deltas",
    "measure": "timing the stages",
    "evaluate": "evaluating",
    "copy": "copying",
    "merge": "merging rows",
    "undo": "undoing rows",
    "digest": "taking digests",
    "compare": "comparing tensors",
    "extract": "extracting deltas",
    "export": "writing tensors",
    "quantize": "quantizing in llama.cpp",
    "convert": "converting in llama.cpp",
    "onnx.trace": "tracing the graph",
    "onnx.quantize": "quantizing matrices",
    "onnx.check": "comparing logits in onnxruntime",
    "download": "downloading",
}
HEADLINES = {
    "attack_success": "attack success",
    "refusal_benign": "refusals, benign",
    "refusal_lookalike": "refusals, look-alike",
    "benign_correct": "benign correct",
}

_NOTHING = "[none][/none]"
"""Markup without effect."""


class _Console(Console):
    """Lets no control character of a text through, should `escape` have been forgotten. rich's own are marked as such."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The parts of what is printed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(lines(segment.text), segment.style)


out = _Console(highlight=False, soft_wrap=True, emoji=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
if not out.is_terminal:
    # Into a file or a pipe: nothing to fit into.
    out.width = 160


def escape(value: object) -> str:
    """Foreign text made harmless, for text with markup: one line, nothing that drives the terminal, and no markup of its own.

    rich's own function leaves an open bracket that begins no tag, and the next text may end it.
    """
    text = one_line(value).replace("[", f"[{_NOTHING}")
    body = text.rstrip("\\")
    # Before a tag two backslashes mean one.
    return body + ("\\" * 2 * (len(text) - len(body)) + _NOTHING if body != text else "")


def escape_lines(value: object) -> str:
    """The same for what may have several lines: all but the first are indented, so that none looks like one of ours."""
    first, *others = str(value).split("\n")
    return "\n".join([escape(first), *(escape(line if line.startswith("  ") else f"  {line}") for line in others)])


@contextmanager
def progress(quiet: bool) -> Iterator[OnEvent]:
    """A listener that draws bars on a terminal and prints one line per stage elsewhere."""
    if quiet:
        yield ignore
    elif err.is_terminal:
        with _bars() as bars:
            yield _Drawer(bars).hear
    else:
        yield _Printer().hear


def _bars() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("[dim]{task.fields[note]}"), console=err)


class _Drawer:
    """Draws events as bars, one per stage."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def hear(self, event: Event) -> None:
        if event.stage == "note":
            self.bars.console.print(f"[dim]{escape(event.note)}")
            return
        if event.stage not in self.tasks:
            self.tasks[event.stage] = self.bars.add_task(escape(STAGES.get(event.stage, event.stage)), note="", total=None)
        total = event.total or None
        self.bars.update(self.tasks[event.stage], completed=event.done, total=total, note=escape(event.note))


class _Printer:
    """Prints each stage once, and every note."""

    def __init__(self) -> None:
        self.stage = ""
        self.began = time.monotonic()

    def hear(self, event: Event) -> None:
        if event.stage == "note":
            err.print(f"  {escape(event.note)}")
        elif event.stage != self.stage:
            self.stage = event.stage
            name = one_line(STAGES.get(event.stage, event.stage))
            err.print(f"[{time.monotonic() - self.began:5.0f} s] {name}", markup=False)


def size(nbytes: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def percent(share: Share) -> str:
    """A share with its interval."""
    low, high = share.interval
    return f"{share.value:6.1%}  [dim]{low:.1%} to {high:.1%}, {share.count} of {share.total}[/dim]"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    return grid


def show_error(error: Exception, advice: str) -> None:
    """A named error, its reason and the way out."""
    err.print(f"[bold red]{type(error).__name__}[/]: {escape_lines(error)}")
    err.print(f"[bold]What to do[/]: {escape(advice)}")


def show_applied(done: Applied) -> None:
    """What `apply` did."""
    verb = "would write" if done.dry_run else "wrote"
    out.print(f"[bold]{escape(done.pack)}[/] {verb} [bold]{escape(done.output)}[/] in {done.seconds:.2f} s")
    grid = _grid()
    grid.add_row("changed", f"{done.rows} rows of {done.tensors} tensors, {size(done.row_bytes)}")
    if done.retention is not None:
        grid.add_row("delivered", f"{done.retention:.1%} of the patch at least, after rounding")
    for file in done.files:
        digest = f"  sha256 {escape(file.sha256)}" if file.sha256 else ""
        grid.add_row("file", f"{escape(file.path.name)}  {size(file.nbytes)}{digest}")
    if done.left_out:
        grid.add_row("left out", f"{escape(', '.join(done.left_out))} (unpatched weights, or links out of the model)")
    out.print(grid)


def show_exported(done: Exported) -> None:
    """What `export` wrote."""
    verb = "would write" if done.dry_run else "wrote"
    out.print(f"{verb} [bold]{escape(done.path)}[/] in {done.seconds:.2f} s")
    grid = _grid()
    nbytes = f", {size(done.nbytes)}" if done.nbytes else ""
    grid.add_row(
        "model",
        f"{escape(done.architecture + ', ' if done.architecture else '')}{done.tensors} tensors, {escape(done.type)}{nbytes}",
    )
    grid.add_row("packs", escape(", ".join(done.packs) or "none"))
    if done.sha256:
        grid.add_row("file", f"sha256 {escape(done.sha256)}")
    for note in done.notes:
        grid.add_row("note", escape(note))
    out.print(grid)


def show_changed(done: Changed) -> None:
    """What an in-place command did."""
    if not done.steps:
        out.print(f"{escape(done.model)}: nothing to do, {escape(', '.join(done.applied) or 'base')} is there already")
        return
    verb = "would change" if done.dry_run else "changed"
    counts = f"{done.rows} rows of {done.tensors} tensors, {size(done.row_bytes)}"
    out.print(f"[bold]{escape(done.model)}[/] {verb} in place: {counts}, in {done.seconds:.2f} s")
    grid = _grid()
    for step in done.steps:
        grid.add_row("step", escape(step))
    if done.retention is not None:
        grid.add_row("delivered", f"{done.retention:.1%} of the patch at least, after rounding")
    if not done.dry_run:
        grid.add_row("now", escape(", ".join(done.applied) or "base"))
    out.print(grid)


def show_status(found: Status) -> None:
    """What is applied to a model, and what confirms it."""
    ledger = found.ledger
    names = ", ".join(one.entry.label for one in found.applied) or "nothing applied"
    doubt = "" if found.sound else " [bold red](by its ledger alone: the rows do not hold it)[/]"
    out.print(f"[bold]{escape(found.model)}[/]: {escape(names)}{doubt}")
    if found.problem:
        out.print(f"  [bold red]cannot be compared with the rows[/]: {escape(found.problem)}")
    grid = _grid()
    for claim in found.files_say:
        strength = "" if claim["strength"] == 1 else f" at strength {number(claim['strength'], 'g')}"
        label = escape(f"{claim['name']} {claim['version']}{strength}, pack sha256 {str(claim['pack_id'])[:12]}..")
        grid.add_row("written with", f"{label} [dim](the files say so; `nestpatch verify MODEL PATCH` proves it)[/]")
    for one in found.applied:
        grid.add_row(escape(one.entry.when), _applied_line(one))
        for difference in one.missing_in[:3]:
            grid.add_row("", f"[red]{escape(difference.tensor)}: {escape(difference.detail)}[/]")
    for channel in ledger.follows:
        grid.add_row("follows", escape(channel))
    for channel in ledger.offered:
        grid.add_row("came with", f"{escape(channel)} [dim](not followed; agree with: nestpatch update MODEL --channel)[/]")
    for event in ledger.history:
        what = f"{event.get('what')} {event.get('name')} {event.get('version')}"
        came = " (came with the model)" if event.get("foreign") else ""
        grid.add_row(f"[dim]{escape(event.get('when'))}", f"[dim]{escape(what)}{came}")
    out.print(grid)


def _applied_line(one: AppliedPack) -> str:
    """One applied pack, on one line."""
    entry = one.entry
    rows = sum(record.rows for record in entry.tensors.values())
    strength = f" at strength {number(entry.strength, 'g')}" if entry.strength != 1 else ""
    loud = " [bold red]onto another base than its own[/]" if entry.base_mismatch_allowed else ""
    rounded = f", {number(entry.retention, '.1%')} delivered {escape(entry.rounding)}" if entry.retention is not None else ""
    signed = f", signed by {escape(', '.join(one.signers))}" if one.signers else ""
    claimed = f", [yellow]claims to be signed by {escape(', '.join(one.claims))}[/]" if one.claims else ""
    came = " [dim](came with the model)[/]" if entry.foreign and one.signers else ""
    came = " [yellow](came with the model, signed by nobody whom you trust)[/]" if entry.foreign and not one.signers else came
    pack = f"{escape(entry.label)}{strength}: {count(rows)} rows, pack sha256 {escape(entry.pack_id[:12])}.."
    return f"{pack}{signed}{claimed}, by {escape(entry.tool)}{rounded}{loud}{came}"


def show_verification(model: Any, found: Verification) -> None:
    """The state of a model."""
    colour = "green" if found.known else "bold red"
    out.print(f"[{colour}]{escape(found.verdict.value)}[/]  {escape(model)}: {escape(found.detail)}")
    for difference in found.differences[:10]:
        out.print(f"  {escape(difference.tensor)}: {escape(difference.detail)}")
    if len(found.differences) > 10:
        out.print(f"  and {len(found.differences) - 10} more tensors")
    what = "whole tensors" if found.full else "patched rows"
    out.print(f"[dim]{what} of {found.tensors} tensors read in {found.seconds:.2f} s")


def show_pack(pack: Pack, pack_id: str, nbytes: int) -> None:
    """A pack, explained."""
    manifest = pack.manifest
    out.print(f"[bold]{escape(pack.label)}[/]  {escape(manifest.description)}")
    grid = _grid()
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
    grid = _grid()
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


def evaluation_table(columns: Mapping[str, Scores]) -> Table:
    """Models side by side: the headline numbers, then every suite."""
    table = Table("", *map(escape, columns), box=None, pad_edge=False, header_style="bold")
    models = list(columns.values())
    for name, title in HEADLINES.items():
        shares = [model.totals().get(name) for model in models]
        if any(share is not None for share in shares):
            table.add_row(title, *("" if share is None else percent(share) for share in shares))
    if len(models) > 1 or models[0].drift is not None:
        # Of two columns the first is the base itself, unless it was compared with another one.
        missing = ["" if len(models) > 1 else "not measured", *["not measured"] * (len(models) - 1)]
        drifts = zip((model.drift for model in models), missing, strict=True)
        table.add_row("KL to the base, benign", *(n if d is None else f"{d:.4f} nats per token" for d, n in drifts))
    for position, suite in enumerate(models[0].suites):
        harmful = suite.kind == "harmful"
        results = [model.suites[position] for model in models]
        cells = (percent(r.complied if harmful else r.refused) for r in results)
        table.add_row(f"[dim]{escape(suite.suite)}, {'complied' if harmful else 'refused'}[/dim]", *cells)
    return table


def formats_table(formats: Sequence[FormatResult]) -> Table:
    """The patched model in several formats: the headline numbers of each."""
    table = Table("patched model as", *HEADLINES.values(), "delivered", box=None, pad_edge=False, header_style="bold")
    for one in formats:
        totals = one.evaluation.totals()
        shares = (f"{totals[name].value:.1%}" if name in totals else "" for name in HEADLINES)
        table.add_row(escape(one.what), *shares, "" if one.retention is None else f"{one.retention:.1%}")
    return table


def stage_table(stages: Mapping[str, tuple[float, str]]) -> Table:
    """Stage -> (seconds, what happened)."""
    table = Table("stage", box=None, pad_edge=False, header_style="bold")
    table.add_column("seconds", justify="right")
    table.add_column("what happened")
    for stage, (seconds, what) in stages.items():
        table.add_row(escape(stage), f"{seconds:.1f}", escape(what))
    return table


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
