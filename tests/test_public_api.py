"""`import nestpatch` is the whole API: every name is documented, typed, and importable on its own."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nestpatch

NAMES = [name for name in nestpatch.__all__ if name != "__version__"]
VERBS = [name for name in NAMES if name[0].islower()]
NOUNS = [name for name in NAMES if name[0].isupper()]
PROMISED = {
    *(
        "train",
        "apply",
        "apply_in_place",
        "revert",
        "verify",
        "status",
        "recover",
        "diff",
        "evaluate",
        "sign",
        "verify_signature",
    ),
    *("push", "pull", "update", "yank", "renew", "load_pack", "load_prompts", "load_policy", "builtin_suites"),
    *("export_safetensors", "export_gguf", "export_onnx", "export_lora", "export_gguf_lora", "export_onnx_adapter"),
    *("Pack", "Recipe", "TrainingData", "Label", "Suite", "Policy", "Evaluation", "NestpatchError"),
}


def imports_for_type_checkers() -> Iterator[tuple[str, str]]:
    """(public name, "module:name there") of the imports that mypy sees."""
    for node in ast.walk(ast.parse(Path(nestpatch.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nestpatch."):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}:{alias.name}"


def test_the_promised_names_are_there() -> None:
    assert set(NAMES) >= PROMISED
    assert len(NAMES) == len(set(NAMES))


def test_what_type_checkers_see_is_what_runs() -> None:
    seen = dict(imports_for_type_checkers())
    homes = {}
    for name, home in nestpatch._HOMES.items():
        module, _, attribute = home.partition(":")
        homes[name] = f"nestpatch.{module}:{attribute or name}"
    assert seen == homes


def test_dir_is_the_api() -> None:
    assert dir(nestpatch) == sorted(nestpatch.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'aply'"):
        _ = nestpatch.aply  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_documented(name: str) -> None:
    value = getattr(nestpatch, name)
    text = inspect.getdoc(value) or ""
    assert re.match(r"\S.{10,}", text), f"{name} has no docstring"
    if name in VERBS:
        assert documented(text) >= set(parameters(value)), f"Args of {name} lacks {set(parameters(value)) - documented(text)}"
        assert "\nReturns:\n" in text or str(inspect.signature(value).return_annotation) == "None"
        assert "\nRaises:\n" in text, f"{name} does not say what it raises"


def parameters(value: Any) -> list[str]:
    return list(inspect.signature(value).parameters)


def documented(text: str) -> set[str]:
    """The parameters that the Args section of a docstring names."""
    section = re.search(r"^Args:\n((?:(?: {4}.*)?\n)+)", text + "\n", re.MULTILINE)
    return set(re.findall(r"^ {4}(\w+):", section[1], re.MULTILINE)) if section else set()


@pytest.mark.parametrize("name", VERBS)
def test_no_verb_takes_options_that_it_does_not_name(name: str) -> None:
    signature = inspect.signature(getattr(nestpatch, name))
    for parameter in signature.parameters.values():
        assert parameter.kind not in {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
        assert parameter.annotation is not inspect.Parameter.empty
        assert "Any" not in str(parameter.annotation)
