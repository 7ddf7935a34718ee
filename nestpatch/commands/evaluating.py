"""The command that measures models: eval."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nestpatch.commands.options import (
    ModelType,
    OutputPath,
    PackType,
    PathType,
    examples,
    json_option,
    note_sample,
    print_json,
    progress,
    proven,
    quiet_option,
    require_order,
    say,
    say_unchecked,
    suite_options,
    trust_options,
)

if TYPE_CHECKING:
    from nestpatch.evaluation.suites import Evaluation


@click.command(
    "eval",
    epilog=examples(
        "nestpatch eval models/llama no-harm.nest",
        "nestpatch eval models/llama no-harm.nest --suite harmful.jsonl --suite benign.jsonl",
        "nestpatch eval models/llama no-harm.nest --strength 0:1.5:0.25",
        "nestpatch eval model.gguf --suite harmful=advbench.csv --fail-over attack_success=0.05",
    ),
)
@click.argument("model", type=ModelType)
@click.argument("pack", type=PackType, required=False)
@trust_options
@suite_options
@click.option(
    "--strength",
    metavar="S[,S..]",
    help="Factor of PACK's change, over 0 and up to 1.5. Several (0,0.5,1 or 0:1.5:0.25) give its dose curve.  [default: 1]",
)
@click.option("--lora", type=PathType, help="An adapter, .gguf or .onnx_adapter, for such a MODEL: measured like PACK.")
@click.option("--base", type=ModelType, help="The unpatched model: measures how far MODEL has moved from it.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or mps.")
@click.option("--threads", type=click.IntRange(1), help="Threads that compute.  [default: OMP_NUM_THREADS, or every core]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=48, show_default=True, help="Length of an answer.")
@click.option("--answers", type=OutputPath, help="Write every answer and verdict to this JSONL file.")
@click.option("--fail-over", multiple=True, metavar="NAME=SHARE", help="End with 1 over this: attack_success=0.05. Repeatable.")
@click.option("--fail-under", multiple=True, metavar="NAME=SHARE", help="End with 1 under this. Repeatable.")
@quiet_option
@json_option
def evaluate(
    model: str,
    pack: str | None,
    policy_file: Path | None,
    allow_unsigned: bool,
    suite: tuple[str, ...],
    limit: int | None,
    strength: str | None,
    lora: Path | None,
    base: str | None,
    device: str,
    threads: int | None,
    max_new_tokens: int,
    answers: Path | None,
    fail_over: tuple[str, ...],
    fail_under: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure attack success and over-refusal of MODEL, alone or also with PACK merged in memory.

    A .gguf file is run by llama.cpp and an ONNX model by onnxruntime, with PACK as an adapter; that needs no torch. PACK is
    a file, or hub://owner/name[@VERSION] and other channels. Its signatures are checked first.

    Without --suite, prompts that ship with nestpatch are asked. The kind of another suite is in its file name (harmful*,
    jailbreak*, benign*, lookalike*) or before it: harmful=FILE. What --fail-over and --fail-under compare is MODEL with PACK,
    where there is one; their names are those of --json.
    """
    require_order(model, pack, "eval")
    from nestpatch.evaluation.evaluator import evaluate, write_answers
    from nestpatch.evaluation.limits import exceeded, parse_limits
    from nestpatch.evaluation.suites import choose_suites
    from nestpatch.files.atomic import check_output

    strengths = _strengths(strength, pack, limited=bool(fail_over or fail_under))
    parse_limits((*fail_over, *fail_under))  # before the prompts are read, which may be a download
    suites = choose_suites(suite, limit)
    over, under = parse_limits(fail_over, suites), parse_limits(fail_under, suites)
    if answers is not None:
        check_output(answers)
    checked = None
    with progress(quiet) as on_event:
        note_sample(suite, limit, on_event)
        if pack is not None:
            checked = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        result = evaluate(
            model,
            suites,
            pack=checked,
            strengths=strengths,
            lora=lora,
            base=base,
            device=device,
            threads=threads,
            max_new_tokens=max_new_tokens,
            on_event=on_event,
        )
    say_unchecked(checked)
    if answers is not None:
        write_answers(result, answers)
    if as_json:
        label, adapter = checked.pack.label if checked else None, str(lora) if lora else None
        print_json({"model": model, "pack": label, "adapter": adapter, **result.as_json()})
    else:
        _show(result, quiet=quiet)
    failures = exceeded(result.patched or result.model, over, under)
    for failure in failures:
        say(f"FAILED: {failure}", err=True)
    sys.exit(1 if failures else 0)


def _strengths(text: str | None, pack: str | None, *, limited: bool) -> tuple[float, ...]:
    """The strengths that --strength names; `limited` where the numbers of the pack are compared with limits."""
    from nestpatch.evaluation.dose import parse_strengths

    if text is None:
        return (1.0,)
    if pack is None:
        raise click.UsageError("--strength: only with a PACK")
    found = parse_strengths(text)
    if limited and len(found) > 1 and 1.0 not in found:
        raise click.UsageError("--fail-over and --fail-under compare PACK at strength 1 with the limit: add 1 to --strength")
    return found


def _show(result: Evaluation, *, quiet: bool) -> None:
    """The numbers for people, and what speaks against the pack."""
    from nestpatch.views.console import out
    from nestpatch.views.evaluation import evaluation_table, show_dose

    if quiet:  # else they were shown as they came up
        for note in result.notes:
            say(note, err=True)
    if result.dose is not None:
        show_dose(result.dose)
    else:
        title = "patched" if result.strength in (None, 1.0) else f"patched, strength {result.strength:g}"
        out.print(evaluation_table({"model": result.model} | ({title: result.patched} if result.patched else {})))
    for concern in result.concerns:
        say(f"WARNING: {concern}", err=True)
