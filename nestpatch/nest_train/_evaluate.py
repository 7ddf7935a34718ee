"""The stage evaluate: the numbers of the base and of the pack, which is written again with them.

Public in the room: `evaluate` and `evaluated`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from nestpatch.evaluation.dose import Dose, DosePoint, dose_json
from nestpatch.evaluation.scores import Scores, evaluate_suites
from nestpatch.evaluation.suites import Suite
from nestpatch.formats import nest
from nestpatch.measured import BENIGN
from nestpatch.nest_train import _ranks
from nestpatch.nest_train._digests import digest_json
from nestpatch.nest_train._pack import write
from nestpatch.nest_train._run import Run
from nestpatch.nest_train.result import Trained, with_numbers

if TYPE_CHECKING:
    from nestpatch.nest_train._deltas import DeltaSet


def evaluate(run: Run, suites: Sequence[Suite], keep: str, note: str, inputs: Mapping[str, Any]) -> Scores:
    with run.run_dir.record.timed("evaluate"):
        return evaluate_suites(lambda prompts: run.generate(prompts, "evaluate", note, keep=keep, inputs=inputs), suites)


def evaluated(
    run: Run, trained: Trained, suites: Sequence[Suite], deltas: DeltaSet, before: Scores, request: Mapping[str, Any]
) -> Trained:
    """The result with the numbers of the pack, or with the reason why some are missing. The deltas are attached."""
    tensors = [
        [part.name, *(sha256(array.tobytes()).hexdigest() for array in nest.parts(part).values())] for part in trained.pack
    ]
    inputs: dict[str, Any] = {"pack": digest_json(tensors)}

    def measured(strength: float, note: str, keep: str) -> Scores:
        with deltas.scaled(strength):
            scores = evaluate(run, suites, keep, note, inputs if strength == 1 else {**inputs, "strength": strength})
            return Scores(scores.suites, run.drift(before.answers(BENIGN), deltas.off))

    try:
        after = measured(1.0, "the base with the pack", "pack-answers")
        trained = dataclasses.replace(with_numbers(trained, {"after": after.as_json()}), after=after)
        write(run, trained, request, overwrite=True)
        sides, doses = {0.0: before, 1.0: after}, run.recipe.doses()
        for number, strength in enumerate(doses, start=1):
            note = f"the base with the pack at strength {strength:g}, {number} of {len(doses)}"
            run.note(f"evaluating {note}")
            sides[strength] = measured(strength, note, f"pack-answers-{strength:g}")
        if doses:
            curve = Dose(tuple(DosePoint.of(s, one.totals(), one.drift, one.categories()) for s, one in sorted(sides.items())))
            trained = with_numbers(trained, dose_json(curve))
            write(run, trained, request, overwrite=True)
    except Exception as error:  # whatever fails here must not cost a trained pack
        if _ranks.HERE.count > 1:  # the others wait for this process
            run.note("the pack is written, and its evaluation failed: nestpatch eval MODEL PACK measures it again")
            raise
        return dataclasses.replace(trained, problem=f"{type(error).__name__}: {error}")
    return trained
