"""The command that measures models: eval."""

from __future__ import annotations

import sys
from pathlib import Path

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


@click.command(
    "eval",
    epilog=examples(
        "nestpatch eval models/llama no-harm.nest",
        "nestpatch eval models/llama no-harm.nest --suite harmful.jsonl --suite benign.jsonl",
        "nestpatch eval models/llama no-harm.nest --suite xstest=xstest_prompts.csv --text prose.txt",
        "nestpatch eval model.gguf --suite harmful=advbench.csv --fail-over attack_success=0.05",
    ),
)
@click.argument("model", type=ModelType)
@click.argument("pack", type=PackType, required=False)
@trust_options
@suite_options
@click.option("--jailbreak", metavar="builtin|FILE", help="Ask harmful prompts inside jailbreak templates, too.")
@click.option("--text", type=PathType, multiple=True, help="Measure the perplexity on this plain text. Repeatable.")
@click.option("--task", multiple=True, metavar="NAME|FILE", help="Run this task of lm-eval, such as gsm8k. Repeatable.")
@click.option("--task-limit", type=click.IntRange(1), metavar="N", help="Questions of each task at most.")
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
    jailbreak: str | None,
    text: tuple[Path, ...],
    task: tuple[str, ...],
    task_limit: int | None,
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
    jailbreak*, benign*, lookalike*) or before it: harmful=FILE. Published benchmarks have names of their own: xstest=FILE, or
    xstest alone for the data set of the Hub. What --fail-over and --fail-under compare is MODEL with PACK, where there is
    one; their names are those of --json.
    """
    require_order(model, pack, "eval")
    from nestpatch.evaluation.evaluator import evaluate, write_answers
    from nestpatch.evaluation.jailbreaks import load_templates, with_jailbreaks
    from nestpatch.evaluation.limits import exceeded, parse_limits
    from nestpatch.evaluation.perplexity import load_texts
    from nestpatch.evaluation.suites import BUILTIN_LIMIT, choose_suites, limited
    from nestpatch.files.atomic import check_output
    from nestpatch.views.console import out
    from nestpatch.views.evaluation import evaluation_table

    parse_limits((*fail_over, *fail_under))  # before the prompts are read, which may be a download
    templates, texts = load_templates(jailbreak) if jailbreak else (), load_texts(text)
    suites = choose_suites(suite, limit)
    if jailbreak:
        most = BUILTIN_LIMIT if limit is None and not suite else limit
        suites = [limited(each, most) for each in with_jailbreaks(suites, templates)]
    changed = pack is not None or lora is not None
    compared = {"compared": changed or base is not None, "texts_given": bool(text), "tasks_given": bool(task) and changed}
    over, under = parse_limits(fail_over, suites, **compared), parse_limits(fail_under, suites, **compared)
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
            lora=lora,
            base=base,
            texts=texts,
            tasks=task,
            task_limit=task_limit,
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
        if quiet:  # else they were shown as they came up
            for note in result.notes:
                say(note, err=True)
        columns = {"model": result.model} | ({"patched": result.patched} if result.patched else {})
        out.print(evaluation_table(columns))
        for concern in result.concerns:
            say(f"WARNING: {concern}", err=True)
    failures = exceeded(result.patched or result.model, over, under)
    for failure in failures:
        say(f"FAILED: {failure}", err=True)
    sys.exit(1 if failures else 0)
