"""Commands that change models: apply, revert, recover."""

from __future__ import annotations

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
    opened_base,
    print_json,
    progress,
    proven,
    quiet_option,
    require_order,
    say,
    say_unchecked,
    threads_option,
    trust_options,
)

if TYPE_CHECKING:
    from nestpatch.pack import Pack
    from nestpatch.patcher.apply import Applied
    from nestpatch.patcher.inplace import Changed

base_option = click.option("--base", type=ModelType, help="Quantized models: compute the rows from this float model.")
dither_option = click.option(
    "--dither", is_flag=True, help="Quantized models: add noise that keeps small changes in the rounding."
)


@click.command(
    epilog=examples(
        "nestpatch apply models/llama no-harm-1.0.0.nest --in-place",
        "nestpatch apply model.gguf hub://acme/no-harm -o model-safe.gguf",
    )
)
@click.argument("model", type=PathType)
@click.argument("pack", type=PackType)
@click.option("-o", "--output", type=OutputPath, help="Where to write.  [default: beside the model, named after the pack]")
@click.option("--in-place", is_flag=True, help="Change the model's own files; crash-safe, can be reverted.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Factor of the change, over 0 and up to 1.5.")
@click.option("--hard-link", is_flag=True, help="Copy: link unchanged shards instead of copying them.")
@click.option("--sha256", "digest", is_flag=True, help="Copy: compute the SHA-256 of every weight file.")
@click.option("--no-sync", is_flag=True, help="Copy: do not wait for the disk, as cp does.")
@click.option("--allow-overlap", is_flag=True, help="Add up with a pack that changes the same rows.")
@click.option("--allow-downgrade", is_flag=True, help="Replace a newer version of the pack.")
@click.option("--allow-other-publisher", is_flag=True, help="Replace a pack that another publisher signed.")
@click.option("--allow-base-mismatch", is_flag=True, help="Patch a model that is not the pack's base. Recorded in the ledger.")
@base_option
@dither_option
@threads_option
@click.option("--detach", is_flag=True, help="In place: first replace links by copies of their files.")
@trust_options
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@quiet_option
@json_option
def apply(
    model: Path,
    pack: str,
    policy_file: Path | None,
    allow_unsigned: bool,
    output: Path | None,
    in_place: bool,
    strength: float,
    hard_link: bool,
    digest: bool,
    no_sync: bool,
    allow_overlap: bool,
    allow_downgrade: bool,
    allow_other_publisher: bool,
    allow_base_mismatch: bool,
    base: str | None,
    dither: bool,
    detach: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge PACK into MODEL: into a copy, or --in-place.

    MODEL is a model directory, or a safetensors, GGUF or ONNX file. PACK is a file, or a channel such as
    hub://owner/name[@VERSION], which the model then follows.

    The signatures of PACK are checked first, with the keys that you trust; then the rows of MODEL: a pack fits only the base
    that it was made for.
    """
    require_order(model, pack, "apply")
    if in_place and output is not None:
        raise click.UsageError("-o and --in-place exclude each other: --in-place changes the model itself")
    if not in_place and detach:
        raise click.UsageError("--detach goes with --in-place")
    if in_place and (hard_link or digest or no_sync):
        raise click.UsageError("--hard-link, --sha256 and --no-sync go with a copy, not with --in-place")
    if allow_base_mismatch:
        say("WARNING: --allow-base-mismatch: the result is not what the pack's evaluation measured", err=True)
    done: Applied | Changed
    with progress(quiet or as_json) as on_event, opened_base(base, quiet=quiet or as_json) as float_model:
        checked = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        if in_place:
            from nestpatch.patcher.inplace import apply_in_place

            done = apply_in_place(
                model,
                checked,
                strength=strength,
                allow_overlap=allow_overlap,
                allow_downgrade=allow_downgrade,
                allow_base_mismatch=allow_base_mismatch,
                allow_other_publisher=allow_other_publisher,
                base=float_model,
                dither=dither,
                detach=detach,
                dry_run=dry_run,
                on_event=on_event,
            )
        else:
            from nestpatch.patcher.apply import apply as run

            done = run(
                model,
                checked,
                output,
                strength=strength,
                allow_overlap=allow_overlap,
                allow_downgrade=allow_downgrade,
                allow_base_mismatch=allow_base_mismatch,
                allow_other_publisher=allow_other_publisher,
                base=float_model,
                dither=dither,
                hard_link=hard_link,
                digest=digest,
                sync=not no_sync,
                dry_run=dry_run,
                on_event=on_event,
            )
    from nestpatch.evaluation.concerns import concerns

    say_unchecked(checked)
    evaluation = checked.pack.manifest.evaluation
    warnings = list(concerns(evaluation)) if evaluation else []
    for warning in warnings:
        say(f"WARNING: {checked.pack.label}: {warning}", err=True)
    _say_recommended(checked.pack)
    if as_json:
        facts = {"pack": checked.pack.label, "pack_id": checked.pack_id, "strength": strength}
        print_json({"model": str(model), **facts, **done.as_json(), "warnings": warnings})
    else:
        _show(done)


def _show(done: Applied | Changed) -> None:
    """The result for people; importing what draws takes as long as patching a small model, so --json does without."""
    from nestpatch.patcher.apply import Applied
    from nestpatch.views.models import show_applied, show_changed

    if isinstance(done, Applied):
        show_applied(done)
    else:
        show_changed(done)


def _say_recommended(pack: Pack) -> None:
    """Reports the strength that a pack's evaluation recommends, where it is not 1 and nobody chose one."""
    from nestpatch.evaluation.dose import Recommendation

    found = Recommendation.from_json(pack.manifest.evaluation.get("recommended"))
    chosen = click.get_current_context().get_parameter_source("strength") is not click.core.ParameterSource.DEFAULT
    if found is None or found.strength in (None, 1.0) or chosen:
        return
    say(f"info: {pack.label} is applied at strength 1; its evaluation recommends {found.strength:g}, {found.reason}", err=True)


@click.command(
    epilog=examples(
        "nestpatch revert models/llama",
        "nestpatch revert models/llama --to 1.0.0 --dry-run",
    )
)
@click.argument("model", type=PathType)
@click.option("--to", default="base", show_default=True, metavar="base|VERSION", help="The state to return to.")
@trust_options
@base_option
@dither_option
@threads_option
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@quiet_option
@json_option
def revert(
    model: Path,
    to: str,
    policy_file: Path | None,
    allow_unsigned: bool,
    base: str | None,
    dither: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Undo what was applied to MODEL in place, bit for bit.

    Packs and undo records that came with MODEL are used only where signatures and digests prove them.
    """
    require_order(model, None, "revert")
    from nestpatch.patcher.inplace import revert as run
    from nestpatch.signing.store import load_policy

    policy = load_policy(policy_file)
    with progress(quiet or as_json) as on_event, opened_base(base, quiet=quiet or as_json) as float_model:
        done = run(
            model,
            to,
            policy=policy,
            allow_unsigned=allow_unsigned,
            base=float_model,
            dither=dither,
            dry_run=dry_run,
            on_event=on_event,
        )
    if as_json:
        print_json(done.as_json())
    else:
        _show(done)


@click.command(
    epilog=examples(
        "nestpatch recover models/llama",
        "nestpatch recover models/llama --foreign roll-back",
    )
)
@click.argument("model", type=PathType)
@click.option(
    "--foreign",
    type=click.Choice(["refuse", "roll-back", "remove"]),
    default="refuse",
    show_default=True,
    help="A journal that neither this machine nor a signed pack confirms: follow it, or remove it and keep the rows.",
)
@json_option
def recover(model: Path, foreign: str, as_json: bool) -> None:
    """End an interrupted change of MODEL: roll it back, or find that it was complete.

    Commands that write to MODEL do this by themselves.
    """
    from nestpatch.patcher.recovery import Foreign, recover_model

    done = recover_model(model, Foreign(foreign))
    if as_json:
        print_json({"model": str(model), **done.as_json()})
        return
    proof = f" ({done.proof})" if done.proof else ""
    say(f"{model}: {'nothing to recover' if done.action == 'none' else done.action}{proof}")
