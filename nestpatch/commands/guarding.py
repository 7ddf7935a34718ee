"""The command that exports what a fine-tune must leave alone: guard."""

from __future__ import annotations

from pathlib import Path

import click

from nestpatch.commands.options import (
    NewFile,
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
    say_unchecked,
    trust_options,
)


@click.command(
    epilog=examples(
        "nestpatch guard models/llama-patched no-harm-1.0.0.nest -o guard.safetensors",
        "nestpatch guard models/llama-patched no-harm-1.0.0.nest --harmful ours.jsonl -o g.safetensors",
    )
)
@click.argument("model", type=PathType)
@click.argument("pack", type=PackType)
@click.option("-o", "--output", type=NewFile, required=True, help="The file to write.")
@click.option("--harmful", help="Harmful prompts, a file or a data set of the Hub, instead of 256 of the built-in ones.")
@click.option(
    "--energy", type=float, default=0.9, show_default=True, help="Share of the energy of their inputs that is kept, under 1."
)
@click.option("--strength", type=float, default=1.0, show_default=True, help="The strength at which PACK was applied.")
@device_option()
@compute_threads_option
@trust_options
@quiet_option
@json_option
def guard(
    model: Path,
    pack: str,
    output: Path,
    harmful: str | None,
    energy: float,
    strength: float,
    device: str,
    threads: int | None,
    policy_file: Path | None,
    allow_unsigned: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Export what a fine-tune of the patched MODEL must leave alone, so that PACK stays in it.

    MODEL reads harmful prompts, and the file gets the main directions of the inputs of every linear layer. A training that
    leaves what these directions are mapped to answers such prompts as before. `nestpatch.GuardCallback` keeps trainings of
    transformers and PEFT to it: docs/guard.md. Needs torch.

    PACK is a file, or a channel such as hub://owner/name[@VERSION]. Its signatures are checked first.
    """
    require_order(model, pack, "guard")
    from nestpatch.files.atomic import check_output
    from nestpatch.guarding.export import check_energy, export_guard
    from nestpatch.patcher.plan import check_strength
    from nestpatch.prompts.readers import load_prompts

    check_strength(strength)
    check_energy(energy)
    check_output(output)
    prompts = load_prompts(harmful) if harmful else None
    with progress(quiet or as_json) as on_event:
        passed = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        done = export_guard(
            model,
            passed,
            output,
            prompts=prompts,
            energy=energy,
            strength=strength,
            device=device,
            threads=threads,
            on_event=on_event,
        )
    say_unchecked(passed)
    if as_json:
        print_json({"model": str(model), **done.as_json()})
        return
    from nestpatch.views.exporting import show_guard

    show_guard(done)
