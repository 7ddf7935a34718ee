"""Writes the reference pages from the code: api.md from the public docstrings, commands.md from the help of every command.

python docs/build.py            write them
python docs/build.py --check    exit with 1 if one of them is not what the code gives
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

import nestpatch
from nestpatch.cli import main

FOLDER = Path(__file__).parent
SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:")
GENERATED = "<!-- Written by docs/build.py from the code: change the docstrings, then run `make docs`. -->"


def api() -> str:
    """The page of the Python API: every public name with its signature and docstring, verbs first."""
    names = [name for name in nestpatch.__all__ if not name.startswith("_")]
    verbs = sorted(name for name in names if name[0].islower())
    nouns = sorted(name for name in names if name[0].isupper())
    lines = [GENERATED, "# Python API", "", "Import these names from `nestpatch`. Exceptions are in `nestpatch.errors`.", ""]
    for title, group in (("Verbs", verbs), ("Values", nouns)):
        lines += [f"**{title}:** " + ", ".join(f"[{name}](#{name.lower()})" for name in group), ""]
    for name in (*verbs, *nouns):
        lines += [f"## {name}", "", *_entry(name, getattr(nestpatch, name)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, value: Any) -> list[str]:
    lines = ["```python", _signature(name, value), "```", ""] if callable(value) else []
    lines += _docstring(inspect.getdoc(value) or "")
    if inspect.isclass(value):
        for method, function in inspect.getmembers(value, _is_public):
            if method in vars(value):
                text = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
                arguments = "" if isinstance(function, property) else "()"
                lines.append(f"- `{method}{arguments}`: {text}" if text else f"- `{method}{arguments}`")
    return lines


def _is_public(member: Any) -> bool:
    name = getattr(member, "__name__", None) or getattr(getattr(member, "fget", None), "__name__", "_")
    return not name.startswith("_") and (inspect.isfunction(member) or inspect.ismethod(member) or isinstance(member, property))


def _signature(name: str, value: Any) -> str:
    """The call, a parameter a line where it does not fit into one."""
    signature = inspect.signature(value)
    parameters: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        text = f"{parameter.name}: {parameter.annotation}"
        if parameter.default is not inspect.Parameter.empty:
            text += f" = {getattr(parameter.default, '__name__', None) or repr(parameter.default)}"
        parameters.append(text)
    returns = "" if inspect.isclass(value) else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){returns}"])


def _docstring(text: str) -> list[str]:
    """A Google-style docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    in_section = False
    for line in text.splitlines():
        if line in SECTIONS:
            lines += [f"**{line.rstrip(':')}**", ""]
            in_section = True
        elif in_section and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if colon and re.fullmatch(r"[\w*.]+", name) else f"- {line.strip()}")
        elif in_section and line.startswith("     "):
            lines[-1] += f" {line.strip()}"
        else:
            in_section = in_section and not line
            lines.append(line)
    return [*lines, ""]


def commands() -> str:
    """The page of the command line: the help of every command, as `nestpatch COMMAND --help` prints it."""
    lines = [GENERATED, "# Commands", ""]
    for path, command in _walk(main, ("nestpatch",)):
        lines += [f"## {' '.join(path)}", "", textwrap.indent(_help(command, path), "    "), ""]
    return "\n".join(re.sub(r"[ \t]+$", "", line) for line in "\n".join(lines).splitlines()).rstrip() + "\n"


def _walk(command: click.Command, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    found = [(path, command)]
    for name, sub in sorted(getattr(command, "commands", {}).items()):
        found += _walk(sub, (*path, name))
    return found


def _help(command: click.Command, path: tuple[str, ...]) -> str:
    context: click.Context | None = None
    for name in path:
        context = click.Context(command if name == path[-1] else click.Group(name), parent=context, info_name=name)
    assert context is not None
    context.help_option_names = ["-h", "--help"]
    context.terminal_width = context.max_content_width = 100
    return command.get_help(context)


PAGES = {"api.md": api, "commands.md": commands}


def run(*, check: bool) -> int:
    """Writes the pages, or compares them: the exit code."""
    written = {name: (FOLDER / name).read_text("utf-8") if (FOLDER / name).is_file() else "" for name in PAGES}
    stale = [name for name, page in PAGES.items() if written[name] != page()]
    if check:
        for name in stale:
            print(f"docs/{name} is not what the code gives: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (FOLDER / name).write_text(PAGES[name](), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(check="--check" in sys.argv[1:]))
