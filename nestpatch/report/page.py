"""The page: collects what it shows, and fills the template.

Everything that a template prints passes `lines`, which takes away what is not visible, and then Jinja's escaping.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nestpatch import __version__
from nestpatch.evaluation.concerns import concerns
from nestpatch.evaluation.dose import Dose, Recommendation
from nestpatch.events import OnEvent, ignore
from nestpatch.files.atomic import check_output, write_bytes
from nestpatch.measured import (
    DECISIVE,
    TITLES,
    Row,
    StoredAblation,
    StoredShare,
    categories,
    drift,
    headlines,
    strength_of,
    suites,
)
from nestpatch.pack import creation_time
from nestpatch.plain import lines
from nestpatch.report.charts import Charts
from nestpatch.report.examples import read_examples
from nestpatch.report.sources import Subject, read_subject
from nestpatch.report.structure import MOST_CLUSTERS, MOST_LAYERS, layers

_QUOTED = re.compile(r"""(?<!\w)(['"]).*\1""", re.DOTALL)
"""What a note quotes: the prompt that is in two suites."""


def write_report(
    source: str,
    output: Path,
    *,
    pack: str | None = None,
    answers: Path | None = None,
    show_harmful: bool = False,
    policy_file: Path | None = None,
    on_event: OnEvent = ignore,
) -> Path:
    """Writes one self-contained HTML page about a pack, a model or an evaluation.

    Args:
        source: A pack or its channel, a model, or a JSON file that `eval --json` printed.
        output: The file to write.
        pack: A pack to describe as well, where the source is a model or an evaluation.
        answers: A JSONL file of `eval --answers`, for examples.
        show_harmful: Whether the page shows the texts of harmful suites, and prompts that notes quote.
        policy_file: Whose signatures count; None means the policy of this user and this machine.
        on_event: Receives the progress of a download.

    Returns:
        `output`.

    Raises:
        OutputError: The file exists already, or cannot be written.
        DataError: The source is no evaluation, or is one of another pack; or the answers cannot be read.
        SignatureError: A signature of the pack is wrong.
        PackError: The pack cannot be read.
        CheckpointError: The model cannot be read.
        StateError: The state beside the model is broken, or a change was interrupted.
    """
    check_output(output)
    subject = read_subject(source, pack, policy_file, on_event)
    write_bytes(output, render(subject, answers, show_harmful=show_harmful).encode("utf-8"))
    return output


def render(subject: Subject, answers: Path | None = None, *, show_harmful: bool = False) -> str:
    """Renders the page.

    Args:
        subject: What it is about.
        answers: As for `write_report`.
        show_harmful: As for `write_report`.

    Returns:
        HTML.

    Raises:
        DataError: The answers cannot be read.
    """
    room = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files("nestpatch.report") / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.filters |= {"percent": _percent, "interval": _interval, "quote": shlex.quote, "mapping": _mapping, "plain": _plain}
    rows, strength = suites(subject.evaluation.get("before"), subject.evaluation.get("after")), strength_of(subject.evaluation)
    examples = [] if answers is None else read_examples(answers, rows, strength=strength, show_harmful=show_harmful)
    content = {
        "subject": subject,
        "examples": examples,
        "version": __version__,
        "made": creation_time(),
        # Read, not included: CSS has characters that HTML's escaping would change.
        "style": Markup((files("nestpatch.report") / "page.css").read_text("utf-8")),  # noqa: S704
        **_measured(subject.evaluation, rows),
        **_ablation(subject.evaluation),
        "notes": _notes(subject.evaluation.get("notes"), show_harmful=show_harmful),
        **_structure(subject),
    }
    return room.get_template("page.html.j2").render(content)


def _measured(evaluation: Mapping[str, Any], rows: list[Row]) -> dict[str, Any]:
    """The measured part of the page."""
    before, after = evaluation.get("before"), evaluation.get("after")
    heads = [row for row in headlines(before, after) if row.before or row.after]
    charts, dose = Charts(), Dose.from_json(evaluation.get("dose"))
    points = dose.points if dose is not None else ()
    groups = [("Harmful prompts", "answered: lower is better", [row for row in rows if row.kind == "harmful"]),
              ("Harmless prompts", "refused: lower is better", [row for row in rows if row.kind != "harmful"])]  # fmt: skip
    return {
        "heads": heads,
        "tiles": [row for row in heads if row.name in DECISIVE],
        "drift": drift(after),
        "groups": [group for group in groups if group[2]],
        "bars": {row.name + row.kind: charts.bars(row) for row in (*heads, *rows)},
        "has_both": any(row.before and row.after for row in heads),
        "categories": categories(before, after),
        "warnings": concerns(evaluation) if isinstance(after, Mapping) else (),
        "doses": points,
        "curve_titles": DECISIVE,
        "dose_titles": {name: title for name, title in TITLES.items() if any(getattr(one, name) for one in points)},
        "recommended": Recommendation.from_json(evaluation.get("recommended")) if points else None,
        "dose_curve": charts.curve(points) if points else "",
        "dose_categories": list(dict.fromkeys(name for one in points for name in one.categories)),
        "dose_drift": charts.drift(points) if points else "",
    }


def _ablation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The model without some of its neurons: a row for each model that was measured, with the shares that some of them have."""
    found = StoredAblation.parse(evaluation.get("ablation"))
    if found is None:
        return {"ablation": None, "ablated": [], "ablated_titles": []}
    without = f"without {found.neurons:,}"
    sides = {"model": evaluation.get("before"), "patched": evaluation.get("after")}
    sides |= {f"{without} chosen neurons": found.chosen, f"{without} random ones": found.random}
    shares = {title: {row.title: row.before for row in headlines(side, None)} for title, side in sides.items() if side}
    titles = [title for title in TITLES.values() if any(one.get(title) for one in shares.values())]
    table = [(title, [one.get(name) for name in titles], drift(sides[title])) for title, one in shares.items()]
    return {"ablation": found, "ablated": table, "ablated_titles": titles}


def _notes(stored: Any, *, show_harmful: bool) -> list[str]:
    """The notes of an evaluation; prompts that they quote may ask for harm."""
    notes = [note for note in stored if isinstance(note, str)] if isinstance(stored, list) else []
    return notes if show_harmful else [_QUOTED.sub("(redacted)", note) for note in notes]


def _structure(subject: Subject) -> dict[str, Any]:
    """What a pack changes; without a pack nothing."""
    if subject.pack is None:
        empty = {"layers": [], "clusters": 0, "kinds": (), "neurons": 0, "more_layers": 0, "more_clusters": 0}
        return {**empty, "method": {}, "detector": ""}
    pack = subject.pack.proven.pack
    found = layers(pack)
    clusters = max(len(layer.cells) for layer in found)
    return {
        "layers": found[:MOST_LAYERS],
        "clusters": min(clusters, MOST_CLUSTERS),
        "kinds": [kind for kind, some in (("clusters", clusters), ("rank", any(layer.rank for layer in found))) if some],
        "neurons": sum(layer.neurons for layer in found),
        "more_layers": max(0, len(found) - MOST_LAYERS),
        "more_clusters": max(0, clusters - MOST_CLUSTERS),
        "method": pack.manifest.method,
        "detector": pack.manifest.detector.sentence if pack.manifest.detector is not None else "",
    }


def _visible(value: Any) -> Any:
    """What a template prints: foreign text without hidden characters; what was escaped already as it is."""
    return lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _percent(share: StoredShare | None) -> str:
    """A share in percent: whole, or with a decimal where it would read 0 or 100 and is neither."""
    if share is None:
        return "not measured"
    rounded = f"{share.value:.0%}"
    exact = f"{share.value:.1%}" if rounded in {"0%", "100%"} and 0 < share.value < 1 else rounded
    return exact.replace("%", " %")


def _interval(share: StoredShare) -> str:
    return f"{100 * share.low:.0f} to {100 * share.high:.0f} %, {share.count} of {share.total}"


def _mapping(value: Any) -> list[tuple[str, Any]]:
    """The members of a stored object; none where it is none."""
    return [(str(name), entry) for name, entry in value.items()] if isinstance(value, Mapping) else []


def _plain(value: Any) -> str:
    """A stored value in one line; lists and objects only by their length."""
    if isinstance(value, (list, Mapping)):
        return f"{len(value)} entries"
    return "none" if value is None else str(value)
