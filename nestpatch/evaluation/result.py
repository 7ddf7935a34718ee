"""`Evaluation`, what `nestpatch.evaluate` returns: the scores of a model, patched, and without some of its neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nestpatch.evaluation.ablation import Chosen, Wanted
from nestpatch.evaluation.agreement import Agreement, agreements
from nestpatch.evaluation.concerns import concerns
from nestpatch.evaluation.detection import Detection
from nestpatch.evaluation.dose import Dose, DosePoint, dose_json
from nestpatch.evaluation.judges.coherence import is_incoherent
from nestpatch.evaluation.judges.keywords import KEYWORDS
from nestpatch.evaluation.scores import Scores
from nestpatch.evaluation.shares import Share


@dataclass(frozen=True)
class Ablation:
    """A model with neurons switched off, and beside it with as many random ones of the same matrices.

    Attributes:
        wanted: "patched", or the number of neurons that was asked for.
        how: How the neurons were chosen, in words.
        neurons: How many were switched off.
        total: Neurons of all feed-forward blocks.
        blocks: Feed-forward blocks in which some were.
        chosen: The scores without them; the drift is that from the model without the pack.
        random: The scores without random ones.
        left: Of the harmful prompts that the whole model refuses, those that it still refuses; None where it refuses none.
        random_left: The same without random ones.
    """

    wanted: str
    how: str
    neurons: int
    total: int
    blocks: int
    chosen: Scores
    random: Scores
    left: Share | None
    random_left: Share | None

    @classmethod
    def of(cls, neurons: Chosen, wanted: Wanted, whole: Scores, chosen: Scores, random: Scores) -> Ablation:
        """Makes an ablation of what was measured.

        Args:
            neurons: What was switched off.
            wanted: What was asked for.
            whole: The scores of the whole model.
            chosen: The scores without the chosen neurons.
            random: The scores without random ones.

        Returns:
            The ablation.
        """
        left, random_left = (one.still_refused(whole) for one in (chosen, random))
        counts = (neurons.count, neurons.total, len(neurons.neurons))
        return cls(str(wanted), neurons.how, *counts, chosen, random, left, random_left)

    def as_json(self) -> dict[str, Any]:
        """The numbers as plain values; None for what was not measured."""
        facts = {name: getattr(self, name) for name in ("wanted", "how", "neurons", "total", "blocks")}
        left = {"still_refused": self.left, "random_still_refused": self.random_left}
        shares = {name: None if share is None else share.as_json() for name, share in left.items()}
        return {**facts, **shares, "chosen": self.chosen.as_json(), "random": self.random.as_json()}


@dataclass(frozen=True)
class Evaluation:
    """What `nestpatch.evaluate` measured.

    Attributes:
        model: The model as it is on disk.
        patched: The same model with a pack or an adapter; None where none was given, and where a curve lacks strength 1.
        notes: What a reader of the numbers must know: prompts in several suites, a model that holds the pack already.
        judges: Names of the judges; the first decided.
        strength: Of the pack in `patched`; None where there is none, and where it is not known.
        curve: (strength, scores) of the pack at each of several strengths over 0; empty where one was measured.
        detection: The pack's detector on the suites; None where there is none, and where it was not measured.
        gated: The scores where the patched model answers the prompts that the detector takes for harmful, and the base all
            others; None unless they were asked for.
        ablation: The model, or where there is one the patched model, with neurons switched off; None where none were.
    """

    model: Scores
    patched: Scores | None = None
    notes: tuple[str, ...] = ()
    judges: tuple[str, ...] = (KEYWORDS.name,)
    strength: float | None = None
    curve: tuple[tuple[float, Scores], ...] = ()
    detection: Detection | None = None
    gated: Scores | None = None
    ablation: Ablation | None = None

    @property
    def sides(self) -> tuple[tuple[float | None, Scores], ...]:
        """(strength, scores) of everything that was measured: the model, None, then the patched model at each strength."""
        patched = self.curve or (() if self.patched is None else ((self.strength, self.patched),))
        return ((None, self.model), *patched)

    @property
    def agreement(self) -> tuple[Agreement, ...]:
        """Each other judge beside the first, over the answers of all models and suites; empty for one judge."""
        off = () if self.ablation is None else (self.ablation.chosen, self.ablation.random)
        sides = (*(side for _, side in self.sides), *off)
        judged = (one for side in sides for suite in side.suites for one in suite.verdicts)
        return agreements(self.judges, [one.verdicts for one in judged if not is_incoherent(one.answer)])  # no judge read those

    @property
    def concerns(self) -> tuple[str, ...]:
        """What speaks against the pack, each with its number; empty without a pack."""
        if self.patched is None:
            return ()
        return concerns({"before": self.model.as_json(), "after": self.patched.as_json()})

    @property
    def dose(self) -> Dose | None:
        """The numbers of every strength, and the recommended one; None where no curve was measured."""
        if not self.curve:
            return None
        sides = ((0.0, self.model), *self.curve)
        return Dose(tuple(DosePoint.of(strength, one.totals(), one.drift, one.categories()) for strength, one in sides))

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model and the pack that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names. What was not measured is None.
        """
        return {
            "before": self.model.as_json(),
            "after": self.patched.as_json() if self.patched is not None else None,
            "strength": self.strength,
            "warnings": list(self.concerns),
            "notes": list(self.notes),
            "judges": list(self.judges),
            "agreement": [one.as_json() for one in self.agreement],
            "detector": self.detection.as_json() if self.detection is not None else None,
            "gated": self.gated.as_json() if self.gated is not None else None,
            "ablation": None if self.ablation is None else self.ablation.as_json(),
            **dose_json(self.dose),
        }
