"""How the files of a model turn a prompt into the text that the model reads, and how they want answers to be drawn.

Reads files and renders the chat template; loads no model. What packs record of their base (`ChatForm.facts`) and what is read
from a deployed model is made by the same functions, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from nestpatch.errors import CheckpointFormatError
from nestpatch.files.reading import MAX_JSON, read_json, read_text
from nestpatch.formats.gguf.header import read_arrays, read_header
from nestpatch.formats.gguf.vocabulary import TEMPLATE
from nestpatch.runtimes._chat import conversation_renderer

PROMPT, ANSWER = "What is the capital of France?", "ANSWER-OF-THE-ASSISTANT"
"""What the template is rendered with."""
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size")
"""Settings of generation_config.json that draw answers."""
STEERING = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_decoder_ids",
    "sequence_bias",
    "suppress_tokens",
)
"""Settings of generation_config.json that forbid or force tokens."""
_SPECIAL = ("bos", "eos")
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class ChatForm:
    """The chat template of a model, with what it is rendered with."""

    path: Path
    template: str | None
    """None: prompts are lines of text."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """"bos_token" and "eos_token" -> their texts."""
    generation: Mapping[str, Any] | None = None
    """The settings of SAMPLING and STEERING that the files set; None where the format has no place for them."""

    @cached_property
    def prompt(self) -> str:
        """What the model reads of PROMPT, up to where its answer begins.

        Raises:
            MissingExtraError: jinja2 is missing, or too old to be safe.
            CheckpointFormatError: The template does not work.
        """
        return self.render([{"role": "user", "content": PROMPT}], answer=True)

    def render(self, messages: Sequence[Mapping[str, str]], *, answer: bool) -> str:
        """Renders a conversation.

        Args:
            messages: {"role", "content"} each.
            answer: Whether the beginning of an answer follows.

        Returns:
            The text. Dates in it are the word DATE, so that it is the same every day.

        Raises:
            MissingExtraError: jinja2 is missing, or too old to be safe.
            CheckpointFormatError: There is no template, or it does not work.
        """
        if self.template is None:
            raise CheckpointFormatError(f"{self.path} has no chat template")
        return conversation_renderer(self.template, {**self.tokens, "strftime_now": lambda _: "DATE"})(messages, answer)

    def facts(self) -> dict[str, Any]:
        """What a pack records of its base, as plain JSON values: the digest of the template, and the text that it writes.

        Returns:
            The facts; empty without a template.

        Raises:
            MissingExtraError: jinja2 is missing, or too old to be safe.
            CheckpointFormatError: The template does not work.
        """
        if self.template is None:
            return {}
        digest = sha256(self.template.encode("utf-8")).hexdigest()
        generation = None if self.generation is None else dict(self.generation)
        return {
            "template_sha256": digest,
            "prompt": self.prompt,
            "eos_token": self.tokens.get("eos_token"),
            "generation": generation,
        }


def read_chat_form(model: Path) -> ChatForm:
    """Reads the chat template and the generation settings of a model.

    Args:
        model: A directory, a .gguf file, or another weight file with its configuration beside it.

    Returns:
        The form.

    Raises:
        CheckpointFormatError: A file cannot be read or is broken.
    """
    if model.suffix == ".gguf":
        return _of_gguf(model)
    folder = model if model.is_dir() else model.parent
    config = _object(folder / "tokenizer_config.json")
    template, own = config.get("chat_template"), folder / "chat_template.jinja"
    if own.is_file():  # as in transformers, a .jinja file takes precedence
        template = read_text(own, MAX_JSON, error=CheckpointFormatError)
    elif isinstance(template, list):
        template = next(
            (one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"), None
        )
    tokens = {f"{name}_token": _token(config.get(f"{name}_token")) for name in _SPECIAL}
    settings = _object(folder / "generation_config.json")
    chosen = {name: settings[name] for name in (*SAMPLING, *STEERING) if settings.get(name) is not None}
    known = {name: text for name, text in tokens.items() if text is not None}
    return ChatForm(model, template if isinstance(template, str) else None, known, chosen)


def _of_gguf(model: Path) -> ChatForm:
    metadata = read_header(model).metadata
    template = metadata.get(TEMPLATE)
    pieces = read_arrays(model, (_TOKENS,)).get(_TOKENS, [])
    tokens = {}
    for name in _SPECIAL:
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(number) is int and 0 <= number < len(pieces):
            tokens[f"{name}_token"] = str(pieces[number])
    return ChatForm(model, template if isinstance(template, str) else None, tokens)


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path, missing={})
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{path} is not a JSON object")
    return value


def _token(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
