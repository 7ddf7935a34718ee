"""Chat templates without transformers: the same template gives the same text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from nestpatch.errors import CheckpointFormatError, MissingExtraError
from nestpatch.runtimes.text import Conversation, messages_of

_SAFE = (3, 1, 6)
"""Older versions of jinja2 let a template out of its sandbox, and templates are part of models that anyone may publish."""


def chat_renderer(template: str, tokens: Mapping[str, str]) -> Callable[[Conversation], str]:
    """Compiles a chat template.

    Args:
        template: The template of the model.
        tokens: Name of a special token, such as "bos_token" -> its text.

    Returns:
        A function: prompt or turns -> the text that the model reads, up to where its answer begins. It raises
        CheckpointFormatError when the template fails.

    Raises:
        MissingExtraError: jinja2 is missing, or too old to be safe.
        CheckpointFormatError: The template does not compile.
    """
    write = conversation_renderer(template, tokens)
    return lambda prompt: write(messages_of(prompt), True)


def conversation_renderer(template: str, given: Mapping[str, Any]) -> Callable[[Sequence[Mapping[str, str]], bool], str]:
    """Compiles a chat template for whole conversations.

    Args:
        template: The template of the model.
        given: Names that the template can use, such as "bos_token" -> their values.

    Returns:
        A function: messages of {"role", "content"}, and whether the beginning of an answer follows -> the text. It raises
        CheckpointFormatError when the template fails.

    Raises:
        MissingExtraError: jinja2 is missing, or too old to be safe.
        CheckpointFormatError: The template does not compile.
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

    def render(messages: Sequence[Mapping[str, str]], answer: bool) -> str:
        try:
            return str(compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=answer, **given))
        except Exception as error:  # a template may provoke any of Python's errors
            raise _broken(error) from error

    return render


def _broken(error: BaseException) -> CheckpointFormatError:
    return CheckpointFormatError(f"the model's chat template does not work: {error}")


def _environment() -> Any:
    """The sandbox, configured as transformers configures it."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's text for training and does not change the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """The block's content, without the block."""
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
        """A namespace that rejects names with a leading underscore: the sandbox does not check what is stored in one."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            """Stores a value; raises SecurityError for a name with a leading underscore."""
            if str(name).startswith("_"):
                raise SecurityError(f"a template may not store {name!r}")
            super().__setitem__(name, value)

    environment.filters["tojson"] = to_json
    environment.globals["namespace"] = Plain
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005
    return environment
