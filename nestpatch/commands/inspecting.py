"""Commands that inspect models and packs: show, status, list, verify, diff."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from nestpatch.commands.options import (
    OutputPath,
    PackType,
    PathType,
    examples,
    json_option,
    opened_base,
    print_json,
    progress,
    quiet_option,
    require_order,
    threads_option,
)
from nestpatch.commands.patching import base_option


@click.command(
    epilog=examples(
        "nestpatch show no-harm-1.0.0.nest",
        "nestpatch show hub://acme/no-harm@1.0.0 --rows",
    )
)
@click.argument("pack", type=PackType)
@click.option("--rows", is_flag=True, help="List every tensor, layer and setting of the training.")
@json_option
def show(pack: str, rows: bool, as_json: bool) -> None:
    """Explain PACK: what it changes, what it is for, how it was trained and measured.

    PACK is a file, or a channel such as hub://owner/name[@VERSION].
    """
    from nestpatch.formats import nest
    from nestpatch.formats.manifest import manifest_json
    from nestpatch.gate import look
    from nestpatch.views.packs import show_pack

    found = look(pack)
    label, nbytes = found.pack.label, len(nest.encode(found.pack))
    if as_json:
        manifest = manifest_json(found.pack)
        print_json({"pack": label, "pack_id": found.pack_id, "bytes": nbytes, "manifest": manifest})
    else:
        show_pack(found.pack, found.pack_id, nbytes, rows=rows)


@click.command(
    epilog=examples(
        "nestpatch status models/llama",
        "nestpatch status model.gguf --json",
    )
)
@click.argument("model", type=PathType)
@json_option
def status(model: Path, as_json: bool) -> None:
    """Show what is applied to MODEL, and whether its rows and the kept signatures confirm it.

    Packs that the files of a release name are compared with the rows, too. Writes nothing. Exit code 1: the rows do not hold
    what the ledger or the files say, or a change was interrupted.
    """
    require_order(model, None, "status")
    from nestpatch.patcher.status import status as run

    found = run(model)
    if as_json:
        print_json(found.as_json())
    else:
        from nestpatch.views.models import show_status

        show_status(found)
    sys.exit(0 if found.sound else 1)


@click.command("list", epilog=examples("nestpatch list", "nestpatch list --json"))
@json_option
def list_models(as_json: bool) -> None:
    """List the models that you have patched, in place or as copies, and what their ledgers name.

    `nestpatch status MODEL` compares the rows of one. A model that is gone, or back at its base, is listed once more.
    """
    from nestpatch.patcher.registry import patched_models

    found = patched_models()
    if as_json:
        print_json({"models": [one.as_json() for one in found]})
        return
    from nestpatch.views.models import show_patched

    show_patched(found)


@click.command(
    epilog=examples(
        "nestpatch verify models/llama",
        "nestpatch verify models/llama no-harm-1.0.0.nest --full",
    )
)
@click.argument("model", type=PathType)
@click.argument("pack", type=PackType, required=False)
@click.option("--strength", type=float, default=1.0, show_default=True, help="The strength at which PACK should be applied.")
@base_option
@threads_option
@click.option("--full", is_flag=True, help="Also hash the whole tensors, not only the patched rows.")
@json_option
def verify(model: Path, pack: str | None, strength: float, base: str | None, full: bool, as_json: bool) -> None:
    """Check which state MODEL is in: base, patched, half patched, missing, altered or claimed. Writes nothing.

    Without PACK, exit code 0 means that the rows are the base, or hold what the ledger says. A release whose rows match the
    digests in its own files is "claimed" (exit code 1): only PACK proves that. With PACK, a file or hub://owner/name, exit code
    0 means that the rows hold exactly this pack, by the digests in it. PACK need not be signed, but the signatures that it has
    must be valid.
    """
    require_order(model, pack, "verify")
    from nestpatch.gate import look
    from nestpatch.patcher.verify import verify as run

    wanted = look(pack).pack if pack is not None else None
    with opened_base(base, quiet=as_json) as float_model:
        result = run(model, wanted, strength=strength, base=float_model, full=full)
    if as_json:
        print_json({"model": str(model), **result.as_json()})
    else:
        from nestpatch.views.models import show_verification

        show_verification(model, result)
    sys.exit(0 if result.known else 1)


@click.command(
    epilog=examples(
        "nestpatch diff models/llama models/llama-safe",
        "nestpatch diff models/llama models/llama-safe -o safe.nest --license Apache-2.0",
        "nestpatch diff no-harm-1.0.0.nest no-harm-1.1.0.nest",
    )
)
@click.argument("a", type=PackType)
@click.argument("b", type=PackType)
@click.option("-o", "--output", type=OutputPath, help="Extract the pack that turns A into B, and write it here.")
@click.option("--name", help="Name of the extracted pack.  [default: the output's file name]")
@click.option("--version", "pack_version", help="Version of the extracted pack (semver).  [default: 1.0.0]")
@click.option("--description", help="Description of the extracted pack: one sentence.")
@click.option("--license", "license_", help="License of the extracted pack (SPDX).")
@quiet_option
@json_option
def diff(
    a: str,
    b: str,
    output: Path | None,
    name: str | None,
    pack_version: str | None,
    description: str | None,
    license_: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare two models, tensor by tensor and row by row, or two packs.

    Exit code 0: identical, 1: different, as diff does. A failure also ends with 1, with an error on stderr. With -o, 0: a pack
    was written. Only the weights of models are compared. Packs are files, or hub://owner/name[@VERSION]; they need not be
    signed, but the signatures that they have must be valid.
    """
    with progress(quiet or as_json) as on_event:
        if output is not None:
            from nestpatch.compare.extract import extract
            from nestpatch.pack import Label

            name = name or output.name.removesuffix(".nest")
            label = Label(name, pack_version or "1.0.0", description or "", license_ or "")
            found: Any = extract(a, b, output, label, on_event=on_event)
        elif any(fact is not None for fact in (name, pack_version, description, license_)):
            raise click.UsageError("--name, --version, --description and --license go with -o")
        else:
            from nestpatch.compare.diff import diff as run

            found = run(a, b, on_event=on_event)
    if as_json:
        print_json(found.as_json())
    else:
        from nestpatch.views.comparing import show_diff

        show_diff(found)
    sys.exit(0 if output is not None or found.identical else 1)
