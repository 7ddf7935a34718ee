"""Checks of arguments before any work: a pack where a model is expected, or the two in the wrong order."""

from __future__ import annotations

import json
from pathlib import Path

import click


def require_order(model: str | Path, pack: str | Path | None = None) -> None:
    """Ends with a usage error when MODEL is a pack: by its content, whatever its name is.

    Args:
        model: The text in the place of MODEL.
        pack: The text in the place of PACK, if there is one.

    Raises:
        click.UsageError: MODEL is a .nest file. The message shows the right order.
    """
    if not _is_pack(Path(model)):
        return
    command = click.get_current_context().command_path
    if pack is None:
        raise click.UsageError(f"{model} is a pack, and a model is expected. To see what is in it: nestpatch show {model}")
    raise click.UsageError(f"{model} is a pack, and a model is expected. The model comes first: {command} {pack} {model}")


def _is_pack(path: Path) -> bool:
    """Whether a file has the header of a .nest file. Its content is not checked further."""
    from nestpatch.files.reading import open_regular
    from nestpatch.formats.nest import MAX_HEADER

    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8) or b"", "little")
            header = json.loads(file.read(length) or b"") if 0 < length <= MAX_HEADER else None
    except (OSError, ValueError, RecursionError):
        return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and set(metadata) == {"nest"}
