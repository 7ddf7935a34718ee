"""The commands that measure models and the judges of their answers: eval, judge."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nestpatch.commands.judging import judge_options, say_agreement
from nestpatch.commands.options import (
    EvaluatedType,
    NewFile,
    OutputPath,
    PackType,
    PathType,
    compute_threads_option,
    device_option,
    endpoint_settings,
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
    server_options,
    suite_options,
    trust_options,
)

if TYPE_CHECKING:
    from nestpatch.evaluation.result import Evaluation


@contextmanager
def _keeping(file: Path | None) -> Iterator[Callable[[Evaluation], None] | None]:
    """Writes what was answered before a server or a judge failed to the file of --answers."""
    from nestpatch.errors import EndpointError, JudgeError
    from nestpatch.evaluation.answers import write_answers

    kept = 0

    def keep(found: Evaluation) -> None:
        nonlocal kept
        kept = write_answers(found, file) if file is not None else 0

    try:
        yield keep if file is not None else None
    except (EndpointError, JudgeError) as error:
        if kept:
            error.advice = f"{error.advice} The {kept} answers until then are in {file}."
        raise


@click.command(
    "eval",
    epilog=examples(
        "nestpatch eval models/llama no-harm.nest",
        "nestpatch eval models/llama no-harm.nest --suite harmful.jsonl --suite benign.jsonl",
        "nestpatch eval models/llama no-harm.nest --suite xstest=xstest_prompts.csv --text prose.txt",
        "nestpatch eval models/llama no-harm.nest --strength 0:1.5:0.25",
        "nestpatch eval models/llama no-harm.nest --gated",
        "nestpatch eval models/llama no-harm.nest --ablate patched",
        "nestpatch eval model.gguf --suite harmful=advbench.csv --fail-over attack_success=0.05",
        "nestpatch eval models/llama --judge keywords --judge classifier=NousResearch/Minos-v1",
        "nestpatch eval http://localhost:8000/v1 --model llama --answers answers.jsonl",
    ),
)
@click.argument("model", type=EvaluatedType)
@click.argument("pack", type=PackType, required=False)
@trust_options
@suite_options
@click.option("--jailbreak", metavar="builtin|FILE", help="Ask harmful prompts inside jailbreak templates, too.")
@click.option("--text", type=PathType, multiple=True, help="Measure the perplexity on this plain text. Repeatable.")
@click.option("--task", multiple=True, metavar="NAME|FILE", help="Run this task of lm-eval, such as gsm8k. Repeatable.")
@click.option("--task-limit", type=click.IntRange(1), metavar="N", help="Questions of each task at most.")
@click.option(
    "--strength",
    metavar="S[,S..]",
    help="Factor of PACK's change, over 0 and up to 1.5. Several (0,0.5,1 or 0:1.5:0.25) give its dose curve.  [default: 1]",
)
@click.option("--gated", is_flag=True, help="Also sum up PACK answering only where its detector fires, and else the base.")
@click.option("--lora", type=PathType, help="An adapter, .gguf or .onnx_adapter, for such a MODEL: measured like PACK.")
@click.option("--base", type=EvaluatedType, help="The unpatched model: measures how far MODEL has moved from it.")
@click.option(
    "--ablate",
    metavar="patched|N",
    help="Measure again without the neurons of PACK, or without the N that respond most to harm, and without random ones.",
)
@click.option("--categories", is_flag=True, help="Show attack success by category of the harmful prompts.")
@device_option("Of MODEL")
@device_option("Of judges that are models", "--judge-device")
@compute_threads_option
@click.option("--max-new-tokens", type=click.IntRange(1), default=48, show_default=True, help="Length of an answer.")
@judge_options
@server_options
@click.option("--concurrency", type=click.IntRange(1, 256), help="Requests to a server at a time.  [default: 8]")
@click.option("--answers", type=OutputPath, help="Write every answer and verdict to this JSONL file.")
@click.option("--label", type=NewFile, help="Write 50 answers to this CSV file, for a person to judge (`nestpatch judge`).")
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
    jailbreak: str | None,
    text: tuple[Path, ...],
    task: tuple[str, ...],
    task_limit: int | None,
    strength: str | None,
    gated: bool,
    lora: Path | None,
    base: str | None,
    ablate: str | None,
    categories: bool,
    device: str,
    judge_device: str,
    threads: int | None,
    max_new_tokens: int,
    judges: tuple[str, ...],
    judge_labels: tuple[str, ...],
    served_name: str | None,
    concurrency: int | None,
    timeout: float | None,
    key_variable: str | None,
    answers: Path | None,
    label: Path | None,
    fail_over: tuple[str, ...],
    fail_under: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure attack success and over-refusal of MODEL, alone or also with PACK merged in memory.

    A .gguf file is run by llama.cpp and an ONNX model by onnxruntime, with PACK as an adapter; that needs no torch. PACK is
    a file, or hub://owner/name[@VERSION] and other channels. Its signatures are checked first.

    MODEL may also be the address of an OpenAI-compatible server, http://HOST:PORT/v1: its model is measured as it is served.
    The API key is read from an environment variable.

    Without --suite, prompts that ship with nestpatch are asked. The kind of another suite is in its file name (harmful*,
    jailbreak*, benign*, lookalike*) or before it: harmful=FILE. Published benchmarks have names of their own: xstest=FILE, or
    xstest alone for the data set of the Hub. What --fail-over and --fail-under compare is MODEL with PACK, where there is
    one; their names are those of --json.
    """
    server = {"model": served_name, "concurrency": concurrency, "timeout": timeout, "key_variable": key_variable}
    endpoint = endpoint_settings(model, **server)
    if endpoint is None:
        require_order(model, pack, "eval")
    from nestpatch.evaluation.ablation import parse_ablation
    from nestpatch.evaluation.evaluator import evaluate
    from nestpatch.evaluation.jailbreaks import load_templates, with_jailbreaks
    from nestpatch.evaluation.judges.opening import parse_judge_labels, require_judges
    from nestpatch.evaluation.limits import exceeded, parse_limits
    from nestpatch.evaluation.perplexity import load_texts
    from nestpatch.evaluation.suites import BUILTIN_LIMIT, choose_suites, limited
    from nestpatch.files.atomic import check_output

    labels = parse_judge_labels(judge_labels)
    require_judges(judges, labels)
    strengths = _strengths(strength, pack, limited=bool(fail_over or fail_under))
    off = None if ablate is None else parse_ablation(ablate)
    parse_limits((*fail_over, *fail_under))  # before the prompts are read, which may be a download
    templates, texts = load_templates(jailbreak) if jailbreak else (), load_texts(text)
    suites = choose_suites(suite, limit)
    if jailbreak:
        most = BUILTIN_LIMIT if limit is None and not suite else limit
        suites = [limited(each, most) for each in with_jailbreaks(suites, templates)]
    changed = pack is not None or lora is not None
    compared = {"compared": changed or base is not None, "texts_given": bool(text), "tasks_given": bool(task) and changed}
    over, under = parse_limits(fail_over, suites, **compared), parse_limits(fail_under, suites, **compared)
    for file in (answers, label):
        if file is not None:
            check_output(file)
    checked = None
    with progress(quiet) as on_event:
        note_sample(suite, limit, on_event)
        if pack is not None and endpoint is None:
            checked = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        with _keeping(answers) as keep:
            result = evaluate(
                model,
                suites,
                pack=checked or pack,
                strengths=strengths,
                gate=gated,
                lora=lora,
                base=base,
                texts=texts,
                tasks=task,
                task_limit=task_limit,
                device=device,
                threads=threads,
                max_new_tokens=max_new_tokens,
                judges=judges,
                judge_labels=labels,
                judge_device=judge_device,
                endpoint=endpoint,
                ablate=off,
                keep=keep,
                on_event=on_event,
            )
    say_unchecked(checked)
    _write(result, answers, label)
    if as_json:
        name, adapter = checked.pack.label if checked else None, str(lora) if lora else None
        print_json({"model": model, "pack": name, "adapter": adapter, **result.as_json()})
    else:
        _show(result, quiet=quiet, categories=categories)
    failures = exceeded(result.patched or result.model, over, under)
    for failure in failures:
        say(f"FAILED: {failure}", err=True)
    sys.exit(1 if failures else 0)


