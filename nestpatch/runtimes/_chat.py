"""Chat templates without transformers: the same text for the same template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from nestpatch.errors import CheckpointFormatError, MissingExtraError

_SAFE = (3, 1, 6)
"""jinja2 before this lets a template out of its sandbox, and templates are part of models that anybody may publish."""


def chat_renderer(template: str, tokens: Mapping[str, str]) -> Callable[[str], str]:
    """Prompt -> what the model reads, up to where its answer begins. `tokens` are names such as "bos_token" and their texts.

    Raises MissingExtraError without a safe jinja2, CheckpointFormatError for a template that does not work.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("llama", "rendering a chat template") from error
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < _SAFE:
        raise MissingExtraError("llama", f"jinja2 {jinja2.__version__} runs chat templates unsafely; rendering one")
    try:
        compiled = _environment().from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise _broken(error) from error

    def render(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            return str(compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens))
        except Exception as error:  # a template may provoke any of Python's errors
            raise _broken(error) from error

    return render


def _broken(error: BaseException) -> CheckpointFormatError:
    return CheckpointFormatError(f"the model's chat template does not work: {error}")


def _environment() -> Any:
    """As transformers sets it up."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """`{% generation %}` marks what an assistant wrote, for training; it changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])

    class Plain(Namespace):
        """A namespace without names that mean something to Python: the sandbox does not watch what is stored in one."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a template may not store {name!r}")
            super().__setitem__(name, value)

    environment.filters["tojson"] = to_json
    environment.globals["namespace"] = Plain
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005
    return environment
