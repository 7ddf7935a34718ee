"""Which neurons an ablation switches off: all that a pack changes, or those that respond most to harmful prompts.

In a dense model these have the largest effect sizes (SafeNeuron, arXiv 2602.12158). In a mixture of experts they are looked for
in the experts that harmful prompts are routed to most, three times as many as a token has, by a z-scored difference of means
over 2 (GateBreaker, arXiv 2512.21008).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from nestpatch.errors import DataError
from nestpatch.evaluation.suites import Suite
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.measured import BENIGN, HARMFUL
from nestpatch.pack import Pack
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.text import by_length
from nestpatch.runtimes.transformers import TransformersRuntime
from nestpatch.runtimes.weights import MlpBlock, find_mlps

if TYPE_CHECKING:
    from nestpatch.runtimes.effects import Moments
    from nestpatch.runtimes.neurons import Neurons

PATCHED, _FORM = "patched", "1000"
"""All neurons that the pack changes; and a number of neurons, as an example."""
_SHIFT = 2.0
"""z-score of a neuron of a mixture, at least. Source: GateBreaker, `sn_thres_router`."""
_FEWEST = 2
"""Prompts of each kind from which neurons can be told apart, at least."""
Wanted: TypeAlias = str | int  # PATCHED, or how many neurons
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Chosen:
    """Neurons to switch off, and as many others to compare with.

    Attributes:
        neurons: What is switched off.
        random: As many neurons of the same matrices and experts, drawn from all of them.
        count: How many.
        total: Neurons of all feed-forward blocks.
        how: How they were chosen, in words.
    """

    neurons: Neurons
    random: Neurons
    count: int
    total: int
    how: str


def parse_ablation(text: str) -> Wanted:
    """Reads what a user asks for.

    Args:
        text: "patched" or a number of neurons.

    Returns:
        The same, checked.

    Raises:
        DataError: It is neither.
    """
    if text == PATCHED:
        return text
    if not (text.isascii() and text.isdigit() and 0 < int(text[:12]) == int(text)):
        raise DataError(f"{text[:40]!r} names no neurons", advice=f"Write {PATCHED}, or how many neurons: {_FORM}.")
    return int(text)


@dataclass(frozen=True, eq=False)
class Choice:
    """What decides which neurons are switched off.

    Attributes:
        wanted: PATCHED, or how many neurons.
        pack: Whose neurons PATCHED are; None without a pack.
        suites: Their harmful and their benign prompts tell neurons apart.
        on_event: Receives the progress.
    """

    wanted: Wanted
    pack: Pack | None
    suites: Sequence[Suite]
    on_event: OnEvent = ignore


def choose(runtime: TransformersRuntime, choice: Choice) -> Chosen:
    """Chooses the neurons of a model.

    Args:
        runtime: The model, patched where a pack is measured: neurons are observed in it.
        choice: What decides.

    Returns:
        The neurons. There may be fewer than were asked for, where fewer respond to harmful prompts.

    Raises:
        DataError: The pack changes no neuron, or none responds to harmful prompts.
        UnsupportedModelError: The model has no feed-forward block that is known.
    """
    from nestpatch.runtimes.neurons import neurons_of, patched_neurons, random_neurons

    blocks, pack = find_mlps(runtime.model), choice.pack
    if isinstance(choice.wanted, int):
        picked, how = _most(runtime, blocks, choice.wanted, choice)
        found = neurons_of(runtime.model, picked)
    elif pack is None or runtime.path is None:
        raise DataError("without a pack there are no patched neurons", advice=f"Give a PACK, or how many neurons: {_FORM}.")
    else:
        found, how = patched_neurons(runtime.model, open_model(runtime.path)[0], pack), f"all that {pack.label} changes"
    count = sum(map(len, found.values()))
    total = sum(block.neurons for block in blocks)
    return Chosen(found, random_neurons(runtime.model, found, 0), count, total, how)


def _most(
    runtime: TransformersRuntime, blocks: Sequence[MlpBlock], wanted: int, choice: Choice
) -> tuple[list[tuple[MlpBlock, IntArray]], str]:
    """The neurons that respond most to harmful prompts, by block, and how they were chosen."""
    from nestpatch.runtimes.effects import cohens_d, shift

    harmful, benign = (_rows(runtime, choice.suites, kind) for kind in (HARMFUL, BENIGN))
    on_event = choice.on_event
    mixed = any(block.mixture for block in blocks)
    if mixed:
        blocks = _busy(runtime, blocks, harmful, on_event)
    kinds = zip(_moments(runtime, blocks, harmful, on_event), _moments(runtime, blocks, benign, on_event), strict=True)
    scores = [(shift if mixed else cohens_d)(*both) for both in kinds]
    flat, least = np.concatenate(scores), _SHIFT if mixed else 0.0
    order = np.argsort(-flat, kind="stable")[:wanted]
    order = order[flat[order] > least]
    if not len(order):
        raise DataError(f"no neuron of {runtime.path} responds more to the harmful prompts than to the benign ones")
    ends = np.cumsum([len(one) for one in scores])
    places = np.searchsorted(ends, order, side="right")
    starts = ends - [len(one) for one in scores]
    picked = [(block, np.sort(order[places == place] - starts[place])) for place, block in enumerate(blocks)]
    rule = (
        f"shift over {_SHIFT:g} in the experts that harmful prompts are routed to most" if mixed else "the largest effect sizes"
    )
    few = f", of {wanted:,} asked for" if len(order) < wanted else ""
    return picked, f"{len(order):,} neurons{few}: {rule}, {flat[order].min():.2f} to {flat[order].max():.2f}"


def _rows(runtime: TransformersRuntime, suites: Sequence[Suite], kind: str) -> list[list[int]]:
    """Token ids of the prompts of a kind."""
    texts = dict.fromkeys(prompt.text for suite in suites if suite.kind == kind for prompt in suite.prompts.prompts)
    if len(texts) < _FEWEST:
        raise DataError(
            f"{len(texts)} {kind} prompts do not tell which neurons respond to harm",
            advice=f"Neurons are chosen by harmful and benign prompts: add --suite {kind}=FILE.",
        )
    return runtime.token_ids(list(texts))


def _busy(
    runtime: TransformersRuntime, blocks: Sequence[MlpBlock], harmful: Sequence[Sequence[int]], on_event: OnEvent
) -> list[MlpBlock]:
    """Leaves to each mixture the experts that harmful prompts are routed to most."""
    from nestpatch.runtimes.experts import Batch, busiest, counting, run_batch

    batch = Batch()
    with counting(blocks, batch) as counts:
        for places in _batches(runtime, harmful, on_event, "experts"):
            with runtime.active():
                run_batch(runtime.model, [harmful[place] for place in places], _pad(runtime), batch)
    return [block.of_experts(busiest(counts[block.name])) if block.mixture else block for block in blocks]


def _moments(
    runtime: TransformersRuntime, blocks: Sequence[MlpBlock], rows: Sequence[Sequence[int]], on_event: OnEvent
) -> list[Moments]:
    """The moments of each block's neurons, max-pooled over the tokens of each prompt. Memory does not grow with the prompts."""
    from nestpatch.runtimes.effects import Moments
    from nestpatch.runtimes.experts import Batch, pooling, run_batch

    batch, found = Batch(), list[Moments]()
    with pooling(blocks, batch) as pooled:
        for places in _batches(runtime, rows, on_event, "neurons"):
            with runtime.active():
                run_batch(runtime.model, [rows[place] for place in places], _pad(runtime), batch)
            parts = [Moments.of(pooled[block.name].cpu().numpy()) for block in blocks]
            found = [old + new for old, new in zip(found, parts, strict=True)] if found else parts
    return found


def _batches(runtime: TransformersRuntime, rows: Sequence[Sequence[int]], on_event: OnEvent, what: str) -> Iterator[list[int]]:
    """Batches of similar length, which report when they are asked for."""
    done = 0
    for places in by_length(rows, runtime.together):
        yield places
        done += len(places)
        on_event(Event("observe", done, len(rows), what))


def _pad(runtime: TransformersRuntime) -> int:
    return int(runtime.tokenizer.pad_token_id)
