"""The result of a training: the pack and its numbers.

Public: `Trained`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from nestpatch.evaluation.concerns import concerns
from nestpatch.evaluation.dose import Dose, dose_json
from nestpatch.evaluation.scores import Scores
from nestpatch.formats import nest
from nestpatch.pack import Pack


@dataclass(frozen=True, eq=False)
class Trained:
    """The result of a training.

    Attributes:
        pack: The pack, with the numbers of the evaluation in its manifest.
        pack_id: SHA-256 of its file.
        nbytes: Size of its file.
        before: The numbers of the base; None where no suites were given.
        after: The numbers of the base with the pack; None where no suites were given, or where the evaluation failed.
        trained_parameters: Number of trained values.
        model_parameters: Number of parameters of the base.
        output: The file of the pack; None where no output was given.
        problem: Why the pack, or where `after` is there its dose curve, could not be evaluated; None where nothing failed.
    """

    pack: Pack
    pack_id: str
    nbytes: int
    before: Scores | None
    after: Scores | None
    trained_parameters: int
    model_parameters: int
    output: Path | None = None
    problem: str | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the pack, by the numbers in its manifest: one sentence each, with the number."""
        return concerns(self.pack.manifest.evaluation)

    @property
    def dose(self) -> Dose | None:
        """The dose curve in its manifest; None where the recipe has no `dose_strengths`."""
        return Dose.from_json(self.pack.manifest.evaluation.get("dose"))

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given. What was not measured is null.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "output": None if self.output is None else str(self.output),
            "pack": self.pack.label,
            "pack_id": self.pack_id,
            "bytes": self.nbytes,
            "trained_parameters": self.trained_parameters,
            "model_parameters": self.model_parameters,
            "before": None if self.before is None else self.before.as_json(),
            "after": None if self.after is None else self.after.as_json(),
            "warnings": list(self.warnings),
            "problem": self.problem,
            **dose_json(self.dose),
        }


def with_numbers(trained: Trained, numbers: Mapping[str, Any]) -> Trained:
    """The result with more numbers in the manifest."""
    manifest = trained.pack.manifest
    manifest = dataclasses.replace(manifest, evaluation={**manifest.evaluation, **numbers})
    pack = dataclasses.replace(trained.pack, manifest=manifest)
    pack_id, nbytes = identity(pack)
    return dataclasses.replace(trained, pack=pack, pack_id=pack_id, nbytes=nbytes)


def identity(pack: Pack) -> tuple[str, int]:
    """(id, size) of the pack's file."""
    data = nest.encode(pack)
    return sha256(data).hexdigest(), len(data)
