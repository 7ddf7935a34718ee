"""The stages probe, select, cluster and detector in a row: the neurons of every layer, each stage kept in the run directory.

Public in the room: `find_layers`, `find_clusters`, and `digest_layers`, the identity of what they found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nestpatch.detector import Detector
from nestpatch.events import Event
from nestpatch.nest_train import _detector
from nestpatch.nest_train._digests import digest_json
from nestpatch.nest_train._neurons import (
    Clusters,
    Selection,
    choose_first_layer,
    cluster,
    collect,
    require_neurons,
    routed,
    select,
)
from nestpatch.nest_train._ranks import from_first
from nestpatch.nest_train._run import Run
from nestpatch.nest_train.avoid import without
from nestpatch.nest_train.data import TrainingData
from nestpatch.rows import FloatArray
from nestpatch.runtimes.states import Places, hidden_size, layers_of
from nestpatch.runtimes.weights import MlpBlock

T = TypeVar("T", Selection, Clusters)
_PROBE = ("seed", "probe_holdout", "probe_c", "probe_margin", "selector", "threshold", "sign")
"""The settings of the stage select."""
_CLUSTER = (*_PROBE, "first_layer", "k_min", "k_max", "profile_prompts")
"""The settings of the stage cluster and of those before it."""


def busy_blocks(run: Run, data: TrainingData, blocks: Sequence[MlpBlock]) -> tuple[MlpBlock, ...]:
    """Begins the stage probe: of each mixture of experts, those take part that harmful prompts are routed to most often.

    Args:
        run: The base.
        data: The prompts.
        blocks: The base's feed-forward blocks.

    Returns:
        The blocks, mixtures without the other experts.
    """
    if not any(block.mixture for block in blocks):
        return tuple(blocks)
    harmful = run.runtime.token_ids([prompt.text for prompt in data.harmful.prompts])
    with run.run_dir.record.timed("probe"):
        found = routed(run.model, blocks, harmful, run.recipe, run.pad, run.on_event)
    for block, whole in zip(found, blocks, strict=True):
        if block.mixture:
            numbers = ", ".join(map(str, block.experts))
            run.note(
                f"layer {block.layer}: experts {numbers} of {len(whole.experts)}, which harmful prompts are routed to most"
            )
    return found


Choose = Callable[[Run, Sequence[MlpBlock], "Activations", npt.NDArray[np.bool_]], list[Selection]]
"""Another stage select, called as `selected` is."""


def find_clusters(
    run: Run,
    data: TrainingData,
    blocks: Sequence[MlpBlock],
    choose: Choose | None = None,
) -> list[tuple[Selection, Clusters]]:
    """The stages probe, select and cluster.

    Args:
        run: The base.
        data: The prompts.
        blocks: The base's feed-forward blocks.
        choose: The stage select; None for `selected`. What it finds is not kept in a run directory.

    Returns:
        (selection, clusters) of each block.

    Raises:
        TrainingError: No neuron separates harmful from harmless prompts.
    """
    return find_layers(run, data, blocks, choose, detector=False)[0]


def find_layers(
    run: Run,
    data: TrainingData,
    blocks: Sequence[MlpBlock],
    choose: Choose | None = None,
    *,
    detector: bool,
    taken: Sequence[npt.NDArray[np.bool_]] = (),
) -> tuple[list[tuple[Selection, Clusters]], Detector | None]:
    """The stages probe, select, cluster and detector.

    Args:
        run: The base.
        data: The prompts.
        blocks: The base's feed-forward blocks.
        choose: As for `find_clusters`.
        detector: Whether there is a stage detector.
        taken: For `selected`.

    Returns:
        ((selection, clusters) of each block, the detector); None where none was asked for, and of a model with one layer.

    Raises:
        TrainingError: No neuron separates harmful from harmless prompts.
    """
    texts = [prompt.text for prompt in data.harmful.prompts + data.harmless]
    inputs = {"prompts": digest_json(texts), "prompt tokens": run.recipe.max_prompt_tokens, "batch": run.recipe.probe_batch}
    inputs["experts"] = [block.experts for block in blocks]
    places = _detector.candidates(len(layers_of(run.model, blocks[0])[0])) if detector else []
    widths = [block.neurons for block in blocks] + [hidden_size(run.model)] * len(places)
    shapes = {f"{number}.npy": (len(texts), width) for number, width in enumerate(widths)}
    harmful = np.arange(len(texts)) < len(data.harmful.prompts)

    def record(folder: Path) -> None:
        with run.run_dir.record.timed("probe"):
            collect(run.model, blocks, run.runtime.token_ids(texts), folder, run.recipe, run.pad, run.on_event, places)

    with run.run_dir.arrays("activations", inputs | ({"states": places} if places else {}), shapes, record) as make:
        acts = Activations(make)
        inputs |= {"harmful prompts": len(data.harmful.prompts)}
        selections = choose(run, blocks, acts, harmful) if choose else selected(run, blocks, acts, harmful, inputs, taken)
        layers = list(zip(selections, _clustered(run, blocks, acts, selections, inputs), strict=True))
        if detector and not places:
            run.decide("detector", "none", "the model has one layer, or its layers are not known")
        return layers, _detected(run, blocks, acts, harmful, layers, places, inputs) if places else None


class Activations:
    """The activations of all blocks, which are found or recorded when the first one is asked for."""

    def __init__(self, make: Callable[[], list[FloatArray]]) -> None:
        self._make = make
        self._made: list[FloatArray] | None = None

    def ready(self) -> None:
        """Finds or records them, unless that is done. All ranks must call it; the first one has them afterwards."""
        if self._made is None:
            self._made = self._make()

    def __getitem__(self, place: int) -> FloatArray:
        self.ready()
        return (self._made or [])[place]


def selected(
    run: Run,
    blocks: Sequence[MlpBlock],
    acts: Activations,
    harmful: npt.NDArray[np.bool_],
    inputs: Mapping[str, Any] | None = None,
    taken: Sequence[npt.NDArray[np.bool_]] = (),
) -> list[Selection]:
    """The stage select.

    Args:
        run: The recipe is read, and the choice of the first layer is recorded.
        blocks: The base's feed-forward blocks.
        acts: float32 [prompts, neurons] of each block.
        harmful: bool [prompts].
        inputs: What the activations depend on; None keeps nothing in the run directory.
        taken: bool [neurons] of each block, those that are left to other packs; without any, none are.

    Returns:
        A result per block, without neurons below the first patched layer.

    Raises:
        TrainingError: No neuron separates harmful from harmless prompts.
    """
    inputs = {**(inputs or {}), **_settings(run, _PROBE)}
    found = _found(run, "selections", inputs, _selection, blocks)
    for place, block in enumerate(blocks):
        if place == len(found):
            acts.ready()
            with run.run_dir.record.timed("select"):
                found.append(from_first(lambda: select(block.layer, acts[place], harmful, run.recipe)))  # noqa: B023 - called at once
            run.run_dir.keep_rows("selections", inputs, map(_row, found))
        run.on_event(Event("select", place + 1, len(blocks)))
    if taken:
        found = [without(one, others) for one, others in zip(found, taken, strict=True)]
    require_neurons(found)
    first, reason = choose_first_layer(found, run.recipe)
    run.decide("first layer", str(first), reason)
    used = [one if one.layer >= first else one.skipped(f"below layer {first}, the first that is patched") for one in found]
    require_neurons(used)
    return used


def _clustered(
    run: Run, blocks: Sequence[MlpBlock], acts: Activations, selections: Sequence[Selection], inputs: Mapping[str, Any]
) -> list[Clusters]:
    """The stage cluster: a result per block."""
    inputs = {**inputs, **_settings(run, _CLUSTER)}
    found = _found(run, "clusters", inputs, _clusters, blocks)
    if any(not np.array_equal(groups.neurons, one.neurons) for groups, one in zip(found, selections, strict=False)):
        found = []
    for place, selection in enumerate(selections):
        if place == len(found):
            acts.ready()
            with run.run_dir.record.timed("cluster"):
                found.append(from_first(lambda: cluster(selection, acts[place], run.recipe)))  # noqa: B023 - called at once
            run.run_dir.keep_rows("clusters", inputs, map(_row, found))
        run.note(f"layer {selection.layer}: {selection.reason}; {found[place].k} clusters")
        run.on_event(Event("cluster", place + 1, len(blocks)))
    return found


def _detected(
    run: Run,
    blocks: Sequence[MlpBlock],
    acts: Activations,
    harmful: npt.NDArray[np.bool_],
    layers: Sequence[tuple[Selection, Clusters]],
    places: Places,
    inputs: Mapping[str, Any],
) -> Detector:
    """The stage detector."""
    used = (block for block, (selection, _) in zip(blocks, layers, strict=True) if len(selection.neurons))
    first = min(layers_of(run.model, block)[1] for block in used)
    inputs = {**inputs, "states": places, "first layer": first, **_settings(run, _detector.SETTINGS)}
    found = run.run_dir.rows("detector", inputs, _detector.of_row)
    if len(found) == 1:
        run.run_dir.note_reused("detector")
    else:
        acts.ready()
        with run.run_dir.record.timed("detector"):
            run.on_event(Event("detector", 0, 1))
            states = partial(_states, acts, len(blocks))
            found = [from_first(lambda: _detector.fit_detector(places, states, harmful, first, run.recipe))]
        run.run_dir.keep_rows("detector", inputs, [_detector.row_of(*found[0])])
    detector, reason = found[0]
    run.decide("detector", f"layer {detector.facts.layer}, {detector.facts.pooling}", reason)
    run.on_event(Event("detector", 1, 1))
    return detector


def _states(acts: Activations, blocks: int, number: int) -> FloatArray:
    return acts[blocks + number]


def digest_layers(layers: Sequence[tuple[Selection, Clusters]]) -> str:
    """The identity of the neurons that are trained.

    Args:
        layers: From `find_clusters`.

    Returns:
        SHA-256, hex.
    """
    return digest_json([_row(clusters) for _, clusters in layers])


def _found(
    run: Run, name: str, inputs: Mapping[str, Any], parse: Callable[[Any, int], T], blocks: Sequence[MlpBlock]
) -> list[T]:
    """What an earlier training kept of the first blocks."""
    sizes = iter([block.neurons for block in blocks])
    found = run.run_dir.rows(name, inputs, lambda row: parse(row, next(sizes)))
    if [one.layer for one in found] != [block.layer for block in blocks][: len(found)]:
        return []
    if found:
        run.run_dir.note_reused(f"{name} of {len(found)} blocks")
    return found


def _settings(run: Run, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(run.recipe, name) for name in names}


def _row(value: Selection | Clusters) -> dict[str, Any]:
    """A result as a JSON value; its floats are read back exactly."""
    entries = asdict(value).items()
    return {name: entry.tolist() if isinstance(entry, np.ndarray) else entry for name, entry in entries}


def _selection(row: Any, size: int) -> Selection:
    """A result of `_row`; raises ValueError, TypeError or LookupError for any other value."""
    neurons, z = _integers(row["neurons"], size), np.array(row["z"], np.float32)
    if z.shape != neurons.shape or (np.diff(neurons) <= 0).any():
        raise ValueError("it is no selection")
    return Selection(row["layer"], float(row["accuracy"]), neurons, z, str(row["reason"]))


def _clusters(row: Any, size: int) -> Clusters:
    """A result of `_row`; raises ValueError, TypeError or LookupError for any other value."""
    neurons, k = _integers(row["neurons"], size), int(row["k"])
    labels = _integers(row["labels"], k)
    if labels.shape != neurons.shape or len(np.unique(labels)) != k or (np.diff(neurons) <= 0).any():
        raise ValueError("they are no clusters")
    silhouette = None if row["silhouette"] is None else float(row["silhouette"])
    return Clusters(row["layer"], neurons, labels, k, silhouette, str(row["reason"]))


def _integers(values: Any, end: int) -> npt.NDArray[np.int64]:
    if not all(type(value) is int and 0 <= value < end for value in values):
        raise ValueError("a number is out of range")
    return np.array(values, np.int64)
