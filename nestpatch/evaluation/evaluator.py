"""Evaluation of a model on disk, in whatever runtime it is for, with or without a pack."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.errors import DataError
from nestpatch.evaluation.dose import check_strengths
from nestpatch.evaluation.drift import drift
from nestpatch.evaluation.suites import BENIGN, Evaluation, Scores, Suite, evaluate_suites, overlaps
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import write_bytes
from nestpatch.formats import nest
from nestpatch.formats.provenance import read_packs
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.pack import Pack
from nestpatch.patcher.findings import APPLICABLE, State
from nestpatch.patcher.identity import examine
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.plan import make_plan
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.protocol import Runtime, open_runtime, runtime_of
from nestpatch.runtimes.transformers import locate
from nestpatch.signing.trust import Policy

NOT_MEASURED = "no benign suite: the drift from the base was not measured"
_Opened: TypeAlias = Callable[[str | Path], AbstractContextManager[Runtime]]


def evaluate(
    model: str | Path,
    suites: Sequence[Suite],
    *,
    pack: PackLike | None = None,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    strengths: Sequence[float] = (1.0,),
    lora: str | Path | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_new_tokens: int = 48,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Evaluates a model; with a pack also the same model with the pack merged in memory.

    A .gguf file is run by llama.cpp and an ONNX model by onnxruntime, both without torch; there the pack is an adapter where
    the model takes one. A model that holds the pack already is evaluated as it is, and a note says so; with `base` both are.

    Args:
        model: A model directory, weight file or Hub id.
        suites: What to ask.
        pack: What to merge in memory. It passes the gate first, as for `apply_in_place`: what is measured is what would be
            applied.
        policy: Whose signatures the pack needs; None means the policy of this user and this machine.
        trust: "none" skips the judgement of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        strengths: Factors of the pack's change, over 0 and at most 1.5. More than one are measured one after the other, as
            the dose curve; 0 names the model alone, which is measured in any case.
        lora: An adapter file for a .gguf or ONNX model, instead of `pack`.
        base: The unpatched model: measures how far `model` has moved from it.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto", or the torch dtype to compute in; GGUF and ONNX files have their own.
        threads: Threads that compute; None: OMP_NUM_THREADS, or every core.
        max_new_tokens: Length of an answer.
        on_event: Receives the progress.

    Returns:
        The scores of the model, and of the patched one.

    Raises:
        SignatureError: Too few trusted keys signed the pack, or a signature is wrong.
        PackError: The pack cannot be read.
        CheckpointError: The model cannot be read or run, or is not the pack's base.
        DataError: The options do not go together, or the runtime cannot compute on the device.
        MissingExtraError: The packages of the runtime are not installed.
    """
    wanted = check_strengths(strengths)
    if pack is not None and lora is not None:
        raise DataError("a pack and an adapter were given: either of them makes the patched model")
    if wanted != (1.0,) and pack is None:
        raise DataError("strengths without a pack: a strength is a factor of a pack's change")
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event).pack
    _require_compatible(model, lora, base)
    opened = partial(open_runtime, device=device, dtype=dtype, threads=threads, max_new_tokens=max_new_tokens)
    work = _Evaluator(suites, opened, on_event, list(overlaps(suites)))
    for note in work.notes:
        on_event(Event("note", note=note))
    if proven is not None and (reason := _already_held(model, proven)):
        work.note_held(model, proven, reason, wanted)
        if base is not None:
            return work.compare(base, model)
        work.note("give the unpatched model with --base to measure both")
        proven = None
    with work.load(model) as runtime:
        before = work.scores(runtime, str(model))
        if base is not None:
            before = work.moved_from(base, runtime, before)
        if proven is not None:
            found = work.at_strengths(runtime, proven, wanted, before, f"{model} with {proven.label}")
            curve = tuple(found.items()) if len(wanted) > 1 else ()
            strength = 1.0 if curve else wanted[0]
            return Evaluation(before, found.get(strength), tuple(work.notes), strength if strength in found else None, curve)
        if lora is None:
            return Evaluation(before, None, tuple(work.notes))
        with runtime.with_adapter(Path(lora)) as patched:
            after = work.patched(runtime, patched, before, f"{model} with {lora}")
            return Evaluation(before, after, tuple(work.notes))


def _require_compatible(model: str | Path, lora: str | Path | None, base: str | Path | None) -> None:
    """Raises DataError for an adapter or a base that the model's runtime does not accept."""
    kind = runtime_of(model)
    if lora is not None and kind == "transformers":
        advice = "Give the pack itself: nestpatch eval MODEL PACK"
        raise DataError("an adapter file goes with a .gguf or an ONNX model", advice=advice)
    other = kind if base is None else runtime_of(base)
    if other not in (kind, "transformers"):
        what, where = ("a .gguf", ".gguf") if other == "llama.cpp" else ("an ONNX", "ONNX")
        raise DataError(f"the drift from {what} base can be measured for {where} models", advice="Give the base's directory.")


