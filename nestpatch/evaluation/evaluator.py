"""Evaluation of a model on disk, in whatever runtime it is for, with or without a pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from nestpatch.errors import DataError
from nestpatch.evaluation._evaluator import Evaluator
from nestpatch.evaluation.ablation import Choice, Wanted
from nestpatch.evaluation.dose import check_strengths
from nestpatch.evaluation.judges.opening import open_judges
from nestpatch.evaluation.judges.protocol import Judge, Verdict
from nestpatch.evaluation.preconditions import require_ablation, require_gate, require_together
from nestpatch.evaluation.result import Evaluation
from nestpatch.evaluation.suites import Suite, overlaps
from nestpatch.evaluation.tasks import find_tasks
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.runtimes.connection import EndpointSettings, is_endpoint
from nestpatch.runtimes.protocol import open_runtime, runtime_of
from nestpatch.signing.trust import Policy

IN_TRANSFORMERS = (
    "the .gguf file is run by transformers, where neurons can be switched off, at the values of its rounded weights"
)


def evaluate(
    model: str | Path,
    suites: Sequence[Suite],
    *,
    pack: PackLike | None = None,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    strengths: Sequence[float] = (1.0,),
    gate: bool = False,
    lora: str | Path | None = None,
    base: str | Path | None = None,
    texts: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_new_tokens: int = 48,
    judges: Sequence[str | Judge] = ("keywords",),
    judge_labels: Mapping[str, Verdict] | None = None,
    judge_device: str = "auto",
    endpoint: EndpointSettings | None = None,
    ablate: Wanted | None = None,
    keep: Callable[[Evaluation], None] | None = None,
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
        strengths: Factors of the pack's change, over 0 and at most 1.5. More than one are measured one after the other, as
            the dose curve; 0 names the model alone, which is measured in any case.
        gate: Also sums up a host that answers with the patched model where the pack's detector fires, and else with the base.
        lora: An adapter file for a .gguf or ONNX model, instead of `pack`.
        base: The unpatched model: measures how far `model` has moved from it.
        texts: Plain texts: measures the perplexity.
        tasks: Tasks of lm-eval, by name or as .yaml files; only in transformers. With `base` alone they run on `model` alone.
        task_limit: Questions of each task at most; None for all.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto", or the torch dtype to compute in; GGUF and ONNX files have their own.
        threads: Threads that compute; None: OMP_NUM_THREADS, or every core.
        max_new_tokens: Length of an answer.
        judges: Who judges the answers: names (docs/evaluation.md), or objects with `name` and `judge`. The first decides, the
            others are compared with it. Their models are loaded before MODEL and stay in memory.
        judge_labels: What the labels of a classifier mean, where their names do not say it.
        judge_device: Where judges that are models compute: as `device`, which is that of MODEL.
        endpoint: How a server is asked.
        ablate: Measures the patched model, or `model` without a pack, with neurons switched off too: "patched" for those of the
            pack, or how many of those that respond most to harmful prompts; beside it as many random ones. In transformers.
        keep: Receives what was answered, judged, where a server or a judge fails; then the error is raised.
        on_event: Receives the progress.

    Returns:
        The scores of the model, and of the patched one.

    Raises:
        SignatureError: Too few trusted keys signed the pack, or a signature is wrong.
        PackError: The pack cannot be read.
        CheckpointError: The model cannot be read or run, or is not the pack's base.
        JudgeError: A judge cannot be loaded, or fails; `answered` of the error holds the answers until then.
        DataError: The options do not go together, a judge or a task is not known, or the runtime cannot compute on the device.
        EndpointError: The server stopped answering; `answered` of the error holds its answers.
        EvaluationTaskError: A task fails.
        MissingExtraError: The packages of the runtime are not installed.
    """
    wanted = check_strengths(strengths)
    require_together(model, pack=pack, lora=lora, base=base, strengths=wanted, texts=texts)
    require_ablation(ablate, model, suites, pack=pack, lora=lora, strengths=wanted)
    if is_endpoint(model) and (device, dtype, threads) != ("auto", "auto", None):
        raise DataError("the server decides where and how it computes", advice="Leave --device and --threads out.")
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event).pack
    if gate:
        require_gate(model, proven, wanted)
    found_tasks = find_tasks(tasks, model, task_limit)
    lengths: Any = {"max_new_tokens": max_new_tokens, "kind": None if ablate is None else "transformers"}
    opened = partial(open_runtime, device=device, dtype=dtype, threads=threads, endpoint=endpoint, **lengths)
    neurons = None if ablate is None else Choice(ablate, proven, suites, on_event)
    with ExitStack() as stack:
        asked = open_judges(judges, labels=judge_labels, device=judge_device, stack=stack)
        notes = [*overlaps(suites), *([IN_TRANSFORMERS] if ablate is not None and runtime_of(model) == "llama.cpp" else ())]
        work = Evaluator(suites, opened, on_event, notes, asked, texts, found_tasks, gate, neurons)
        for note in work.notes:
            on_event(Event("note", note=note))
        with work.keeping(keep, wanted):
            return work.run(model, proven, wanted, lora, base)
