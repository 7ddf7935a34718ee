"""The commands of `restore`: packs that give a fine-tune its safety back, made of checkpoints without training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nestpatch.commands.options import (
    OutputPath,
    PackType,
    PathType,
    examples,
    json_option,
    print_json,
    progress,
    quiet_option,
)

if TYPE_CHECKING:
    from nestpatch.restore.result import Restored

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def restore() -> None:
    """Bring a pack or aligned rows to a fine-tune: a pack made of checkpoints, without training.

    The pack's base is the fine-tune: apply, verify and revert handle it like any other. Models are directories, safetensors or
    GGUF files of one architecture and dtype. Nothing is measured: do that before you use the pack, with nestpatch eval.
    """


def _pack_options(command: F) -> F:
    """The output, and the label of the pack."""
    for option in (
        json_option,
        quiet_option,
        click.option("--license", "license_", default="", help="License of the pack (SPDX)."),
        click.option("--description", default="", help="Description of the pack: one sentence."),
        click.option("--version", "pack_version", default="1.0.0", show_default=True, help="Version of the pack (semver)."),
        click.option("--name", help="Name of the pack.  [default: the output's file name]"),
        click.option("-o", "--output", type=OutputPath, required=True, help="The .nest file to write."),
    ):
        command = option(command)
    return command


_tensor_option = click.option(
    "--tensor",
    "tensors",
    multiple=True,
    metavar="GLOB",
    help="Matrices to change. Repeatable.  [default: the feed-forward blocks]",
)


@restore.command(
    epilog=examples(
        "nestpatch restore transplant tuned --base base --reference aligned -o restored.nest",
        "nestpatch restore transplant tuned --base base --reference aligned --extrapolate 0.5 -o x.nest",
    )
)
@click.argument("tuned", type=PathType)
@click.option("--base", type=PathType, required=True, help="The model before its alignment.")
@click.option("--reference", type=PathType, required=True, help="The aligned model; also BASE with a pack applied.")
@click.option("--cosine", type=float, metavar="T", help="Replace the rows whose cosine is below T.  [default: all that differ]")
@click.option("--share", type=float, metavar="P", help="Replace this share of the rows, those with the lowest cosine.")
@click.option(
    "--extrapolate", type=float, default=0.0, metavar="ALPHA", help="Go beyond the reference, by ALPHA times the alignment."
)
@_tensor_option
@_pack_options
def transplant(
    tuned: Path, base: Path, reference: Path, cosine: float | None, share: float | None, extrapolate: float, **rest: Any
) -> None:
    """Put rows of the aligned model into TUNED, where TUNED left the alignment.

    Looks at the rows that the alignment changed: those of REFERENCE that differ from BASE. The cosine of TUNED - BASE and
    REFERENCE - BASE says how much of the change of a row is left (NLSR, arXiv 2412.12497).
    """
    from nestpatch.restore.transplant import transplant as run

    tensors = rest.pop("tensors")
    _make(partial(run, tuned, base, reference, cosine=cosine, share=share, extrapolate=extrapolate, tensors=tensors), **rest)


@restore.command(
    epilog=examples(
        "nestpatch restore extrapolate aligned --base base --rank 6 --alpha 1.25 -o robust.nest",
        "nestpatch restore extrapolate aligned --base base --rank 6 --alpha 0.5 --onto tuned -o x.nest",
    )
)
@click.argument("aligned", type=PathType)
@click.option("--base", type=PathType, required=True, help="The model before its alignment.")
@click.option("--rank", type=int, required=True, metavar="K", help="Singular directions of each matrix, at most.")
@click.option("--alpha", type=float, required=True, metavar="A", help="How far they are continued.")
@click.option("--onto", type=PathType, help="Make the pack for this fine-tune of ALIGNED.  [default: for ALIGNED]")
@_tensor_option
@_pack_options
def extrapolate(aligned: Path, base: Path, rank: int, alpha: float, onto: Path | None, **rest: Any) -> None:
    """Continue the alignment of ALIGNED in its main directions.

    The pack adds A times the part of rank K of ALIGNED - BASE (LoX, arXiv 2506.15606): before a fine-tuning, so that less of
    the alignment is lost by it, or after one, with --onto.
    """
    from nestpatch.restore.extrapolate import extrapolate as run

    tensors = rest.pop("tensors")
    _make(partial(run, aligned, base, rank=rank, alpha=alpha, onto=onto, tensors=tensors), **rest)


@restore.command(
    epilog=examples(
        "nestpatch restore carry no-harm-1.0.0.nest tuned --base base -o no-harm-tuned.nest",
        "nestpatch restore carry no-harm-1.0.0.nest tuned --base base --refit -o no-harm-tuned.nest",
    )
)
@click.argument("pack", type=PackType)
@click.argument("tuned", type=PathType)
@click.option("--base", type=PathType, required=True, help="The base of PACK, of which TUNED is a fine-tune.")
@click.option("--refit", is_flag=True, help="Scale the deltas by how much the norms of their rows changed.")
@click.option("--rematch", is_flag=True, help="Move changes to the rows that are most similar now, instead of refusing.")
@_pack_options
def carry(pack: str, tuned: Path, base: Path, refit: bool, rematch: bool, **rest: Any) -> None:
    """Bring PACK, made for BASE, to TUNED, a fine-tune of BASE.

    Every touched row must still be the most similar one of its matrix, by cosine. What was measured for PACK does not hold for
    the new pack. A fine-tune of the patched model is refused, because it holds the change already.
    """
    from nestpatch.restore.carry import carry as run

    _make(partial(run, pack, tuned, base, refit=refit, rematch=rematch), **rest)


def _make(
    run: Callable[..., Restored],
    *,
    output: Path,
    name: str | None,
    pack_version: str,
    description: str,
    license_: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Makes a pack and prints what it is."""
    from nestpatch.pack import Label

    label = Label(name or output.name.removesuffix(".nest"), pack_version, description, license_)
    with progress(quiet or as_json) as on_event:
        done = run(output, label, on_event=on_event)
    if as_json:
        print_json(done.as_json())
        return
    from nestpatch.views.restoring import show_restored

    show_restored(done)
