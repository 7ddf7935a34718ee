"""Checks of what the user typed that several commands share, before any work."""

from __future__ import annotations

from pathlib import Path

import click


def require_order(model: str | Path, pack: str | Path | None, command: str) -> None:
    """Recognises MODEL and PACK in the wrong order.

    Args:
        model: What was given as MODEL.
        pack: What was given as PACK; None where nothing was.
        command: The command as it is typed, such as "eval".

    Raises:
        click.UsageError: MODEL is a pack.
    """
    if not _is_pack(model):
        return
    if pack is None:
        raise click.UsageError(f"{model} is a pack, and MODEL is missing. Write: nestpatch {command} MODEL {model}")
    if not _is_pack(pack):
        raise click.UsageError(f"{model} is a pack: MODEL comes first. Write: nestpatch {command} {pack} {model}")


def _is_pack(given: str | Path) -> bool:
    """Whether an argument names a pack by its ending or its scheme; hub://owner/name may also name a model."""
    return Path(given).suffix.lower() == ".nest" or str(given).startswith(("file://", "https://", "http://"))
