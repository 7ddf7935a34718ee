"""Evaluation of a model on disk, in whatever runtime it is for, with or without a pack."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from nestpatch.errors import DataError
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
from nestpatch.runtimes.connection import EndpointSettings, is_endpoint
from nestpatch.runtimes.protocol import Runtime, open_runtime, runtime_of
from nestpatch.runtimes.transformers import locate
from nestpatch.signing.trust import Policy

NOT_MEASURED = "no benign suite: the drift from the base was not measured"
NO_LOGITS = "an endpoint gives answers and no logits: the drift from the base was not measured"
_Opened: TypeAlias = Callable[[str | Path], AbstractContextManager[Runtime]]


def evaluate(
    model: str | Path,
    suites: Sequence[Suite],
    *,
    pack: PackLike | None = None,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    lora: str | Path | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_new_tokens: int = 48,
    endpoint: EndpointSettings | None = None,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Evaluates a model; with a pack also the same model with the pack merged in memory.

    A .gguf file is run by llama.cpp and an ONNX model by onnxruntime, both without torch; there the pack is an adapter where
    the model takes one. The model of an OpenAI-compatible server is asked as it is served. A model that holds the pack already
    is evaluated as it is, and a note says so; with `base` both are.

    Args:
        model: A model directory, weight file or Hub id, or the address of a server, such as http://localhost:8000/v1.
        suites: What to ask.
        pack: What to merge in memory. It passes the gate first, as for `apply_in_place`: what is measured is what would be
            applied.
        policy: Whose signatures the pack needs; None means the policy of this user and this machine.
        trust: "none" skips the judgement of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        lora: An adapter file for a .gguf or ONNX model, instead of `pack`.
        base: The unpatched model: measures how far `model` has moved from it.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto", or the torch dtype to compute in; GGUF and ONNX files have their own.
        threads: Threads that compute; None: OMP_NUM_THREADS, or every core.
        max_new_tokens: Length of an answer.
        endpoint: How a server is asked.
        on_event: Receives the progress.

    Returns:
        The scores of the model, and of the patched one.

    Raises:
        SignatureError: Too few trusted keys signed the pack, or a signature is wrong.
        PackError: The pack cannot be read.
        CheckpointError: The model cannot be read or run, or is not the pack's base.
        DataError: The options do not go together, or the runtime cannot compute on the device.
        EndpointError: The server stopped answering; `answered` of the error holds its answers.
        MissingExtraError: The packages of the runtime are not installed.
    """
    _require_local(model, pack is not None or lora is not None, base, device, dtype, threads)
    if pack is not None and lora is not None:
        raise DataError("a pack and an adapter were given: either of them makes the patched model")
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event).pack
    _require_compatible(model, lora, base)
    opened = partial(
        open_runtime, device=device, dtype=dtype, threads=threads, max_new_tokens=max_new_tokens, endpoint=endpoint
    )
    work = _Evaluator(suites, opened, on_event, list(overlaps(suites)))
    for note in work.notes:
        on_event(Event("note", note=note))
    if proven is not None and (reason := _already_held(model, proven)):
        work.note(f"{model} holds {proven.label} already ({reason}): it is evaluated as it is")
        if base is not None:
            return work.compare(base, model)
        work.note("give the unpatched model with --base to measure both")
        proven = None
    with work.load(model) as runtime:
        before = work.scores(runtime, str(model))
        if base is not None:
            before = work.moved_from(base, runtime, before)
        if is_endpoint(model):
            work.note(NO_LOGITS)
        if proven is None and lora is None:
            return Evaluation(before, None, tuple(work.notes))
        what = proven.label if proven is not None else str(lora)
        with runtime.with_pack(proven) if proven is not None else runtime.with_adapter(Path(str(lora))) as patched:
            after = work.scores(patched, f"{model} with {what}")
            after = Scores(after.suites, work.drift(runtime, patched, before))
            return Evaluation(before, after, tuple(work.notes))


def _require_local(
    model: str | Path, patched: bool, base: str | Path | None, device: str, dtype: str, threads: int | None
) -> None:
    """Raises DataError for what can be done with the files of a model alone, and is asked of an endpoint."""
    if base is not None and is_endpoint(base):
        advice = "Give the files of the base and of MODEL: the drift is measured with their logits."
        raise DataError(f"the base is an endpoint, {base}, which gives no logits", advice=advice)
    if not is_endpoint(model):
        return
    if patched:
        advice = f"Load the pack into the server (nestpatch adapter load {model} PACK), and run eval without it."
        raise DataError("a pack cannot be merged into the model of an endpoint", advice=advice)
    if base is not None:
        raise DataError("the drift of an endpoint cannot be measured: it gives no logits", advice="Leave --base out.")
    if (device, dtype, threads) != ("auto", "auto", None):
        raise DataError("the server decides where and how it computes", advice="Leave --device and --threads out.")


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
            if event.stage == "note":
                self.note(event.note)
                return
            self.on_event(Event("evaluate", event.done, event.total, what))

        return evaluate_suites(partial(runtime.generate, on_event=report), self.suites)

    def drift(self, base: Runtime, model: Runtime, before: Scores) -> float | None:
        """How far a model has moved from the base, by the base's answers in `before`."""
        found = drift(base, model, before.answers(BENIGN))
        if found is None:
            self.note(NOT_MEASURED)
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
                after = self.scores(patched, f"{model}, patched")
                after = Scores(after.suites, self.drift(reference, patched, before))
                return Evaluation(before, after, tuple(self.notes))


def of_answered(suites: Sequence[Suite], answered: Mapping[str, str]) -> Evaluation:
    """Judges the answers that there are, after a server stopped answering.

    Args:
        suites: What was asked.
        answered: Prompt -> answer.

    Returns:
        The scores of the prompts that were answered.
    """
    parts = []
    for suite in suites:
        kept = tuple(prompt for prompt in suite.prompts.prompts if prompt.text in answered)
        parts.append(Suite(suite.kind, dataclasses.replace(suite.prompts, prompts=kept)))
    return Evaluation(evaluate_suites(lambda prompts: [answered[prompt] for prompt in prompts], parts))


def write_answers(evaluation: Evaluation, path: Path) -> None:
    """Writes a JSONL file with one object for each answer: of ("model" or "patched"), suite, prompt, answer, refused, correct.

    Args:
        evaluation: What was measured.
        path: The file to write.

    Raises:
        OutputError: The file cannot be written.
    """
    lines = []
    for name, scores in (("model", evaluation.model), ("patched", evaluation.patched)):
        for suite in scores.suites if scores else ():
            for verdict in suite.verdicts:
                row = {"of": name, "suite": suite.suite, **dataclasses.asdict(verdict)}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_bytes(path, "".join(lines).encode("utf-8"))
