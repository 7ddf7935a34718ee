"""The stages remember and tune, which go on where they were interrupted."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nestpatch.events import Event
from nestpatch.nest_train._digests import digest_json
from nestpatch.nest_train._run import Run
from nestpatch.nest_train._targets import JUDGED_TOKENS, Examples
from nestpatch.runtimes.weights import MlpBlock

if TYPE_CHECKING:
    from nestpatch.nest_train._trunk import Trunk
    from nestpatch.nest_train._tune import Loss
    from nestpatch.nest_train._tune_state import Trainable, TuneResult, TuneState

_AFTER_TUNING = ("max_answer_tokens", "delta_dtype", "dose_strengths", "detector", "detector_false_positives", "shard")
"""Settings that the tuning does not depend on."""


def fit(
    run: Run,
    blocks: Sequence[MlpBlock],
    change: Trainable,
    examples: Examples,
    neurons: str = "",
    loss_function: Loss | None = None,
) -> TuneResult:
    """The stages remember and tune.

    Args:
        run: The base.
        blocks: Its feed-forward blocks.
        change: What is trained, in place.
        examples: The training examples.
        neurons: The identity of what `change` is attached to.
        loss_function: As for `tune`.

    Returns:
        How the tuning went.

    Raises:
        PromptDataError: A kind has fewer than two examples.
        OutOfMemoryError: Not even one example fits into memory.
    """
    from nestpatch.nest_train._tune_state import TuneState

    texts = [[[e.text, e.tokens.prompt, e.tokens.answer] for e in kind] for kind in (examples.harmful, examples.harmless)]
    settings = {name: value for name, value in run.recipe.as_json().items() if name not in _AFTER_TUNING}
    state = TuneState(run.run_dir, {**settings, "examples": digest_json(texts), "neurons": neurons})
    state.load(change, run.recipe.steps)
    if state.reason:  # it had ended
        run.decisions |= state.decisions
        state.keep_best(change)
    else:
        _remember_and_tune(run, blocks, change, examples, state, loss_function)
    run.run_dir.record.update(tuning=state.as_json())
    result = state.result
    run.note(f"kept step {result.kept.step} of {result.steps} ({result.reason}): {result.kept}; the base: {result.before}")
    return result


def _remember_and_tune(
    run: Run,
    blocks: Sequence[MlpBlock],
    change: Trainable,
    examples: Examples,
    state: TuneState,
    loss_function: Loss | None,
) -> None:
    from nestpatch.nest_train._trunk import Trunk
    from nestpatch.nest_train._tune import tune

    trunk, timed = Trunk(run.model, blocks, change.first_layer, run.pad), run.run_dir.record.timed
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with timed("remember"):
            _remember(run, trunk, change, examples, state, Path(folder))
        run.on_event(Event("tune", state.step, run.recipe.steps, f"{change.trainable} parameters"))
        answer = partial(run.generate, stage="look", tokens=JUDGED_TOKENS)
        with timed("tune"):
            recipe = dataclasses.replace(run.recipe, micro_batch=state.micro_batch)
            tune(trunk, change, examples, answer, recipe, run.on_event, state, loss_function)


def _remember(run: Run, trunk: Trunk, change: Trainable, examples: Examples, state: TuneState, folder: Path) -> None:
    """The stage remember. A tuning that goes on is computed as it began, whatever memory is free now."""
    from nestpatch.nest_train._memory import fit_memory

    if not state.micro_batch:
        before = set(run.decisions)
        state.micro_batch, state.checkpointing = fit_memory(run, trunk, change, examples, folder), trunk.checkpointing
        state.decisions = {name: choice for name, choice in run.decisions.items() if name not in before}
    trunk.checkpointing = state.checkpointing
    run.decisions |= state.decisions
    every, harmless = ([e.tokens for e in part] for part in (examples.harmful + examples.harmless, examples.harmless))
    run.decide("step", *trunk.remember(every, harmless, folder, run.on_event, state.micro_batch))
    state.decisions["step"] = run.decisions["step"]
