"""The verb `detect`: which prompts the detector of a pack takes for harmful."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.detector import DetectorFacts
from nestpatch.evaluation.detection import reads_below, require_detector, score_prompts
from nestpatch.evaluation.preconditions import already_held
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.pack import Pack
from nestpatch.runtimes.protocol import open_runtime
from nestpatch.signing.trust import Policy


@dataclass(frozen=True)
class ScoredPrompt:
    """What a detector says of one prompt.

    Attributes:
        prompt: The prompt.
        score: The log-odds of being harmful in the training.
        harmful: Whether the score is above the threshold.
    """

    prompt: str
    score: float
    harmful: bool


@dataclass(frozen=True)
class Detected:
    """What `nestpatch.detect` found.

    Attributes:
        pack: Name and version of the pack.
        facts: Where its detector reads, its threshold, and how well it was measured.
        prompts: The prompts, in the order in which they were given.
        notes: What a reader of the scores must know.
    """

    pack: str
    facts: DetectorFacts
    prompts: tuple[ScoredPrompt, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        prompts = [{"prompt": one.prompt, "score": round(one.score, 4), "harmful": one.harmful} for one in self.prompts]
        return {"pack": self.pack, "detector": self.facts.as_json(), "prompts": prompts, "notes": list(self.notes)}


def detect(
    model: str | Path,
    prompts: Sequence[str],
    pack: PackLike,
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    device: str = "auto",
    threads: int | None = None,
    on_event: OnEvent = ignore,
) -> Detected:
    """Says which prompts ask for harm, by the detector of a pack. The model is not changed, and answers nothing.

    Args:
        model: The base of the pack: a model directory, weight file, Hub id or .gguf file. A model that holds the pack is
            read as it is; a note says so where its hidden states are not the base's.
        prompts: What a user asks. A prompt of more than 512 tokens is judged by its last ones.
        pack: A pack with a detector. It passes the gate first, as for `apply_in_place`.
        policy: Whose signatures the pack needs; None means the policy of this user and this machine.
        trust: "none" skips the judgement of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        device: "auto", "cpu", "cuda" or "mps".
        threads: Threads that compute; None: OMP_NUM_THREADS, or every core.
        on_event: Receives the progress.

    Returns:
        The score of every prompt.

    Raises:
        SignatureError: Too few trusted keys signed the pack, or a signature is wrong.
        PackError: The pack cannot be read.
        DataError: The pack has no detector, or the runtime of the model gives no hidden states.
        CheckpointError: The model cannot be read or run, or is not the pack's base.
        MissingExtraError: The packages of the runtime are not installed.
    """
    checked = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event).pack
    detector = require_detector(checked, model)
    notes = notes_on(model, checked)
    for note in notes:
        on_event(Event("note", note=note))
    on_event(Event("load", note=str(model)))
    with open_runtime(model, device=device, threads=threads) as runtime:
        scores = score_prompts(runtime, detector, prompts)
    fired = scores > detector.facts.threshold
    found = (ScoredPrompt(*one) for one in zip(prompts, scores.tolist(), fired.tolist(), strict=True))
    return Detected(checked.label, detector.facts, tuple(found), notes)


def notes_on(model: str | Path, pack: Pack) -> tuple[str, ...]:
    """What a reader of a detector's scores must know about the model.

    Args:
        model: The model whose hidden states are read.
        pack: A pack with a detector.

    Returns:
        A note where the model holds the pack in a layer that the detector depends on; else nothing.

    Raises:
        BaseMismatchError: The pack is not for this model.
    """
    held = already_held(model, pack)
    if not held or reads_below(pack):
        return ()
    reason = f"{model} holds {pack.label} already ({held}), and the detector reads a layer that the pack changes"
    return (f"{reason}: its threshold and its measured rates are for the base",)
