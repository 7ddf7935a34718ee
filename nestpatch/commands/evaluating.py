"""The command that measures models: eval."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nestpatch.commands.options import (
    EvaluatedType,
    OutputPath,
    PackType,
    PathType,
    endpoint_options,
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
    from nestpatch.evaluation.suites import Suite
    from nestpatch.runtimes.connection import EndpointSettings


def _endpoint(
    model: str, name: str | None, concurrency: int | None, timeout: float | None, key_variable: str | None
) -> EndpointSettings | None:
    """How the server is asked; None where MODEL is none. Raises UsageError for options that go with a server alone."""
    from nestpatch.runtimes.connection import EndpointSettings, is_endpoint

    options = {"model": name, "concurrency": concurrency, "timeout": timeout, "key_variable": key_variable}
    given = {option: value for option, value in options.items() if value is not None}
    if is_endpoint(model):
        return EndpointSettings(**given)  # type: ignore[arg-type]
    if given:
        raise click.UsageError("--model, --concurrency, --timeout and --api-key-env go with the address of a server as MODEL")
    return None


@contextmanager
def _keeping(suites: Sequence[Suite], file: Path | None) -> Iterator[None]:
    """Writes what a server answered before it stopped answering to the file of --answers."""
    from nestpatch.errors import EndpointError
    from nestpatch.evaluation.evaluator import of_answered, write_answers

    try:
        yield
    except EndpointError as error:
        if file is not None and error.answered:
            write_answers(of_answered(suites, error.answered), file)
            error.advice = f"{error.advice} The {len(error.answered)} answers until then are in {file}."
        raise


@click.command(
    "eval",
    epilog=examples(
        "nestpatch eval models/llama no-harm.nest",
        "nestpatch eval models/llama no-harm.nest --suite harmful.jsonl --suite benign.jsonl",
        "nestpatch eval model.gguf --suite harmful=advbench.csv --fail-over attack_success=0.05",
        "nestpatch eval http://localhost:8000/v1 --model llama --answers answers.jsonl",
    ),
)
@click.argument("model", type=EvaluatedType)
@click.argument("pack", type=PackType, required=False)
@trust_options
@suite_options
@click.option("--lora", type=PathType, help="An adapter, .gguf or .onnx_adapter, for such a MODEL: measured like PACK.")
@click.option("--base", type=EvaluatedType, help="The unpatched model: measures how far MODEL has moved from it.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or mps.")
@click.option("--threads", type=click.IntRange(1), help="Threads that compute.  [default: OMP_NUM_THREADS, or every core]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=48, show_default=True, help="Length of an answer.")
@endpoint_options
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
    lora: Path | None,
    base: str | None,
    device: str,
    threads: int | None,
    max_new_tokens: int,
    served_name: str | None,
    concurrency: int | None,
    timeout: float | None,
    key_variable: str | None,
    answers: Path | None,
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
    jailbreak*, benign*, lookalike*) or before it: harmful=FILE. What --fail-over and --fail-under compare is MODEL with PACK,
    where there is one; their names are those of --json.
    """
    endpoint = _endpoint(model, served_name, concurrency, timeout, key_variable)
    if endpoint is None:
        require_order(model, pack, "eval")
    from nestpatch.evaluation.evaluator import evaluate, write_answers
    from nestpatch.evaluation.limits import exceeded, parse_limits
    from nestpatch.evaluation.suites import choose_suites
    from nestpatch.files.atomic import check_output
    from nestpatch.views.console import out
    from nestpatch.views.evaluation import evaluation_table

    parse_limits((*fail_over, *fail_under))  # before the prompts are read, which may be a download
    suites = choose_suites(suite, limit)
    over, under = parse_limits(fail_over, suites), parse_limits(fail_under, suites)
    if answers is not None:
        check_output(answers)
    checked = None
    with progress(quiet) as on_event:
        note_sample(suite, limit, on_event)
        if pack is not None and endpoint is None:
            checked = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        with _keeping(suites, answers):
            result = evaluate(
                model,
                suites,
                pack=checked or pack,
                lora=lora,
                base=base,
                device=device,
                threads=threads,
                max_new_tokens=max_new_tokens,
                endpoint=endpoint,
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
