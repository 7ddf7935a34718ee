"""Commands that change models: apply, revert, recover."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nestpatch.commands._arguments import require_order
from nestpatch.commands._options import (
    PathType,
    json_option,
    opened_base,
    print_json,
    progress,
    proven,
    quiet_option,
    report,
    say,
    say_unchecked,
    trust_options,
)
from nestpatch.errors import NestpatchError

if TYPE_CHECKING:
    from nestpatch.patcher.apply import Applied
    from nestpatch.patcher.inplace import Changed

base_option = click.option("--base", metavar="DIR|HUB_ID", help="Quantized models: make rows exactly, from the float model.")
dither_option = click.option("--dither", is_flag=True, help="Quantized models: noise that carries small changes through.")


@click.command()
@click.argument("model", type=PathType)
@click.argument("pack")
@trust_options
@click.option("-o", "--output", type=PathType, help="Where to write.  [default: beside the model, named after the patch]")
@click.option("--in-place", is_flag=True, help="Change the model's own files, crash-safe and revertible.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the patch, over 0 and up to 1.5.")
@click.option("--hard-link", is_flag=True, help="Copy: let untouched shards share their files with the base.")
@click.option("--sha256", "digest", is_flag=True, help="Copy: take the SHA-256 of every weight file.")
@click.option("--no-sync", is_flag=True, help="Copy: leave writing to the disk to the system, as cp does.")
@click.option("--allow-overlap", is_flag=True, help="Add up with another pack that changes the same rows.")
@click.option("--allow-downgrade", is_flag=True, help="Replace a newer version.")
@click.option("--allow-other-publisher", is_flag=True, help="Replace a pack that another publisher signed.")
@click.option("--allow-base-mismatch", is_flag=True, help="Patch a model that is not the pack's base. Recorded in the ledger.")
@base_option
@dither_option
@click.option("--detach", is_flag=True, help="In place: replace links by files of the model's own first.")
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
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
    """Merge PACK into MODEL, a directory or a safetensors, GGUF or ONNX file: into a copy, or --in-place.

    PACK is a file, or hub://owner/name[@VERSION] and other channels: the model then follows that channel. Its signatures are
    checked first, by the keys that you trust; then the model: a patch only fits the base that it was made for.
    """
    if in_place and output is not None:
        raise click.UsageError("--in-place changes the model itself; leave -o out")
    if not in_place and detach:
        raise click.UsageError("--detach goes with --in-place")
    if in_place and (hard_link or digest or no_sync):
        raise click.UsageError("--hard-link, --sha256 and --no-sync go with a copy, not with --in-place")
    require_order(model, pack)
    if allow_base_mismatch:
        say("WARNING: --allow-base-mismatch: the result is not what the pack's evaluation measured", err=True)
    with progress(quiet or as_json) as on_event, opened_base(base, quiet=quiet or as_json) as float_model:
        checked = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        with explained_interrupt(model, in_place=in_place):
            done: Applied | Changed
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
    say_unchecked(checked)
    _report(done, as_json=as_json)


def _report(done: Applied | Changed, *, as_json: bool) -> None:
    from nestpatch.patcher.inplace import Changed
    from nestpatch.views.models import show_applied, show_changed

    if isinstance(done, Changed):
        report(done, show_changed, as_json)
    else:
        report(done, show_applied, as_json)


@contextmanager
def explained_interrupt(model: Path, *, in_place: bool = True) -> Iterator[None]:
    """After Ctrl-C, says what is left of a change, in one line on stderr."""
    before, _ = _change_of(model)
    try:
        yield
    except KeyboardInterrupt:
        after, interrupted = _change_of(model)
        if not in_place:
            text = f"{model} is as it was, and no copy was written"
        elif after != before:
            text = f"the change of {model} is complete: see nestpatch status {model}"
        elif interrupted:
            text = f"the change of {model} is incomplete: nestpatch recover {model} rolls it back"
        else:
            text = f"{model} is as it was: nothing was changed, or it was rolled back"
        say(text, err=True)
        raise


def _change_of(model: Path) -> tuple[str, bool]:
    """(the last transaction of a model, whether another one was interrupted); ("", False) where that cannot be read."""
    from nestpatch.patcher.ledger import read_ledger
    from nestpatch.patcher.state_dir import state_dir_of

    with suppress(NestpatchError, OSError, ValueError):
        state_dir = state_dir_of(model)
        return read_ledger(state_dir).transaction, os.path.lexists(state_dir.journal)
    return "", False


@click.command()
@click.argument("model", type=PathType)
@click.option("--to", default="base", show_default=True, metavar="base|VERSION", help="What to go back to.")
@trust_options
@base_option
@dither_option
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
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

    Packs and undo records that came along with MODEL are used only as far as signatures and the packs' digests prove them.
    """
    from nestpatch.patcher.inplace import revert as run
    from nestpatch.signing.trust import load_policy
    from nestpatch.views.models import show_changed

    require_order(model)
    policy = load_policy(policy_file)
    with (
        progress(quiet or as_json) as on_event,
        opened_base(base, quiet=quiet or as_json) as float_model,
        explained_interrupt(model),
    ):
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
    report(done, show_changed, as_json)


@click.command()
@click.argument("model", type=PathType)
@click.option(
    "--foreign",
    type=click.Choice(["refuse", "roll-back", "remove"]),
    default="refuse",
    show_default=True,
    help="A journal that neither this machine wrote nor a signed pack confirms: carry it out, or drop it and leave the rows.",
)
@json_option
def recover(model: Path, foreign: str, as_json: bool) -> None:
    """End an interrupted change of MODEL: roll it back, or find that it was complete. Commands that write do this too."""
    from nestpatch.patcher.recovery import Foreign, recover_model

    done = recover_model(model, Foreign(foreign))
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    proof = f" ({done.proof})" if done.proof else ""
    say(f"{model}: {'nothing to recover' if done.action == 'none' else done.action}{proof}")
