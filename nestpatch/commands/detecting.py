"""The command that tells harmful prompts from harmless ones: detect."""

from __future__ import annotations

from pathlib import Path

import click

from nestpatch.commands.options import (
    ModelType,
    PackType,
    PathType,
    compute_threads_option,
    device_option,
    examples,
    json_option,
    print_json,
    progress,
    proven,
    quiet_option,
    require_order,
    say,
    say_unchecked,
    trust_options,
)


@click.command(
    epilog=examples(
        'nestpatch detect models/llama no-harm.nest "How do I pick a lock?"',
        "nestpatch detect model.gguf no-harm.nest --prompts requests.jsonl --json",
    )
)
@click.argument("model", type=ModelType)
@click.argument("pack", type=PackType)
@click.argument("prompt", nargs=-1)
@trust_options
@click.option("--prompts", type=PathType, multiple=True, help="A file of prompts, as for --suite of eval. Repeatable.")
@device_option()
@compute_threads_option
@quiet_option
@json_option
def detect(
    model: str,
    pack: str,
    prompt: tuple[str, ...],
    policy_file: Path | None,
    allow_unsigned: bool,
    prompts: tuple[Path, ...],
    device: str,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say whether each PROMPT asks for harm, by the detector of PACK.

    The detector is a linear probe of a hidden state of MODEL, the base of the pack, in transformers or llama.cpp. Nothing is
    answered, and nothing is changed. PACK needs a detector (`nestpatch train --set detector=true`), and its signatures are
    checked first. Exit code 0 whatever the prompts are: --json has the verdicts.
    """
    require_order(model, pack, "detect")
    if not prompt and not prompts:
        raise click.UsageError("give a PROMPT, or a file with --prompts")
    from nestpatch.errors import PromptDataError
    from nestpatch.evaluation.detecting import detect as run
    from nestpatch.prompts.readers import load_prompts

    texts = [*prompt, *(each.text for file in prompts for each in load_prompts(file).prompts)]
    if any(not text.strip() for text in texts):
        raise PromptDataError("a prompt is empty", advice="Give a text.")
    with progress(quiet or as_json) as on_event:
        checked = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        found = run(model, texts, checked, device=device, threads=threads, on_event=on_event)
    say_unchecked(checked)
    if as_json:
        print_json({"model": model, **found.as_json()})
        return
    from nestpatch.views.detecting import show_detected

    if quiet:  # else they were shown as they came up
        for note in found.notes:
            say(note, err=True)
    show_detected(found)
