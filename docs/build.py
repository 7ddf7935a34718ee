"""Writes the reference pages: api.md from the public docstrings, commands.md from the help texts, json.md from its schema.

The schema is docs/json-schema.json; the examples in json.md are the golden files of tests/test_json.py.

python docs/build.py            write them
python docs/build.py --check    exit with 1 if one of them is not what the code gives
"""

from __future__ import annotations

import inspect
import json
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


JSON_HEAD = """# JSON of the commands

With `--json` a command prints one object, on one line of stdout. [json-schema.json](json-schema.json) is the JSON Schema (draft
2020-12) of these objects: one property for each command. This page is made from it. A command prints all members, unless they
are marked as optional, and no others. What is not known or was not measured is null.
"""


def json_objects() -> str:
    """The page of the objects that commands print with --json, from their schema."""
    schema = json.loads((FOLDER / "json-schema.json").read_text("utf-8"))
    shared = {name: part for name, part in schema["$defs"].items() if name[0].islower()}
    inner = {name: part for name, part in schema["$defs"].items() if name not in shared}
    lines = [GENERATED.replace("the code: change the docstrings", "docs/json-schema.json: change that"), JSON_HEAD]
    lines += ["## Names", "", "These names mean the same in every object.", "", *_members(shared, shared, shared), ""]
    groups: dict[str, list[str]] = {}
    for command, part in schema["properties"].items():
        groups.setdefault(part.get("$ref", command), []).append(command)
    for key, names in groups.items():
        part = schema["properties"][key] if key in names else inner[key.removeprefix("#/$defs/")]
        lines += [f"## {', '.join(names)}", "", part["description"], ""]
        lines += [*_members(part["properties"], part["required"], shared), "", *_example(names[0])]
    lines += ["## Objects inside of these", ""]
    for name, part in inner.items():
        if f"#/$defs/{name}" not in groups:
            lines += [f"### {name}", "", part["description"], "", *_members(part["properties"], part["required"], shared), ""]
    return "\n".join(lines).rstrip() + "\n"


def _members(members: dict[str, Any], required: Any, shared: dict[str, Any]) -> list[str]:
    lines = ["| name | type | meaning |", "|---|---|---|"]
    for name, part in members.items():
        meaning = part.get("description") or shared.get(name, {}).get("description", "")
        meaning = meaning.replace("|", "\\|") + ("" if name in required else " Optional.")
        lines.append(f"| `{name}` | {_type_of(part, shared)} | {meaning} |")
    return lines


def _type_of(part: dict[str, Any], shared: dict[str, Any]) -> str:
    """The type of a member, for people: "string or null", "list of [File](#file)"."""
    if "$ref" in part:
        name = part["$ref"].removeprefix("#/$defs/")
        return _type_of(shared[name], shared) if name in shared else f"[{name}](#{name.lower()})"
    if "anyOf" in part:
        return " or ".join(_type_of(one, shared) for one in part["anyOf"])
    if "const" in part:
        return f"`{part['const']}`"
    if part.get("type") == "array":
        return f"list of {_type_of(part['items'], shared)}"
    if isinstance(part.get("additionalProperties"), dict):
        return f"object: name to {_type_of(part['additionalProperties'], shared)}"
    types = part["type"] if isinstance(part["type"], list) else [part["type"]]
    return " or ".join(types)


def _example(command: str) -> list[str]:
    """The golden file of a command, if there is one: tests of slow commands have none."""
    name = re.sub(r"[ -]+", "-", command.lower())
    file = FOLDER.parent / "tests" / "golden" / "json" / f"{name}.json"
    return ["```json", file.read_text("utf-8").rstrip(), "```", ""] if file.is_file() else []


PAGES = {"api.md": api, "commands.md": commands, "json.md": json_objects}


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
