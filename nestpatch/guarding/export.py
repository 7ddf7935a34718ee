"""The verb `export_guard`: derives the guard of a patched model from the model, its pack and harmful prompts. Needs torch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import BaseMismatchError, DataError
from nestpatch.events import OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.guarding.file import write
from nestpatch.guarding.guard import Guard, patched_rows
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.verify import Verdict, verify
from nestpatch.prompts.builtin import PREFIX
from nestpatch.prompts.readers import PromptSet, load_prompts, sample_set
from nestpatch.signing.trust import Policy


@dataclass(frozen=True)
class ExportedGuard:
    """A guard that was written."""

    output: Path
    guard: Guard
    nbytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {"output": str(self.output), "bytes": self.nbytes, **self.guard.as_json(), "seconds": self.seconds}


ENERGY = 0.9
"""Measured on SmolLM2 (bench/LOG.md): more costs the fine-tune more, and keeps no more refusals."""
PROMPTS = 256


def export_guard(
    model: str | Path,
    pack: PackLike,
    output: str | Path,
    *,
    prompts: PromptSet | None = None,
    energy: float = ENERGY,
    strength: float = 1.0,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    device: str = "auto",
    threads: int | None = None,
    on_event: OnEvent = ignore,
) -> ExportedGuard:
    """Exports what a fine-tune of a patched model must leave alone, for `GuardCallback` and `guard_model`.

    Args:
        model: The patched model: a model directory, or a file of weights in one.
        pack: The pack in it, checked as by `apply`.
        output: The file to write.
        prompts: Harmful prompts; None for 256 of the built-in training set.
        energy: Share of the energy of their inputs that the guarded directions of each matrix hold, over 0 and under 1.
        strength: At which the pack was applied.
        policy: The trust policy for the pack; by default that of this user and this machine.
        trust: "none" skips the check of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        device: Where the model computes: "auto", "cpu", "cuda" or "mps".
        threads: Threads that compute; None: OMP_NUM_THREADS, or every core.
        on_event: Receives the progress.

    Returns:
        The guard, and where it is.

    Raises:
        BaseMismatchError: The rows of the model do not hold the pack.
        CheckpointError: The model cannot be read.
        DataError: The strength or the energy is out of range, there are no prompts, or PyTorch cannot compute on the device.
        MissingExtraError: torch or transformers is not installed.
        OutputError: The output exists or cannot be written.
        PackError: The pack is broken.
        SignatureError: The pack is not signed as the policy requires.
        StateError: The state of the model is broken, or a change was interrupted.
        UnsupportedModelError: The model has no linear layers inside its layers.
    """
    began, target = time.perf_counter(), Path(output)
    check_strength(strength)
    check_energy(energy)
    check_output(target)
    proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    found = verify(model, proven.pack, strength=strength, policy=policy)
    if found.verdict is not Verdict.PATCHED:
        raise BaseMismatchError(
            f"{model} does not hold {proven.pack.label}: {found.detail}",
            advice="A guard is made of the patched model: nestpatch apply MODEL PACK --in-place",
        )
    from nestpatch.guarding.inputs import guarded_matrices
    from nestpatch.runtimes.transformers import TransformersRuntime

    asked = prompts or sample_set(load_prompts(f"{PREFIX}harmful.train"), PROMPTS, 0)
    texts = [prompt.text for prompt in asked.prompts]
    if not texts:
        raise DataError("there are no harmful prompts to make a guard from", advice="Give some, or none for the built-in ones.")
    rows = patched_rows(proven.pack, open_model(model)[0], strength)
    runtime = TransformersRuntime.load(Path(model), device=device, threads=threads)
    matrices = guarded_matrices(runtime, texts, energy, on_event)
    guard = Guard(proven.pack.label, proven.pack_id, strength, energy, len(texts), rows, matrices)
    return ExportedGuard(target, guard, write(guard, target), time.perf_counter() - began)


def check_energy(energy: float) -> None:
    """Checks a share of energy.

    Args:
        energy: The share.

    Raises:
        DataError: It is not over 0 and under 1.
    """
    if not 0 < energy < 1:
        raise DataError(f"an energy of {energy:g} is out of range", advice="Give a number over 0 and under 1, such as 0.9.")
