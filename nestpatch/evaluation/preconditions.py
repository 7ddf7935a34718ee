"""What must hold before a model is loaded to be evaluated: options that go together, and a base that the pack is for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nestpatch.errors import DataError
from nestpatch.evaluation.ablation import PATCHED, Wanted
from nestpatch.evaluation.detection import require_detector
from nestpatch.evaluation.suites import Suite
from nestpatch.formats import nest
from nestpatch.formats.provenance import read_packs
from nestpatch.measured import BENIGN, HARMFUL
from nestpatch.pack import Pack
from nestpatch.patcher.findings import APPLICABLE, State
from nestpatch.patcher.identity import examine
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.plan import make_plan
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.connection import is_endpoint
from nestpatch.runtimes.loading import locate
from nestpatch.runtimes.protocol import runtime_of


def require_runnable(model: str | Path, *, pack: object | None, lora: str | Path | None) -> None:
    """Rejects a pack or an adapter that the runtime of a model does not take, before anything is loaded.

    Args:
        model: A model directory, weight file, Hub id or the address of a server.
        pack: A pack to merge; None without one.
        lora: An adapter file; None without one.

    Raises:
        DataError: Both were given; the model is on a server; or it takes no adapter files.
    """
    if is_endpoint(model) and (pack is not None or lora is not None):
        advice = f"Load the pack into the server (nestpatch adapter load {model} PACK), and leave it out here."
        raise DataError("a pack cannot be merged into the model of an endpoint", advice=advice)
    if pack is not None and lora is not None:
        raise DataError("a pack and an adapter were given: either of them makes the patched model")
    if lora is not None and runtime_of(model) == "transformers":
        advice = "Give the pack itself instead of --lora: MODEL PACK"
        raise DataError("an adapter file goes with a .gguf or an ONNX model", advice=advice)


def require_together(
    model: str | Path,
    *,
    pack: object | None,
    lora: str | Path | None,
    base: str | Path | None,
    strengths: tuple[float, ...],
    texts: Sequence[str],
) -> None:
    """Rejects what cannot be measured together, before anything is loaded.

    Args:
        model: A model directory, weight file, Hub id or the address of a server.
        pack: A pack to merge; None without one.
        lora: An adapter file; None without one.
        base: The unpatched model; None where no drift is asked for.
        strengths: Factors of the pack's change.
        texts: Texts for the perplexity.

    Raises:
        DataError: The options contradict each other, or the runtime of the model cannot do what they ask for.
    """
    if base is not None and is_endpoint(base):
        advice = "Give the files of the base and of MODEL: the drift is measured with their logits."
        raise DataError(f"the base is an endpoint, {base}, which gives no logits", advice=advice)
    require_runnable(model, pack=pack, lora=lora)
    if is_endpoint(model) and base is not None:
        raise DataError("the drift of an endpoint cannot be measured: it gives no logits", advice="Leave --base out.")
    if is_endpoint(model) and texts:
        raise DataError("the perplexity of an endpoint cannot be measured: it gives no logits", advice="Leave --text out.")
    if strengths != (1.0,) and pack is None:
        raise DataError("strengths without a pack: a strength is a factor of a pack's change")
    kind = runtime_of(model)
    other = kind if base is None else runtime_of(base)
    if other not in (kind, "transformers"):
        what, where = ("a .gguf", ".gguf") if other == "llama.cpp" else ("an ONNX", "ONNX")
        raise DataError(f"the drift from {what} base can be measured for {where} models", advice="Give the base's directory.")


def require_gate(model: str | Path, pack: Pack | None, strengths: Sequence[float]) -> None:
    """Rejects what cannot be gated, before anything is loaded.

    Args:
        model: A model directory, weight file, Hub id or the address of a server.
        pack: The pack; None without one.
        strengths: Factors of the pack's change.

    Raises:
        DataError: There is no pack, no detector in it, more than one strength, or no hidden state of the model.
    """
    if pack is None:
        raise DataError("a gated model needs a pack with a detector", advice="Give the pack: nestpatch eval MODEL PACK --gated")
    if len(strengths) > 1:
        raise DataError("a gated model is measured at one strength", advice="Give one strength.")
    require_detector(pack, model)


def require_ablation(
    wanted: Wanted | None,
    model: str | Path,
    suites: Sequence[Suite],
    *,
    pack: object | None,
    lora: str | Path | None,
    strengths: tuple[float, ...],
) -> None:
    """Rejects an ablation that cannot be measured, before anything is loaded.

    Args:
        wanted: PATCHED, or how many neurons; None for no ablation.
        model: A model directory, weight file, Hub id or the address of a server.
        suites: What is asked.
        pack: A pack to merge; None without one.
        lora: An adapter file; None without one.
        strengths: Factors of the pack's change.

    Raises:
        DataError: The runtime of the model cannot switch neurons off, or what decides about the neurons is missing.
    """
    if wanted is None:
        return
    kind = runtime_of(model)
    if kind in ("endpoint", "onnxruntime"):
        what = "a served model" if kind == "endpoint" else "an ONNX model"
        advice = "Give the directory that it was made of, or its .gguf file: --ablate runs in transformers."
        raise DataError(f"neurons of {what} cannot be switched off", advice=advice)
    if lora is not None:
        raise DataError("--ablate measures a pack, and an adapter was given", advice="Give the pack instead of --lora.")
    if len(strengths) > 1:
        raise DataError("--ablate measures one strength of a pack, and several were given", advice="Give one --strength.")
    if wanted == PATCHED and pack is None:
        raise DataError("without a pack there are no patched neurons", advice="Give a PACK, or a number: --ablate 1000.")
    if isinstance(wanted, int) and wanted < 1:
        raise DataError(f"{wanted} neurons are none", advice=f"Give {PATCHED}, or a number from 1: --ablate 1000.")
    for need in (HARMFUL,) if wanted == PATCHED else (HARMFUL, BENIGN):
        if not any(suite.kind == need for suite in suites):
            raise DataError(f"--ablate needs a {need} suite, and none was given", advice=f"Add one: --suite {need}=FILE.")


def already_held(model: str | Path, pack: Pack) -> str:
    """What proves, before anything is loaded, that a model holds a pack already.

    Args:
        model: A model directory, weight file or Hub id.
        pack: The pack.

    Returns:
        The proof in words; empty where the model does not hold the pack.

    Raises:
        BaseMismatchError: The pack is not for this model.
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