def _already_held(model: str | Path, pack: Pack) -> str:
    """What proves, before anything is loaded, that a model holds a pack already; empty where it does not.

    Raises BaseMismatchError for a model that the pack is not for.
    """
    kind = runtime_of(model)
    if kind == "transformers":
        import transformers  # noqa: F401 - a missing package is reported before anything is read

        model = locate(model).path
    checkpoint, state_dir = open_model(model)
    states = {finding.state for finding in examine(pack, checkpoint)}
    if states == {State.PATCHED}:
        return "its rows are the pack's result"
    if not states & {State.BASE, State.WIDENED, State.PATCHED, State.MISSING, State.SHAPE}:
        # Rows that were rounded, or merged at another strength, prove little: then the records count.
        pack_id = nest.pack_id(pack)
        if any(entry.pack_id == pack_id for entry in read_ledger(state_dir).applied):
            return "its ledger names the pack"
        if any(claim["pack_id"] == pack_id for claim in read_packs(checkpoint.metadata())):
            return "its files name the pack"
    if kind != "onnxruntime" and not states <= set(APPLICABLE):
        make_plan(pack, checkpoint)  # raises, and says which rows differ
    return ""


@dataclass(eq=False)
class _Evaluator:
    """What the steps of one evaluation share."""

    suites: Sequence[Suite]
    opened: _Opened
    on_event: OnEvent
    notes: list[str]

    def note(self, text: str) -> None:
        """A note for the result, and at once for the listener."""
        if text not in self.notes:
            self.notes.append(text)
            self.on_event(Event("note", note=text))

    def note_held(self, model: str | Path, pack: Pack, reason: str, strengths: Sequence[float]) -> None:
        """Notes that a model holds the pack already. Raises DataError where other strengths are to be measured."""
        held = f"{model} holds {pack.label} already ({reason})"
        if strengths != (1.0,):
            raise DataError(f"{held}: no other strength can be measured", advice="Give the unpatched model.")
        self.note(f"{held}: it is evaluated as it is")

    @contextmanager
    def load(self, model: str | Path) -> Iterator[Runtime]:
        """Opens a model, and reports which."""
        self.on_event(Event("load", note=str(model)))
        with self.opened(model) as runtime:
            yield runtime

    def scores(self, runtime: Runtime, what: str) -> Scores:
        """Evaluates a model, and names it in every event."""
        self.on_event(Event("note", note=f"evaluating {what}"))

        def report(event: Event) -> None:
            self.on_event(Event("evaluate", event.done, event.total, what))

        return evaluate_suites(partial(runtime.generate, on_event=report), self.suites)

    def drift(self, base: Runtime, model: Runtime, before: Scores) -> float | None:
        """How far a model has moved from the base, by the base's answers in `before`."""
        found = drift(base, model, before.answers(BENIGN))
        if found is None:
            self.note(NOT_MEASURED)
        return found

    def patched(self, base: Runtime, model: Runtime, before: Scores, what: str) -> Scores:
        """The scores of a patched model, with its drift from the base."""
        after = self.scores(model, what)
        return Scores(after.suites, self.drift(base, model, before))

    def at_strengths(
        self, base: Runtime, pack: Pack, strengths: Sequence[float], before: Scores, what: str
    ) -> dict[float, Scores]:
        """Strength -> scores of the base with a pack; `strengths` as from `check_strengths`."""
        found, positive = {}, [strength for strength in strengths if strength]
        for number, strength in enumerate(positive, start=1):
            which = f", {number} of {len(positive)}" if len(strengths) > 1 else ""
            note = "" if strengths == (1.0,) else f" at strength {strength:g}{which}"
            with base.with_pack(pack, strength) as patched:
                found[strength] = self.patched(base, patched, before, what + note)
        return found

    def moved_from(self, base: str | Path, model: Runtime, scores: Scores) -> Scores:
        """The scores of a model, with its drift from a base, which is out of memory again afterwards."""
        prompts = list(scores.answers(BENIGN))
        if not prompts:
            self.note(NOT_MEASURED)
            return scores
        with self.load(base) as reference:
            answers = dict(zip(prompts, reference.generate(prompts), strict=True))
            return Scores(scores.suites, drift(reference, model, answers))

    def compare(self, base: str | Path, model: str | Path) -> Evaluation:
        """A base and the model that was made from it by patching."""
        with self.load(base) as reference:
            before = self.scores(reference, f"{base}, the base")
            with self.load(model) as patched:
                return Evaluation(before, self.patched(reference, patched, before, f"{model}, patched"), tuple(self.notes))


def write_answers(evaluation: Evaluation, path: Path) -> None:
    """Writes a JSONL file with one object for each answer: of ("model" or "patched"), suite, prompt, answer, refused, correct.

    Those of a curve also name the strength.

    Args:
        evaluation: What was measured.
        path: The file to write.

    Raises:
        OutputError: The file cannot be written.
    """
    lines = []
    sides: list[tuple[dict[str, Any], Scores]] = [({"of": "model"}, evaluation.model)]
    sides += [({"of": "patched", "strength": strength}, scores) for strength, scores in evaluation.curve]
    if evaluation.patched is not None and not evaluation.curve:
        sides.append(({"of": "patched"}, evaluation.patched))
    for name, scores in sides:
        for suite in scores.suites:
            for verdict in suite.verdicts:
                row = {**name, "suite": suite.suite, **dataclasses.asdict(verdict)}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_bytes(path, "".join(lines).encode("utf-8"))
