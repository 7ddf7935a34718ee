"""The command that exports what a fine-tune must leave alone: guard."""

from __future__ import annotations

from pathlib import Path

import click

from nestpatch.commands.options import (
    NewFile,
    PackType,
    PathType,
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


@click.command(epilog=examples("nestpatch guard models/llama-patched no-harm-1.0.0.nest -o guard.safetensors"))
@click.argument("model", type=PathType)
@click.argument("pack", type=PackType)
@click.option("-o", "--output", type=NewFile, required=True, help="The file to write.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="The strength at which PACK was applied.")
@trust_options
@quiet_option
@json_option
def guard(
    model: Path,
    pack: str,
    output: Path,
    strength: float,
    policy_file: Path | None,
    allow_unsigned: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Export what a fine-tune of the patched MODEL must leave alone, so that PACK stays in it.

    The file has the rows that PACK changes, and the directions of its deltas. `nestpatch.GuardCallback` keeps a training with
    transformers or PEFT to it: docs/guard.md.

    PACK is a file, or a channel such as hub://owner/name[@VERSION]. Its signatures are checked first.
    """
    require_order(model, pack, "guard")
    from nestpatch.files.atomic import check_output
    from nestpatch.guarding.export import export_guard
    from nestpatch.patcher.plan import check_strength

    check_strength(strength)
    check_output(output)
    with progress(quiet or as_json) as on_event:
        passed = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        done = export_guard(model, passed, output, strength=strength)
    say_unchecked(passed)
    if as_json:
        print_json({"model": str(model), **done.as_json()})
        return
    from nestpatch.views.exporting import show_guard

    show_guard(done)
