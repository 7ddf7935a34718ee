"""The command line, called in the process of a test."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from nestpatch.cli import main


def run(*words: object) -> Result:
    """Runs a command. What it does not turn into a message is raised."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.stderr
    return result


def refused(error: str, *words: object) -> str:
    """Runs a command that has to end with 1 and that error; what it says."""
    result = run(*words)
    assert result.exit_code == 1, (words, result.stdout, result.stderr)
    assert result.stderr.startswith(f"{error}:"), result.stderr
    return result.stderr


def answer(*words: object, code: int = 0) -> Any:
    """Runs a command with --json: its answer."""
    result = run(*words, "--json")
    assert result.exit_code == code, (words, result.stdout, result.stderr)
    return json.loads(result.stdout)