def _write(result: Evaluation, answers: Path | None, label: Path | None) -> None:
    """Writes the files of --answers and --label, where they were asked for."""
    from nestpatch.evaluation.answers import write_answers
    from nestpatch.evaluation.labelling import write_sheet

    if answers is not None:
        write_answers(result, answers)
    if label is not None:
        many = write_sheet(result, label)
        say(f"wrote {many} answers to {label}: fill the column verdict, then run nestpatch judge {label}", err=True)


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


def _show(result: Evaluation, *, quiet: bool, categories: bool) -> None:
    """The numbers for people, and what speaks against the pack."""
    from nestpatch.views.console import out
    from nestpatch.views.evaluation import detection_text, evaluation_table, show_dose
    from nestpatch.views.parts import show_ablation, show_categories

    if quiet:  # else they were shown as they came up
        for note in result.notes:
            say(note, err=True)
    if result.dose is not None:
        show_dose(result.dose)
    costs = result.patched is not None and (result.model.text is not None or result.model.tasks)
    if result.dose is None or costs:
        if result.dose is not None:
            out.print()
        title = "patched" if result.strength in (None, 1.0) else f"patched, strength {result.strength:g}"
        columns = {"model": result.model, title: result.patched, "gated": result.gated}
        out.print(evaluation_table({name: scores for name, scores in columns.items() if scores is not None}))
    if result.detection is not None:
        out.print(f"\n{detection_text(result.detection.as_json())}")
    if categories:
        show_categories(result)
    if result.ablation is not None:
        show_ablation(result, result.ablation)
    say_agreement(result.agreement)
    for concern in result.concerns:
        say(f"WARNING: {concern}", err=True)
