"""The schemas of the objects that commands print with --json: docs/json-schema.json."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

FILE = Path(__file__).parent.parent / "docs" / "json-schema.json"


@cache
def document() -> dict[str, Any]:
    """The whole file."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def require_schema(value: Any, command: str) -> None:
    """Fails where an object is not what a command prints, such as "apply --in-place" or "error"."""
    _require(value, document()["properties"][command])


def require_part(value: Any, name: str) -> None:
    """Fails where an object is not the shared one of that name, such as "Check"."""
    _require(value, document()["$defs"][name])


def _require(value: Any, schema: dict[str, Any]) -> None:
    errors = Draft202012Validator({**schema, "$defs": document()["$defs"]}).iter_errors(value)
    assert not (texts := [f"{error.json_path}: {error.message}" for error in errors]), "\n".join(texts)
