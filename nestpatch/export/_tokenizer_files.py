"""The files of a tokenizer, as any version of transformers or sentencepiece writes them, read into one form."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.export._model_config import OTHER_CONVERTER
from nestpatch.files.reading import MAX_JSON, open_regular, read_json, read_text
from nestpatch.formats.gguf.vocabulary import Kind
from nestpatch.formats.protobuf import BYTES, VARINT, Field, Wire

BPE = 2
"""The model type of a sentencepiece BPE."""
ChatTemplate: TypeAlias = str | list[dict[str, str]]


@dataclass(frozen=True)
class VocabularyPiece:
    """One entry of a sentencepiece vocabulary; its position in the list is its id."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """The fields of tokenizer.model that an exporter needs."""

    pieces: tuple[VocabularyPiece, ...]
    model_type: int
    add_dummy_prefix: bool


def read_model(path: Path) -> SentencePieceModel:
    """Reads tokenizer.model.

    Args:
        path: The file.

    Returns:
        The sentencepiece model.

    Raises:
        CheckpointFormatError: It is not a sentencepiece model, or is too long for one.
    """
    try:
        with open_regular(path, error=CheckpointFormatError) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JSON:
                raise CheckpointFormatError(f"cannot read {path}: it is too long: at most {MAX_JSON} bytes are allowed")
            return _model(Wire(file, size))
    except (ValueError, LookupError, struct.error) as error:
        raise CheckpointFormatError(f"{path} is not a sentencepiece model: {error}") from error


def _model(wire: Wire) -> SentencePieceModel:
    pieces: list[VocabularyPiece] = []
    model_type, prefix = 1, True  # the defaults of sentencepiece
    for field in wire.fields(0, wire.size):
        if field.number == 1 and field.kind == BYTES:
            pieces.append(_piece(wire, field))
        elif field.number in (2, 3) and field.kind == BYTES:
            numbers = {inner.number: inner.value for inner in wire.nested(field) if inner.kind == VARINT}
            if field.number == 2:
                model_type = numbers.get(3, 1)
            else:
                prefix = bool(numbers.get(3, 1))
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencePieceModel(tuple(pieces), model_type, prefix)


def _piece(wire: Wire, message: Field) -> VocabularyPiece:
    fields = {field.number: field for field in wire.nested(message)}
    text, score, kind = wire.text(fields[1]), 0.0, Kind.NORMAL
    if 2 in fields:
        (score,) = struct.unpack("<f", wire.content(fields[2]))
    if 3 in fields:
        kind = Kind(fields[3].value if fields[3].kind == VARINT else 0)
    return VocabularyPiece(text, score, kind)


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the raw text, before it is split."""

    content: str
    special: bool
    strips: bool = False
    """Whether white space beside it is stripped."""


@dataclass(frozen=True, eq=False)
class TokenizerFiles:
    """The content of the tokenizer's files in a model's directory."""

    folder: Path
    tokenizer: Mapping[str, Any] | None
    """tokenizer.json."""
    config: Mapping[str, Any]
    """tokenizer_config.json; missing fields are those of special_tokens_map.json."""
    model: Mapping[str, Any]
    """config.json; missing fields, such as token ids, are those of generation_config.json."""
    added: Mapping[int, AddedToken]

    def special(self, kind: str) -> tuple[str | None, int | None]:
        """Looks up a special token as the configuration files have it.

        Args:
            kind: "bos", "eos", "pad", ...

        Returns:
            (text, id), of several ids the first; None where the files do not say.
        """
        text, number = self.config.get(f"{kind}_token"), self.model.get(f"{kind}_token_id")
        text = text.get("content") if isinstance(text, dict) else text
        number = number[0] if isinstance(number, list) and number else number
        return text, number if type(number) is int and number >= 0 else None


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Reads all files of a tokenizer but the sentencepiece model.

    Args:
        folder: The model's directory.

    Returns:
        Their content; files that are missing are empty.

    Raises:
        CheckpointFormatError: A file is broken.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    config = {**(read_json(folder / "special_tokens_map.json") or {}), **(read_json(folder / "tokenizer_config.json") or {})}
    model = {**(read_json(folder / "generation_config.json") or {}), **(read_json(folder / "config.json") or {})}
    try:
        added = _added(folder, tokenizer, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointFormatError(f"the added tokens of {folder} are broken: {error!r}") from error
    return TokenizerFiles(folder, tokenizer, config, model, added)


def _added(folder: Path, tokenizer: Any, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The added tokens by id; newer kinds of files take precedence."""
    found = {int(number): AddedToken(text, False) for text, number in (read_json(folder / "added_tokens.json") or {}).items()}
    entries = list((config.get("added_tokens_decoder") or {}).items())
    entries += [(entry["id"], entry) for entry in (tokenizer or {}).get("added_tokens") or ()]
    for number, entry in entries:
        strips = bool(entry.get("lstrip") or entry.get("rstrip"))
        found[int(number)] = AddedToken(str(entry["content"]), bool(entry.get("special")), strips)
    return found


def chat_template(files: TokenizerFiles) -> ChatTemplate | None:
    """Reads the chat template. As in transformers, a .jinja file takes precedence.

    Args:
        files: The tokenizer's files.

    Returns:
        The template, or several by name; None without one.
    """
    main = files.folder / "chat_template.jinja"
    if not main.is_file():
        found = files.config.get("chat_template")
        return found if isinstance(found, (str, list)) else None
    others = sorted((files.folder / "additional_chat_templates").glob("*.jinja"))
    texts = [read_text(file, MAX_JSON, error=CheckpointFormatError) for file in (main, *others)]
    names = ["default", *(other.stem for other in others)]
    return [{"name": name, "template": text} for name, text in zip(names, texts, strict=True)] if others else texts[0]


def frame(files: TokenizerFiles) -> tuple[str | None, str | None]:
    """The tokens that the post-processor of tokenizer.json puts around every text.

    Args:
        files: The tokenizer's files.

    Returns:
        (token before the text, token after it); None where there is none.

    Raises:
        UnsupportedModelError: It adds more than a GGUF file can express.
    """
    processor = (files.tokenizer or {}).get("post_processor") or {}
    parts = processor.get("processors", [processor])
    templates = [part for part in parts if part.get("type") == "TemplateProcessing"]
    odd = [part.get("type") for part in parts if part.get("type") not in ("TemplateProcessing", "ByteLevel", None)]
    if odd or len(templates) > 1:
        raise UnsupportedModelError(
            f"a GGUF file cannot express the post-processor of {files.folder} ({', '.join(map(str, odd)) or 'templates'})",
            advice=OTHER_CONVERTER,
        )
    single = templates[0].get("single", []) if templates else []
    texts = [number for number, part in enumerate(single) if "Sequence" in part]
    names = [str(part.get("SpecialToken", {}).get("id")) for part in single]
    at = texts[0] if texts else 0
    before, after = names[:at], names[at + 1 :] if texts else []
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedModelError(
            f"the tokenizer of {files.folder} puts {before + after} around a text; a GGUF file can have one token on each side"
        )
    return (before[0] if before else None), (after[0] if after else None)
